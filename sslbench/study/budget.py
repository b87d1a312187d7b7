"""Budgets: epochs, images, training FLOPs or device time, and what each makes of a recipe."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from ..data import known_size, open_split
from ..errors import UserError
from ..recipe import Recipe

KINDS: dict[str, tuple[Literal["epochs", "images", "flops", "device_s"], float]] = {
    "epochs": ("epochs", 1), "epoch": ("epochs", 1), "images": ("images", 1),
    "GFLOP": ("flops", 1e9), "TFLOP": ("flops", 1e12), "PFLOP": ("flops", 1e15), "EFLOP": ("flops", 1e18),
    "s": ("device_s", 1), "min": ("device_s", 60), "h": ("device_s", 3600),
}  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """What each row may spend: so many epochs, images, FLOPs of training, or seconds of a device."""

    text: str  # as it was given, without spaces
    kind: Literal["epochs", "images", "flops", "device_s"]
    amount: float


def parse_budget(text: str) -> Budget:
    """`100TFLOP`, `10epochs`, `20min`, `500000images`."""
    given = "".join(str(text).split())
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:[eE]\d+)?)([A-Za-z]+)", given)
    if not match or match[2] not in KINDS:
        raise UserError(f"budget '{text}': expected a number with one of {', '.join(KINDS)}, such as 100TFLOP or 20min")
    kind, unit = KINDS[match[2]]
    if not 0 < float(match[1]) < math.inf:
        raise UserError(f"budget '{text}' is a budget of {'everything' if float(match[1]) else 'nothing'}")
    return Budget(given, kind, float(match[1]) * unit)


def images_of(spec: str) -> int:
    """How many a data set's train split has; needs no data where that is known."""
    return known_size(spec) or len(open_split(spec, "train"))


def steps_for(recipe: Recipe, budget: Budget, flops_per_image: float) -> int:
    """Whole steps, rounded to the nearest, that the budget pays for; of device time the clock tells when they end."""
    batch = recipe.science.batch_size
    if budget.kind == "epochs":
        return round(images_of(recipe.science.data.spec) // batch * budget.amount)
    per_step = {"images": batch, "flops": flops_per_image * batch}[budget.kind]
    if not per_step:
        raise UserError(f"{recipe.method} counts no FLOPs, so a budget of {budget.text} has no length; give epochs")
    return round(budget.amount / per_step)


def within(recipe: Recipe, budget: Budget, warmup: float, flops_per_image: float) -> Recipe:
    """The recipe for that budget, the first `warmup` of it warm-up. UserError where that is less than a step."""
    new = recipe.model_copy(deep=True)
    s = new.science
    if budget.kind == "device_s":
        s.device_minutes = budget.amount / 60
        s.epochs, s.optim.warmup_epochs = 1, warmup  # of the schedule, which is the time's
        return new
    per_epoch = images_of(s.data.spec) // s.batch_size
    if not per_epoch:
        raise UserError(
            f"a batch of {s.batch_size} is more than the {images_of(s.data.spec)} images of '{s.data.spec}'; give "
            f"--set science.batch_size=, or another recipe for {recipe.method}"
        )
    steps = steps_for(recipe, budget, flops_per_image)
    if not steps:
        raise UserError(f"a budget of {budget.text} is less than one step of {recipe.method} ({s.batch_size} images)")
    epochs = steps / per_epoch
    s.epochs = int(epochs) if epochs == int(epochs) else epochs
    s.optim.warmup_epochs = warmup * epochs
    return new
