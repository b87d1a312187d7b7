"""Methods side by side at one budget: the same epochs, the same device time on one kind of machine, the same FLOPs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

from ..stats import holm, paired_difference
from .tables import Row, Table

NEAR = 1.1  # device times and FLOPs within 10 % of each other are one budget; epochs are equal or they are not
EQUAL = (
    "Methods of one budget: the same epochs, or device times or FLOPs within 10 %, means over seeds. Each number with "
    "its 95 % interval; below, differences of runs with the same seed, their 95 % interval, and p of the paired t "
    "test, after Holm over the differences of a column; one seed gives no test. Device time is as measured, whatever "
    "else the machine did."
)


@dataclass
class Equal:
    """All of a table that may be compared under one kind of budget."""

    title: str
    groups: list[Group]
    alone: list[str]  # rows that no other shares a budget with, and what theirs is


@dataclass
class Group:
    """Rows of one budget. A difference is `a - b: +1.2 ± 0.8, p .03`, of seeds that both have."""

    budget: str
    rows: list[Row]
    columns: list[str]  # in which at least two of the rows have a number
    pairs: list[tuple[str, dict[str, str]]]  # `a - b` -> column -> difference


def equal(table: Table) -> list[Equal]:
    """Compare at equal epochs, device time (on each kind of machine) and FLOPs; [] where methods are less than two."""
    rows = table.trained
    if len(rows) < 2:
        return []
    budgets = [_equal("Equal epochs", rows, [row.first.pretrain.epochs for row in rows], "{:.4g} ep", 1.0)]
    for machine in sorted({name for row in rows for name in row.hardware()}):
        seconds = [row.device_s() if row.hardware() == {machine} else None for row in rows]
        budgets.append(_equal(f"Equal device time on {machine}", rows, seconds, "{:,.0f} s", NEAR))
    teraflops = [None if (n := row.flops()) is None else n / 1e12 for row in rows]
    return [*budgets, _equal("Equal FLOPs", rows, teraflops, "{:,.1f} TFLOP", NEAR)]


def _equal(title: str, rows: list[Row], costs: list[float | None], word: str, near: float) -> Equal:
    """costs: of the rows, None where there is none to compare by."""
    known = sorted(((c, row) for c, row in zip(costs, rows, strict=True) if c), key=lambda x: (x[0], x[1].label))
    groups: list[Group] = []
    end = 0  # of the group before: one that lies within it is no group
    for i, (least, _) in enumerate(known):
        stop = next((j for j in range(i, len(known)) if known[j][0] > near * least), len(known))
        if stop > max(end, i + 1):
            groups.append(_group(known[i:stop], word))
        end = max(end, stop)
    together = {row.label for group in groups for row in group.rows}
    unequal = [(row, c) for c, row in zip(costs, rows, strict=True) if row.label not in together]
    return Equal(title, groups, [f"{row.label} ({word.format(c) if c else 'none known'})" for row, c in unequal])


def _group(window: list[tuple[float, Row]], word: str) -> Group:
    costs, rows = [cost for cost, _ in window], sorted((row for _, row in window), key=lambda row: row.label)
    held = [c for row in rows for c in row.cells]
    columns = [c for c in dict.fromkeys(held) if held.count(c) > 1]
    pairs = list(combinations(rows, 2))
    differences = {c: _differences(pairs, c) for c in columns}
    named = [(f"{a.label} - {b.label}", {c: differences[c][i] for c in columns}) for i, (a, b) in enumerate(pairs)]
    least, most = (word.format(c) for c in (costs[0], costs[-1]))
    return Group(most if least == most else f"{least.partition(' ')[0]} to {most}", rows, columns, named)


def _differences(pairs: list[tuple[Row, Row]], column: str) -> list[str]:
    """`+1.2 ± 0.8, p 0.03` a pair; '' where they share no seed."""
    differences: dict[int, tuple[float, float | None, float | None]] = {}
    for i, (a, b) in enumerate(pairs):
        if column not in a.cells or column not in b.cells:
            continue
        of_a, of_b = (row.cells[column].by_seed() for row in (a, b))
        seeds = sorted(of_a.keys() & of_b.keys())
        x, y = ([side[s] for s in seeds] for side in (of_a, of_b))
        if seeds:
            differences[i] = paired_difference(x, y) if len(seeds) > 1 else (x[0] - y[0], None, None)
    ps = holm({i: p for i, (_, _, p) in differences.items() if p is not None})
    texts = []
    for i in range(len(pairs)):
        if i not in differences:
            texts.append("")
            continue
        difference, half, _ = differences[i]
        interval = f"{difference:+z.1f}" + ("" if half is None else f" ± {half:.1f}")
        texts.append(f"{interval}, p {ps[i]:.2g}" if i in ps else interval)
    return texts


def as_rows(group: Group) -> tuple[list[str], list[list[str]]]:
    """Header and rows: each method's numbers, then the differences."""
    cells = [[row.label, *(str(row.cells.get(c, "")) for c in group.columns)] for row in group.rows]
    return [group.budget, *group.columns], cells + [[name, *texts.values()] for name, texts in group.pairs]


def alone(e: Equal) -> str:
    """What cannot be compared, said; '' where nothing."""
    return f"Nothing else has the budget of {', '.join(e.alone)}: not compared." if e.alone else ""
