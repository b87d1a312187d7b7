"""The ledger as tables: a row a recipe, a column a protocol, a cell the mean over seeds with its interval."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from ..evaluate.told import PUBLIC
from ..ledger import GEOMETRY, Record
from ..stats import mean_interval

MAIN_METRICS = ("knn_top1", "linprobe_top1", "attentive_top1", "finetune_top1")
UNTRAINED = "untrained"
SCALES = ("paper", "cifar", "tiny")  # in the order of the page
WORDS = {"knn": "k-NN", "linprobe": "linear", "attentive": "attentive", "finetune": "fine-tuning"}

Column = tuple[str, str, str]  # protocol name, metric, protocol hash
RowKey = tuple[bool, str, float, str, str]  # trained?, method, epochs, preset, recipe hash
Trained = tuple[RowKey, str]  # and the fingerprint of the training images


@dataclass
class Cell:
    """A measured number: mean over seeds, half-width of its 95 % interval, and the records behind it.

    Seeds are those of the pre-training; of one that was evaluated by several seeds the mean counts.
    """

    value: float
    half: float | None  # None: a single record that does not say its error
    over: str  # what the interval is over: `seeds` (Student t), else `evaluation seeds` or `images` (binomial) of one
    records: list[Record]  # one a seed of pre-training and of evaluation
    gain: float | None = None  # over the untrained ViT in the same column

    def by_seed(self) -> dict[int, float]:
        """The value of each seed."""
        return {seed: fmean(r.value for r in group) for seed, group in by_run_seed(self.records).items()}

    def seeds(self) -> list[int]:
        """What `over` counts; of an interval over images the one seed."""
        return sorted({r.seed if self.over == "evaluation seeds" else r.run_seed for r in self.records})

    def __str__(self) -> str:
        form = self._form
        return f"{self.value:{form}}" if self.half is None else f"{self.value:{form}} ± {self.half:{form}}"

    def gain_text(self) -> str:
        """` (+1.2)`, or nothing where there is no gain."""
        return "" if self.gain is None else f" ({self.gain:+z{self._form}})"

    @property
    def _form(self) -> str:
        return form_of(self.records[0].metric)


def form_of(metric: str) -> str:
    """How its numbers are written: percentages to a tenth, those without a unit to a hundredth."""
    return ".2f" if metric in GEOMETRY else ".1f"


@dataclass
class Row:
    label: str
    method: str
    cells: dict[str, Cell] = field(default_factory=dict)

    @property
    def first(self) -> Record:
        return next(iter(self.cells.values())).records[0]

    def wall_s(self) -> float | None:
        """Seconds of pre-training, mean over seeds."""
        return self._cost("wall_s")

    def device_s(self) -> float | None:
        """Seconds of pre-training times devices, mean over seeds."""
        hours = self._cost("device_hours")
        return None if hours is None else 3600 * hours

    def flops(self) -> float | None:
        """FLOPs of pre-training, mean over seeds."""
        return self._cost("flops")

    def hardware(self) -> set[str]:
        """What its runs trained on: devices, their number, threads, precision. Times on two of these do not compare."""
        known = [r.pretrain.hardware or r.hardware for r in self._pretrained()]
        return {
            f"{h.get('devices', 1)} x {h.get('device')}"
            + "".join(f", {k} {h[k]}" for k in ("threads", "precision") if k in h)
            for h in known
        }

    def _cost(self, what: str) -> float | None:
        """Mean over seeds. Old records know the sum with the evaluation alone: of those of a seed the least is nearest,
        and one whose evaluation trained says nothing."""
        by_seed: dict[int, float] = {}
        for r in self._pretrained():
            if r.pretrain.cost is None and "eval_run" in r.condition:
                continue
            if value := getattr(r.pretrain.cost or r.cost, what):
                by_seed[r.run_seed] = min(value, by_seed.get(r.run_seed, value))
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


def is_unitless(table: Table) -> bool:
    """Whether its numbers are no percentages."""
    return table.rows[0].first.metric in GEOMETRY


def newest(records: list[Record]) -> list[Record]:
    """One record a number: of the same weights, protocol, metric, data and seed, the one measured last.

    Numbers of weights that were kept on the way are left out: their schedule had not ended.
    """
    last: dict[tuple[Any, ...], Record] = {}
    for r in sorted((r for r in records if "milestone" not in r.condition), key=lambda r: (r.created, r.id)):
        last[r.weights_sha256, r.head_sha256, r.protocol.hash, r.metric, r.dataset, r.data_fingerprint, r.seed] = r
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
    by_row: dict[Trained, list[Record]] = defaultdict(list)
    images = training_images(group)
    lengths: dict[str | None, list[float]] = defaultdict(list)
    for r in group:
        lengths[r.pretrain.recipe_hash].append(r.pretrain.epochs or 0.0)
    for r in group:
        key_of = row_key(r)
        if r.pretrain.recipe_hash:  # a run for so long a time has as many epochs as it got to, each seed its own
            key_of = (*key_of[:2], fmean(lengths[r.pretrain.recipe_hash]), *key_of[3:])
        by_row[key_of, images[r.id]].append(r)
    rows = []
    for named, members in sorted(by_row.items(), key=lambda item: item[0]):
        row = Row(_row_label(named, by_row), named[0][1])
        for column, name in names.items():
            if chosen := [r for r in members if _column(r) == column]:
                row.cells[name] = cell_of(chosen)
        rows.append(row)
    table = Table(title, key, list(names.values()), rows)
    if base := table.base:
        for row in table.trained:
            for name in row.cells.keys() & base.cells.keys():
                row.cells[name].gain = row.cells[name].value - base.cells[name].value
    return table


def training_images(records: list[Record]) -> dict[str, str]:
    """{record id: the fingerprint of what it was pre-trained on}: sets in two folders of one name are two.

    An old record does not know it, and has that of the others of its recipe where there is one unique.
    """
    of_recipe: dict[str | None, set[str]] = defaultdict(set)
    for r in records:
        of_recipe[r.pretrain.recipe_hash].update([r.pretrain.data_fingerprint] if r.pretrain.data_fingerprint else [])
    unique = {recipe: next(iter(fingerprints)) for recipe, fingerprints in of_recipe.items() if len(fingerprints) == 1}
    return {r.id: r.pretrain.data_fingerprint or unique.get(r.pretrain.recipe_hash, "") for r in records}


def row_key(r: Record) -> RowKey:
    """Sorts the untrained ViT first. Weights that no recipe stands behind are a row of their own."""
    trained = r.method != UNTRAINED
    recipe = r.pretrain.recipe_hash or (r.weights_sha256 if trained else "")
    return trained, r.method, r.pretrain.epochs or 0.0, PUBLIC if r.public else r.preset or "", recipe


def _row_label(key: Trained, keys: Iterable[Trained]) -> str:
    """The method, with a preset other than `paper`; as much of epochs and recipe hash as tells it from other rows."""
    same = [k for k in keys if _named(k)[0] == _named(key)[0]]
    return next(
        (name for level, name in enumerate(_named(key)) if [_named(k)[level] for k in same].count(name) == 1),
        _named(key)[-1],
    )


def _named(key: Trained) -> list[str]:
    """Return names for a row, from short to exact; the table takes the shortest that no other row has."""
    (trained, method, epochs, preset, recipe), images = key
    preset = preset.partition("+")[0]  # what a recipe sets otherwise is too long to name a row by
    label = "untrained ViT" if not trained else method if preset in ("", "paper") else f"{method} ({preset})"
    longer = f"{label}, {epochs:.4g} ep" if epochs else label
    exact = f"{longer} [{recipe[:6]}]"
    return [label, longer, exact, f"{exact}, images {images[:6] or 'not recorded'}"]


def _column(r: Record) -> Column:
    return r.protocol.name, r.metric, r.protocol.hash


def _column_names(group: list[Record]) -> dict[Column, str]:
    """Readable, unique, in the order of the page: `k-NN, cls`; the hash is added where two protocols bear one name."""
    plain = {_column(r): plain_name(r.protocol.name, r.metric) for r in group}
    names = list(plain.values())
    kinds = [*WORDS]  # what most methods have comes first
    in_order = sorted(plain, key=lambda c: (_rank(c[0], kinds), c[0], len(c[1]), c[1], c[2]))  # k10 before k100
    return {c: plain[c] if names.count(plain[c]) == 1 else f"{plain[c]} [{c[2][:6]}]" for c in in_order}


def _rank(protocol: str, kinds: list[str]) -> int:
    kind = protocol.partition("_")[0]
    return kinds.index(kind) if kind in kinds else len(kinds)


def plain_name(protocol: str, metric: str) -> str:
    kind, _, pool = protocol.partition("_")
    standard, _, k = metric.partition("_k")
    if pool and kind in WORDS and standard == f"{kind}_top1":
        return f"{WORDS[kind]}{f' k={k}' if k else ''}, {pool.replace('_', ' ')}"
    return f"{protocol} {metric.removeprefix(f'{protocol}_')}"


def cell_of(records: list[Record]) -> Cell:
    """Seeds are averaged (of one seed trained twice, the newest counts).

    One seed has the interval over the seeds that it was evaluated by, or over its test images.
    """
    last = {(r.run_seed, r.seed): r for r in sorted(records, key=lambda r: (r.created, r.id))}
    chosen = [last[key] for key in sorted(last)]
    groups = by_run_seed(chosen)
    several = len(groups) > 1
    mean, half = mean_interval(
        [fmean(r.value for r in g) for g in groups.values()] if several else [r.value for r in chosen]
    )
    if half is not None:
        return Cell(mean, half, "seeds" if several else "evaluation seeds", chosen)
    stderr = chosen[0].stderr
    return Cell(mean, None if stderr is None else 1.96 * stderr, "images", chosen)


def by_run_seed(records: list[Record]) -> dict[int, list[Record]]:
    groups: dict[int, list[Record]] = defaultdict(list)
    for r in records:
        groups[r.run_seed].append(r)
    return dict(sorted(groups.items()))


def summary(table: Table) -> list[str]:
    """A sentence a column: who leads, by how much, and whether that is more than noise.

    Of methods that trained for different numbers of epochs none is said to lead: equal.py compares those that may be.
    """
    epochs = sorted({row.first.pretrain.epochs or 0.0 for row in table.trained})
    fair = len(epochs) < 2
    said = [f"{c}: {lead}." for c in table.columns if (lead := _lead(table, c)) and (fair or NONE_ABOVE in lead)]
    unfair = f"Epochs differ, from {epochs[0]:.4g} to {epochs[-1]:.4g}: the table ranks no method." if not fair else ""
    return [unfair, *said] if unfair else said


NONE_ABOVE = "no method is above the untrained ViT"


def _lead(table: Table, column: str) -> str:
    """'' where the column has no two rows to compare."""
    ranked = sorted((row for row in table.rows if column in row.cells), key=lambda row: -row.cells[column].value)
    if len(ranked) < 2:
        return ""
    first, second = ranked[:2]
    a, b = first.cells[column], second.cells[column]
    if first.method == UNTRAINED:
        return f"{NONE_ABOVE}'s {a} %"
    gap = a.value - b.value
    lead = f"{first.label} leads with {a} %, {gap:.1f} points above {second.label}"
    if a.half is None or b.half is None:
        return lead
    return f"{lead}, {'more than' if gap > math.hypot(a.half, b.half) else 'within'} the 95 % noise of the two"
