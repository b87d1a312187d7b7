"""Intervals over seeds, and paired tests."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import numpy as np
import scipy

K = TypeVar("K", bound=Hashable)
RESAMPLES = 1000  # of a bootstrap


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float | None]:
    """The mean and the half-width of its Student-t interval over seeds; None for one value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None
    half = scipy.stats.t.ppf((1 + level) / 2, len(values) - 1) * scipy.stats.sem(values)
    return mean, float(half)


def paired_difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float | None]:
    """Mean of a - b over pairs, the half-width of its 95 % interval, and p of Student's paired t test.

    p is None where all differences are equal: the test then divides by zero.
    """
    differences = np.subtract(a, b)
    mean, half = mean_interval(differences.tolist())
    assert half is not None, "a paired test needs two pairs"
    p = None if np.ptp(differences) < 1e-9 else float(scipy.stats.ttest_rel(a, b).pvalue)
    return mean, half, p


def block_error(values: np.ndarray) -> tuple[float, int]:
    """(standard error of the difference of two rows' means, its degrees of freedom), from all rows alike.

    values (rows, seeds): each row once with each seed, so that seeds are blocks of a randomised complete block design;
    what is left behind the means of rows and of seeds is the noise of a run. Two rows: the paired t test's own.
    """
    rows, seeds = values.shape
    rest = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
    df = (rows - 1) * (seeds - 1)
    return float(np.sqrt(2 * np.square(rest).sum() / df / seeds)), df


def normal_difference(
    a: float, error_a: float | None, b: float, error_b: float | None
) -> tuple[float, float | None, float | None]:
    """a - b, the half-width of its 95 % interval and p, from two independent standard errors; None without them."""
    if not error_a or not error_b:
        return a - b, None, None
    error = float(np.hypot(error_a, error_b))
    return a - b, float(scipy.stats.norm.ppf(0.975)) * error, float(2 * scipy.stats.norm.sf(abs(a - b) / error))


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """p of the exact McNemar test. a, b (N,): which of the same images each has right; those that both have do not
    count, and of the others half would be expected either way (McNemar 1947)."""
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return float(scipy.stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def crossed_interval(x: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The interval of the mean of x (seeds, images), which counts both: seeds and images are drawn anew, each for
    itself, with replacement (Owen 2007, the pigeonhole bootstrap). Deterministic.
    """
    seeds, images = (np.arange(n) for n in x.shape)

    def mean(s: np.ndarray, i: np.ndarray, axis: int = -1) -> np.ndarray:
        times = np.stack([np.bincount(of_one, minlength=x.shape[1]) for of_one in i])  # each image was drawn
        return np.take_along_axis(times @ x.T, s, 1).mean(axis) / x.shape[1]

    data: tuple[np.ndarray, ...] = (seeds, images)
    statistic: Callable[..., Any] = mean
    if len(seeds) == 1:  # scipy wants two of each
        data, statistic = (x[0],), np.mean
    drawn = scipy.stats.bootstrap(
        data, statistic, n_resamples=RESAMPLES, batch=20, confidence_level=level, vectorized=True, method="percentile",
        rng=np.random.default_rng(0),
    )  # fmt: skip
    return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def image_interval(
    statistic: Callable[..., np.ndarray], *of_images: np.ndarray, level: float = 0.95
) -> tuple[float | None, list[float] | None]:
    """(standard error, [low, high]) of a statistic of sums over images, such as mIoU, by the percentile bootstrap:
    images are drawn anew with replacement. Deterministic; None of a single image.

    of_images: what is summed, each (N, K), a row an image. statistic takes as many arrays (RESAMPLES, K) of sums, and
    gives a number a row.
    """
    n = len(of_images[0])
    if n < 2:
        return None, None
    times = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(float)  # each was drawn
    values = statistic(*(times @ x for x in of_images))
    tail = 50 * (1 - level)
    return float(values.std(ddof=1)), [float(v) for v in np.percentile(values, [tail, 100 - tail])]


def holm(ps: dict[K, float]) -> dict[K, float]:
    """Holm's step-down correction (1979): p times the number of hypotheses that are not yet ahead of it."""
    out: dict[K, float] = {}
    largest = 0.0
    for place, (key, p) in enumerate(sorted(ps.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, p * (len(ps) - place)))
        out[key] = largest
    return out
