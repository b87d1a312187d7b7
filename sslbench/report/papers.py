"""The papers' tables as printed, with what was measured beside; where the papers contradict themselves or the code."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ..ablate import paper_hashes
from ..errors import UserError, nearest
from ..evaluate.features import POOLS
from ..evaluate.run import eval_recipe
from ..ledger import Record
from ..method import methods
from ..paths import bundled
from ..recipe import digest
from ..views import VIEW
from ..vit import get_arch
from .tables import RowKey, cell_of, newest, row_key

PAPERS = {
    "ocl": "OCL (Yang et al. 2025)",
    "micl": "MiCL, the earlier version of OCL (Yang et al.)",
    "asl": "ASL (Li et al. 2024)",
    "ccmim": "ccMIM (Zhang et al. 2023)",
    "macrl": "MACRL (Yao et al. 2022)",
}

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
    sources: dict[tuple[int, int], list[str]]  # (row, column) -> a record's id for each number after a bar


def paper_tables() -> dict[str, Path]:
    """`ocl_t6` -> its CSV: paper by paper, its tables by number, then others, what the text says last."""

    def order(path: Path) -> tuple[int, int, str]:
        paper, _, table = path.stem.partition("_")
        at = [*PAPERS].index(paper) if paper in PAPERS else len(PAPERS)
        return at, int(table[1:]) if table[1:].isdigit() else 98 + (table == "text"), path.stem

    return {p.stem: p for p in sorted(bundled("results/paper").glob("*.csv"), key=order)}


def read_paper(name: str) -> pd.DataFrame:
    """A paper's table as printed, every column as text."""
    known = paper_tables()
    if name not in known:
        raise UserError(f"unknown table '{name}'{nearest(name, known)}; `sslbench list tables` shows all")
    return pd.read_csv(known[name], dtype=str, keep_default_na=False)


def reported_beside_measured(name: str, records: list[Record]) -> PaperTable:
    """A paper's table, with the ledger's numbers of the same setting and protocol beside the printed ones."""
    frame = read_paper(name)
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
    for _, group in frame.groupby(["row", *keys, "nth"], sort=False):
        cells = {}
        for _, line in group.iterrows():
            found = measured_for(line, frame, measured)
            cells[line[across]] = " | ".join([_printed(line, remarks), *(text for text, _ in found)])
            if found:
                sources[len(rows), len(keys) + columns.index(line[across])] = [id for _, id in found]
        rows.append([group.iloc[0][k].replace(";", ", ") for k in keys] + [cells.get(c, "") for c in columns])
    once = {k: frame[k].iloc[0] for k in KEYS if k not in (*keys, across) and frame[k].nunique() == 1}
    common = ", ".join(KEYS[k].format(v.replace(";", ", ")) for k, v in once.items() if v)
    names = {"column": "setting", "row": "where", "pretrain_data": "pre-trained on"}
    header = [names.get(k, k) for k in keys] + [c or "number" for c in columns]
    notes = [f"[{i}] {note}" for i, note in enumerate(remarks, 1)]
    return PaperTable(name, common, header, len(keys), rows, notes, sources)


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


def measured_for(line: Any, frame: pd.DataFrame, records: list[Record]) -> list[tuple[str, str]]:
    """What the ledger has for a printed number, each protocol and recipe for itself: `73.9 ± 0.2 (800 ep)`, and the id
    of a record behind it.

    A row of an ablation that is a recipe here has the numbers of that very recipe. Else nothing where the table has
    several lines of this method, arch, data and metric that a record cannot tell apart: it knows its epochs, but not a
    row's condition. Where the line is the only one, a record of other epochs says so.
    """
    tuned, of_row = tuned_epochs(line["condition"]), paper_hashes(f"{line['paper']}_{line['table']}").get(line["row"])
    if of_row:
        fitting = [r for r in records if r.pretrain.recipe_hash == of_row and _facts(r)[3:] == _wanted(line)[3:]]
    else:
        fitting = _by_facts(line, frame, records)
    found: dict[tuple[RowKey, str, str], list[Record]] = defaultdict(list)
    for r in fitting:
        if follows(r, protocol_of(line), tuned):
            found[row_key(r), r.protocol.name, r.protocol.hash].append(r)
    several = [len({*part}) > 1 for part in zip(*((key[-1], *protocol) for key, *protocol in found), strict=True)]
    out = []
    for ((_, _, epochs, preset, recipe), protocol, hash), group in sorted(found.items()):
        words = [preset] if preset not in ("", "paper") and not of_row else []
        words += [f"{epochs:g} ep" if epochs else "unknown epochs"] if f"{epochs:g}" != line["epochs"] else []
        words += [part for part, told in zip((recipe[:6], protocol, hash[:6]), several, strict=True) if told]
        cell = cell_of(group)
        if (printed := _number(line["value"])) is not None:
            words = [f"{cell.value - printed:+.1f}", *words]
        out.append((f"{cell} ({', '.join(words)})" if words else str(cell), cell.records[0].id))
    return out


