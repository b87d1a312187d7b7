"""A study's results from what is kept of it and the ledger: rankings, what else was measured, cost, tuning."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from .. import ledger, right
from ..ledger import Record
from ..study.budget import parse_budget
from ..study.cells import UNTRAINED
from ..study.measure import DENSE
from ..study.rank import Numbers, Ranking, rank
from ..study.record import read_record, studies_folder
from ..study.spec import Study
from .tables import by_run_seed, cell_of, plain_name


@dataclass
class Result:
    """All that can be said of a study. `beside`: {budget: {row: {metric: "41.2 ± 0.8"}}} but for the main metric."""

    record: dict[str, Any]
    study: Study
    rankings: list[Ranking]  # by the main metric, the largest budget first
    beside: dict[str, dict[str, dict[str, str]]]
    spent: list[dict[str, Any]]  # of each row and budget: epochs, steps, TFLOP, seconds, mean over seeds
    notes: list[str]

    @property
    def name(self) -> str:
        return self.record["name"]

    @property
    def failed(self) -> list[str]:
        """The runs that failed, each with its reason."""
        cells = [c for c in self.record["trials"] + self.record["cells"] if c["status"] == "failed"]
        return [f"{c['row']} {c['budget']} seed {c['seed']}: {c['reason']}" for c in cells]


def results() -> list[Result]:
    """The results of every study that is kept, by name."""
    kept = [read_record(path) for path in sorted(studies_folder().glob("*.json"))]
    records = {r.id: r for r in ledger.read()} if kept else {}
    return [result(record, records) for record in kept]


def result(record: dict[str, Any], records: dict[str, Record]) -> Result:
    """records: the ledger's by id; a number that is gone from there is left out."""
    study = Study.model_validate({**record["study"], "name": record["name"]})
    numbers_of = _found(record["cells"], records)
    metric = study.metric or next((m for row in numbers_of for m in numbers_of[row]), None)
    budgets = list(dict.fromkeys(c["budget"] for c in record["cells"] if c["recipe_hash"]))
    budgets.sort(key=lambda b: -parse_budget(b).amount if b else 0)
    kept = right.read(r.id for by in numbers_of.values() for r in by.get(metric or "", []))
    rankings, beside = [], {}
    for budget in budgets:
        word = budget or _one_length(record["cells"])
        rows = list(dict.fromkeys(c["row"] for c in record["cells"] if c["budget"] == budget or c["row"] == UNTRAINED))
        beside[word or "as their recipes are"] = {
            row: {m: str(cell_of(rs)) for m, rs in _at(numbers_of, row, budget).items() if m != metric} for row in rows
        }
        numbers = [_numbers(row, _at(numbers_of, row, budget).get(metric or "", []), kept, record) for row in rows]
        if metric and word and any(n.by_seed for n in numbers):
            rankings.append(rank(word, metric, numbers, _words(metric)))
    spent = [_spent(row, budget, record["cells"], numbers_of) for budget in budgets for row in record["rows"]]
    return Result(record, study, rankings, beside, [s for s in spent if s], _notes(record, study))


Found = dict[tuple[str, str], dict[str, list[Record]]]  # (row, budget) -> metric -> a record a seed


def _found(cells: list[dict[str, Any]], records: dict[str, Record]) -> Found:
    out: Found = {}
    for c in cells:
        metrics = out.setdefault((c["row"], c["budget"]), {})
        for name, id in c["numbers"].items():
            if id in records:
                metrics.setdefault(name, []).append(records[id])
    return out


def _at(found: Found, row: str, budget: str) -> dict[str, list[Record]]:
    """What a row has at a budget; the untrained ViT has none and stands at each."""
    return found.get((row, budget)) or found.get((row, ""), {}) if row == UNTRAINED else found.get((row, budget), {})


def _one_length(cells: list[dict[str, Any]]) -> str:
    """`3epochs` where rows that are run as their recipes are have one length; '' where they do not: nothing ranks."""
    epochs = {c["epochs"] for c in cells if c["recipe_hash"]}
    return f"{next(iter(epochs)):g}epochs" if len(epochs) == 1 else ""


def _numbers(row: str, records: list[Record], kept: dict[str, Any], record: dict[str, Any]) -> Numbers:
    by_seed = {seed: fmean(r.value for r in group) for seed, group in by_run_seed(records).items()}
    numbers = Numbers(row, by_seed, records[0].stderr if records else None)
    numbers.right = {r.run_seed: kept[r.id] for r in records if r.id in kept}
    numbers.control = row == UNTRAINED or record["rows"].get(row, {}).get("control", False)
    return numbers


def _words(metric: str) -> str:
    """knn_mean -> k-NN, mean; coco_ocl -> bbox AP (coco_ocl)"""
    protocol = metric.partition("_")[0]
    if protocol in DENSE:
        return f"{DENSE[protocol].replace('_ap', ' AP').replace('miou', 'mIoU')} ({metric})"
    return plain_name(metric, f"{protocol}_top1")


def _spent(row: str, budget: str, cells: list[dict[str, Any]], found: Found) -> dict[str, Any]:
    its = [c for c in cells if (c["row"], c["budget"]) == (row, budget) and c["recipe_hash"]]
    records = [r for rs in found.get((row, budget), {}).values() for r in rs]
    if not its or not records:
        return {}
    trained = [r.pretrain.cost for r in records]
    seconds = [3600 * c.device_hours for c in trained if c and c.device_hours]
    flops = [c.flops for c in trained if c and c.flops]
    epochs = [r.pretrain.epochs for r in records if r.pretrain.epochs]
    return {
        "row": row,
        "budget": budget,
        "epochs": fmean(epochs) if epochs else None,
        "steps": its[0]["steps"],
        "TFLOP": fmean(flops) / 1e12 if flops else None,
        "device_s": fmean(seconds) if seconds else None,
        "seeds": len({c["seed"] for c in its if c["numbers"]}),
    }


def _notes(record: dict[str, Any], study: Study) -> list[str]:
    """What a reader must know before the numbers."""
    notes = []
    declared = record["declared"]
    if declared and declared["hash"] != record["hash"]:
        notes.append(
            f"The study's file changed after its first final run: it was {declared['hash']} on {declared['created']}, "
            f"and is {record['hash']} now."
        )
    return [*notes, tuning(record, study)]


def tuning(record: dict[str, Any], study: Study) -> str:
    """How the rows were tuned, in a sentence; that they were not."""
    if study.tune is None:
        return "Not tuned: each row has its recipe's lr."
    factors = study.tune.lr_factors
    said = ", ".join(f"{row} x {f:g}" for row, f in record["chosen"].items())
    edge = [row for row, f in record["chosen"].items() if f in (min(factors), max(factors))]
    text = (
        f"Tuned: {len(factors)} trials a row, its lr times {', '.join(f'{f:g}' for f in factors)}, at the smallest "
        f"budget, with a seed of their own, chosen by k-NN on a tenth of train: {said}."
    )
    return text + (f" At the edge of that grid: {', '.join(edge)}." if edge else "")


def as_entries(r: Ranking) -> list[dict[str, Any]]:
    """A ranking as plain data, row by row from the first."""
    out = []
    for place, s in enumerate(r.rows, 1):
        differences = {}
        for other in r.rows:
            if d := r.between(s.row, other.row):
                differences[other.row] = {**asdict(d), "told_apart": d.told_apart}
        out.append({"budget": r.budget, "metric": r.metric, "place": place, **asdict(s), "differences": differences})
    return out
