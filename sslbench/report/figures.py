"""Pictures of the tables, with matplotlib; the same ledger draws the same bytes."""

from __future__ import annotations

import io
import math
import textwrap
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
import scipy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, Formatter, NullLocator

from .tables import Row, Table

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
GREY = "#777777"
WIDTH = 4.6  # inches: on a phone 390 pixels wide, type keeps four fifths of its size
LINE = 0.16  # inches that a line of a label takes
BACKING = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0}
DASHED = "; dashed: untrained"
STYLE: Any = {
    "svg.hashsalt": "sslbench",
    "svg.fonttype": "none",
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def accuracy(table: Table) -> Figure | None:
    """A panel a protocol: each method's accuracy with its interval, the untrained ViT as a line."""
    rows = table.trained
    if not rows:
        return None
    columns = _measured(table, rows)
    labels = [label_of(row) for row in rows]
    tall = 0.15 + LINE * max(label.count("\n") + 1 for label in labels)
    across = min(2, len(columns))
    down = -(-len(columns) // across)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.5 + down * (0.45 + tall * len(rows))), layout="constrained")
        panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).ravel()
        for axis, column in zip(panels, columns, strict=False):
            _untrained(axis, table, column, axis.axvline, axis.axvspan)
            for y, row in enumerate(rows):
                if cell := row.cells.get(column):
                    axis.errorbar(cell.value, y, xerr=cell.half, fmt="o", color=colour_of(y), capsize=3)
                    axis.annotate(f"{cell.value:.1f}", (cell.value, y), (0, 4), textcoords="offset points",
                                  ha="center", fontsize=8, bbox=BACKING, zorder=1.5)  # fmt: skip
            axis.set_title(_plain(column))
        panels[0].set_yticks(range(len(rows)), labels)
        panels[0].set_ylim(len(rows) - 0.4, -0.8)
        panels[0].margins(x=0.12)
        for axis in panels[len(columns) :]:
            axis.set_axis_off()
        figure.supxlabel(f"top-1, %; bar and band: 95 % interval{DASHED * bool(table.base)}", fontsize=9)
    return figure


def compute(table: Table) -> Figure | None:
    """A panel a protocol: accuracy against the cost of pre-training. None where no cost is known.

    The cost is FLOPs if every method's were counted, else seconds: the two never share an axis.
    """
    rows = [row for row in table.trained if row.wall_s()]
    if not rows:
        return None
    columns = _measured(table, rows)
    counted = all(row.flops() for row in rows)
    costs = [(row.flops() if counted else row.wall_s()) or 1.0 for row in rows]
    with mpl.rc_context(STYLE):
        tall = 0.45 + max(0.9, LINE * sum(label_of(row).count("\n") + 1 for row in rows))
        figure = Figure(figsize=(WIDTH, 0.4 + len(columns) * tall), layout="constrained")
        panels = figure.subplots(len(columns), 1, sharex=True, squeeze=False)[:, 0]
        for axis, column in zip(panels, columns, strict=True):
            _untrained(axis, table, column, axis.axhline, axis.axhspan)
            for i, (row, cost) in enumerate(zip(rows, costs, strict=True)):
                if cell := row.cells.get(column):
                    axis.errorbar(cost, cell.value, yerr=cell.half, fmt="o", capsize=3, color=colour_of(i))
            axis.margins(y=0.1)
            log_costs(axis, costs, EngFormatter())
            axis.set_title(f"{_plain(column)}, %")
        unit = "FLOP" if counted else "seconds"
        figure.supxlabel(f"{unit} of pre-training{DASHED * bool(table.base)}", fontsize=9)
        figure.draw_without_rendering()  # lays the panels out: their heights are known from here
        for axis, column in zip(panels, columns, strict=True):
            marks = zip(rows, costs, map(colour_of, range(len(rows))), strict=True)
            name_points(axis, [(x, r.cells[column].value, label_of(r), c) for r, x, c in marks if column in r.cells])
    return figure


def name_points(axis: Axes, points: list[tuple[float, float, str, str]]) -> None:
    """Labels in the right margin of a figure whose layout is known, in the points' order, each tied to its point: near
    points stay legible. points: (x, y, label, colour).
    """
    shown = sorted(points, key=lambda p: (p[1], p[2]))
    low, high = axis.get_ylim()
    inches = axis.bbox.height / axis.figure.dpi
    heights = [LINE / inches * (label.count("\n") + 1) for _, _, label, _ in shown]
    centres = _spread([(y - low) / (high - low) for _, y, _, _ in shown], heights, -0.05, 1.05)
    for (x, value, label, colour), y in zip(shown, centres, strict=True):
        axis.annotate(label, (x, value), (1.04, y), xycoords="data", textcoords="axes fraction",
                      va="center", fontsize=9, color="#222222", linespacing=0.95, zorder=1,
                      arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4,
                                  "relpos": (0, 0.5)})  # fmt: skip


