"""The plugin interface: one class a method, one file in `methods/`, found by looking."""

from __future__ import annotations

import functools
from importlib.metadata import EntryPoints, entry_points
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .errors import UserError, nearest
from .paths import bundled
from .plugin import import_file
from .strict import Strict
from .views import Augment, Crop
from .vit import VisionTransformer


class MethodConfig(Strict):
    """Every switch of a method, its defaults the paper's."""


class Trainable(nn.Module):
    """What the loop trains: `build_views` (a batch -> views), `forward` (views -> outputs) and `loss` (outputs ->
    named losses, "loss" their total). A method; a classifier; a detector. `encoder` is its ViT."""

    # Each takes what its own kind of batch holds: Any, for what the arguments are called and are is the subclass's.
    build_views: Any

    def loss(self, outputs: dict[str, Any]) -> dict[str, Tensor]:
        raise NotImplementedError

    def after_step(self, progress: float) -> None:
        """After the weights moved; progress in [0, 1]."""


class Method(Trainable):
    """What pre-trains an encoder: build_views, forward (views -> outputs), loss. Knows nothing of devices or ranks."""

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {"paper": {}}
    hybrid: ClassVar[bool] = False  # one of the four that the suite is about; all others are controls
    crops: ClassVar[int] = 1  # random crops of an image that build_views takes
    couples_batch: ClassVar[bool] = False  # True: the loss compares images of a batch, so its size is science
    compared: ClassVar[tuple[str, ...]] = ()  # entries of `embed` that `compare` reads; () where forward is one piece
    pool: ClassVar[str] = "cls"  # the feature that evaluations read unless told: cls, mean or mean_all

    def __init__(self, config: Any, encoder: VisionTransformer, augment: Augment) -> None:
        super().__init__()
        self.config, self.encoder, self.augment = config, encoder, augment

    def crop_list(self) -> list[Crop]:
        """Return an image's crops. Overridden where they differ in size or scale, or where their places matter."""
        return [Crop()] * self.crops

    def build_views(self, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """uint8 images (B, 3, H, W) on the device -> what forward takes. Draws from `generator` only.

        By `draws.rand` (`rand_each` where that is large, `rand_together` for what images share), it does not depend on
        how a batch is divided over devices and passes.
        """
        raise NotImplementedError

    def embed(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """The part of `forward` that sees each image alone, (B, ...) each: what a gradient cache does in small passes.

        A method whose loss compares images may leave `forward` alone and write `embed` and `compare` in its place, and
        say in `compared` which entries the batch is needed for: features, not images. Its `loss` then takes a part of
        the outputs, too, and gives the terms that come from it.
        """
        raise NotImplementedError

    def compare(self, embedded: dict[str, Tensor]) -> dict[str, Tensor]:
        """The rest of `forward`: what sees the batch, such as BatchNorm. Entries not in `compared` go through."""
        return embedded

    def forward(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Views -> features, predictions: what `loss` takes."""
        return self.compare(self.embed(views))

    def loss(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """{"loss": the total, ...}, float32 scalars. The others that need grad are its terms, whose pull is logged."""
        raise NotImplementedError

    def after_step(self, progress: float) -> None:
        """After the weights moved (EMA, memory bank); progress in [0, 1]."""

    def tokens_per_image(self) -> int:
        """Tokens that the encoder sees of one image in one step, for the plan."""
        return self.encoder.n_patches + 1

    def pictures(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """For `inspect`: by title, images (B, 3, H, W) in 0..255 (see `pictures.Canvas`) or heat maps (B, 1, h, w)."""
        return {}

    @classmethod
    def compares_batch(cls, config: dict[str, Any]) -> bool:
        """Whether, under this config, the loss compares the images of a batch: their number then is science."""
        return cls.couples_batch

    @classmethod
    def gathers_batch(cls, config: dict[str, Any]) -> bool:
        """Whether such a loss compares the images of all devices, by `losses.gather`, and not each device's own.

        The methods here call that switch `gather_negatives`; one with another switch, or none, says so here.
        """
        return bool(config.get("gather_negatives", False))


def _load(path: Path) -> list[type[Method]]:
    module = import_file(path, "method")
    classes = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Method)]
    return [c for c in classes if c.__module__ == module.__name__]


def methods() -> dict[str, type[Method]]:
    """Every method by name: each file in `methods/`, and the entry points of group `sslbench.methods`."""
    in_folder = {path.stem: c for path in sorted(bundled("methods").glob("*.py")) for c in _load(path)}
    return in_folder | {e.name: e.load() for e in _installed()}


@functools.cache
def _installed() -> EntryPoints:
    """Read once: a look through all that is installed takes 10 ms, and a report asks thousands of times."""
    return entry_points(group="sslbench.methods")


def name_of(method: str) -> str:
    """`ocl` -> `ocl`, `path/to/file.py:Class` -> `file`."""
    path, colon, _ = method.rpartition(":")
    return Path(path).stem if colon else method


def get_method(name: str) -> type[Method]:
    """A method by name, or by `path/to/file.py:Class`."""
    path, _, cls = name.rpartition(":")
    if path.endswith(".py") and Path(path).is_file():
        for c in _load(Path(path).resolve()):
            if c.__name__ == cls:
                return c
        raise UserError(f"no Method named '{cls}' in {path}")
    if name in _installed().names:
        return methods()[name]
    if (file := bundled("methods") / f"{name}.py").is_file() and (found := _load(file)):
        return found[-1]
    raise UserError(f"unknown method '{name}'{nearest(name, methods())}")
