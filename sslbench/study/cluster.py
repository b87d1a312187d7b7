"""`sslbench study --slurm`: the runs that the ledger has not, as an array of jobs of a cluster, through submitit."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from ..paths import home
from ..recipe import Machine
from ..train.slurm import Queued, agree_with, options_of, send
from .cells import Cell
from .executor import as_json, do, from_json
from .grid import Grid


class CellTask(Queued):
    """One cell, on whichever machine it comes to."""

    def __init__(self, cell: Cell) -> None:
        self.cell = as_json(cell)

    def work(self, console: Console) -> str:
        cell = from_json(self.cell)
        do(cell, console)
        return cell.run


def submit(grid: Grid, options: str, console: Console) -> dict[str, Any]:
    """Submit what is not in the ledger: the trials first, and, when these are done, by the same command the rest."""
    cells = grid.waiting()
    given = options_of(options)
    for cell in cells:
        if cell.recipe:
            cell.recipe = cell.recipe.on(agree_with(given, cell.recipe.machine))
    machine = next((c.recipe.machine for c in cells if c.recipe), Machine())
    folder = home() / "runs" / "slurm" / grid.name
    ids = send([CellTask(c) for c in cells], folder, grid.name, machine, given)
    for cell in cells:
        cell.status = "submitted"
    grid.keep()
    are_trials = cells[0].factor is not None
    rest = "; these choose each row's lr, so give the same command again when they are done" if are_trials else ""
    console.print(f"submitted {len(ids)} runs as job {ids[0].partition('_')[0]}, logs in {folder}{rest}", markup=False)
    return {"study": grid.name, "cells": grid.listed(), "ranking": [], "jobs": ids}
