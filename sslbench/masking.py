"""Which patches a view keeps. Every draw comes from the generator that is given."""

from __future__ import annotations

import torch
from torch import Tensor


def random_order(batch: int, n: int, generator: torch.Generator) -> Tensor:
    """(batch, n): a uniformly random permutation of the patches of each image, as MAE draws it (argsort of U(0, 1))."""
    return torch.rand(batch, n, generator=generator, device=generator.device).argsort(dim=1)


def n_kept(n: int, mask_ratio: float) -> int:
    """How many of `n` patches stay visible; truncates as MAE does (196 at .75 -> 49)."""
    return int(n * (1 - mask_ratio))


def split_kept(n: int, mask_ratio: float) -> int:
    """The size of each of OCL's two groups: the kept count rounded down to even, halved (196 at .3 -> 68)."""
    return n_kept(n, mask_ratio) // 2


def random_split(batch: int, n: int, mask_ratio: float, generator: torch.Generator) -> Tensor:
    """(batch, 2, K): two disjoint random groups of kept patches (OCL section 2.2).

    The order is already a random permutation, so its first half against its second is a uniform disjoint split.
    """
    k = split_kept(n, mask_ratio)
    return random_order(batch, n, generator)[:, : 2 * k].reshape(batch, 2, k)
