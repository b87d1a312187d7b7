"""The ledger as tables: a row a recipe, a column a protocol, a cell the mean over seeds with its interval."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from ..errors import UserError, nearest
from ..ledger import Record
from ..paths import bundled
from ..stats import mean_interval

MAIN_METRICS = ("knn_top1", "linprobe_top1", "finetune_top1")
UNTRAINED = "untrained"
SCALES = ("paper", "cifar", "tiny")  # in the order of the page
WORDS = {"knn": "k-NN", "linprobe": "linear", "finetune": "fine-tuning"}

Column = tuple[str, str, str]  # protocol name, metric, protocol hash
RowKey = tuple[bool, str, float, str, str]  # trained?, method, epochs, preset, recipe hash


@dataclass
class Cell:
    """A measured number: mean over seeds, half-width of its 95 % interval, and the records behind it."""

    value: float
    half: float | None  # None: a single record that does not say its error
    over: str  # what the interval is over: `seeds` (Student t) or `images` (binomial, one seed)
    records: list[Record]  # one a seed
    gain: float | None = None  # over the untrained ViT in the same column

    def __str__(self) -> str:
        return f"{self.value:.1f}" if self.half is None else f"{self.value:.1f} ± {self.half:.1f}"


@dataclass
class Row:
    label: str
    method: str
    cells: dict[str, Cell] = field(default_factory=dict)

    @property
    def first(self) -> Record:
        return next(iter(self.cells.values())).records[0]

    def wall_s(self) -> float | None:
        """Seconds of pre-training, mean over seeds. A record's cost has its evaluation in it: the least is nearest."""
        by_seed: dict[int, float] = {}
        for r in self._pretrained():
            by_seed[r.seed] = min(r.cost.wall_s, by_seed.get(r.seed, r.cost.wall_s))
        return fmean(by_seed.values()) if by_seed else None

    def flops(self) -> float | None:
        """FLOPs of pre-training, mean over seeds."""
        by_seed: dict[int, float] = {}
        for r in self._pretrained():
            if r.cost.flops:
                by_seed[r.seed] = min(r.cost.flops, by_seed.get(r.seed, r.cost.flops))
        return fmean(by_seed.values()) if by_seed else None

    def _pretrained(self) -> list[Record]:
        """Where no run of ours is behind the weights, a record's cost is that of the evaluation alone: left out."""
        return [r for cell in self.cells.values() for r in cell.records if r.pretrain.recipe_hash]


@dataclass
class Table:
    """Numbers that may be compared: one scale, one set of test images, one pre-training set, one arch."""

    title: str
    key: tuple[str, ...]  # scale, dataset, fingerprint of the test images, pre-training data, arch
    columns: list[str]
    rows: list[Row]

    @property
    def trained(self) -> list[Row]:
        return [row for row in self.rows if row.method != UNTRAINED]

    @property
    def base(self) -> Row | None:
        return next((row for row in self.rows if row.method == UNTRAINED), None)


def newest(records: list[Record]) -> list[Record]:
    """One record a number: of the same weights, protocol, metric and data, the one measured last."""
    last: dict[tuple[Any, ...], Record] = {}
    for r in sorted(records, key=lambda r: (r.created, r.id)):
        last[r.weights_sha256, r.protocol.hash, r.metric, r.dataset, r.data_fingerprint] = r
    return list(last.values())


