"""Random draws that do not depend on how a batch is divided over devices, accumulation and passes."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def seed_of(*key: int | str) -> int:
    """A 63-bit seed that is a function of the key, well mixed."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


class Draws(torch.Generator):
    """The generator of one micro-batch that knows its place: what `rand` draws are its rows of the global batch's.

    What is drawn from it in other ways is as random, but differs with the division.
    """

    def __new__(cls, device: torch.device) -> Draws:
        return super().__new__(cls, device)  # type: ignore[call-arg]

    def __init__(self, device: torch.device) -> None:
        self.whole = torch.Generator(device)
        self.total, self.first, self.calls = 0, 0, 0

    def seek(self, seed: int, own: int, total: int, first: int) -> None:
        """Go to the micro-batch whose first image is number `first` of the `total` of its step, which has this seed.

        own: the seed of what other than `rand` draws.
        """
        self.manual_seed(own)
        self.whole.manual_seed(seed)
        self.total, self.first, self.calls = total, first, 0


def rand(shape: tuple[int, ...], generator: torch.Generator, batch: int = 0) -> Tensor:
    """Uniform in [0, 1) on the generator's device; `batch`: the dimension of `shape` that counts the images."""
    if not isinstance(generator, Draws):
        return torch.rand(shape, generator=generator, device=generator.device)
    whole = (*shape[:batch], generator.total, *shape[batch + 1 :])
    drawn = torch.rand(whole, generator=generator.whole, device=generator.device)
    return drawn.narrow(batch, generator.first, shape[batch])


def rand_together(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform in [0, 1), and the same in every micro-batch of a step, on every device: for what its images share."""
    whole = generator.whole if isinstance(generator, Draws) else generator
    return torch.rand(shape, generator=whole, device=generator.device)


def rand_each(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw as `rand` does, images in the first dimension, what is too large to be drawn for the global batch.

    Each image has a generator of its own, whose seed is by its number.
    """
    out = torch.empty(shape, device=generator.device)
    if not isinstance(generator, Draws):
        return out.uniform_(generator=generator)
    seed, numbers = numbered(shape[0], generator)
    generator.calls += 1
    own = torch.Generator(generator.device)
    for row, number in zip(out, numbers, strict=True):
        row.uniform_(generator=own.manual_seed(seed_of("each", seed, generator.calls, number)))
    return out


def numbered(count: int, generator: torch.Generator) -> tuple[int, range]:
    """(a seed that is the whole step's, which of its images a micro-batch of `count` holds): for draws on the host."""
    if not isinstance(generator, Draws):
        return generator.initial_seed(), range(count)
    return generator.whole.initial_seed(), range(generator.first, generator.first + count)
