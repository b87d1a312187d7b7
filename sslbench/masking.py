"""Which patches a view keeps. Every draw comes from the generator that is given."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .draws import rand


def random_order(batch: int, n: int, generator: torch.Generator) -> Tensor:
    """(batch, n): a uniformly random permutation of the patches of each image, as MAE draws it (argsort of U(0, 1))."""
    return rand((batch, n), generator).argsort(dim=1)


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


def blockwise_order(
    batch: int, grid: tuple[int, int], n_masked: int, generator: torch.Generator, smallest: int = 16
) -> Tensor:
    """(batch, N): an order whose last `n_masked` patches are BEiT's blocks (Bao et al. 2021, section 2.3).

    Blocks of at least `smallest` patches (no more than are asked for), aspect log-uniform in (.3, 1 / .3), are laid
    until `n_masked` patches are covered; what the last block covers beyond that stays visible, a random part of it.
    All blocks of a batch are drawn at once: block t counts for an image as long as the ones before do not suffice.
    """
    rows, columns = grid
    n = rows * columns
    smallest = min(smallest, n_masked)
    device = generator.device
    y, x = torch.arange(rows, device=device)[:, None], torch.arange(columns, device=device)[None]
    first = torch.full((batch, n), torch.inf, device=device)  # the number of the block that covers a patch first
    tries = max(4 * math.ceil(n / smallest), 16)
    draw = rand((4, batch, tries), generator, 1)
    area = smallest + draw[0] * (n_masked - smallest)
    ratio = torch.exp(math.log(0.3) * (1 - 2 * draw[1]))
    height = (area * ratio).sqrt().round().clamp(1, rows)
    width = (area / ratio).sqrt().round().clamp(1, columns)
    top, left = (draw[2] * (rows - height + 1)).floor(), (draw[3] * (columns - width + 1)).floor()
    for t in range(tries):
        h, w, a, b = (v[:, t, None, None] for v in (height, width, top, left))
        inside = ((y >= a) & (y < a + h) & (x >= b) & (x < b + w)).flatten(1)
        first = torch.where(inside & first.isinf(), float(t), first)
    # Early blocks are masked first; a random rank within a block, and among what no block covers, settles the rest.
    rank = first.clamp(max=tries) + rand((batch, n), generator)
    return rank.argsort(dim=1, descending=True)