def _spread(wanted: list[float], heights: list[float], low: float, high: float) -> list[float]:
    """Centres of labels that do not overlap, as near to `wanted` (ascending) as can be, within low..high if they fit.

    With the labels below subtracted, not to overlap is not to descend: the nearest is an isotonic regression.
    """
    below = np.cumsum([0.0, *((a + b) / 2 for a, b in pairwise(heights))])
    level = scipy.optimize.isotonic_regression(np.asarray(wanted) - below).x
    level = np.clip(level, low + heights[0] / 2, high - heights[-1] / 2 - below[-1])
    return [float(y) for y in level + below]


def _measured(table: Table, rows: list[Row]) -> list[str]:
    """The columns to draw: those in which rows can be compared, or, where there are none, all that hold something."""
    held = {c: sum(c in row.cells for row in rows) for c in table.columns}
    most = min(2, max(held.values(), default=0))
    return [c for c, n in held.items() if n and n >= most]


def _untrained(axis: Axes, table: Table, column: str, line: Any, span: Any) -> None:
    if table.base and (cell := table.base.cells.get(column)):
        line(cell.value, color=GREY, linestyle="--", linewidth=1.2, zorder=1)
        if cell.half:
            span(cell.value - cell.half, cell.value + cell.half, color=GREY, alpha=0.15, linewidth=0, zorder=0)


def log_costs(axis: Axes, costs: list[float], formatter: Formatter) -> None:
    """The x axis of costs: logarithmic, with a label on either side of them."""
    ticks = _ticks(costs)
    axis.set_xscale("log")
    axis.set_xlim(ticks[0], ticks[-1])
    axis.set_xticks(ticks if len(ticks) <= 6 else [t for t in ticks if math.log10(t).is_integer()])
    axis.xaxis.set_major_formatter(formatter)
    axis.xaxis.set_minor_locator(NullLocator())


def _ticks(costs: list[float]) -> list[float]:
    """1, 2 and 5 of each power of ten, from the last well below the costs to the first well above."""
    steps = [m * 10.0**e for e in range(math.floor(math.log10(min(costs))) - 1, math.ceil(math.log10(max(costs))) + 2)
             for m in (1, 2, 5)]  # fmt: skip
    below = max(s for s in steps if s < 0.9 * min(costs))
    above = min(s for s in steps if s > 1.1 * max(costs))
    return [s for s in steps if below <= s <= above]


def colour_of(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def label_of(row: Row) -> str:
    """The row's label in lines of at most 18 letters."""
    return wrapped(row.label)


def wrapped(label: str) -> str:
    return _plain("\n".join(textwrap.wrap(label, 18)))


def _plain(text: str) -> str:
    """A dollar sign is not the start of a formula."""
    return text.replace("$", r"\$")


def picture(figure: Figure, format: str) -> bytes:
    """The figure as `svg` or `png`, without a date or anything else that differs from run to run."""
    buffer = io.BytesIO()
    nothing = ("Date", "Creator", "Format", "Type") if format == "svg" else ("Software",)
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format=format, dpi=160, metadata=dict.fromkeys(nothing))
    return buffer.getvalue()
