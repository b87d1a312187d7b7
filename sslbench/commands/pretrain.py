"""`sslbench pretrain`: what a recipe comes to, and its run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..data import data_name
from ..evaluate.start import pretrain
from ..paths import home
from ..recipe import Batch, Recipe, dump, length
from ..train.build import build, flops_per_image
from ..train.job import run_name
from ..train.launch import agree
from ..train.memory import fitted
from ..train.optim import learning_rate
from ..train.slurm import Queued, submit
from ..vit import count_parameters


def peak(recipe: Recipe, per_epoch: int, steps: int) -> float:
    """The largest lr of the run's steps: the recipe's peak, where the run is long enough to reach it."""
    s = recipe.science
    end = int(s.optim.warmup_epochs * per_epoch)
    near = {min(max(step, 0), steps - 1) for step in (end, end + 1, steps - 1)} if steps else set()
    return max((learning_rate(s.optim, s.batch_size, step / per_epoch, s.epochs) for step in near), default=0.0)


def dry(recipe: Recipe, console: Console) -> dict[str, Any]:
    """Print what would run. Builds the model on shapes alone, and needs no data."""
    with torch.device("meta"):
        method = build(recipe)
    s = recipe.science
    batch = Batch.of(recipe)
    images, per_epoch, steps = length(recipe)
    flops = flops_per_image(recipe)
    lr = s.optim.lr * s.batch_size / 256
    facts: dict[str, Any] = {
        "encoder_parameters": count_parameters(method.encoder),
        "parameters": count_parameters(method),
        "tokens_per_image": method.tokens_per_image(),
        "lr": lr,
        "lr_reached": peak(recipe, per_epoch, steps),
        "warmup_epochs": s.optim.warmup_epochs,
        "batch": batch.model_dump(),
        "images": images,
        "steps_per_epoch": per_epoch,
        "steps": steps,
        "flops_per_image": flops,
        "flops": flops * steps * batch.total,
        "hash": recipe.hash(),
        "notes": recipe.notes,
    }
    console.print(dump(recipe), markup=False, end="")
    for line in recipe.notes:
        console.print(line, markup=False)
    console.print(f"\nencoder     {facts['encoder_parameters'] / 1e6:.1f}M parameters ({s.arch}), "
                  f"{facts['parameters'] / 1e6:.1f}M with what is thrown away after")  # fmt: skip
    views = method.tokens_per_image()
    console.print(f"tokens      {views} an image in one step (a full image has {method.encoder.n_patches + 1})")
    auto = "; passes as the device's memory allows" if recipe.machine.micro_batch == "auto" else ""
    console.print(f"batch       {batch}{auto}")
    if method.compares_batch(s.method):
        console.print(f"contrast    {s.contrastive_batch or s.batch_size} images compared in one loss")
    console.print(
        f"lr          {lr:.4g} = {s.optim.lr:g} x {s.batch_size} / 256; the run reaches {facts['lr_reached']:.4g}, "
        f"after a warm-up of {s.optim.warmup_epochs:g} of {s.epochs:g} epochs"
    )
    console.print(
        f"steps       {facts['steps']:,} = {s.epochs} epochs x {per_epoch:,} ({images:,} images, last part dropped)"
    )
    console.print(f"compute     {flops / 1e9:.2f} GFLOP an image, {facts['flops']:.3g} FLOP in all")
    console.print(f"hash        {recipe.hash()} of science; seed {s.seed}")
    return {**facts, "recipe": recipe.model_dump(mode="json")}


class Pretraining(Queued):
    """A run, as a job of a cluster."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder

    def work(self, console: Console) -> str:
        return pretrain(self.recipe, self.folder, console, progress=False)


def start(recipe: Recipe, out: Path | None, console: Console, slurm: str | None = None) -> dict[str, str]:
    """Run it, in `--out` or in runs/<name>; with `slurm`, sbatch's options, as a job of a cluster."""
    introduce(recipe, console)
    return run(recipe, out or home() / "runs" / run_name(recipe), console, slurm)


def introduce(recipe: Recipe, console: Console) -> None:
    """Print what is to be trained, and what was chosen for it."""
    console.print(
        f"{recipe.method_name} {recipe.science.arch} on {data_name(recipe.science.data.spec)}, recipe {recipe.name}"
    )
    for line in recipe.notes:
        console.print(line, markup=False)


def run(recipe: Recipe, folder: Path, console: Console, slurm: str | None) -> dict[str, str]:
    """Train in that folder, or submit the job that does: {"run", "status"}."""
    if slurm is not None:
        return submit(recipe, folder, slurm, console, Pretraining)
    recipe = fitted(recipe.on(agree(recipe.machine)), console)
    console.print(f"batch {Batch.of(recipe)}")
    status = pretrain(recipe, folder, Console(stderr=True, highlight=False))
    console.print(f"{status}: {folder}")
    return {"run": str(folder), "status": "finished" if status == "already finished" else status}
