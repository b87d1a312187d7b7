"""`sslbench quickstart`: a study of every method on built-in images, each with the same time, and its page."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console

from . import ledger
from .errors import UserError
from .ledger import Record
from .method import methods
from .paths import home
from .report.page import write_page
from .study.cells import UNTRAINED
from .study.command import Plan
from .study.results import result
from .study.spec import Study, check

ARCH, DATA, SIZE = "vit_mini4", "builtin", 24  # views of 24 pixels: half the tokens, so twice the images in a minute
TRAINING = 0.75  # of the time; the rest is for decoding, evaluations and the page


def quickstart(minutes: float, seed: int, out: Path | None, console: Console) -> dict[str, Any]:
    """Pre-train, evaluate, report, in about `minutes`. Returns {"report", "files", "numbers", "wall_s"}."""
    if not minutes > 0:
        raise UserError(f"--minutes {minutes}: expected a time, such as 4.5")
    began = time.perf_counter()
    names = list(methods())
    console.print(f"{len(names)} methods ({', '.join(names)}) on 4,000 CIFAR-10 images, about {minutes:g} minutes\n")
    study = study_of_all(names, 60 * minutes * TRAINING / len(names), seed)
    plan = Plan(study, None, None, [], [])
    plan.run(1, console)
    ids = {r.id for c in plan.cells for r in c.found.values()}
    records = {r.id: r for r in ledger.read() if r.id in ids}
    shown = result(plan.keep(), records)
    folder = out or home() / "results" / "report"
    written = write_page([*records.values()], folder, notes=notes(plan, study), shown=[shown])
    wall = time.perf_counter() - began
    console.print(f"\n{wall:.0f} s in all. The report: {written['report']}")
    return {**written, "wall_s": wall}


def study_of_all(names: list[str], seconds: float, seed: int) -> Study:
    """Each method for so many seconds of training, beside the untrained ViT."""
    tree = {
        "name": "quickstart",
        "question": "Does every method run here, and does it learn?",
        "answer": "k-NN above the untrained ViT of the same shape, by the better of two pools, by more than the noise. "
        "One seed ranks nothing.",
        "metric": "knn_mean",
        "rows": {name: {} for name in names},
        "untrained": True,
        "science": {"arch": ARCH, "data": {"spec": DATA, "image_size": SIZE}},
        "budgets": [f"{seconds:.1f}s"],
        "seeds": [seed],
        "evaluations": [{"protocol": p, "pool": ["cls", "mean"]} for p in ("knn", "linprobe")],
    }
    return check(Study.model_validate(tree))


def notes(plan: Plan, study: Study) -> list[str]:
    """What a reader must know: how little time this was, and who has not gained from it."""
    text = (
        f"Each method trained for {study.budgets[0].removesuffix('s')} s on this machine. Papers train thousands of "
        "times longer: read this page as a check that everything runs and learns, not as a ranking."
    )
    knn = {c.row: {n: r for n, r in c.found.items() if n.startswith("knn")} for c in plan.cells}
    flat = []
    for row, its in knn.items():
        if row == UNTRAINED or not its:
            continue
        gain, noise = better_gain(its, knn[UNTRAINED])
        if gain < noise:
            flat.append(f"{row} ({gain:+.1f} points, noise {noise:.1f})")
    if not flat:
        return [text]
    return [text, f"No clear k-NN gain over the untrained ViT: {', '.join(flat)}. `sslbench quickstart --minutes 60` "
            f"gives each more time."]  # fmt: skip


def better_gain(trained: dict[str, Record], untrained: dict[str, Record]) -> tuple[float, float]:
    """(points of the better pool above the untrained ViT's, half-width of the 95 % interval of such a difference)."""
    gain, name = max((r.value - untrained[n].value, n) for n, r in trained.items())
    errors = [(records[name].stderr or 0.0) ** 2 for records in (trained, untrained)]
    return gain, 1.96 * sum(errors) ** 0.5
