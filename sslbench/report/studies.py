"""Studies on the report's page: the question, the answer in words, who is ahead, at what cost, and how it was tuned."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from ..study.budget import parse_budget
from ..study.rank import Ranking
from .figures import GREY, STYLE, WIDTH, colour_of, name_points
from .results import Result

HOW = (
    "Each row spent the same budget. A number is top-1 accuracy in percent with its 95 % interval, over seeds and test "
    "images where it is known which images were right. Differences are of runs with the same seed; p is of the t test "
    "over seeds with the noise of a run taken from all rows (seeds as blocks; two rows: the paired t test; one seed: "
    "the exact McNemar test), after Holm over all pairs of a table. A pair is told apart where p < .05 and the "
    "interval leaves 0 out."
)

PAIRWISE = "Pairwise differences at {}, row - column; in brackets: not told apart"


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
    "budget": (budget_figure, "Accuracy against budget"),
    "watch": (watch_figure, "Accuracy while training"),
}


def _rows(result: Result) -> list[str]:
    """Every row, in the order of the largest budget's ranking."""
    return list(dict.fromkeys(s.row for r in result.rankings for s in r.rows))


# Tables as (header, rows) of text, which both formats share.
Grid = tuple[list[str], list[list[str]]]


def standings(r: Ranking, beside: dict[str, dict[str, str]]) -> Grid:
    """The ranked table: the main metric, differences to the first and to each control, what else was measured."""
    controls = [s.row for s in r.rows if s.control]
    first = r.rows[0].row
    more = list(dict.fromkeys(m for s in r.rows for m in beside.get(s.row, {})))
    header = ["", "row", r.metric, "- first", *(f"- {c}" for c in controls), *more]
    lines = []
    for place, s in enumerate(r.rows, 1):
        differences = [str(d) if (d := r.between(s.row, other)) else "" for other in (first, *controls)]
        numbers = [beside.get(s.row, {}).get(m, "") for m in more]
        lines.append([str(place), s.row, str(s), *differences, *numbers])
    return header, lines


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
    said += [("Answer", r.sentence) for r in result.rankings] or [("Answer", "Nothing is ranked: budgets differ.")]
    return [(what, text) for what, text in said if text]


def notes(result: Result) -> list[str]:
    """How it was tuned, and what went wrong."""
    failed = [f"Failed: {'; '.join(result.failed)}."] if result.failed else []
    return [*failed, *result.notes]


# ------------------------------------------------------------------------------------------------------------ formats


def html(result: Result, figures: dict[str, str]) -> str:
    """figures: {name: its SVG as markup}."""
    parts = [f"<h2>Study: {escape(result.name)}</h2>"]
    parts += [f"<p><b>{what}.</b> {escape(text)}</p>" for what, text in words(result)]
    for r in result.rankings:
        parts.append(f"<h3>{escape(r.budget)}</h3>{_table(standings(r, result.beside[r.budget]))}")
    drawn = "".join(
        f"<figure><figcaption>{FIGURES[name][1]}</figcaption>{svg}</figure>" for name, svg in figures.items()
    )
    parts.append(f'<div class="figures">{drawn}</div>' if drawn else "")
    for r in result.rankings:
        title = escape(PAIRWISE.format(r.budget))
        parts.append(f"<details><summary>{title}</summary>{_table(matrix(r))}</details>")
    parts.append(f"<details><summary>What it cost</summary>{_table(spent(result))}</details>")
    parts += [f'<p class="soft">{escape(note)}</p>' for note in notes(result)]
    return "\n".join(part for part in parts if part)


def _table(grid: Grid) -> str:
    header, lines = grid
    kinds = [' class="key"' if h in ("", "row", "budget") else "" for h in header]
    rows = ["".join(f"<th{k}>{escape(h)}</th>" for k, h in zip(kinds, header, strict=True))]
    rows += ["".join(f"<td{k}>{escape(c)}</td>" for k, c in zip(kinds, line, strict=True)) for line in lines]
    return f'<div class="scroll"><table>{"".join(f"<tr>{row}</tr>" for row in rows)}</table></div>'


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
