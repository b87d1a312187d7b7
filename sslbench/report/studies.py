"""Studies on the report's page: the question, the answer in words, who is ahead, at what cost, and how it was tuned."""

from __future__ import annotations

from collections.abc import Callable, Container

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from ..study.budget import parse_budget
from ..study.rank import Ranking
from .figures import DASHED, GREY, STYLE, WIDTH, colour_of, name_points
from .results import Result

HOW = (
    "Each row spent the same budget. A number is top-1 accuracy in percent with its 95 % interval, over seeds and test "
    "images where it is known which images were right. Differences are of runs with the same seed; p is of the t test "
    "over seeds with the noise of a run taken from all rows (seeds as blocks; two rows: the paired t test; one seed: "
    "the exact McNemar test), after Holm over all pairs of a table. A pair is told apart where p < .05 and the "
    "interval leaves 0 out."
)

UNRANKED = "Nothing is ranked: budgets differ."
PAIRWISE = "Pairwise differences at {}, row - column; in brackets: not told apart"


def standing_figure(result: Result) -> Figure | None:
    """The ranking at the largest budget: each row with its interval, the untrained ViT dashed. None: nothing ranked."""
    if not result.rankings:
        return None
    largest = result.rankings[0]
    rows = [s for s in largest.rows if s.row != "untrained"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.7 + 0.3 * len(rows)), layout="constrained")
        axis = figure.subplots()
        for s in largest.rows:
            if s.row == "untrained":
                axis.axvline(s.value, color=GREY, linestyle="--")
        for y, s in enumerate(rows):
            if s.low is not None and s.high is not None:
                axis.plot([s.low, s.high], [y, y], "|-", color=colour_of(y))
            axis.plot(s.value, y, "o", color=colour_of(y), markerfacecolor="white" if s.control else None)
            axis.annotate(f"{s.value:.1f}", (s.value, y), (0, 5), textcoords="offset points", fontsize=8, ha="center")
        axis.set_yticks(range(len(rows)), [s.row for s in rows])
        axis.set_ylim(len(rows) - 0.5, -0.7)
        axis.set_title(f"{largest.metric} at {largest.budget}, %")
        hollow = "; hollow: a control" if any(s.control for s in rows) else ""
        dashed = DASHED if len(rows) < len(largest.rows) else ""
        figure.supxlabel(f"bar: 95 % interval{dashed}{hollow}", fontsize=9)
    return figure


def budget_figure(result: Result) -> Figure | None:
    """Accuracy against budget, a line a row with its band. None where there is one budget."""
    rankings = result.rankings[::-1]
    if len(rankings) < 2:
        return None
    amounts = [parse_budget(r.budget).amount for r in rankings]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
        axis = figure.subplots()
        ends = []
        for i, row in enumerate(_rows(result)):
            its = [(x, s) for x, r in zip(amounts, rankings, strict=True) for s in r.rows if s.row == row]
            colour = GREY if row == "untrained" else colour_of(i)
            xs, ys = [x for x, _ in its], [s.value for _, s in its]
            axis.plot(xs, ys, "--" if row == "untrained" else "o-", color=colour, markersize=4)
            band = [(s.low, s.high) for _, s in its if s.low is not None and s.high is not None]
            if len(band) == len(its):
                low, high = np.transpose(band)
                axis.fill_between(xs, low, high, color=colour, alpha=0.12, linewidth=0)
            ends.append((xs[-1], ys[-1], row, colour))
        axis.set_xscale("log")
        axis.set_xticks(amounts, [r.budget for r in rankings])
        axis.minorticks_off()
        axis.set_title(f"{rankings[0].metric}, %")
        figure.supxlabel("budget; band: 95 % interval", fontsize=9)
        figure.draw_without_rendering()
        name_points(axis, ends)
    return figure


def watch_figure(result: Result) -> Figure | None:
    """k-NN on a part of train while the runs of the largest budget went on, mean over seeds. None: nothing kept."""
    largest = result.rankings[0].budget if result.rankings else ""
    curves: dict[str, list[list[list[float]]]] = {}
    for c in result.record["cells"]:
        if c.get("watched") and c["budget"] in (largest, ""):
            curves.setdefault(c["row"], []).append(c["watched"])
    if not curves:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
        axis = figure.subplots()
        ends = []
        for i, row in enumerate(_rows(result)):
            if row not in curves:
                continue
            shares = sorted({x for curve in curves[row] for x, _ in curve})
            mean = [float(np.mean([_at(x, curve) for curve in curves[row]])) for x in shares]
            axis.plot(shares, mean, "o-", color=colour_of(i), markersize=3)
            ends.append((shares[-1], mean[-1], row, colour_of(i)))
        axis.set_xlim(0, 1)
        axis.set_title("k-NN on a held-out part of train, %")
        figure.supxlabel(f"share of the run, {largest}".rstrip(", "), fontsize=9)
        figure.draw_without_rendering()
        name_points(axis, ends)
    return figure