def tables(records: list[Record], metrics: tuple[str, ...] = MAIN_METRICS) -> list[Table]:
    """Group records into tables. Two protocol hashes never share a column, two recipes never a row.

    The untrained ViT is in every table of its arch and test set; one that no method stands beside has its own table.
    """
    groups: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    bases: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    for r in newest(records):
        if r.metric in metrics and r.method == UNTRAINED:
            bases[r.dataset, r.data_fingerprint, r.arch].append(r)
        elif r.metric in metrics:
            groups[r.scale, r.dataset, r.data_fingerprint, r.pretrain.data or "unknown data", r.arch].append(r)
    joined = {(key[1], key[2], key[4]) for key in groups}
    for key, group in groups.items():
        group += bases.get((key[1], key[2], key[4]), [])
    for (dataset, fingerprint, arch), group in bases.items():
        if (dataset, fingerprint, arch) not in joined:
            groups[group[0].scale, dataset, fingerprint, "nothing", arch] = group
    in_order = sorted(groups, key=lambda k: (SCALES.index(k[0]), k[1], k[3], k[4], k[2]))
    return [_table(key, groups[key], _title(key, in_order)) for key in in_order]


def _title(key: tuple[str, ...], keys: list[tuple[str, ...]]) -> str:
    """The test images' fingerprint is named only where another table differs in nothing else."""
    scale, dataset, fingerprint, data, arch = key
    alike = [k for k in keys if (k[0], k[1], k[3], k[4]) == (scale, dataset, data, arch)]
    which = f", test images {fingerprint[:6]}" if len(alike) > 1 else ""
    return f"{dataset}, {arch} pre-trained on {data} ({scale} scale{which})"


def _table(key: tuple[str, ...], group: list[Record], title: str) -> Table:
    names = _column_names(group)
    by_row: dict[RowKey, list[Record]] = defaultdict(list)
    for r in group:
        by_row[_row_key(r)].append(r)
    rows = []
    for row_key, members in sorted(by_row.items(), key=lambda item: item[0]):
        row = Row(_row_label(row_key, by_row), row_key[1])
        for column, name in names.items():
            if chosen := [r for r in members if _column(r) == column]:
                row.cells[name] = _cell(chosen)
        rows.append(row)
    table = Table(title, key, list(names.values()), rows)
    if base := table.base:
        for row in table.trained:
            for name in row.cells.keys() & base.cells.keys():
                row.cells[name].gain = row.cells[name].value - base.cells[name].value
    return table


def _row_key(r: Record) -> RowKey:
    """Sorts the untrained ViT first. Weights that no recipe stands behind are a row of their own."""
    trained = r.method != UNTRAINED
    recipe = r.pretrain.recipe_hash or (r.weights_sha256 if trained else "")
    return trained, r.method, r.pretrain.epochs or 0.0, r.preset or "", recipe


def _row_label(key: RowKey, keys: Iterable[RowKey]) -> str:
    """The method, with a preset other than `paper`; as much of epochs and recipe hash as tells it from other rows."""
    same = [k for k in keys if _named(k)[0] == _named(key)[0]]
    return next(
        (name for level, name in enumerate(_named(key)) if [_named(k)[level] for k in same].count(name) == 1),
        _named(key)[-1],
    )


def _named(key: RowKey) -> list[str]:
    """From short to exact."""
    trained, method, epochs, preset, recipe = key
    preset = preset.partition("+")[0]  # what a recipe sets otherwise is too long to name a row by
    label = "untrained ViT" if not trained else method if preset in ("", "paper") else f"{method} ({preset})"
    longer = f"{label}, {epochs:.4g} ep" if epochs else label
    return [label, longer, f"{longer} [{recipe[:6]}]"]


def _column(r: Record) -> Column:
    return r.protocol.name, r.metric, r.protocol.hash


def _column_names(group: list[Record]) -> dict[Column, str]:
    """Readable, unique, in the order of the page: `k-NN, cls`; the hash is added where two protocols bear one name."""
    plain = {_column(r): _plain_name(r.protocol.name, r.metric) for r in group}
    names = list(plain.values())
    in_order = sorted(plain, key=lambda c: (c[0], len(c[1]), c[1], c[2]))  # k10 before k100
    return {c: plain[c] if names.count(plain[c]) == 1 else f"{plain[c]} [{c[2][:6]}]" for c in in_order}


