"""The ledger as tables: a row a recipe, a column a protocol, a cell the mean over seeds with its interval."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ..errors import UserError, nearest
from ..ledger import Record
from ..paths import bundled
from ..stats import mean_interval

MAIN_METRICS = ("knn_top1", "linprobe_top1")
UNTRAINED = "untrained"


@dataclass
class Cell:
    """A measured number: mean over seeds, half-width of its 95 % interval, and the records behind it."""

    value: float
    half: float
    over: str  # what the interval is over: `seeds` (Student t) or `images` (binomial, one seed)
    records: list[Record]
    gain: float | None = None  # over the untrained ViT in the same column

    def __str__(self) -> str:
        return f"{self.value:.1f} ± {self.half:.1f}"


@dataclass
class Row:
    label: str
    method: str
    first: Record
    cells: dict[str, Cell] = field(default_factory=dict)


@dataclass
class Table:
    """Numbers that may be compared: one scale, one test set, one pre-training set, one arch."""

    title: str
    key: tuple[str, ...]
    columns: list[str]
    rows: list[Row]


def newest(records: list[Record]) -> list[Record]:
    """One record a number: of the same weights, protocol, metric and data, the one measured last."""
    last: dict[tuple[Any, ...], Record] = {}
    for r in sorted(records, key=lambda r: (r.created, r.id)):
        last[r.weights_sha256, r.protocol.hash, r.metric, r.dataset, r.data_fingerprint] = r
    return list(last.values())


def tables(records: list[Record], metrics: tuple[str, ...] = MAIN_METRICS) -> list[Table]:
    """Group records into tables. Two protocol hashes never share a column, two recipes never a row."""
    groups: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    chosen = [r for r in newest(records) if r.metric in metrics]
    for r in chosen:
        if r.method != UNTRAINED:
            groups[r.scale, r.dataset, r.pretrain.data or "unknown", r.arch].append(r)
    for key, group in groups.items():
        sizes = {(r.protocol.hash, r.data_fingerprint) for r in group}
        group += [
            r
            for r in chosen
            if r.method == UNTRAINED and r.arch == key[3] and (r.protocol.hash, r.data_fingerprint) in sizes
        ]
    if not groups:  # nothing but untrained ViTs
        for r in chosen:
            groups[r.scale, r.dataset, "none", r.arch].append(r)
    return [_table(key, group) for key, group in sorted(groups.items())]


def _table(key: tuple[str, ...], group: list[Record]) -> Table:
    scale, dataset, data, arch = key
    names = _column_names(group)
    by_row: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for r in group:
        by_row[r.method != UNTRAINED, r.method, r.preset or "", r.pretrain.recipe_hash or ""].append(r)
    rows = []
    for _, members in sorted(by_row.items()):
        first = min(members, key=lambda r: (r.seed, r.metric, r.id))
        row = Row(_row_label(first, group), first.method, first)
        for column in sorted({_column(r) for r in members}):
            row.cells[names[column]] = _cell([r for r in members if _column(r) == column])
        rows.append(row)
    base = next((row for row in rows if row.method == UNTRAINED), None)
    for row in rows:
        for name, cell in row.cells.items():
            if base and row is not base and name in base.cells:
                cell.gain = cell.value - base.cells[name].value
    columns = sorted({name for row in rows for name in row.cells})
    return Table(f"{dataset}, {arch} pre-trained on {data} ({scale} scale)", key, columns, rows)


def _column(r: Record) -> tuple[str, str, str]:
    return r.protocol.name, r.metric, r.protocol.hash


def _column_names(group: list[Record]) -> dict[tuple[str, str, str], str]:
    """Readable and unique: `k-NN, cls`; the hash is added where two protocols bear one name."""
    words = {"knn": "k-NN", "linprobe": "linear"}
    found: dict[str, set[tuple[str, str, str]]] = defaultdict(set)
    for r in group:
        kind, _, pool = r.protocol.name.partition("_")
        k = f" k={r.condition['k']}" if r.metric.startswith("knn_top1_k") else ""
        found[f"{words.get(kind, kind)}{k}, {pool}"].add(_column(r))
    return {
        column: name if len(columns) == 1 else f"{name} [{column[2][:6]}]"
        for name, columns in found.items()
        for column in columns
    }


def _row_label(r: Record, group: list[Record]) -> str:
    """The method, and where one method has several recipes in the table, its epochs and recipe hash."""
    if r.method == UNTRAINED:
        return "untrained ViT"
    alone = len({x.pretrain.recipe_hash for x in group if x.method == r.method}) == 1
    return r.method if alone else f"{r.method}, {r.pretrain.epochs or 0:g} ep [{(r.pretrain.recipe_hash or '')[:6]}]"


def _cell(records: list[Record]) -> Cell:
    """Seeds are averaged; one seed has the binomial interval of its test images."""
    by_seed = {r.seed: r for r in sorted(records, key=lambda r: (r.created, r.id))}
    chosen = [by_seed[s] for s in sorted(by_seed)]
    mean, half = mean_interval([r.value for r in chosen])
    if half is None:
        return Cell(mean, 1.96 * (chosen[0].stderr or 0.0), "images", chosen)
    return Cell(mean, half, "seeds", chosen)


def summary(table: Table) -> list[str]:
    """A sentence a column: who leads, by how much, and whether that is more than noise."""
    lines = []
    for column in table.columns:
        ranked = sorted((r for r in table.rows if column in r.cells), key=lambda r: -r.cells[column].value)
        if len(ranked) < 2 or all(r.method == UNTRAINED for r in ranked):
            continue
        a, b = ranked[0].cells[column], ranked[1].cells[column]
        apart = a.value - b.value > (a.half**2 + b.half**2) ** 0.5
        verdict = "more than" if apart else "within"
        lines.append(
            f"{column}: {ranked[0].label} leads with {a} %, {a.value - b.value:.1f} points before {ranked[1].label}, "
            f"{verdict} the 95 % noise of the two."
        )
    return lines


# ------------------------------------------------------------------------------------------------- the papers' tables


def paper_tables() -> dict[str, Path]:
    """`ocl_t6` -> its CSV, in the papers' order."""

    def order(path: Path) -> tuple[str, int]:
        paper, _, number = path.stem.partition("_t")
        return paper, int(number) if number.isdigit() else 99

    return {p.stem: p for p in sorted(bundled("results/paper").glob("*.csv"), key=order)}


