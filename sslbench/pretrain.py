"""`sslbench pretrain`: from the words of a command line to a recipe, a plan, and a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .data import known_size, open_split
from .errors import UserError
from .method import get_method
from .paths import home
from .recipe import (
    Batch,
    Recipe,
    choose,
    data_name,
    dump,
    find_recipe,
    merge,
    name_of,
    parse_sets,
    read_tree,
    resolve,
    unpacked_name,
)
from .settings import is_known, look, settings_for, shorten_warmup


def compose(
    method: str,
    *,
    recipe: str | None = None,
    preset: str | None = None,
    sets: list[str] | None = None,
    science: dict[str, Any] | None = None,
    machine: dict[str, Any] | None = None,
) -> Recipe:
    """The recipe that is meant: a named or chosen file, then the preset, the flags that were given, and --set.

    For data that no recipe of the method is for, what fits the set comes between the file and these; `notes` of the
    recipe say so, and where a warm-up was too long for the epochs asked for.
    """
    get_method(method)
    given = drop_none({"science": science or {}, "machine": machine or {}})
    said = given.get("science", {})
    if "arch" in said:
        from .vit import get_arch

        get_arch(said["arch"])
    asked = merge(given, parse_sets(sets or []))
    arch, spec = said.get("arch"), said.get("data", {}).get("spec")
    notes, fitted = [], None
    if recipe:
        path = find_recipe(recipe)
    elif is_known(method, arch, spec):
        path = choose(method, arch, spec)
    else:
        images, pixels = look(spec)
        batch = asked.get("science", {}).get("batch_size")
        fitted = settings_for(method, arch, images, pixels, unpacked_name(data_name(spec)), batch)
        path = fitted.recipe
        what = f"{arch} on {data_name(spec)}" if arch else data_name(spec)
        seen = f"no recipe of {name_of(method)} is for {what}: {images:,} images of about {pixels} pixels get"
        notes = [seen, *fitted.why]
    tree = merge(merge(read_tree(path), fitted.tree if fitted else {}), given)
    named = tree.get("science", {}).get("method", {}).get("name")
    if named != method:
        if named is not None and ":" not in method:
            raise UserError(f"recipe {path.stem} is for {named}, not {method}; leave --recipe out or name another")
        tree = merge(tree, {"science": {"method": {"name": method}}})
    if preset:
        tree = merge(tree, {"science": {"method": {"preset": preset}}})
    tree = merge(tree, parse_sets(sets or []))
    name = f"{path.parent.name}/{path.stem}" if path.parent.name == method else path.stem
    resolved = resolve(tree, name)
    shortened = shorten_warmup(resolved.science, asked.get("science", {}))
    resolved.notes.extend([*notes, *filter(None, [shortened])])
    return resolved


def drop_none(tree: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that nobody gave a value."""
    out = {k: drop_none(v) if isinstance(v, dict) else v for k, v in tree.items()}
    return {k: v for k, v in out.items() if v is not None and v != {}}


def length(recipe: Recipe) -> tuple[int, int, int]:
    """(images, steps an epoch, steps); needs no data where the set's size is known."""
    spec, batch = recipe.science.data.spec, recipe.science.batch_size
    images = known_size(spec)
    if images is None:
        images = len(open_split(spec, "train"))
    if images < batch:
        raise UserError(f"a batch of {batch} is more than the {images} images of '{spec}'; use --batch-size")
    return images, images // batch, round(images // batch * recipe.science.epochs)


def peak(recipe: Recipe, per_epoch: int, steps: int) -> float:
    """The largest lr of the run's steps: the recipe's peak, where the run is long enough to reach it."""
    from .train.optim import learning_rate

    s = recipe.science
    end = int(s.optim.warmup_epochs * per_epoch)
    near = {min(max(step, 0), steps - 1) for step in (end, end + 1, steps - 1)} if steps else set()
    return max((learning_rate(s.optim, s.batch_size, step / per_epoch, s.epochs) for step in near), default=0.0)


def dry(recipe: Recipe, console: Console) -> dict[str, Any]:
    """Print what would run. Builds the model on shapes alone, and needs no data."""
    from .train.meter import build, flops_per_image
    from .vit import count_parameters

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
    console.print(f"batch       {batch}")
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


def start(recipe: Recipe, out: Path | None, console: Console, slurm: str | None = None) -> dict[str, str]:
    """Run it, in `--out` or in runs/<name>; with `slurm`, sbatch's options, as a job of a cluster."""
    from .train.job import run_name
    from .train.launch import agree
    from .train.loop import pretrain

    folder = out or home() / "runs" / run_name(recipe)
    console.print(
        f"{recipe.method_name} {recipe.science.arch} on {data_name(recipe.science.data.spec)}, recipe {recipe.name}"
    )
    for line in recipe.notes:
        console.print(line, markup=False)
    if slurm is not None:
        from .train.slurm import submit

        return submit(recipe, folder, slurm, console)
    agree(recipe.machine)
    console.print(f"batch {Batch.of(recipe)}")
    status = pretrain(recipe, folder, Console(stderr=True, highlight=False))
    console.print(f"{status}: {folder}")
    return {"run": str(folder), "status": "finished" if status == "already finished" else status}