def _at(x: float, curve: list[list[float]]) -> float:
    return float(np.interp(x, [share for share, _ in curve], [value for _, value in curve]))


FIGURES: dict[str, tuple[Callable[[Result], Figure | None], str]] = {
    "standing": (standing_figure, "Who is ahead"),
    "budget": (budget_figure, "Accuracy against budget"),
    "watch": (watch_figure, "Accuracy while training"),
}


def _rows(result: Result) -> list[str]:
    """Every row, in the order of the largest budget's ranking."""
    return list(dict.fromkeys(s.row for r in result.rankings for s in r.rows))


# Tables as (header, rows) of text.
Grid = tuple[list[str], list[list[str]]]


def standings(r: Ranking, beside: dict[str, dict[str, str]]) -> Grid:
    """The ranked table: the main metric, differences to the first and to each control, what else was measured."""
    controls = [s.row for s in r.rows if s.control]
    first = r.rows[0].row
    others = more(r, beside)
    header = ["", "row", r.metric, "- first", *(f"- {c}" for c in controls), *others]
    lines = []
    for place, s in enumerate(r.rows, 1):
        differences = [str(d) if (d := r.between(s.row, other)) else "" for other in (first, *controls)]
        numbers = [beside.get(s.row, {}).get(m, "") for m in others]
        lines.append([str(place), s.row, str(s), *differences, *numbers])
    return header, lines


def more(r: Ranking, beside: dict[str, dict[str, str]]) -> list[str]:
    """The metrics that were measured beside the main one."""
    return list(dict.fromkeys(m for s in r.rows for m in beside.get(s.row, {})))


def compared(r: Ranking) -> list[str]:
    """Whom the ranked table compares each row with: the first, then the controls."""
    return list(dict.fromkeys([r.rows[0].row, *(s.row for s in r.rows if s.control)]))


def sources(result: Result, known: Container[str]) -> dict[tuple[str, str, str], list[str]]:
    """(row, budget as it is ranked, metric) -> the ids of the records behind the number, those that are known."""
    ids: dict[tuple[str, str, str], list[str]] = {}
    for budget, rows in result.beside.items():
        for c in result.record["cells"]:
            if c["row"] not in rows or c["budget"] not in (budget, ""):
                continue
            for metric, id in c["numbers"].items():
                if id in known:
                    ids.setdefault((c["row"], budget, metric), []).append(id)
    return ids


def matrix(r: Ranking) -> Grid:
    """Every pairwise difference, row minus column; in brackets where it cannot be told from nothing."""
    names = [s.row for s in r.rows]
    lines = []
    for a in names:
        cells = []
        for b in names:
            d = r.between(a, b)
            cells.append("" if d is None else str(d) if d.told_apart else f"({d})")
        lines.append([a, *cells])
    return ["", *names], lines


def spent(result: Result) -> Grid:
    """What each row and budget cost."""
    header = ["row", "budget", "epochs", "steps", "TFLOP", "device s", "seeds"]

    def said(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    lines = [
        [s["row"], s["budget"], said(s["epochs"], ".4g"), said(s["steps"], ","), said(s["TFLOP"], ",.1f"),
         said(s["device_s"], ",.0f"), str(s["seeds"])]
        for s in result.spent
    ]  # fmt: skip
    return header, lines


def words(result: Result) -> list[tuple[str, str]]:
    """[(what, text)] that open a study."""
    said = [("Question", result.study.question), ("Would answer it", result.study.answer)]
    said += [("Answer", r.sentence) for r in result.rankings] or [("Answer", UNRANKED)]
    return [(what, text) for what, text in said if text]


def finding(result: Result) -> str:
    """The answer in short: what is said first at the largest budget, who is ahead of whom."""
    return result.rankings[0].sentence.split("; ")[0].rstrip(".") + "." if result.rankings else UNRANKED


def notes(result: Result) -> list[str]:
    """How it was tuned, and what went wrong."""
    failed = [f"Failed: {'; '.join(result.failed)}."] if result.failed else []
    return [*failed, *result.notes]


def markdown(result: Result, figures: list[str], grid: Callable[[list[str], list[list[str]]], str]) -> list[str]:
    """The parts of a study; figures: paths of pictures."""
    parts = [f"## Study: {result.name}", *(f"**{what}.** {text}" for what, text in words(result))]
    for r in result.rankings:
        parts += [f"### {r.budget}", grid(*standings(r, result.beside[r.budget]))]
    parts += [f"![{path}]({path})" for path in figures]
    for r in result.rankings:
        parts += [
            f"### {PAIRWISE.format(r.budget)}",
            grid(*matrix(r)),
        ]
    return [*parts, "### What it cost", grid(*spent(result)), *notes(result)]
