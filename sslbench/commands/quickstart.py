"""`sslbench quickstart`: a study of methods on built-in images, each with the same time, and its page."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from .. import ledger, right
from ..device import default_device, device_count
from ..errors import UserError
from ..ledger import Record
from ..method import get_method, methods
from ..paths import home
from ..provenance import cores
from ..report.page import write_page
from ..report.results import result
from ..study.cells import UNTRAINED
from ..study.grid import Grid
from ..study.spec import Study, StudyRow, read_study

TRAINING = 0.78  # of the time; the rest is for starting, evaluations and the page


def quickstart(
    minutes: float, seed: int, out: Path | None, console: Console, named: str | None = None
) -> dict[str, Any]:
    """Pre-train, evaluate, report, in about `minutes`. Returns {"report", "files", "numbers", "wall_s"}.

    named: methods, "ocl,dino", or "all"; None: the four hybrids and two controls, whose settings are for these minutes.

    As many methods at once as there are GPUs or, without one, cores: two small runs with a core each see half as many
    images again as one after the other with two.
    """
    if not minutes > 0:
        raise UserError(f"--minutes {minutes}: expected a time, such as 5")
    began = time.perf_counter()
    names = asked(named)
    device = default_device().type
    jobs = min(cores() if device == "cpu" else device_count(device), len(names))
    seconds = 60 * minutes * TRAINING / -(-len(names) // jobs)
    console.print(
        f"{len(names)} methods ({', '.join(names)}) on 4,000 CIFAR-10 images, {jobs} at once, {seconds:.0f} s each; "
        f"about {minutes:g} minutes\n"
    )
    study = study_of_all(names, seconds, seed)
    grid = Grid(study, None, None, [], [])
    grid.execute(jobs, console)
    ids = {r.id for c in grid.cells for r in c.numbers.values()}
    records = {r.id: r for r in ledger.read() if r.id in ids}
    shown = result(grid.keep(), records)
    folder = out or home() / "results" / "report"
    written = write_page([*records.values()], folder, notes=notes(grid, seconds), shown=[shown])
    wall = time.perf_counter() - began
    console.print(f"\n{wall:.0f} s in all. The report: {written['report']}")
    answer = {**written, "wall_s": wall}
    grid.check(console, answer)
    return answer


def asked(named: str | None) -> list[str]:
    """The methods that `--methods` means. UserError: one is unknown."""
    if named is None:
        return [name for name in read_study("quickstart").rows if isinstance(name, str)]
    if named == "all":
        return list(methods())
    names = list(dict.fromkeys(word.strip() for word in named.split(",") if word.strip()))
    for name in names:
        get_method(name)
    if not names:
        raise UserError("--methods names none; give all, or some of `sslbench list methods`, such as ocl,dino")
    return names


def study_of_all(names: list[str], seconds: float, seed: int) -> Study:
    """The study `quickstart` with each of these methods, for so many seconds of training; one seed, not tuned."""
    study = read_study("quickstart")
    study.name = f"quickstart_{seconds:.0f}s"  # not the record of the study itself
    study.question = f"Does every method run here, and does it learn in {seconds:.0f} s?"
    study.rows = {name: study.rows.get(name, StudyRow()) for name in names}
    study.controls = [name for name in study.controls if name in names]
    study.budgets, study.seeds, study.tune = [f"{round(seconds, 1):.10g}s"], [seed], None
    return study


def notes(grid: Grid, seconds: float) -> list[str]:
    """What a reader must know: how little time this was, and who has not gained from it."""
    text = (
        f"Each method trained for {seconds:.0f} s on this machine. Papers train thousands of times longer: read this "
        "page as a check that everything runs and learns, not as a ranking."
    )
    knn = {c.row: {n: r for n, r in c.numbers.items() if n.startswith("knn")} for c in grid.cells}
    untrained = knn.pop(UNTRAINED, {})
    gains = {row: better_gain(its, untrained) for row, its in knn.items() if its and untrained}
    flat = [f"{row} ({gain:+.1f} points, noise {noise:.1f})" for row, (gain, noise) in gains.items() if gain < noise]
    if flat:
        more = "`sslbench quickstart --minutes 60` gives each more time."
        return [text, f"No clear k-NN gain over the untrained ViT: {', '.join(flat)}. {more}"]
    if len(gains) < len(knn):  # a run failed: the study's part of the page says which
        return [text]
    return [text, "Every method ends above the untrained ViT of its shape by more than the noise over test images."]


def better_gain(trained: dict[str, Record], untrained: dict[str, Record]) -> tuple[float, float]:
    """(points of the better pool above the untrained ViT's, half-width of the 95 % interval of that difference on the
    same images)."""
    gain, name = max((r.value - untrained[n].value, n) for n, r in trained.items())
    a, b = trained[name], untrained[name]
    kept = right.read([a.id, b.id])
    if len(kept) < 2:  # of a ledger without them: as if of different images
        return gain, 1.96 * ((a.stderr or 0.0) ** 2 + (b.stderr or 0.0) ** 2) ** 0.5
    difference = kept[a.id].astype(float) - kept[b.id]
    return gain, 100 * 1.96 * float(np.std(difference)) / len(difference) ** 0.5
