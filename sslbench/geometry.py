"""How features lie in space, without labels: rank, spread, uniformity, alignment, and how alike two encoders' are.

The collapse meters of a run (train/diagnose.py) and `sslbench eval geometry` share these. Features are (N, D), a row
an image.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

PAIRS = 2**24  # whose similarities are held at once: 64 MiB of float32


def effective_rank(features: Tensor) -> Tensor:
    """Exponential of the entropy of the singular values' shares, from 1 to min(N, D): exp(-sum p log p), p = s / sum s.

    Of features as they are it is RankMe (Garrido et al. 2023, who add 1e-7 to each share); of centred ones it is Roy
    and Vetterli's (2007) of the covariance's root, in which a mean that all images share has no part.
    """
    singular = torch.linalg.svdvals(features)
    share = singular / singular.sum().clamp_min(1e-30)
    return (-(share * share.clamp_min(1e-30).log()).sum()).exp()


def spread(features: Tensor) -> Tensor:
    """Return the standard deviation of unit features over images, mean over channels, times sqrt(D): 1 where they
    spread over the sphere, 0 in collapse (Chen and He 2021, section 4.1)."""
    return F.normalize(features, dim=1).std(0).mean() * features.shape[1] ** 0.5


def uniformity(features: Tensor) -> tuple[Tensor, Tensor]:
    """(log of the mean over pairs of exp(-2 |x - y|^2) of unit features, its standard error over images): 0 in
    collapse, lower where they spread (Wang and Isola 2020, section 4.1, t = 2).

    The error is that of a mean over pairs (Hoeffding 1948): twice that of the images' own means; through the logarithm.
    """
    unit, n = F.normalize(features, dim=1), len(features)
    sums = []
    for rows in torch.arange(n, device=unit.device).split(max(1, PAIRS // n)):
        squared = (2 - 2 * unit[rows] @ unit.T).clamp_min(0)
        near = (-2 * squared).exp()
        sums.append(near.sum(1) - near.gather(1, rows[:, None])[:, 0])  # an image and itself are no pair
    own = torch.cat(sums) / (n - 1)
    return own.mean().log(), 2 * own.std() / n**0.5 / own.mean()


def alignment(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """(mean over images of |x - y|^2 of the unit features of two views, its standard error): 0 where views do not
    matter, 2 where two views of an image are as far apart as directions at random (Wang and Isola 2020, section 4.1,
    alpha = 2)."""
    squared = (F.normalize(first, dim=1) - F.normalize(second, dim=1)).square().sum(1)
    return squared.mean(), squared.std() / len(squared) ** 0.5


def cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear CKA of features (N, D) and (N, E) of the same images, from 0 to 1: |Y'X|^2 / (|X'X| |Y'Y|), Frobenius
    norms of centred features (Kornblith et al. 2019, section 3). With few images for their width it is too high."""
    x, y = x - x.mean(0), y - y.mean(0)
    return (y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())
