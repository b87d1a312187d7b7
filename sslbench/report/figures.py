"""Pictures of the tables, with matplotlib; the same ledger draws the same bytes."""

from __future__ import annotations

import io
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from .tables import UNTRAINED, Table

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
STYLE: Any = {
    "svg.hashsalt": "sslbench",
    "svg.fonttype": "none",
    "font.size": 11,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def accuracy(table: Table) -> Figure:
    """A panel a protocol: each method's accuracy with its interval, the untrained ViT as a line."""
    trained = [row for row in table.rows if row.method != UNTRAINED]
    base = next((row for row in table.rows if row.method == UNTRAINED), None)
    with mpl.rc_context(STYLE):
        n = len(table.columns)
        figure = Figure(figsize=(6.4, 0.9 + n * (0.45 + 0.32 * len(trained))), layout="constrained")
        panels = figure.subplots(n, 1, sharex=True, squeeze=False)[:, 0]
        for axis, column in zip(panels, table.columns, strict=True):
            for y, row in enumerate(trained):
                if cell := row.cells.get(column):
                    colour = COLOURS[y % len(COLOURS)]
                    axis.errorbar(cell.value, y, xerr=cell.half, fmt="o", color=colour, capsize=3)
                    axis.annotate(
                        f"{cell.value:.1f}",
                        (cell.value, y),
                        (0, 5),
                        textcoords="offset points",
                        ha="center",
                        fontsize=9,
                    )
            if base and (cell := base.cells.get(column)):
                axis.axvline(cell.value, color="#777777", linestyle="--", linewidth=1.2)
                axis.axvspan(cell.value - cell.half, cell.value + cell.half, color="#777777", alpha=0.15, linewidth=0)
            axis.set_yticks(range(len(trained)), [row.label for row in trained])
            axis.set_ylim(len(trained) - 0.4, -0.8)
            axis.set_title(column, loc="left", fontsize=11, pad=3)
        panels[-1].set_xlabel("top-1 accuracy, %   (dashed: untrained ViT; bars and band: 95 % interval)")
    return figure


def compute(table: Table) -> Figure | None:
    """Accuracy against the FLOPs of pre-training, a line a protocol; None where no cost was measured."""
    points = [row for row in table.rows if row.method != UNTRAINED and row.first.cost.flops]
    if not points:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axis = figure.subplots()
        column = table.columns[0]
        for i, row in enumerate(points):
            if cell := row.cells.get(column):
                x = (row.first.cost.flops or 0) / 1e12
                axis.errorbar(x, cell.value, yerr=cell.half, fmt="o", capsize=3, color=COLOURS[i % len(COLOURS)])
                axis.annotate(row.label, (x, cell.value), (8, 4), textcoords="offset points")
        base = next((row.cells.get(column) for row in table.rows if row.method == UNTRAINED), None)
        if base:
            axis.axhline(base.value, color="#777777", linestyle="--", linewidth=1.2)
            axis.annotate("untrained ViT", (0.99, base.value), (0, 4), xycoords=("axes fraction", "data"),
                          textcoords="offset points", ha="right", color="#555555", fontsize=9)  # fmt: skip
        axis.set_xlim(0, 1.25 * max((row.first.cost.flops or 0) / 1e12 for row in points))
        axis.margins(y=0.2)
        axis.set_xlabel("TFLOP of pre-training")
        axis.set_ylabel(f"{column}: top-1, %")
    return figure


def picture(figure: Figure, format: str) -> bytes:
    """The figure as `svg` or `png`, without a date."""
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        metadata = {"Date": None} if format == "svg" else {"Software": None}
        figure.savefig(buffer, format=format, dpi=160, metadata=metadata)
    return buffer.getvalue()
