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
    batch: int, grid: tuple[int, int], n_masked: int, generator: torch.Generator, smallest: int = 16, tries: int = 64
) -> Tensor:
    """(batch, N): an order whose last `n_masked` patches are BEiT's blocks (Bao et al. 2021, Algorithm 1).

    What the blocks leave is masked at random. smallest: no more than are asked for.
    """
    most = torch.full((batch,), n_masked, device=generator.device)
    masked = blocks(batch, grid, most, generator, min(smallest, n_masked), tries)
    # Blocks come last; among the patches that no block covers a random rank settles which are masked too.
    return (masked + rand((batch, grid[0] * grid[1]), generator)).argsort(dim=1)


def blocks(
    batch: int, grid: tuple[int, int], most: Tensor, generator: torch.Generator, smallest: int, tries: int = 64
) -> Tensor:
    """(batch, N) booleans: BEiT's blocks of each image, up to `most` (batch,) patches.

    A block's area is uniform between `smallest` and what is left to mask, its aspect log-uniform in (.3, 1 / .3), its
    place uniform. One that is not smaller than the grid in both directions, that masks nothing new or more than is left
    is drawn again, ten times at most, as in BEiT's code. All draws of a batch are made at once: `tries` of them an
    image.
    """
    rows, columns = grid
    n, device = rows * columns, generator.device
    y, x = torch.arange(rows, device=device)[:, None], torch.arange(columns, device=device)[None]
    masked = torch.zeros(batch, n, dtype=torch.bool, device=device)
    refused = torch.zeros(batch, device=device)  # in a row
    draw = rand((4, batch, tries), generator, 1)
    ratio = torch.exp(math.log(0.3) * (1 - 2 * draw[1]))
    for t in range(tries):
        left = most - masked.sum(1)
        area = (smallest + draw[0, :, t] * (left - smallest)).clamp_min(0)
        h, w = (area * ratio[:, t]).sqrt().round(), (area / ratio[:, t]).sqrt().round()
        a, b = (draw[2, :, t] * (rows - h + 1)).floor(), (draw[3, :, t] * (columns - w + 1)).floor()
        h, w, a, b = (v[:, None, None] for v in (h, w, a, b))
        block = ((y >= a) & (y < a + h) & (x >= b) & (x < b + w) & (h < rows) & (w < columns)).flatten(1)
        new = (block & ~masked).sum(1)
        taken = (new > 0) & (new <= left) & (refused < 10)
        masked |= block & taken[:, None]
        refused = torch.where(taken, 0.0, refused + 1)
    return masked
