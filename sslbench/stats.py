"""Intervals over seeds, and paired tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float | None]:
    """The mean and the half-width of its Student-t interval over seeds; None for one value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * stats.sem(values)
    return mean, float(half)


def paired_difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float | None]:
    """Mean of a - b over pairs, the half-width of its 95 % interval, and p of Student's paired t test.

    p is None where all differences are equal: the test then divides by zero.
    """
    differences = np.subtract(a, b)
    mean, half = mean_interval(differences.tolist())
    assert half is not None, "a paired test needs two pairs"
    p = None if np.ptp(differences) < 1e-9 else float(stats.ttest_rel(a, b).pvalue)
    return mean, half, p


def normal_difference(
    a: float, error_a: float | None, b: float, error_b: float | None
) -> tuple[float, float | None, float | None]:
    """a - b, the half-width of its 95 % interval and p, from two independent standard errors; None without them."""
    if not error_a or not error_b:
        return a - b, None, None
    error = float(np.hypot(error_a, error_b))
    return a - b, float(stats.norm.ppf(0.975)) * error, float(2 * stats.norm.sf(abs(a - b) / error))