def _plain_name(protocol: str, metric: str) -> str:
    kind, _, pool = protocol.partition("_")
    standard, _, k = metric.partition("_k")
    if pool and kind in WORDS and standard == f"{kind}_top1":
        return f"{WORDS[kind]}{f' k={k}' if k else ''}, {pool}"
    return f"{protocol} {metric}"


def _cell(records: list[Record]) -> Cell:
    """Seeds are averaged (of one seed trained twice, the newest counts); one seed has its test images' interval."""
    by_seed = {r.seed: r for r in sorted(records, key=lambda r: (r.created, r.id))}
    chosen = [by_seed[s] for s in sorted(by_seed)]
    mean, half = mean_interval([r.value for r in chosen])
    if half is not None:
        return Cell(mean, half, "seeds", chosen)
    stderr = chosen[0].stderr
    return Cell(mean, None if stderr is None else 1.96 * stderr, "images", chosen)


def summary(table: Table) -> list[str]:
    """A sentence a column: who leads, by how much, and whether that is more than noise."""
    return [f"{column}: {lead}." for column in table.columns if (lead := _lead(table, column))]


def _lead(table: Table, column: str) -> str:
    """'' where the column has no two rows to compare."""
    ranked = sorted((row for row in table.rows if column in row.cells), key=lambda row: -row.cells[column].value)
    if len(ranked) < 2:
        return ""
    first, second = ranked[:2]
    a, b = first.cells[column], second.cells[column]
    if first.method == UNTRAINED:
        return f"no method is above the untrained ViT's {a} %"
    gap = a.value - b.value
    lead = f"{first.label} leads with {a} %, {gap:.1f} points above {second.label}"
    if a.half is None or b.half is None:
        return lead
    return f"{lead}, {'more than' if gap > math.hypot(a.half, b.half) else 'within'} the 95 % noise of the two"


# ------------------------------------------------------------------------------------------------- the papers' tables

# What may tell rows apart; and how the table says it once where it does not.
KEYS = {"method": "{}", "arch": "{}", "pretrain_data": "pre-trained on {}", "epochs": "{} epochs", "condition": "{}"}


@dataclass
class PaperTable:
    """A paper's table in rows and columns; a cell is `reported [footnote]`, then `| measured` where there is one."""

    name: str
    common: str  # what every row has in common, and no column repeats
    header: list[str]
    keys: int  # how many of the columns, from the left, name the row
    rows: list[list[str]]
    notes: list[str]


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


def reported_beside_measured(name: str, records: list[Record]) -> PaperTable:
    """A paper's table, with the ledger's numbers at scale `paper` beside the printed ones."""
    frame = read_paper(name)
    frame["column"] = frame["metric"].str.replace("_", " ") + " " + frame["dataset"].str.replace("+", " + ")
    frame["column"] = frame["column"].str.strip()
    frame["condition"] = frame["condition"].str.replace("_", " ")
    frame["number"] = "number"
    keys, across = _layout(frame, name.endswith("_text"))
    columns = list(dict.fromkeys(frame[across]))
    if across != "number":
        frame["unit"] = frame["unit"].replace("%", "")  # what a column of accuracies is in goes without saying
    # What the paper prints twice under one name takes two lines: no number hides another.
    frame["nth"] = frame.groupby(["row", *keys, across]).cumcount()
    remarks = list(dict.fromkeys(n for n in frame["note"] if n))
    measured = [r for r in newest(records) if r.scale == "paper"]
    rows = []
    for _, group in frame.groupby(["row", *keys, "nth"], sort=False):
        cells = {line[across]: _beside(line, frame, measured, remarks) for _, line in group.iterrows()}
        rows.append([group.iloc[0][k].replace(";", ", ") for k in keys] + [cells.get(c, "") for c in columns])
    once = {k: frame[k].iloc[0] for k in KEYS if k not in (*keys, across) and frame[k].nunique() == 1}
    common = ", ".join(KEYS[k].format(v.replace(";", ", ")) for k, v in once.items() if v)
    names = {"column": "setting", "row": "where", "pretrain_data": "pre-trained on"}
    header = [names.get(k, k) for k in keys] + [c or "number" for c in columns]
    notes = [f"[{i}] {note}" for i, note in enumerate(remarks, 1)]
    return PaperTable(name, common, header, len(keys), rows, notes)


