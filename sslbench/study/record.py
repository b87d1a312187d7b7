"""What is kept of a study beside its numbers: results/studies/NAME.json, from which the report is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .. import provenance
from ..errors import UserError
from ..files import write_json
from ..method import name_of
from ..paths import home
from .cells import UNTRAINED, Cell, ResolvedRow
from .spec import Study

FORMAT = 1


def studies_folder() -> Path:
    return home() / "results" / "studies"


def read_record(path: Path) -> dict[str, Any]:
    """What `keep` wrote, {} where nothing is."""
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text())
    except ValueError as e:
        raise UserError(f"{path} is not readable ({e}); remove it, and the study writes it again") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(
            f"{path} is not what `sslbench study` of this version writes; remove it, the study makes it anew"
        )
    return record


def keep(
    name: str, study: Study, rows: list[ResolvedRow], cells: list[Cell], trials: list[Cell], factors: dict[str, float]
) -> dict[str, Any]:
    """Write down, and return, what was said before the first final run, and which runs its numbers are of."""
    path = studies_folder() / f"{name}.json"
    before = read_record(path)
    declared = before.get("declared")
    if declared is None and any(c.recipe and c.status != "open" for c in cells):
        declared = {"hash": study.hash(), "created": provenance.now()}
    curves = {c["run"]: c["watched"] for c in before.get("cells", []) if c.get("watched")}
    record = {
        "format": FORMAT,
        "name": name,
        "study": study.model_dump(mode="json", exclude_defaults=True, exclude={"name"}),
        "hash": study.hash(),
        "declared": declared,  # the file as it was when its first final run began
        "data": rows[0].recipe.science.data.spec.rpartition("/")[2],
        "rows": {
            r.name: {
                "label": r.label,
                "method": name_of(r.recipe.method),
                "control": r.name in study.controls,
                "lr": r.recipe.science.optim.lr,
                "batch_size": r.recipe.science.batch_size,
            }
            for r in rows
        },
        "cells": [_cell(c) | ({"watched": w} if (w := watched(c) or curves.get(c.run)) else {}) for c in cells],
        "trials": [{**_cell(c), "factor": c.factor} for c in trials],
        "chosen": factors,
    }
    if record != before:
        write_json(path, record)
    return record


def watched(c: Cell) -> list[list[float]]:
    """[[share of the run, k-NN accuracy on a part of train], ...] of a run whose folder is there."""
    path = home() / "runs" / c.run / "metrics.jsonl"
    if c.recipe is None or not path.is_file():
        return []
    entries = []
    for line in path.read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:  # the torn last line of a killed run
            continue
    total = max((e["step"] for e in entries), default=0)
    return [[round(e["step"] / total, 4), e["knn_watch"]] for e in entries if "knn_watch" in e]


def _cell(c: Cell) -> dict[str, Any]:
    return {
        "row": c.row,
        "budget": c.budget,
        "seed": c.seed,
        "recipe_hash": c.recipe.hash() if c.recipe else None,
        "run": c.run,
        "arch": c.recipe.science.arch if c.recipe else c.run.removeprefix(f"{UNTRAINED}:").partition("@")[0],
        "epochs": c.recipe.science.epochs if c.recipe and not c.recipe.science.device_minutes else None,
        "steps": c.steps,
        "flops": c.flops,
        "numbers": {name: r.id for name, r in c.numbers.items()},
        "status": c.status,
        "reason": c.reason,
    }
