"""What the loop is given: how to build, feed and keep a model. Pre-training, fine-tuning, a probe or a transfer."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from PIL.Image import Image
from pydantic import BaseModel

from ..data import ImageSet, data_name, open_split
from ..data.loader import MicroBatches
from ..method import Method, get_method
from ..recipe import Batch, Machine, Optim, Recipe
from ..weights import write_weights
from .build import build, flops_per_image
from .diagnose import CollapseMeters
from .optim import adamw, learning_rate, weight_decay
from .start import Start
from .watch import Watch

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Images(Protocol):
    """What is trained on: of a length, and with a fingerprint that tells it from other images."""

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...


class Batches(Protocol):
    """One device's micro-batches. The same steps give the same ones, in whichever process."""

    steps_per_epoch: int
    wait_s: float  # host time spent waiting for data
    corrupt: set[int]  # indices of images that could not be read

    def __call__(self, first: int, last: int) -> Generator[Any]:
        """What `Trainable.build_views` takes, for each micro-batch of steps first .. last - 1."""
        ...

    def check_corrupt(self) -> None:
        """RunFailed where too many images could not be read."""
        ...


class Job(Protocol):
    """What the loop trains, and what is kept of it."""

    kind: str  # pretrain, finetune, linprobe, coco, ...
    label: str  # what a reader sees of it while it runs
    too_large: str  # advice where a batch is more than there are images
    recipe: BaseModel  # written into the run folder
    identity: dict[str, Any]  # of a run folder, which belongs to one
    spec: str  # the data's name, as a user gave it
    machine: Machine
    seed: int
    batch_size: int  # images a step, over all devices and accumulation
    epochs: float  # of the schedule
    device_minutes: float | None = None  # the run's length where its epochs are not
    pulls: bool = True  # whether to measure how the loss terms pull at the encoder (see diagnose.py)

    @property
    def clip_grad(self) -> float | None:
        """The largest norm of a step's gradient; None: any."""
        return None

    def batch(self) -> Batch:
        """How `batch_size` is divided over devices and passes. UserError where it cannot be."""
        ...

    def data(self) -> Images: ...

    def steps(self, per_epoch: int) -> int:
        """Return how many steps the whole run has."""
        return round(per_epoch * self.epochs)

    def build(self) -> Any:
        """The Trainable; it may draw its weights from torch's global generator."""
        ...

    def optimizer(self, method: Any) -> torch.optim.Optimizer:
        """Its groups may have an `lr_scale`, by which they learn faster or slower than `learning_rate` says."""
        ...

    def learning_rate(self, step: int, epoch: float) -> float:
        """Return the learning rate of a step, which is at that fractional epoch of the schedule."""
        ...

    def weight_decay(self, step: int, epoch: float) -> float | None:
        """Return a step's weight decay, for the groups that have any; None: it stays as the optimiser was made."""
        return None

    def batches(self, data: Any, method: Any, batch: Batch, fabric: Fabric) -> Batches:
        """What feeds this device."""
        ...

    def flops_per_image(self) -> float | None:
        """Return what a step costs, forward and backward. None: unknown before the first step, which is counted."""
        ...

    def warnings(self, method: Any, batch: Batch) -> list[str]:
        """What a reader should know before it trains. UserError where it cannot."""
        return []

    def meters(self, data: Any, method: Any, batch: Batch, device: torch.device) -> CollapseMeters | None:
        """What looks whether features collapse; None: nothing."""
        return None

    def watch(self, data: Any, method: Any, batch: Batch) -> Watch | None:
        """What reads an accuracy on the way; None: nothing."""
        return None

    def info(self) -> dict[str, Any]:
        """What run.json says of it, beside what it says of every run."""
        ...

    def save_weights(self, path: Path, method: Any) -> None: ...


class ImageJob(Job):
    """Learns from crops of images, all of one size: all jobs but transfer."""

    optim: Optim
    image_size: int
    crop_scale: tuple[float, float]
    crop_tries = 10  # see views.crop_boxes
    interpolation = "bicubic"  # of crops
    distort: Callable[[Image], Image] | None = None  # of PIL crops
    labelled = False  # whether a batch is (images, labels)

    @property
    def clip_grad(self) -> float | None:
        return self.optim.clip_grad

    def learning_rate(self, step: int, epoch: float) -> float:
        return learning_rate(self.optim, self.batch_size, epoch, self.epochs)

    def weight_decay(self, step: int, epoch: float) -> float | None:
        return None if self.optim.weight_decay_end is None else weight_decay(self.optim, epoch, self.epochs)

    def batches(self, data: ImageSet, method: Method, batch: Batch, fabric: Fabric) -> MicroBatches:
        """Images of one forward pass, or of all the passes that a gradient cache makes one of."""
        return MicroBatches(
            data,
            seed=self.seed,
            micro=batch.micro * batch.passes,
            world=batch.world,
            accumulation=batch.accumulation,
            rank=fabric.global_rank,
            device=fabric.device,
            crops=method.crop_list(),
            image_size=self.image_size,
            crop_scale=self.crop_scale,
            crop_tries=self.crop_tries,
            interpolation=self.interpolation,
            workers=self.machine.workers,
            distort=self.distort,
            labelled=self.labelled,
        )

    def meters(self, data: ImageSet, method: Method, batch: Batch, device: torch.device) -> CollapseMeters:
        return CollapseMeters(data, method, device, batch.total)


class Pretraining(ImageJob):
    """A recipe of `sslbench pretrain`."""

    kind = "pretrain"
    too_large = "use --batch-size"
    recipe: Recipe

    def __init__(self, recipe: Recipe, start: Start | None = None) -> None:
        """start: the weights that `science.init` names."""
        s = recipe.science
        if (s.init is None) != (start is None):
            raise ValueError("science.init and the weights that it names go together: see evaluate/start.py")
        self.start, self.recipe = start, recipe
        self.label = f"{recipe.method_name} {s.arch}"
        self.machine, self.optim, self.spec = recipe.machine, s.optim, s.data.spec
        self.seed, self.epochs, self.batch_size = s.seed, s.epochs, s.batch_size
        self.device_minutes = s.device_minutes
        self.image_size, self.crop_scale = s.data.image_size or 0, s.augment.crop_scale
        self.interpolation = s.augment.interpolation
        self.identity = identity(recipe)

    def batch(self) -> Batch:
        return Batch.of(self.recipe)

    def data(self) -> ImageSet:
        return open_split(self.spec, "train")

    def build(self) -> Method:
        method = build(self.recipe)
        if self.start:
            self.start.apply(method)
        return method

    def optimizer(self, method: Method) -> torch.optim.Optimizer:
        return adamw(method, self.optim)

    def flops_per_image(self) -> float:
        return flops_per_image(self.recipe)

    def watch(self, data: ImageSet, method: Method, batch: Batch) -> Watch | None:
        return Watch(data, method, batch.total) if self.machine.watch else None

    def info(self) -> dict[str, Any]:
        s = self.recipe.science
        return {
            "method": self.recipe.method_name,
            "preset": preset_label(self.recipe),
            "arch": s.arch,
            "data": data_name(s.data.spec),
            "recipe": self.recipe.name,
            "recipe_hash": self.recipe.hash(),
            "seed": s.seed,
            "epochs": s.epochs,
            "batch_size": s.batch_size,
            **({"init": self.start.facts} if self.start else {}),
        }

    def save_weights(self, path: Path, method: Method) -> None:
        save_weights(path, method, self.recipe)


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
