"""Random draws that do not depend on how a batch is divided over devices, accumulation and passes."""

from __future__ import annotations

import torch
from torch import Tensor


class Draws(torch.Generator):
    """The generator of one micro-batch that knows its place: what `rand` draws are its rows of the global batch's.

    What is drawn from it in other ways is as random, but differs with the division.
    """

    def __new__(cls, device: torch.device) -> Draws:
        return super().__new__(cls, device)  # type: ignore[call-arg]

    def __init__(self, device: torch.device) -> None:
        self.whole = torch.Generator(device)
        self.total, self.first = 0, 0

    def seek(self, seed: int, own: int, total: int, first: int) -> None:
        """To the micro-batch whose first image is number `first` of the `total` of its step, which has this seed.

        own: the seed of what other than `rand` draws.
        """
        self.manual_seed(own)
        self.whole.manual_seed(seed)
        self.total, self.first = total, first


def rand(shape: tuple[int, ...], generator: torch.Generator, batch: int = 0) -> Tensor:
    """Uniform in [0, 1) on the generator's device; `batch`: the dimension of `shape` that counts the images."""
    if not isinstance(generator, Draws):
        return torch.rand(shape, generator=generator, device=generator.device)
    whole = (*shape[:batch], generator.total, *shape[batch + 1 :])
    found = torch.rand(whole, generator=generator.whole, device=generator.device)
    return found.narrow(batch, generator.first, shape[batch])