def _by_facts(line: Any, frame: pd.DataFrame, records: list[Record]) -> list[Record]:
    """The records whose method, arch, data and epochs can be those of no other line of the table."""
    wanted = _wanted(line)
    records = [r for r in records if r.scale != "tiny" and _facts(r) == wanted]
    if not records:
        return []
    same = ["method", "arch", "pretrain_data", "metric", "dataset"]
    alike = frame[
        (frame[same] == line[same]).all(axis=1)
        & (frame["condition"].map(tuned_epochs) == tuned_epochs(line["condition"]))
    ]
    if (alike["epochs"] == line["epochs"]).sum() > 1:
        return []
    return [
        r
        for r in records
        if (r.scale == "paper" and len(alike) == 1) or line["epochs"] == f"{r.pretrain.epochs or 0:g}"
    ]


def _facts(r: Record) -> list[str]:
    words = [r.method, r.arch, r.pretrain.data or "", r.metric, r.dataset]
    return [w.replace("-", "_") for w in words]  # a folder is `imagenet-a` where the paper's data set is imagenet_a


def _wanted(line: Any) -> list[str]:
    return [plugin_of(line), *(line[k].replace("-", "_") for k in ("arch", "pretrain_data", "metric", "dataset"))]


def plugin_of(line: Any) -> str:
    """The method here that a printed row is of: MiCL is OCL's earlier version; MACRL's MoCo is run as MoCo v3."""
    return {"micl": "ocl", "MoCo": "mocov3"}.get(line["method"], line["method"])


def protocol_of(line: Any) -> tuple[str, str] | None:
    """The protocol that a printed number was measured under: (command, recipe); None for what is no such number."""
    paper, method, metric = line["paper"], line["method"], line["metric"]
    large = line["arch"] in ("vit_l16", "vit_h14", "vit_h16")
    small = "cifar" if line["dataset"].startswith("cifar") else "subsets"
    if metric == "linprobe_top1":
        of_paper = {"ccmim": "linprobe_ccmim", "macrl": f"linprobe_macrl_{small}"}
        if line["dataset"] != "imagenet":
            of_paper["asl"] = "linprobe_asl"
        own = "linprobe_mocov3" if method == "mocov3" and paper != "macrl" else of_paper.get(paper)
        if large and method in ("ocl", "micl"):
            own = "linprobe_ocl_l"
        return "eval linprobe", own or ("linprobe_mae_l" if large else "linprobe_mae")
    if metric == "finetune_top1":
        fine = {"inat18": "_inat", "inat19": "_inat", "flowers102": "_flowers"}.get(line["dataset"], "")
        if paper in ("ocl", "micl"):
            own = ("finetune_ocl_l" if large else "finetune_ocl_b") if method in ("ocl", "micl") else None
        else:
            own = {"asl": "finetune_asl", "ccmim": f"finetune_ccmim{fine}", "macrl": f"finetune_macrl_{small}"}[paper]
        return "eval finetune", own or ("finetune_l" if large else "finetune")
    if metric.startswith(("bbox_ap", "mask_ap")):
        size = {"vit_l16": "_l", "vit_s16": "_s"}.get(line["arch"], "")
        return "transfer coco", f"coco_{'ocl' if paper == 'micl' else paper}{size}"
    if metric in ("miou", "aacc", "macc"):
        own = "ade20k_ocl" if paper in ("ocl", "micl") else "ade20k_mae"
        return "transfer ade20k", "ade20k_ccmim" if paper == "ccmim" else f"{own}{'_l' if large else ''}"
    return ("eval robustness", "robustness") if metric == "top1" and "imagenet_" in line["dataset"] else None


def tuned_epochs(condition: str) -> int:
    """Epochs of the evaluation, where a row states them, as `linprobe epochs=100`; else 0."""
    stated = re.search(r"(?:linprobe|finetune)[ _]epochs=(\d+)", condition)
    return int(stated[1]) if stated else 0


def follows(r: Record, protocol: tuple[str, str] | None, epochs: int = 0) -> bool:
    """Whether a record was measured under that recipe as it is shipped, on whichever feature the recipe leaves open.

    epochs: of the evaluation, 0 for the recipe's.
    """
    pool = r.protocol.name.removeprefix(protocol[1] if protocol else "").removeprefix("_")
    if protocol is None or r.protocol.name not in (protocol[1], f"{protocol[1]}_{pool}") or pool not in ("", *POOLS):
        return False
    command, _, kind = protocol[0].partition(" ")
    if command != "eval" or kind == "robustness":
        return True
    sets = [f"science.epochs={epochs}"] if epochs else []
    science = eval_recipe(kind, protocol[1], sets).science.model_dump(mode="json")
    side = science.get("image_size") or get_arch(r.arch).image
    science = {**science, "pool": pool, "image_size": [side, side]}
    any_version = [science] if side < 224 else []  # of images that all see alike: features.view_of
    return r.protocol.hash in map(digest, [{**science, "view": VIEW}, *any_version])


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
