"""`sslbench study`: from the words of a command line to cells, and from their numbers to a ranking."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from .. import ledger
from ..errors import UserError, nearest
from ..paths import home
from ..recipe import parse_sets
from ..report.results import as_entries, result
from ..study.budget import parse_budget
from ..study.cells import Cell, ResolvedRow
from ..study.cluster import submit
from ..study.executor import duration
from ..study.grid import Grid, as_answer
from ..study.rank import Ranking
from ..study.spec import Study, check, studies, study_of, write_study
from ..study.tables import study_named
from .listing import show
from .plan import plan


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
    grid = Grid(named, scale, data, sets or [], only or [], planning=dry_run)
    if dry_run:
        return dry(grid, console)
    if rows:
        path = home() / "results" / "studies" / f"{grid.name}.yaml"
        write_study(grid.study, path)
        console.print(f"the same again: sslbench study {path}", markup=False)
    if slurm is not None and grid.waiting():
        return submit(grid, slurm, console)
    grid.execute(jobs, console)
    answer = answer_of(grid, console)
    grid.check(console, answer)
    return answer


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
    named = study_named(name)
    if budgets:
        named.budgets = budgets
        if isinstance(named.seeds, dict) and seeds is None:
            named.seeds = max(len(named.seeds_at(parse_budget(b))) for b in named.seeds)
    if seeds is not None:
        named.seeds = seeds
    return check(named)


def answer_of(grid: Grid, console: Console) -> dict[str, Any]:
    results = result(grid.keep(), {r.id: r for r in ledger.read()})
    for ranking in results.rankings:
        show_ranking(ranking, results.beside[ranking.budget], console)
    if not results.rankings:
        for budget, rows in results.beside.items():
            console.print(f"\n{budget}, which differ: nothing is ranked", markup=False)
            show([{"row": row, **values} for row, values in rows.items()], console)
    for note in results.notes:
        console.print(note, markup=False, soft_wrap=False)
    return {
        "study": grid.name,
        "hash": grid.study.hash(),
        "cells": grid.listed(),
        "chosen": grid.factors,
        "ranking": [entry for r in results.rankings for entry in as_entries(r)],
        "sentences": [r.sentence for r in results.rankings],
    }


def dry(grid: Grid, console: Console) -> dict[str, Any]:
    """Print every cell with what it takes, at the price of a short calibration of each row."""
    hours = {row.name: hours_per_step(row, grid.cells) for row in grid.rows}
    listed = []
    for c in [*grid.trials, *grid.cells]:
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
    return {"study": grid.name, "hash": grid.study.hash(), "cells": listed, "hours": todo, "ranking": []}


def hours_per_step(row: ResolvedRow, cells: list[Cell]) -> float:
    """Time a step of the row on this machine; 0 where nothing of it is left to train."""
    its = [c for c in cells if c.row == row.name and c.steps and c.status != "done"]
    if not its or its[0].recipe is None or not its[0].steps:
        return 0.0
    return plan(its[0].recipe, 2.0, None, Console(quiet=True))["hours"] / its[0].steps


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
    table = RichTable(
        title=f"{r.budget}, {r.metric}", title_justify="left", box=None, pad_edge=False, header_style="bold"
    )
    table.add_column("")
    table.add_column("row", overflow="fold")
    for head in (r.metric, "- first", *(f"- {c}" for c in controls)):
        table.add_column(head, justify="right")
    best = r.rows[0].row
    for place, s in enumerate(r.rows, 1):
        against = [best, *controls]
        cells = [str(d).replace(", p", "\np") if (d := r.between(s.row, other)) else "" for other in against]
        table.add_row(str(place), s.row, str(s), *cells)
    console.print()
    console.print(table, soft_wrap=False)
    for metric in dict.fromkeys(m for values in beside.values() for m in values):
        said = ", ".join(f"{s.row} {beside[s.row][metric]}" for s in r.rows if metric in beside.get(s.row, {}))
        console.print(f"{metric}: {said}", markup=False, soft_wrap=False)
    over = ", ".join(dict.fromkeys(s.over for s in r.rows))
    console.print(f"\n±: 95 % interval over {over}; p after Holm over all pairs\n{r.sentence}", soft_wrap=False)