def read_paper(name: str) -> pd.DataFrame:
    """A paper's table as printed, every column as text."""
    known = paper_tables()
    if name not in known:
        raise UserError(f"unknown table '{name}'{nearest(name, known)}; `sslbench list tables` shows all")
    return pd.read_csv(known[name], dtype=str, keep_default_na=False)


def reported_beside_measured(name: str, records: list[Record]) -> tuple[list[str], list[list[str]], list[str]]:
    """(header, rows, notes) of a paper's table; a cell is `reported`, or `reported | measured` where the ledger has it.

    A measured number stands beside a reported one only at scale `paper`, for the same method, arch, data set and
    metric, and the same number of epochs.
    """
    frame = read_paper(name)
    frame["column"] = [f"{m} {d}".strip() for m, d in zip(frame["metric"], frame["dataset"], strict=True)]
    if (frame.groupby("row")["column"].nunique() == 1).all() and frame["column"].nunique() > 1:
        across, keys, groups = "arch", ["column"], ["row"]  # a table of settings: one a row, an arch a column
    else:
        across, groups = "column", ["arch", "row"]
        keys = [k for k in ("method", "arch", "epochs", "condition") if frame[k].nunique() > 1 or k == "method"]
    if name.endswith("_text"):  # claims, one a line
        across, keys, groups = "unit", ["row", "method", "arch", "column"], [frame.index]
    columns = list(dict.fromkeys(frame[across]))
    rows: list[list[str]] = []
    remarks: dict[str, list[str]] = {}
    for _, group in frame.groupby(groups, sort=False):
        first = group.iloc[0]
        cells = {r[across]: _reported(r, records) for _, r in group.iterrows()}
        rows.append([first[k] for k in keys] + [cells.get(c, "") for c in columns])
        for _, r in group.iterrows():
            if r["note"]:
                remarks.setdefault(r["note"], []).append(f"{r['arch']} {r['column']} {r['value']}".strip())
    notes = [f"{', '.join(dict.fromkeys(where))}: {note}" for note, where in remarks.items()]
    names = {"column": "setting", "row": "where"}
    return [names.get(k, k) for k in keys] + [c or "number" for c in columns], rows, notes


def _reported(line: Any, records: list[Record]) -> str:
    printed = line["value"] or "-"
    matching = [
        r
        for r in newest(records)
        if (r.scale, r.method, r.arch, r.metric, r.dataset)
        == ("paper", line["method"], line["arch"], line["metric"], line["dataset"])
        and str(int(r.pretrain.epochs or 0)) == line["epochs"]
    ]
    return f"{printed} | {_cell(matching)}" if matching else printed
