"""What the loop is given: how to build, feed and keep a model. A pre-training, or what evaluate/ makes of one."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from pydantic import BaseModel

from ..data import ImageSet, data_name, open_split
from ..files import write_weights
from ..method import Method, get_method
from ..recipe import Batch, Machine, Recipe
from .build import build, flops_per_image
from .optim import adamw
from .start import Start


class Job:
    """What the loop trains, and what is kept of it. This one pre-trains."""

    kind = "pretrain"
    too_large = "use --batch-size"  # advice where a batch is more than there are images
    distort: Callable[[Image], Image] | None = None  # of PIL crops
    labelled = False  # whether a batch is (images, labels)
    crop_tries = 10  # see views.crop_boxes
    interpolation = "bicubic"  # of crops
    device_minutes: float | None = None  # the run's length where its epochs are not

    def __init__(self, recipe: Recipe, start: Start | None = None) -> None:
        """start: the weights that `science.init` names."""
        s = recipe.science
        if (s.init is None) != (start is None):
            raise ValueError("science.init and the weights that it names go together: see evaluate/start.py")
        self.start = start
        self.recipe: BaseModel = recipe  # written into the run folder
        self.label = f"{recipe.method_name} {s.arch}"
        self.machine, self.optim, self.spec = recipe.machine, s.optim, s.data.spec
        self.seed, self.epochs, self.batch_size = s.seed, s.epochs, s.batch_size
        self.device_minutes = s.device_minutes
        self.image_size, self.crop_scale = s.data.image_size or 0, s.augment.crop_scale
        self.interpolation = s.augment.interpolation
        self.identity = identity(recipe)

    def batch(self) -> Batch:
        return Batch.of(self._pretraining)

    def data(self) -> ImageSet:
        return open_split(self.spec, "train")

    def build(self) -> Method:
        """The module; it may draw its weights from torch's global generator."""
        method = build(self._pretraining)
        if self.start:
            self.start.apply(method)
        return method

    def optimizer(self, method: Method) -> torch.optim.Optimizer:
        return adamw(method, self.optim)

    def flops_per_image(self) -> float:
        return flops_per_image(self._pretraining)

    def info(self) -> dict[str, Any]:
        """What run.json says of it, beside what it says of every run."""
        r = self._pretraining
        return {
            "method": r.method_name,
            "preset": preset_label(r),
            "arch": r.science.arch,
            "data": data_name(r.science.data.spec),
            "recipe": r.name,
            "recipe_hash": r.hash(),
            "seed": r.science.seed,
            "epochs": r.science.epochs,
            "batch_size": r.science.batch_size,
            **({"init": self.start.facts} if self.start else {}),
        }

    def save_weights(self, path: Path, method: Method) -> None:
        save_weights(path, method, self._pretraining)

    @property
    def _pretraining(self) -> Recipe:
        assert isinstance(self.recipe, Recipe)
        return self.recipe


def on(job: Job, machine: Machine) -> Job:
    """The same job on another machine."""
    other = copy.copy(job)
    other.machine, other.recipe = machine, job.recipe.model_copy(update={"machine": machine})
    return other


def identity(recipe: Recipe) -> dict[str, Any]:
    """What a run folder belongs to."""
    s = recipe.science
    return {"arch": s.arch, "recipe_hash": recipe.hash(), "seed": s.seed}


def run_name(recipe: Recipe) -> str:
    s = recipe.science
    seed = f"_s{s.seed}" if s.seed else ""
    return f"{recipe.method_name}_{s.arch}_{data_name(s.data.spec)}_{recipe.hash()[:8]}{seed}"


def save_weights(path: Path, method: Method, recipe: Recipe) -> None:
    """The encoder, float32, timm's names; the metadata says what rebuilds it."""
    encoder = method.encoder
    metadata = {
        "arch": recipe.science.arch,
        "image_size": str(recipe.science.data.image_size),
        "method": recipe.method_name,
        "pool": method.pool,
        "mean": json.dumps(recipe.science.augment.mean),
        "std": json.dumps(recipe.science.augment.std),
        "recipe_hash": recipe.hash(),
        "timm": encoder.arch.timm,
        "timm_kwargs": json.dumps(encoder.arch.timm_kwargs(encoder.image[0])),
    }
    write_weights(path, {k: v.float() for k, v in encoder.state_dict().items()}, metadata)


def preset_label(recipe: Recipe) -> str:
    """The preset's name, and what the recipe sets otherwise: `paper`, `paper+kappa=16`, `paper+init=mae_vit_b16`."""
    cls = get_method(recipe.method)
    preset = cls.Config(**cls.presets[recipe.preset]).model_dump(mode="json")
    changed = [f"{k}={recipe.science.method[k]}" for k, v in preset.items() if recipe.science.method[k] != v]
    if init := recipe.science.init:
        changed.append(f"init={Path(init.source).name}")
    return "+".join([recipe.preset, *changed])
