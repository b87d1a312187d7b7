"""The papers' tables as printed, with what was measured beside; where the papers contradict themselves or the code."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ..evaluate.told import PUBLIC
from ..ledger import Record
from ..method import methods
from ..study.printed import evaluation_of, paper_tables, read_paper
from ..study.tables import behind, pretraining_of
from .tables import cell_of, newest

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
    sources: dict[tuple[int, int], list[str]]  # (row, column) -> the ids of the records behind the number after the bar
    measurable: int  # printed numbers that a recipe and a protocol of this suite stand for


def reported_beside_measured(name: str, records: list[Record]) -> PaperTable:
    """A paper's table, with the ledger's numbers of the same setting and protocol beside the printed ones."""
    frame = read_paper(name)
    printed = frame.copy()
    frame["column"] = frame["metric"].str.replace("_", " ") + " " + frame["dataset"].str.replace("+", " + ")
    frame["column"] = frame["column"].str.strip()
    frame["condition"] = frame["condition"].str.replace("_", " ")
    frame["number"] = "number"
    shown = frame.groupby("row")[["metric", "value"]].apply(
        lambda lines: list(lines.itertuples(index=False, name=None))
    )
    frame["condition"] = [_unprinted(c, shown[row]) for c, row in zip(frame["condition"], frame["row"], strict=True)]
    keys, across = _layout(frame, name.endswith("_text"))
    columns = list(dict.fromkeys(frame[across]))
    if across != "number":
        frame["unit"] = frame["unit"].replace("%", "")  # what a column of accuracies is in goes without saying
    # What the paper prints twice under one name takes two lines: no number hides another.
    frame["nth"] = frame.groupby(["row", *keys, across]).cumcount()
    remarks = list(dict.fromkeys(n for n in frame["note"] if n))
    measured = newest(records)
    rows: list[list[str]] = []
    sources: dict[tuple[int, int], list[str]] = {}
    measurable = 0
    for _, group in frame.groupby(["row", *keys, "nth"], sort=False):
        cells = {}
        for at, line in group.iterrows():
            measurement = measured_for(printed.loc[at], measured)
            measurable += bool(measurement) or _measurable(printed.loc[at])
            cells[line[across]] = " | ".join([_printed(line, remarks), *(measurement[:1] if measurement else ())])
            if measurement:
                sources[len(rows), len(keys) + columns.index(line[across])] = measurement[1]
        rows.append([group.iloc[0][k].replace(";", ", ") for k in keys] + [cells.get(c, "") for c in columns])
    once = {k: frame[k].iloc[0] for k in KEYS if k not in (*keys, across) and frame[k].nunique() == 1}
    common = ", ".join(KEYS[k].format(v.replace(";", ", ")) for k, v in once.items() if v)
    names = {"column": "setting", "row": "where", "pretrain_data": "pre-trained on"}
    header = [names.get(k, k) for k in keys] + [c or "number" for c in columns]
    notes = [f"[{i}] {note}" for i, note in enumerate(remarks, 1)]
    return PaperTable(name, common, header, len(keys), rows, notes, sources, measurable)


def _measurable(line: Any) -> bool:
    return bool(line["value"] and evaluation_of(line) and pretraining_of(line))


def _layout(frame: pd.DataFrame, text: bool) -> tuple[list[str], str]:
    """The columns that name a row, and the one whose values become columns."""
    if text:  # claims, one a line; what a claim is about is said in one column
        for k in ("pretrain_data", "condition"):
            about = frame[k].map(lambda v: f" ({v.replace(';', ', ')})" if v else "")
            frame["column"] += about if frame[k].nunique() > 1 else ""
        return ["row", *(k for k in ("method", "arch", "epochs") if frame[k].nunique() > 1), "column"], "number"
    vary = [k for k in KEYS if frame[k].nunique() > 1]
    if (frame.groupby("row")["column"].nunique() == 1).all() and frame["column"].nunique() > 1:
        if frame["method"].nunique() == 1:
            return ["column", *(k for k in vary if k != "arch")], "arch"  # settings, one a row
        frame["method"] += frame[[k for k in vary if k != "method"]].apply(_of_method, axis=1)
        return ["column"], "method"
    # What each column has one of belongs to the column: its own arch, its own pre-training set.
    of_column = [
        k for k in ("arch", "pretrain_data") if k in vary and (frame.groupby("column")[k].nunique() == 1).all()
    ]
    if "arch" in of_column:
        frame["column"] += " " + frame["arch"]
    if "pretrain_data" in of_column and not (same := frame["pretrain_data"] == frame["dataset"]).all():
        frame["column"] += frame["pretrain_data"].where(~same, "").map(lambda v: v and f" from {v}")
    return list(dict.fromkeys(["method", *(k for k in vary if k not in of_column)])), "column"


def _unprinted(condition: str, printed: list[tuple[str, str]]) -> str:
    """The condition without what the row prints too, as `batch=2048` where its batch_size is 2048."""

    def said(part: str) -> bool:
        key, _, value = part.partition("=")
        return any(
            v == value and all(any(word.startswith(k) for word in metric.split("_")) for k in key.split())
            for metric, v in printed
        )

    return ";".join(part for part in condition.split(";") if not said(part))


def _of_method(line: Any) -> str:
    """` vit_b16 imagenet 800 ep`, what a column of a method has one of."""
    return "".join(f" {v} ep" if k == "epochs" else f" {v}" for k, v in line.items() if v)


def _printed(line: Any, remarks: list[str]) -> str:
    """`74.2 [1]`: as printed, with the number of its note."""
    mark = f"[{remarks.index(line['note']) + 1}]" if line["note"] else ""
    return " ".join(part for part in (line["value"] or "-", line["unit"], mark) if part)


def measured_for(line: Any, records: list[Record]) -> tuple[str, list[str]] | None:
    """What the ledger has for a printed number: `73.9 ± 0.2 (-0.3, 800 ep)`, and the ids of the records behind it.

    Only runs of the very recipe that `report --missing` prints, of all seeds, or else public weights, which are marked
    so. In brackets the difference to what is printed, then the method and the epochs where they are not as printed.
    """
    if not (its := behind(line, records)):
        return None
    r, cell = its[0], cell_of(its)
    epochs = f"{r.pretrain.epochs or 0:g}"
    words = [] if (printed := _number(line["value"])) is None else [f"{cell.value - printed:+.1f}"]
    words += [r.method] if r.method.casefold() != line["method"].casefold() else []
    words += [f"{epochs} ep"] if epochs != line["epochs"] else []
    words += [PUBLIC] if r.public else []
    return f"{cell} ({', '.join(words)})" if words else str(cell), [r.id for r in cell.records]


def _number(printed: str) -> float | None:
    try:
        return float(printed)
    except ValueError:  # an empty cell, or one such as `~94k`
        return None


# --------------------------------------------------------------------------------------- what the papers disagree on

# What a note says where two places of a paper, or of two papers, do not agree. "Agrees" takes it back.
CONTRADICTS = re.compile(
    r"\bsays?\b|\bprints?\b|\bgives \d|printed here|\d is below\b|bold as the best|look swapped|but not for"
)


@dataclass
class Disagreement:
    """One place that is contradicted elsewhere."""

    table: str
    where: str  # the row and its metric
    printed: str
    against: str


def disagreements() -> list[Disagreement]:
    """Every note that names a contradiction, once a table, with what is printed where it stands."""
    out = []
    for name in paper_tables():
        frame = read_paper(name)
        frame["against"] = frame["note"].map(contradiction)
        for against, lines in frame[frame["against"] != ""].groupby("against", sort=False):
            place = f"section {lines.iloc[0]['row']}, " if lines.iloc[0]["table"] == "text" else ""
            whose = ", ".join(dict.fromkeys(v for v in (*lines["method"], *lines["arch"]) if v))
            what = ", ".join(
                dict.fromkeys((lines["metric"].str.replace("_", " ") + " " + lines["dataset"]).str.strip())
            )
            printed = ", ".join((lines["value"].replace("", "-") + " " + lines["unit"]).str.strip())
            out.append(
                Disagreement(name, f"{place}{whose}: {what}".replace(": ", "", not whose), printed, str(against))
            )
    return out


def contradiction(note: str) -> str:
    """The note without what it says to agree; '' where nothing in it contradicts what is printed."""
    clauses = [c for c in note.split("; ") if "agree" not in c]
    return "; ".join(clauses) if any(map(CONTRADICTS.search, clauses)) else ""


@dataclass
class Deviation:
    """Where a method's paper and its released code part, or the paper is silent, as its file's head says it."""

    method: str
    head: str
    presets: list[str]
    settings: list[list[str]]  # a key, and its value under each preset


def deviations() -> list[Deviation]:
    out = []
    for name, cls in methods().items():
        head = (sys.modules[cls.__module__].__doc__ or "").strip()
        values = {p: cls.Config(**over).model_dump(mode="json") for p, over in cls.presets.items()}
        keys = [k for k in next(iter(values.values())) if len({str(v[k]) for v in values.values()}) > 1]
        out.append(Deviation(name, head, [*values], [[k, *(str(v[k]) for v in values.values())] for k in keys]))
    return out
