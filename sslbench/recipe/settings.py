"""Settings that no recipe states: for data that none is for, what fits the set; for fewer epochs, their warm-up."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ..data import MemoryImages, data_name, known_size, open_split, unpacked_name
from ..errors import UserError
from ..method import name_of
from ..paths import recipe_files
from ..vit import ARCHS, get_arch
from .read import choose, read_tree

SMALL, MIDDLE = 48, 128  # pixels of an image's short side: below, CIFAR's size; from there on, photographs
STEPS = 16  # an epoch, at least
LEAST = 8  # images a step, where there are as many: fewer leave nothing to contrast
# Of sets that a plan may be asked about before they are on this machine; all others known by name are photographs.
PIXELS = {"builtin": 32, "cifar10": 32, "cifar100": 32, "tiny-imagenet": 64}

# Of a run, at most, unless it is asked for: what the shortest runs of the papers have (ccMIM Table 5, 40 of 100).
WARMUP_SHARE = 0.4


@dataclass(frozen=True)
class Settings:
    """`tree` replaces what `recipe` says; `why` has a line for each value that was chosen."""

    recipe: Path
    tree: dict[str, Any]
    why: list[str]
    borrowed: bool = False  # the recipe is another method's, whose config and contrastive batch say nothing here


def is_known(method: str, arch: str | None, spec: str | None) -> bool:
    """Whether the method has a recipe for this data on this arch (on any, where none is asked for)."""
    if spec is None:
        return True
    data = unpacked_name(data_name(spec))
    own = [n.split("/", 1)[1] for n in recipe_files() if n.startswith(f"{name_of(method)}/")]
    if arch is None or data == "imagenet":  # the papers' set: their settings, on whatever arch
        return any(name.endswith(f"_{data}") for name in own)
    return f"{arch}_{data}" in own


def look(spec: str) -> tuple[int, int]:
    """(training images, pixels of their short side) of a data SPEC; of a known set that is not here, by its name."""
    if images := known_size(spec):
        return images, min(PIXELS.get(part.partition(":")[0], 224) for part in spec.split("+"))
    data = open_split(spec, "train")
    if isinstance(data, MemoryImages):
        return len(data), min(data.images.shape[-2:])
    sides = []
    for i in range(0, len(data), -(-len(data) // 32)):
        try:
            sides.append(data.use(i, lambda image: min(image.size)))
        except OSError:  # the run counts those
            continue
    if not sides:
        raise UserError(f"none of the images of '{spec}' that were looked at can be read; see `sslbench data check`")
    return len(data), int(statistics.median(sides))


def settings_for(
    method: str, arch: str | None, images: int, pixels: int, data: str = "", batch_size: int | None = None
) -> Settings:
    """What fits `images` training images of about `pixels` a side, for any method alike.

    Views: 32 pixels for images below SMALL, 64 below MIDDLE, else 224; an arch that is asked for has its own. Epochs,
    base lr (the lr is that x batch / 256), warm-up and the method's config are those of its nearest recipe: of the
    arch, else of `data` (a set's name), else by the size of its views. The batch is the recipe's where an epoch then
    has STEPS steps, else the largest power of two that leaves as many; batch_size: asked for, so left alone. A
    contrastive batch or micro-batch of the recipe becomes the largest divisor that is no larger.
    """
    small = pixels < MIDDLE
    chosen = arch or ("vit_mini4" if small else "vit_s16")
    size = 64 if arch is None and SMALL <= pixels < MIDDLE else get_arch(chosen).image
    known = any(name.startswith(f"{name_of(method)}/") for name in recipe_files())
    if known:
        path = _nearest(chosen, size, data, name_of(method)) or choose(method, None, None)
    elif any_path := _nearest(chosen, size, data):
        path = any_path
    else:
        raise UserError("no recipes are bundled with this installation; give --recipe PATH")
    name, tree = f"{path.parent.name}/{path.stem}", read_tree(path)
    theirs, machine = tree.get("science", {}), tree.get("machine", {})
    science: dict[str, Any] = {"arch": chosen, "data": {"image_size": size}}
    kind = "small images" if small else "photographs"
    own = "the arch's own" if size == get_arch(chosen).image else "between CIFAR's and photographs'"
    why = [
        f"arch        {chosen}: {'asked for' if arch else f'for {kind}; --arch for another'}",
        f"views       {size} pixels: {own}",
    ]
    batch = batch_size or _batch(theirs.get("batch_size", 4096), images)
    if batch_size is None:
        science["batch_size"] = batch
        kept = batch == theirs.get("batch_size", 4096)
        reason = (
            f"{name}'s" if kept else f"a power of two, for {STEPS} steps an epoch; {name}'s is {theirs['batch_size']:,}"
        )
        why.append(f"batch size  {batch:,}: {reason}")
    compared = None
    if (most_compared := theirs.get("contrastive_batch")) and known:
        science["contrastive_batch"] = compared = _divisor(batch, most_compared)
        why.append(f"contrast    {compared:,} images: what divides the batch, up to the {most_compared:,} of {name}")
    changed = {"science": science}
    if isinstance(micro := machine.get("micro_batch"), int):
        changed["machine"] = {"micro_batch": _divisor(compared or batch, micro)}
    rest = "base lr, warm-up and the method's config" if known else "base lr and warm-up, for want of its own recipe"
    why.append(f"the rest    {theirs.get('epochs', 800):,} epochs, {rest}: {name}")
    return Settings(path, changed, why, borrowed=not known)


def _batch(theirs: int, images: int) -> int:
    fits = max(images // STEPS, min(LEAST, images), 1)
    return theirs if theirs <= fits else 2 ** int(math.log2(fits))


def _divisor(total: int, most: int) -> int:
    return next(n for n in range(min(total, most), 0, -1) if total % n == 0)


def _nearest(arch: str, size: int, data: str, method: str | None = None) -> Path | None:
    """The method's recipe, or any, that is nearest to what is wanted; recipes of one table alone are left out."""
    by_distance: dict[tuple[Any, ...], Path] = {}
    for name, path in recipe_files().items():
        owner, _, own = name.partition("/")
        named = max((a for a in ARCHS if own.startswith(f"{a}_")), key=len, default=None)
        if named is None or method not in (None, owner):
            continue
        views = read_tree(path)["science"].get("data", {}).get("image_size") or ARCHS[named].image
        of = own.removeprefix(f"{named}_")
        width = abs(math.log(ARCHS[named].dim / get_arch(arch).dim))
        key = (named != arch, of != data, abs(math.log(views / size)), of != "imagenet", width, name)
        by_distance[key] = path
    return by_distance[min(by_distance)] if by_distance else None


def shorten_warmup(science: BaseModel, given: dict[str, Any]) -> str:
    """Cut a warm-up that is more than WARMUP_SHARE of the epochs, as it is where these were made fewer.

    The hash is of the warm-up that is used. given: what the user said of `science`; a warm-up in it stays. Returns a
    line for the header, "" where nothing changed.
    """
    optim: Any = science if "warmup_epochs" in type(science).model_fields else getattr(science, "optim", None)
    if not hasattr(optim, "warmup_epochs") or "warmup_epochs" in {**given, **given.get("optim", {})}:
        return ""
    before, epochs = optim.warmup_epochs, science.epochs  # type: ignore[attr-defined]
    most = round(WARMUP_SHARE * epochs, 6)
    if before <= most:
        return ""
    optim.warmup_epochs = most
    return (
        f"warm-up     {most:g} of {epochs:g} epochs: {WARMUP_SHARE:.0%} of a run at most, where the recipe says "
        f"{before:g}; --set science.{'optim.' * (optim is not science)}warmup_epochs for another"
    )
