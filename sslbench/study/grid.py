"""A study as a grid, rows x budgets x seeds, with what the ledger has of each cell."""

from __future__ import annotations

import re
from typing import Any

from rich.console import Console

from .. import ledger
from ..data import data_name
from ..errors import RunFailed, UserError, nearest
from .cells import Cell, ResolvedRow, choose_factors, final_cells, rows_of, trial_cells, tuning_cost
from .executor import carry_out
from .measure import DataSets
from .record import keep
from .spec import Study


class Grid:
    """A study with its rows resolved, and what the ledger has of it.

    planning: nothing will be run, so that data need not be here.
    """

    def __init__(
        self,
        study: Study,
        scale: str | None,
        data: str | None,
        sets: list[str],
        only: list[str],
        planning: bool = False,
    ) -> None:
        self.study, self.level = study, study.at(scale)
        self.rows = rows_of(study, scale, data, sets)
        for row in only:
            if row not in study.rows:
                raise UserError(f"{study.name} has no row '{row}'{nearest(row, map(str, study.rows))}")
        self.only, self.planning = only, planning
        self.trials = trial_cells(study, self.rows)
        self.name = _record_name(study, scale, self.rows)
        self.sets = DataSets()
        if not planning:
            for spec in {row.recipe.science.data.spec: None for row in self.rows if not only or row.name in only}:
                self.sets.train(spec)
        self.factors: dict[str, float] = {}
        self.cells = final_cells(study, self.level, self.rows, {})
        self.look()

    def look(self) -> None:
        """Take up what the ledger has: of the trials, then of the final runs at the lr that they chose."""
        records = ledger.read()
        for cell in self.trials:
            cell.look(records, self.sets, self.planning)
        if (factors := choose_factors(self.trials)) != self.factors:
            self.factors = factors
            self.cells = final_cells(self.study, self.level, self.rows, factors)
        for cell in self.cells:
            cell.tuning = tuning_cost(self.trials, cell.row)
            cell.look(records, self.sets, self.planning)
        for cell in [*self.trials, *self.cells]:
            if self.only and cell.row not in self.only and cell.status == "open":
                cell.status = "left out"

    def execute(self, jobs: int, console: Console) -> None:
        """Train and measure all that the ledger has not: the trials, then the final runs."""
        if any(r.recipe.machine.devices * r.recipe.machine.nodes > 1 for r in self.rows):
            raise UserError(
                f"{self.study.name}: a study trains and measures its rows in one process; leave machine.devices and "
                f"machine.nodes out"
            )
        everything = [*self.trials, *self.cells]
        done = sum(c.status == "done" for c in everything)
        console.print(f"{self.name}: {len(everything)} runs, {done} of them in the ledger\n", markup=False)
        carry_out([c for c in self.trials if c.status == "open"], self.sets, console, jobs, all_cells=everything)
        failed = [c for c in self.trials if c.status == "failed"]
        if self.trials:
            self.look_again(failed)
        untuned = {c.row for c in failed}
        for cell in self.cells:
            if cell.row in untuned and cell.status != "done":
                cell.status, cell.reason = "failed", "a trial of its tuning failed"
        carry_out([c for c in self.cells if c.status == "open"], self.sets, console, jobs, self.keep,
                  [*self.trials, *self.cells])  # fmt: skip
        self.keep()

    def check(self, console: Console, answer: dict[str, Any]) -> None:
        """RunFailed where runs failed, each named with its reason."""
        everything = [*self.trials, *self.cells]
        if failed := [c for c in everything if c.status == "failed"]:
            for c in failed:
                console.print(f"failed: {c.name()}: {c.reason}", markup=False)
            raise RunFailed(
                f"{len(failed)} of {len(everything)} runs failed; the same command tries them again", answer
            )

    def look_again(self, failed: list[Cell]) -> None:
        """Do as `look` does, and remember what failed."""
        said = {id(c): (c.status, c.reason) for c in failed}
        self.look()
        for c in failed:
            c.status, c.reason = said[id(c)]

    def keep(self) -> dict[str, Any]:
        return keep(self.name, self.study, self.rows, self.cells, self.trials, self.factors)

    def waiting(self) -> list[Cell]:
        """What the ledger has not: the trials first, and the final runs when these are done."""
        trials = [c for c in self.trials if c.status != "done"]
        return trials or [c for c in self.cells if c.status != "done"]

    def listed(self) -> list[dict[str, Any]]:
        """Every cell as plain data."""
        return [as_answer(c) for c in [*self.trials, *self.cells]]


def _record_name(study: Study, scale: str | None, rows: list[ResolvedRow]) -> str:
    """The study's name, with its scale, and with the data where that is not in it."""
    data = data_name(rows[0].recipe.science.data.spec)
    parts = [study.name, *([scale] if scale else []), *([data] if data not in study.name.split("_") else [])]
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", "_".join(parts))


def as_answer(c: Cell) -> dict[str, Any]:
    trial = {} if c.factor is None else {"trial": c.factor}
    reason = {"reason": c.reason} if c.reason else {}
    values = {name: r.value for name, r in c.numbers.items()}
    return {"row": c.row, "budget": c.budget, "seed": c.seed, "status": c.status, "run": c.run, **trial, **reason,
            "numbers": values}  # fmt: skip