def _layout(frame: pd.DataFrame, text: bool) -> tuple[list[str], str]:
    """The columns that name a row, and the one whose values become columns."""
    if text:  # claims, one a line; what a claim is about is said in one column
        for k in ("pretrain_data", "condition"):
            about = frame[k].map(lambda v: f" ({v.replace(';', ', ')})" if v else "")
            frame["column"] += about if frame[k].nunique() > 1 else ""
        return ["row", *(k for k in ("method", "arch", "epochs") if frame[k].nunique() > 1), "column"], "number"
    vary = [k for k in KEYS if frame[k].nunique() > 1]
    if (frame.groupby("row")["column"].nunique() == 1).all() and frame["column"].nunique() > 1:
        return ["column", *(k for k in vary if k != "arch")], "arch"  # settings, one a row
    # What each column has one of belongs to the column: its own arch, its own pre-training set.
    of_column = [
        k for k in ("arch", "pretrain_data") if k in vary and (frame.groupby("column")[k].nunique() == 1).all()
    ]
    if "arch" in of_column:
        frame["column"] += " " + frame["arch"]
    if "pretrain_data" in of_column and not (same := frame["pretrain_data"] == frame["dataset"]).all():
        frame["column"] += frame["pretrain_data"].where(~same, "").map(lambda v: v and f" from {v}")
    return list(dict.fromkeys(["method", *(k for k in vary if k not in of_column)])), "column"


def _beside(line: Any, frame: pd.DataFrame, records: list[Record], remarks: list[str]) -> str:
    """`74.2 [1] | 73.9 ± 0.2 (800 ep)`: as printed, with the number of its note, and as measured."""
    mark = f"[{remarks.index(line['note']) + 1}]" if line["note"] else ""
    printed = " ".join(part for part in (line["value"] or "-", line["unit"], mark) if part)
    return " | ".join([printed, *_measured(line, frame, records)])


def _measured(line: Any, frame: pd.DataFrame, records: list[Record]) -> list[str]:
    """What the ledger has for a printed number, each protocol and recipe for itself.

    Nothing where the table has several lines of this method, arch, data and metric that a record cannot tell apart:
    it knows its epochs, but not a row's condition. Where the line is the only one, a record of other epochs says so.
    """
    same = ["method", "arch", "pretrain_data", "metric", "dataset"]
    alike = frame[(frame[same] == line[same]).all(axis=1)]
    if (alike["epochs"] == line["epochs"]).sum() > 1:
        return []
    found: dict[tuple[RowKey, str, str], list[Record]] = defaultdict(list)
    for r in records:
        comparable = [r.method, r.arch, r.pretrain.data, r.metric, r.dataset] == list(line[same])
        if comparable and (len(alike) == 1 or line["epochs"] == f"{r.pretrain.epochs or 0:g}"):
            found[_row_key(r), r.protocol.name, r.protocol.hash].append(r)
    several = [len({*part}) > 1 for part in zip(*((key[-1], *protocol) for key, *protocol in found), strict=True)]
    out = []
    for ((_, _, epochs, preset, recipe), protocol, digest), group in sorted(found.items()):
        words = [preset] if preset not in ("", "paper") else []
        words += [f"{epochs:g} ep" if epochs else "unknown epochs"] if f"{epochs:g}" != line["epochs"] else []
        words += [part for part, told in zip((recipe[:6], protocol, digest[:6]), several, strict=True) if told]
        out.append(f"{_cell(group)} ({', '.join(words)})" if words else str(_cell(group)))
    return out
