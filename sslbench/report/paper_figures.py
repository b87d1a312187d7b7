"""The papers' figures: what they print, what was measured, and, where nothing was, the command that measures it.

Beside the ledger and the papers' tables, these read the run folders that the ledger names, where they are still there:
metrics.jsonl for curves, inspect/ for what `sslbench inspect` found; of public weights, results/inspect/.
"""

from __future__ import annotations

import json
import textwrap
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from ..paths import home, inspected
from ..study.printed import read_paper
from ..study.tables import paper_rows
from ..train.meter import read_metrics
from ..vit import find_arch, parameters_of
from .figures import GREY, STYLE, WIDTH, colour_of, label_of, log_costs, name_points
from .tables import Cell, Row, Table

PANEL = 1.9  # inches, the height of a panel
POINTS = 200  # of a curve, at most
Lines = list[list[tuple[float, float]]]  # (epoch, value), a run a line
Point = tuple[float, float, str, str]  # x, y, label, colour


@dataclass
class PaperFigure:
    """A figure of a paper, drawn from numbers. `figure` is None where there is nothing to draw."""

    name: str  # of its files
    title: str
    caption: str
    figure: Figure | None
    missing: list[str]  # what to run for what is not measured; [] where nothing is missing
    pictures: dict[str, bytes] = field(default_factory=dict)  # of runs, as PNG, by method


def paper_figures(all_tables: list[Table]) -> list[PaperFigure]:
    """Every figure of the papers that shows results, drawn or not."""
    with mpl.rc_context(STYLE):
        return [draw(all_tables) for draw in (_ocl_3, _asl_1, _ccmim_2, _ccmim_3, _macrl_3)]


