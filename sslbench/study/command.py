"""`sslbench study`: from the words of a command line to cells, and from their numbers to a ranking."""

from __future__ import annotations

import re
from typing import Any

from rich.console import Console
from rich.table import Table

from .. import ledger
from ..errors import RunFailed, UserError, nearest
from ..listing import show
from ..paths import home
from ..recipe import data_name, parse_sets
from .budget import parse_budget
from .cells import (
    Cell,
    Row,
    choose_factors,
    final_cells,
    rows_of,
    trial_cells,
    tuning_cost,
)
from .measure import DataSets
from .rank import Ranking
from .record import keep
from .results import as_entries, result
from .run import carry_out, duration
from .spec import Study, check, studies, study_of, write_study
from .tables import study_named


def study(
    name: str | None,
    console: Console,
    *,
    rows: list[str] | None = None,
    budgets: list[str] | None = None,
    seeds: int | None = None,
    only: list[str] | None = None,
    scale: str | None = None,
    data: str | None = None,
    sets: list[str] | None = None,
    jobs: int = 1,
    slurm: str | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Run what of the study is not in the ledger, and print its ranking: {"study", "cells", "ranking", ...}."""
    named = _named(name, rows, budgets, seeds, data, sets or [])
    plan = Plan(named, scale, data, sets or [], only or [], planning=dry_run)
    if dry_run:
        return plan.dry(console)
    if rows:
        path = home() / "results" / "studies" / f"{plan.name}.yaml"
        write_study(plan.study, path)
        console.print(f"the same again: sslbench study {path}", markup=False)
    if slurm is not None:
        from .cluster import submit

        return submit(plan, slurm, console)
    return plan.run(jobs, console)


def _named(
    name: str | None,
    rows: list[str] | None,
    budgets: list[str] | None,
    seeds: int | None,
    data: str | None,
    sets: list[str],
) -> Study:
    """The study of the command line: a file with the flags over it, or the rows alone."""
    if rows and name:
        raise UserError("give a study or --rows, not both; --only ROW picks rows of a study")
    if rows:
        return study_of(rows, budgets or [], seeds or 1, data, parse_sets(sets).get("science", {}))
    if not name:
        raise UserError(f"name a study or give --rows METHOD,METHOD{nearest('', studies())}")
    found = study_named(name)
    if budgets:
        found.budgets = budgets
        if isinstance(found.seeds, dict) and seeds is None:
            found.seeds = max(len(found.seeds_at(parse_budget(b))) for b in found.seeds)
    if seeds is not None:
        found.seeds = seeds
    return check(found)


class Plan:
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

    def run(self, jobs: int, console: Console) -> dict[str, Any]:
        """All cells, then the table. StudyFailed at the end where some failed."""
        self.execute(jobs, console)
        answer = self.answer(console)
        self.check(console, answer)
        return answer

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
        """StudyFailed where runs failed, each named with its reason."""
        everything = [*self.trials, *self.cells]
        if failed := [c for c in everything if c.status == "failed"]:
            for c in failed:
                console.print(f"failed: {c.name()}: {c.reason}", markup=False)
            raise StudyFailed(
                f"{len(failed)} of {len(everything)} runs failed; the same command tries them again", answer
            )

    def look_again(self, failed: list[Cell]) -> None:
        """As `look`, keeping what failed."""
        said = {id(c): (c.status, c.reason) for c in failed}
        self.look()
        for c in failed:
            c.status, c.reason = said[id(c)]

    def keep(self) -> dict[str, Any]:
        return keep(self.name, self.study, self.rows, self.cells, self.trials, self.factors)

    def answer(self, console: Console) -> dict[str, Any]:
        found = result(self.keep(), {r.id: r for r in ledger.read()})
        for ranking in found.rankings:
            show_ranking(ranking, found.beside[ranking.budget], console)
        if not found.rankings:
            for budget, rows in found.beside.items():
                console.print(f"\n{budget}, which differ: nothing is ranked", markup=False)
                show([{"row": row, **values} for row, values in rows.items()], console)
        for note in found.notes:
            console.print(note, markup=False, soft_wrap=False)
        return {
            "study": self.name,
            "hash": self.study.hash(),
            "cells": self.listed(),
            "chosen": self.factors,
            "ranking": [entry for r in found.rankings for entry in as_entries(r)],
            "sentences": [r.sentence for r in found.rankings],
        }

    def listed(self) -> list[dict[str, Any]]:
        """Every cell as plain data."""
        return [as_answer(c) for c in [*self.trials, *self.cells]]

    def dry(self, console: Console) -> dict[str, Any]:
        """Print every cell with what it takes, at the price of a short calibration of each row."""
        hours = {row.name: hours_per_step(row, self.cells) for row in self.rows}
        listed = []
        for c in [*self.trials, *self.cells]:
            if c.recipe is None:
                listed.append({**as_answer(c), "epochs": None, "steps": None, "tflop": None, "hours": None})
                continue
            timed = c.recipe.science.device_minutes
            took = timed / 60 if timed else hours[c.row] * (c.steps or 0)
            flops = None if c.flops is None else c.flops / 1e12
            entry = {**as_answer(c), "epochs": None if timed else c.recipe.science.epochs, "steps": c.steps}
            listed.append({**entry, "tflop": flops, "hours": took})
        show([_line(e) for e in listed], console)
        todo = sum(e["hours"] or 0.0 for e in listed if e["status"] != "done")
        done = sum(e["status"] == "done" for e in listed)
        console.print(
            f"\n{len(listed)} runs, {done} of them in the ledger; the rest trains for {duration(3600 * todo)} on this "
            f"machine\n(each row's speed measured just now; evaluations come on top)"
        )
        return {"study": self.name, "hash": self.study.hash(), "cells": listed, "hours": todo, "ranking": []}


class StudyFailed(RunFailed):
    """Some runs failed; the others are in `answer`."""

    def __init__(self, message: str, answer: dict[str, Any]) -> None:
        super().__init__(message)
        self.answer = answer


def hours_per_step(row: Row, cells: list[Cell]) -> float:
    """Of a step of the row on this machine; 0 where nothing of it is left to train."""
    from ..plan import plan

    its = [c for c in cells if c.row == row.name and c.steps and c.status != "done"]
    if not its or its[0].recipe is None or not its[0].steps:
        return 0.0
    return plan(its[0].recipe, 2.0, None, Console(quiet=True))["hours"] / its[0].steps


def _record_name(study: Study, scale: str | None, rows: list[Row]) -> str:
    """The study's name, with its scale, and with the data where that is not in it."""
    data = data_name(rows[0].recipe.science.data.spec)
    parts = [study.name, *([scale] if scale else []), *([data] if data not in study.name.split("_") else [])]
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", "_".join(parts))


def as_answer(c: Cell) -> dict[str, Any]:
    trial = {} if c.factor is None else {"trial": c.factor}
    reason = {"reason": c.reason} if c.reason else {}
    values = {name: r.value for name, r in c.found.items()}
    return {"row": c.row, "budget": c.budget, "seed": c.seed, "status": c.status, "run": c.run, **trial, **reason,
            "numbers": values}  # fmt: skip


def _line(e: dict[str, Any]) -> dict[str, Any]:
    """A cell of the dry run as a line of 80 columns."""
    return {
        "row": e["row"] + (f" lr x {e['trial']:g}" if "trial" in e else ""),
        "budget": e["budget"],
        "seed": str(e["seed"]) if "trial" not in e else "tuning",
        "epochs": "" if e["epochs"] is None else f"{e['epochs']:.4g}",
        "steps": "" if e["steps"] is None else f"{e['steps']:,}",
        "TFLOP": "" if e["tflop"] is None else f"{e['tflop']:,.4g}",
        "takes": "" if e["hours"] is None else duration(3600 * e["hours"]),
        "ledger": "done" if e["status"] == "done" else "",
    }


def show_ranking(r: Ranking, beside: dict[str, dict[str, str]], console: Console) -> None:
    """The ranked table in 80 columns: the main metric, differences to the first and to each control, then the rest."""
    controls = [s.row for s in r.rows if s.control]
    table = Table(title=f"{r.budget}, {r.metric}", title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    table.add_column("row", overflow="fold")
    for head in (r.metric, "- first", *(f"- {c}" for c in controls)):
        table.add_column(head, justify="right")
    first = r.rows[0].row
    for place, s in enumerate(r.rows, 1):
        against = [first, *controls]
        cells = [str(d).replace(", p", "\np") if (d := r.between(s.row, other)) else "" for other in against]
        table.add_row(str(place), s.row, str(s), *cells)
    console.print()
    console.print(table, soft_wrap=False)
    for metric in dict.fromkeys(m for values in beside.values() for m in values):
        said = ", ".join(f"{s.row} {beside[s.row][metric]}" for s in r.rows if metric in beside.get(s.row, {}))
        console.print(f"{metric}: {said}", markup=False, soft_wrap=False)
    over = ", ".join(dict.fromkeys(s.over for s in r.rows))
    console.print(f"\n±: 95 % interval over {over}; p after Holm over all pairs\n{r.sentence}", soft_wrap=False)
