"""What a training step holds in a device's memory, counted on tensors that have that device and no values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from ..device import default_device, memory_bytes
from ..errors import UserError
from ..recipe import Batch, Recipe
from .build import build
from .job import Pretraining
from .loop import resolve_precision
from .shard import shards

ROOM = 0.92  # of a device's memory: the rest is the driver's, the kernels' and what the allocator cannot join
ROOM_ON_CPU = 0.5  # of a computer's, which the system, the page cache and other programs share


@dataclass
class Held:
    """Bytes that a step holds."""

    weights: int  # parameters and buffers, momentum copies too
    trained: int  # of these, what has gradients
    a_pass: float  # what a forward pass keeps whatever its images: weights in another precision
    an_image: float  # what it keeps of each image for the backward pass


def held(recipe: Recipe, device: str = "cuda", dtype: torch.dtype | None = torch.bfloat16) -> Held:
    """Count a step of `recipe` on that kind of device, which need not be here. dtype: autocast's; None: float32.

    By what two and four images keep; a loss that compares them all with each other keeps little beside the encoder.
    """
    with torch.device("meta"):
        method = build(recipe)
    side = recipe.science.data.image_size or method.encoder.image[0]
    views = {}
    for n in (2, 4):
        images = torch.zeros(n, 3, side, side, dtype=torch.uint8)
        views[n] = method.build_views(images, torch.Generator().manual_seed(0))
    tensors = [*method.parameters(), *method.buffers()]
    weights, trained = _bytes(tensors), _bytes(p for p in method.parameters() if p.requires_grad)
    with FakeTensorMode():
        there = moved(method, torch.device(device))
        two, four = (_kept(there, of, torch.device(device), dtype) for of in views.values())
    an_image = (four - two) / 2
    return Held(weights, trained, max(0.0, two - 2 * an_image), an_image)


def fitted(recipe: Recipe, console: Console) -> Recipe:
    """Return `recipe`, where it says `machine.micro_batch: auto` with the most images a pass that its devices hold.

    Devices alike choose alike, without a word between them. UserError where nothing fits.
    """
    m = recipe.machine
    if m.micro_batch != "auto":
        return recipe
    device = default_device()
    dtype = {"32": None, "bf16": torch.bfloat16, "16": torch.float16}[resolve_precision(m, device.type)]
    there = memory_bytes(device)
    room = there * ROOM if device.type != "cpu" else there * ROOM_ON_CPU / m.devices
    # Fake tensors of Apple's GPU need a torch that was built for it; those of the CPU are as large.
    counted = held(recipe, "cuda" if device.type == "cuda" else "cpu", dtype)
    micro = proposed(recipe, counted, room)
    if micro is None:
        raise UserError(
            f"machine.micro_batch=auto: no pass of {recipe.method} {recipe.science.arch} fits into "
            f"{room / 2**30:.2f} GiB of {device.type}; take a smaller --arch, more devices, or set a number yourself"
        )
    recipe = recipe.on(m.model_copy(update={"micro_batch": micro}))
    takes = peak(recipe, counted, Batch.of(recipe))
    console.print(
        f"micro-batch {micro}: about {takes / 2**30:.2f} GiB a device, of {room / 2**30:.1f} that may be taken",
        markup=False,
    )
    return recipe


def proposed(recipe: Recipe, counted: Held, room: float) -> int | None:
    """Return the largest micro-batch that takes no more than `room` bytes, and is of the same loss; None: none does."""
    whole = recipe.science.batch_size
    for micro in sorted((n for n in range(1, whole + 1) if whole % n == 0), reverse=True):
        machine = recipe.machine.model_copy(update={"micro_batch": micro})
        with contextlib.suppress(UserError):  # it does not divide, or would be another loss
            batch = Batch.of(recipe.on(machine))
            if batch.micro == micro and peak(recipe, counted, batch) <= room:
                return micro
    return None


def peak(recipe: Recipe, counted: Held, batch: Batch) -> float:
    """Return a step's bytes on each device where they are most, at the end of a forward pass: weights, Adam's two
    moments, what autograd keeps, and gradients, where there are some by then; else these come as the former goes."""
    over = batch.world if shards(Pretraining(recipe), batch) else 1
    kept, gradients = counted.a_pass + counted.an_image * batch.micro, counted.trained / over
    before = batch.world * batch.accumulation * batch.passes > 1  # of earlier passes, or in the buckets of DDP
    return (counted.weights + 2 * counted.trained) / over + (kept + gradients if before else max(kept, gradients))


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def moved(method: nn.Module, device: torch.device) -> Any:
    """`method.to(device)`, whose parameters `to` does not exchange for fake ones; shared ones stay shared."""
    there: dict[int, Tensor] = {}

    def move(x: Tensor) -> Tensor:
        if id(x) not in there:
            fake = torch.empty(x.shape, dtype=x.dtype, device=device)
            there[id(x)] = nn.Parameter(fake, x.requires_grad) if isinstance(x, nn.Parameter) else fake
        return there[id(x)]

    for part in method.modules():
        for of in (part._parameters, part._buffers):
            of.update({key: move(x) for key, x in of.items() if x is not None})  # type: ignore[attr-defined, misc]
    return method


def _kept(method: Any, views: dict[str, Tensor], device: torch.device, dtype: torch.dtype | None) -> int:
    """Bytes of what autograd keeps of a forward pass, and of its views, without the weights themselves."""
    inputs = {k: torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=device) for k, v in views.items()}
    weights = {t.untyped_storage()._cdata for t in (*method.parameters(), *method.buffers())}
    kept = {v.untyped_storage()._cdata: v.untyped_storage() for v in inputs.values()}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return t

    with _autocast(device.type, dtype), saved_tensors_hooks(keep, lambda t: t):
        method.loss(method(inputs))
    return sum(storage.nbytes() for storage in kept.values())


@contextlib.contextmanager
def _autocast(device: str, dtype: torch.dtype | None) -> Iterator[None]:
    """torch.autocast, which turns itself off for a device that is not here."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, dtype is not None)
    torch.set_autocast_dtype(device, dtype or before[1])
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])
        torch.clear_autocast_cache()
