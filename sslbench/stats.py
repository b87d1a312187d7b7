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
