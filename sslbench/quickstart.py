"""`sslbench quickstart`: every method on built-in images, each with the same time, and a report of what came out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .data import open_split
from .errors import UserError
from .evaluate.run import eval_recipe, evaluate
from .ledger import Record
from .method import methods
from .paths import home
from .pretrain import compose
from .recipe import Recipe
from .report.page import write_page
from .train.job import run_name
from .train.loop import TrainStep, make_fabric, pretrain
from .train.meter import build
from .train.optim import adamw

ARCH, DATA, SIZE = "vit_mini4", "builtin", 24  # views of 24 pixels: half the tokens, so twice the images in a minute
PROTOCOLS = [(kind, pool) for kind in ("knn", "linprobe") for pool in ("cls", "mean")]
REPORT_S = 12.0  # what the pages and pictures take, with some air


def quickstart(minutes: float, seed: int, out: Path | None, console: Console) -> dict[str, Any]:
    """Pre-train, evaluate, report, in about `minutes`. Returns {"report", "files", "numbers", "wall_s"}."""
    if not minutes > 0:
        raise UserError(f"--minutes {minutes}: expected a time, such as 4.5")
    began = time.perf_counter()
    names = list(methods())
    console.print(f"{len(names)} methods ({', '.join(names)}) on 4,000 CIFAR-10 images, about {minutes:g} minutes\n")
    records = _measure(f"untrained:{ARCH}@{SIZE}", seed, console)
    evaluation_s = time.perf_counter() - began  # imports and decoding too: an upper bound for the next ones
    share = (60 * minutes - evaluation_s - REPORT_S) / len(names) - evaluation_s
    seconds: dict[str, float] = {}
    for name in names:
        start = time.perf_counter()
        science = {"arch": ARCH, "data": {"spec": DATA, "image_size": SIZE}, "seed": seed}
        recipe = compose(name, science=science)
        recipe = _sized(recipe, share)
        folder = home() / "runs" / run_name(recipe)
        pretrain(recipe, folder, Console(stderr=True, highlight=False))
        seconds[name] = time.perf_counter() - start
        records += _measure(str(folder), seed, console)
    written = write_page(records, out or home() / "results" / "report", notes=_notes(records, seconds))
    wall = time.perf_counter() - began
    console.print(f"\n{wall:.0f} s in all. The report: {written['report']}")
    return {**written, "wall_s": wall}


def _sized(recipe: Recipe, seconds: float) -> Recipe:
    """The recipe with as many epochs as fit in `seconds` on this machine, a tenth of them warm-up."""
    steps = len(open_split(DATA, "train")) // recipe.science.batch_size
    done = max(1, int(seconds / _step_seconds(recipe)))
    epochs = done / steps
    science = recipe.science.model_copy(
        update={"epochs": epochs, "optim": recipe.science.optim.model_copy(update={"warmup_epochs": epochs / 10})}
    )
    return recipe.model_copy(update={"science": science})


def _step_seconds(recipe: Recipe) -> float:
    """One training step here and now: the median of three, after one to warm up."""
    fabric = make_fabric(recipe.machine)
    step = TrainStep(build(recipe))
    optimizer = adamw(step.method, recipe.science.optim)
    model, optimizer = fabric.setup(step, optimizer)
    images = open_split(DATA, "train").images[: recipe.science.batch_size].to(fabric.device)  # type: ignore[union-attr]
    generator = torch.Generator(fabric.device).manual_seed(0)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        fabric.backward(model(images, generator)["loss"])
        optimizer.step()
        optimizer.zero_grad()
        step.method.after_step(0.5)
        if fabric.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[1]


def _measure(run: str, seed: int, console: Console) -> list[Record]:
    records: list[Record] = []
    for kind, pool in PROTOCOLS:
        records += evaluate(eval_recipe(kind, sets=[f"science.pool={pool}"]), run, DATA, seed)
    main = {r.protocol.name: r.value for r in records if r.metric in ("knn_top1", "linprobe_top1")}
    console.print(f"{records[0].method:10}" + "  ".join(f"{k} {v:.1f} %" for k, v in main.items()))
    return records


def _notes(records: list[Record], seconds: dict[str, float]) -> list[str]:
    """What a reader must know: how little time this was, and who has not gained from it."""
    knn = {(r.method, r.protocol.name): r for r in records if r.metric == "knn_top1"}
    notes = [
        "Each method had the same share of a few minutes on this machine. Papers train thousands of times longer: "
        "read this page as a check that everything runs and learns, not as a ranking.",
    ]
    flat = []
    for method, spent in seconds.items():
        pools = [p for m, p in knn if m == method]
        best = max(knn[method, p].value - knn["untrained", p].value for p in pools)
        noise = 1.96 * 2**0.5 * (knn[method, pools[0]].stderr or 0)
        if best < noise:
            flat.append(f"{method} ({best:+.1f} points after {spent:.0f} s, noise {noise:.1f})")
    if flat:
        notes.append(
            f"No clear k-NN gain over the untrained ViT yet: {', '.join(flat)}. Methods that reconstruct pixels, or "
            f"that encode two whole views with a momentum copy beside, take longer to show one; "
            f"`sslbench quickstart --minutes 60` gives each more time."
        )
    return notes
