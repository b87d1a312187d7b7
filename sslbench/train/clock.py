"""How far a run is: by its steps, or, where a recipe gives it `device_minutes`, by the time that it has trained."""

from __future__ import annotations

from collections.abc import Callable

ENDLESS = 2**40  # steps; the clock ends the run long before


class Clock:
    """The share of a run that lies behind it, which schedules follow.

    By time, it is what `spent_s` says over the run's seconds, and the step whose end, with a save after it, is nearest
    to theirs is the last.
    """

    def __init__(
        self, steps: int, per_epoch: int, epochs: float, seconds: float | None, spent_s: Callable[[], float]
    ) -> None:
        """steps: of the whole run, if it is not timed. epochs: of the schedule."""
        self.steps = ENDLESS if seconds else steps
        self.per_epoch, self.epochs, self.seconds, self.spent_s = per_epoch, epochs, seconds, spent_s
        self.spent = self.save_s = 0.0

    def begin(self) -> None:
        """Begin to run, or go on."""
        self.spent = self.spent_s() if self.seconds else 0.0

    def epoch(self, step: int) -> float:
        """Which epoch of the schedule it is before that step."""
        if self.seconds is None:
            return step / self.per_epoch
        return min(1.0, self.spent / self.seconds) * self.epochs

    def tick(self) -> None:
        """Note that a step has ended."""
        if self.seconds is not None:
            before, self.spent = self.spent, self.spent_s()
            self.step_s = self.spent - before

    def share(self, step: int) -> float:
        """How much of the run is done after so many steps, in [0, 1]."""
        if self.seconds is None:
            return step / self.steps if self.steps else 1.0
        return min(1.0, self.spent / self.seconds)

    def over(self, step: int) -> bool:
        """Whether the step that was just done, number `step` in all, was the last."""
        if self.seconds is None:
            return step == self.steps
        return self.spent + self.step_s / 2 + self.save_s >= self.seconds

    def saved(self) -> None:
        """Note that a save has ended, whose time the next one will take too."""
        if self.seconds is not None:
            self.save_s = self.spent_s() - self.spent