def curves(table: Table) -> Figure | None:
    """The loss of every run whose folder is still there, a panel a method: losses of two methods do not compare."""
    lines_of = {label_of(row): lines for row in table.trained if (lines := _lines(row, "loss"))}
    if not lines_of:
        return None
    with mpl.rc_context(STYLE):
        figure, panels = _stack([1.3] * -(-len(lines_of) // 2), across=2)
        for axis, (label, lines) in zip(panels, lines_of.items(), strict=False):
            _draw_lines(axis, lines, colour_of(0))
            axis.set_title(label)
        for axis in panels[len(lines_of) :]:
            axis.set_axis_off()
        figure.supxlabel("loss by epoch; a line a seed", fontsize=9)
    return figure


# ----------------------------------------------------------------------------------------------------- figure by figure


def _ocl_3(all_tables: list[Table]) -> PaperFigure:
    printed: dict[tuple[float, float], str] = {}
    for name in ("ocl_t3", "ocl_t4"):
        for _, group in read_paper(name).groupby("row", sort=False):
            value = group.set_index("metric")["value"]
            head = group["condition"].iloc[0].partition("mlp_head=")[2].partition(";")[0]
            words = f"batch {value['batch_size']}" + (f",\n{head} MLP" if head not in ("", "w/o") else "")
            printed.setdefault((float(value["pretrain_hours"]), float(value["linprobe_top1"])), words)
    measured = [t for t in all_tables if _linear(t) and any(row.device_s() for row in t.trained)]
    figure, panels = _stack([PANEL + 0.4] + [PANEL] * len(measured))
    for (hours, top1), _ in printed.items():
        panels[0].scatter(hours, top1, s=_area("vit_l16"), facecolor="none", edgecolor=GREY)
    panels[0].margins(0.12, 0.15)
    _title(panels[0], "printed: OCL, ViT-L, ImageNet-1K, linear; A100 hours")
    named: list[list[Point]] = [[(*at, words, GREY) for at, words in printed.items()]]
    for axis, table in zip(panels[1:], measured, strict=True):
        points: list[Point] = []
        for i, row in enumerate(table.trained):
            if (cell := row.cells.get(_linear(table))) and (seconds := row.device_s()):
                axis.errorbar(seconds / 3600, cell.value, yerr=cell.half, fmt="none", ecolor=colour_of(i), capsize=3)
                axis.scatter(seconds / 3600, cell.value, s=_area(table.key[4]), color=colour_of(i))
                points.append((seconds / 3600, cell.value, label_of(row), colour_of(i)))
        log_costs(axis, [x for x, *_ in points], StrMethodFormatter("{x:g}"))
        axis.margins(y=0.15)
        _title(axis, f"measured: {table.title}, {_linear(table)}; {', '.join(_devices(table))}")
        named.append(points)
    rows, command = {r.hash() for r in paper_rows("ocl_t3").values()}, "sslbench ablate ocl_t3 --scale paper"
    figure.supxlabel("device hours of pre-training; area: parameters; y: top-1, %", fontsize=9)
    _name(figure, panels, named)
    return PaperFigure(
        "ocl_fig3",
        "OCL, Figure 3: device hours against linear accuracy",
        "The paper draws MAE, I-JEPA and MoCo v3 too, and prints no hours of theirs: open circles are what Tables 3 "
        "and 4 print. Hours on two kinds of machine, or accuracies on two data sets, share no axis.",
        figure,
        [] if rows & {row.first.pretrain.recipe_hash for t in measured for row in t.trained} else [command],
    )


def _asl_1(all_tables: list[Table]) -> PaperFigure:
    points_of: dict[str, list[Point]] = defaultdict(list)
    for table in all_tables:
        for i, row in enumerate(table.trained):
            seen = [x for f in _inspected(row) if (x := _token_similarity(f / "inspect.json")) is not None]
            if seen and (cell := row.cells.get(_linear(table))):
                alike = sum(seen) / len(seen)
                points_of[f"{table.title}, {_linear(table)}"].append((alike, cell.value, label_of(row), colour_of(i)))
    frame = read_paper("ccmim_t1")
    frame = frame[(frame["metric"] == "linprobe_top1") & (frame["value"] != "")]
    printed = {m: float(v) for m, v in zip(frame["method"], frame["value"], strict=True) if m in ASL_1}  # the longest
    figure, panels = _stack([1.5] + [PANEL] * len(points_of))
    lines: list[Point] = [(1, v, f"{m} {v:g}", colour_of(i)) for i, (m, v) in enumerate(sorted(printed.items()))]
    for _, value, _, colour in lines:
        panels[0].axhline(value, color=colour, linewidth=1)
    panels[0].set_xlim(0, 1)
    panels[0].set_xticks([])
    panels[0].margins(y=0.12)
    _title(panels[0], "printed: linear accuracy of ViT-B on ImageNet-1K")
    for axis, (title, points) in zip(panels[1:], points_of.items(), strict=True):
        for x, y, _, colour in points:
            axis.plot(x, y, "o", color=colour)
        _title(axis, f"measured: {title}")
        axis.margins(0.15, 0.15)
    figure.supxlabel("token similarity: mean cosine of an image's patches; y: top-1, %", fontsize=9)
    _name(figure, panels, [lines, *points_of.values()])
    return PaperFigure(
        "asl_fig1",
        "ASL, Figure 1: token similarity against linear accuracy",
        "The paper draws how similar each model's tokens are and prints no number of it. The linear accuracies are "
        "those of ccMIM's Table 1, the longest training of each method.",
        figure,
        [] if points_of else ["sslbench inspect runs/RUN", "sslbench inspect timm:vit_base_patch16_224.mae"],
    )


def _token_similarity(path: Path) -> float | None:
    """What `sslbench inspect` found; None where it did not look, or the file is not what it writes."""
    try:
        return float(json.loads(path.read_text())["token_similarity"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


ASL_1 = ("mae", "ccmim", "DINO", "iBOT")  # of the models that its text names as drawn, those with a printed accuracy


def _ccmim_2(all_tables: list[Table]) -> PaperFigure:
    sweeps = _ccmim_rows(all_tables, "contrast_weight", 0.2)
    titles = list(dict.fromkeys(title for title, _ in sweeps))
    figure, panels = _stack([PANEL if titles else 1.0] * max(1, len(titles)))
    for axis, title in zip(panels, titles, strict=False):
        of_title = [(others, points) for (t, others), points in sweeps.items() if t == title]
        for i, (others, points) in enumerate(of_title):
            xs, cells = zip(*sorted(points, key=lambda p: p[0]), strict=True)
            axis.errorbar(xs, [c.value for c in cells], yerr=[c.half or 0 for c in cells], fmt="o-", capsize=3,
                          color=colour_of(i), label=others)  # fmt: skip
        _title(axis, f"measured: {title}")
        axis.margins(y=0.15)
        if len(of_title) > 1:
            axis.legend(fontsize=8, frameon=False)
    for axis in panels:
        axis.axvline(0.2, color=GREY, linestyle="--", linewidth=1, zorder=1)
        axis.axvspan(0.8, 1.0, color=GREY, alpha=0.15, linewidth=0)
        axis.set_xlim(-0.03, 1.03)
    if not titles:
        panels[0].text(
            0.5, 0.5, "accuracy: neither printed\nnor measured", ha="center", va="center", color=GREY, fontsize=9
        )
        panels[0].set_yticks([])
    figure.supxlabel("lambda, the weight of the contrast; y: linear top-1, %", fontsize=9)
    swept = any(len(points) > 1 for points in sweeps.values())
    return PaperFigure(
        "ccmim_fig2",
        "ccMIM, Figure 2: the weight of the contrast",
        "The paper prints no accuracy of this figure, but in words: best at 0.2 (dashed), with NCE below MAE above 0.8 "
        "(shaded)." + (" Measured at one weight only." if titles and not swept else ""),
        figure,
        [] if swept else ["sslbench ablate ccmim_f2 --scale tiny", "sslbench ablate ccmim_f2 --scale paper"],
    )


def _ccmim_3(all_tables: list[Table]) -> PaperFigure:
    frame = read_paper("ccmim_t5")
    frame = frame[frame["metric"] == "linprobe_top1"]
    sweeps = _ccmim_rows(all_tables, "divide", "importance_sampling")
    measured = {key: points for key, points in sweeps.items() if len({x for x, _ in points}) > 1}
    losses = [(t, lines) for t in all_tables if len(lines := _recon(t)) > 1]
    figure, panels = _stack([PANEL] * (1 + len(measured) + len(losses)))
    ways = list(dict.fromkeys(c.partition("=")[2] for c in frame["condition"]))
    for i, (epochs, lines) in enumerate(frame.groupby("epochs", sort=False)):
        at = [j + (i - 0.5) * 0.4 for j in range(len(ways))]
        bars = panels[0].bar(at, lines["value"].astype(float), 0.38, color="none", edgecolor=colour_of(i), hatch="///",
                             label=f"{epochs} epochs")  # fmt: skip
        panels[0].bar_label(bars, list(lines["value"]), fontsize=8)
    panels[0].set_xticks(range(len(ways)), [w.replace(" ", "\n") for w in ways], fontsize=8)
    panels[0].set_ylim(0, 85)
    panels[0].legend(fontsize=8, frameon=False, ncols=2, loc="upper left")
    _title(panels[0], "printed: linear accuracy by division (Table 5), %")
    for axis, ((title, others), points) in zip(panels[1:], measured.items(), strict=False):
        for j, cell in enumerate(cell for _, cell in points):
            axis.errorbar(j, cell.value, yerr=cell.half, fmt="o", capsize=3, color=colour_of(0))
            axis.annotate(f"{cell.value:.1f}", (j, cell.value), (6, 0), textcoords="offset points", fontsize=8)
        axis.set_xticks(range(len(points)), [w.replace("_", "\n") for w, _ in points], fontsize=8)
        axis.margins(0.15, 0.15)
        _title(axis, f"measured: {title}, {others}, linear, %")
    for axis, (table, by_method) in zip(panels[1 + len(measured) :], losses, strict=False):
        for i, (label, of_runs) in enumerate(by_method.items()):
            _draw_lines(axis, of_runs, colour_of(i), label)
        axis.legend(fontsize=8, frameon=False)
        _title(axis, f"measured: reconstruction loss by epoch, {table.key[4]} on {table.key[3]}")
    missing = [] if measured else ["sslbench ablate ccmim_t5 --scale tiny", "sslbench ablate ccmim_t5 --scale paper"]
    missing += [] if losses else [f"sslbench pretrain {m} --data builtin" for m in ("ccmim", "mae")]
    said = "" if losses else " No run folder of both is here, so no curve."
    return PaperFigure(
        "ccmim_fig3",
        "ccMIM, Figure 3: how patches are divided, and the reconstruction loss",
        "Hatched: printed. In words the paper says that in the first 50 epochs ccMIM's reconstruction loss is above "
        f"MAE's; it prints no value.{said} `sslbench inspect` draws the division.",
        figure,
        missing,
    )


def _macrl_3(all_tables: list[Table]) -> PaperFigure:
    pictures: dict[str, bytes] = {}
    for row in (row for table in all_tables for row in table.trained if row.method in ("macrl", "mae", "mocov3")):
        for folder in _inspected(row):
            if (path := folder / "inspect.png").is_file():
                pictures.setdefault(row.method, path.read_bytes())
    below = f" Top to bottom: {', '.join(sorted(pictures))}." if pictures else ""
    return PaperFigure(
        "macrl_fig3",
        "MACRL, Figure 3: attention of MAE, MoCo and MACRL",
        "The paper shows the relevance of Chefer, Gur and Wolf (2021): the column of that name in what "
        f"`sslbench inspect` draws.{below}",
        None,
        [] if pictures else ["sslbench inspect runs/RUN"],
        dict(sorted(pictures.items())),
    )


# --------------------------------------------------------------------------------------------------------------- parts


def _stack(heights: list[float], across: int = 1) -> tuple[Figure, list[Axes]]:
    """Panels of so many inches, one above the other."""
    figure = Figure(figsize=(WIDTH, 0.4 + sum(heights)), layout="constrained")
    return figure, list(figure.subplots(len(heights), across, squeeze=False, height_ratios=heights).ravel())


def _title(axis: Axes, words: str) -> None:
    axis.set_title("\n".join(textwrap.wrap(words, 58)), fontsize=9)


def _name(figure: Figure, panels: list[Axes], named: list[list[Point]]) -> None:
    figure.draw_without_rendering()  # lays the panels out: their heights are known from here
    for axis, points in zip(panels, named, strict=True):
        if points:
            name_points(axis, points)


def _linear(table: Table) -> str:
    """The column of linear accuracies that most methods have; of several, CLS."""
    held = {c: sum(c in row.cells for row in table.trained) for c in table.columns if c.startswith("lin")}
    return max(held, key=lambda c: held[c]) if any(held.values()) else ""


def _devices(table: Table) -> list[str]:
    cells = [cell for row in table.trained for cell in row.cells.values()]
    return sorted({str(r.hardware.get("device")) for cell in cells for r in cell.records})


def _area(arch: str) -> float:
    """A bubble's area grows with the root of the parameters, of which ViT-L has 300 times those of the smallest."""
    return 0.024 * (parameters_of(arch) if find_arch(arch) else 1e6) ** 0.5


def _folders(row: Row) -> list[Path]:
    """Run folders behind a row, seed by seed, that are here."""
    names = sorted({r.pretrain.run for cell in row.cells.values() for r in cell.records if r.pretrain.run})
    return [path for name in names if (path := home() / "runs" / name).is_dir()]


def _inspected(row: Row) -> list[Path]:
    """What `sslbench inspect` may have written of a row: of its runs, or of the public weights that it is."""
    of_public = {r.weights_sha256: None for cell in row.cells.values() for r in cell.records if r.public}
    return [*(folder / "inspect" for folder in _folders(row)), *(inspected(weights) for weights in of_public)]


def _lines(row: Row, what: str) -> Lines:
    """Read the value called `what` from each run's metrics.jsonl, at most POINTS of them."""
    out = []
    for path in (folder / "metrics.jsonl" for folder in _folders(row)):
        steps = read_metrics(path)
        points = [(s["epoch"], s[what]) for s in steps if what in s and "epoch" in s]
        if len(points) > 1:
            out.append(points[:: -(-len(points) // POINTS)])
    return out


def _draw_lines(axis: Axes, lines: Lines, colour: str, label: str = "") -> None:
    for i, line in enumerate(lines):
        axis.plot(*zip(*line, strict=True), color=colour, linewidth=1, alpha=0.7, label=label if i == 0 else None)


def _recon(table: Table) -> dict[str, Lines]:
    """Return the reconstruction loss over training of ccMIM, and of MAE, whose whole loss it is."""
    terms = {"ccmim": "recon", "mae": "loss"}
    lines_of = {label_of(row): _lines(row, terms[row.method]) for row in table.trained if row.method in terms}
    return {label: lines for label, lines in lines_of.items() if lines}


def _ccmim_rows(all_tables: list[Table], key: str, default: Any) -> dict[tuple[str, str], list[tuple[Any, Cell]]]:
    """(table, all other settings) -> (value of that setting, linear accuracy) of ccMIM's rows.

    A record's preset says what its recipe sets otherwise, as `paper+contrast_weight=0.1`.
    """
    points_of: dict[tuple[str, str], list[tuple[Any, Cell]]] = defaultdict(list)
    for table in all_tables:
        for row in table.trained:
            if row.method != "ccmim" or not (cell := row.cells.get(_linear(table))):
                continue
            settings = dict(part.split("=", 1) for part in (row.first.preset or "").split("+")[1:])
            value = type(default)(settings.pop(key, default))
            others = ", ".join([*(f"{k}={v}" for k, v in settings.items()), f"{row.first.pretrain.epochs or 0:g} ep"])
            points_of[table.title, others].append((value, cell))
    return points_of
