"""Who is ahead: rows ranked by the main metric, their differences tested seed by seed, and one sentence about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
import scipy

from ..stats import block_error, crossed_interval, holm, mcnemar, mean_interval, paired_difference
from .spec import ENOUGH

LEVEL = 0.05


@dataclass
class Numbers:
    """A row's numbers of one metric at one budget. right: which test images each seed had right, where that is kept."""

    row: str
    by_seed: dict[int, float]
    stderr: float | None = None  # over the test images, of the first seed
    right: dict[int, np.ndarray] = field(default_factory=dict)
    control: bool = False


@dataclass
class Standing:
    """A row in its place, with the 95 % interval of its number."""

    row: str
    value: float
    low: float | None
    high: float | None
    seeds: list[int]
    over: str  # what the interval counts: seeds and images, seeds, or images
    control: bool = False

    def __str__(self) -> str:
        return f"{self.value:.1f}" + _half(self.value, self.low, self.high)


@dataclass
class Difference:
    """a - b over the seeds that both have. p is after Holm over all pairs; None where nothing can be tested."""

    a: str
    b: str
    value: float
    low: float | None
    high: float | None
    p: float | None
    test: str

    @property
    def told_apart(self) -> bool:
        """Whether the test says so and the interval, which counts the images too, leaves 0 out."""
        if self.p is None or self.p >= LEVEL:
            return False
        return self.low is None or self.high is None or not self.low <= 0 <= self.high

    def __str__(self) -> str:
        p = "" if self.p is None else f", p {self.p:.2g}"
        return f"{self.value:+.1f}" + _half(self.value, self.low, self.high) + p


@dataclass
class Ranking:
    """One metric at one budget."""

    budget: str
    metric: str
    rows: list[Standing]
    pairs: dict[tuple[str, str], Difference]
    sentence: str = ""

    def between(self, a: str, b: str) -> Difference | None:
        """a - b, whichever way round it is kept."""
        if pair := self.pairs.get((a, b)):
            return pair
        if not (pair := self.pairs.get((b, a))):
            return None
        low, high = (None if x is None else -x for x in (pair.high, pair.low))
        return Difference(a, b, -pair.value, low, high, pair.p, pair.test)


def rank(budget: str, metric: str, rows: Sequence[Numbers], what: str = "") -> Ranking:
    """The rows from the best on, each pair tested, and what can be said. what: the metric in words."""
    ordered = sorted((r for r in rows if r.by_seed), key=lambda r: -np.mean([*r.by_seed.values()]))
    error = _pooled(ordered)
    pairs = {(a.row, b.row): _difference(a, b, error) for a, b in combinations(ordered, 2)}
    corrected = holm({k: d.p for k, d in pairs.items() if d.p is not None})
    for key, d in pairs.items():
        d.p = corrected.get(key, d.p)
    ranking = Ranking(budget, metric, [_standing(r) for r in ordered], pairs)
    ranking.sentence = _sentence(ranking, what or metric)
    return ranking


def _standing(r: Numbers) -> Standing:
    seeds = sorted(r.by_seed)
    values = [r.by_seed[s] for s in seeds]
    value = float(np.mean(values))
    if len(seeds) > 1 and all(s in r.right for s in seeds):
        ends = crossed_interval(100.0 * np.stack([r.right[s] for s in seeds]))
        return Standing(r.row, value, *ends, seeds, "seeds and images", r.control)
    half = mean_interval(values)[1] if len(seeds) > 1 else None if r.stderr is None else 1.96 * r.stderr
    low, high = (None, None) if half is None else (value - half, value + half)
    return Standing(r.row, value, low, high, seeds, "seeds" if len(seeds) > 1 else "images", r.control)


def _pooled(rows: Sequence[Numbers]) -> tuple[float, int] | None:
    """The error of a difference from all rows, which takes the same seeds of each; with few seeds, a pair's own
    differences say too little of it."""
    seeds = [sorted(r.by_seed) for r in rows]
    if len(rows) < 3 or len(seeds[0]) < 2 or any(s != seeds[0] for s in seeds):
        return None
    return block_error(np.array([[r.by_seed[s] for s in seeds[0]] for r in rows]))


def _difference(a: Numbers, b: Numbers, error: tuple[float, int] | None) -> Difference:
    seeds = sorted(a.by_seed.keys() & b.by_seed.keys())
    value = float(np.mean([a.by_seed[s] - b.by_seed[s] for s in seeds])) if seeds else float("nan")
    kept = bool(seeds) and all(s in side.right for s in seeds for side in (a, b))
    low: float | None = None
    high: float | None = None
    p: float | None = None
    test = "no seed in common"
    if error and error[0] > 0:
        t = scipy.stats.t(error[1])
        p, half = float(2 * t.sf(abs(value) / error[0])), float(t.ppf(0.975)) * error[0]
        low, high, test = value - half, value + half, f"t in blocks of {len(seeds)} seeds, {error[1]} df"
    elif len(seeds) > 1:
        _, half, p = paired_difference([a.by_seed[s] for s in seeds], [b.by_seed[s] for s in seeds])
        low, high, test = value - half, value + half, f"paired t, {len(seeds)} seeds"
    elif seeds and kept:
        p, test = mcnemar(a.right[seeds[0]], b.right[seeds[0]]), "exact McNemar, 1 seed"
    if kept:
        low, high = crossed_interval(100.0 * np.stack([a.right[s].astype(float) - b.right[s] for s in seeds]))
    return Difference(a.row, b.row, value, low, high, p, test)


def _sentence(r: Ranking, what: str) -> str:
    """What can be told apart and what cannot; that seeds are too few, where they are."""
    if len(r.rows) < 2:
        return "One row: nothing to compare."
    fewest = min(len(s.seeds) for s in r.rows)
    at = f"At {r.budget}, by {what}" if r.budget else f"By {what}"
    if fewest < ENOUGH:
        return f"{at}: not enough seeds to rank, {fewest} of the {ENOUGH} that it takes."
    apart = {key for key, d in r.pairs.items() if d.told_apart}
    if not apart:
        return f"{at}, over {fewest} seeds, none of the {len(r.pairs)} pairs can be told apart."
    said = []
    for standing in r.rows:
        below = [s.row for s in r.rows if (standing.row, s.row) in apart]
        if below:
            said.append(f"{standing.row} is above {_and(below)}")
    alike = [
        f"{s.row} from {_and(others)}"
        for s in r.rows
        if (others := [o.row for o in r.rows if (s.row, o.row) in r.pairs.keys() - apart])
    ]
    rest = f"; not told apart: {', '.join(alike)}" if alike else "; every pair can be told apart"
    return f"{at}, over {fewest} seeds, {'; '.join(said)} (p < {LEVEL:g} after Holm){rest}."


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _half(value: float, low: float | None, high: float | None) -> str:
    """` ± 0.8`: the wider side of the interval, which a bootstrap need not have at equal distances."""
    return "" if low is None or high is None else f" ± {max(value - low, high - value):.1f}"
