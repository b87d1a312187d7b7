"""The executor: every cell that the ledger has not, one after the other or several at once, and what came of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .. import ledger
from ..device import default_device
from ..errors import Interrupted, RunFailed, UserError, is_full
from ..evaluate.start import pretrain
from ..paths import home
from ..provenance import cores
from ..recipe import Recipe
from ..signals import Signals
from . import measure
from .cells import Cell
from .measure import DataSets


def carry_out(
    cells: list[Cell],
    sets: DataSets,
    console: Console,
    jobs: int = 1,
    changed: Callable[[], Any] = lambda: None,
    all_cells: list[Cell] | None = None,
) -> None:
    """Run what is not done; a failed cell stops no other. Interrupted and a full disk stop all.

    changed: called after each cell, when the ledger and the cell have its numbers.
    """
    todo = [c for c in cells if c.status != "done"]
    clock = Clock(all_cells or cells, jobs)
    if jobs > 1:
        _several(todo, sets, console, jobs, changed, clock)
        return
    for cell in todo:
        cell.status = "running"
        console.print(f"[{clock.place(cell)}] {cell.name()}: running", markup=False)
        began = time.perf_counter()
        try:
            do(cell, Console(stderr=True, highlight=False))
        except (Interrupted, KeyboardInterrupt):
            cell.status = "interrupted"
            changed()
            raise
        except Exception as e:  # whatever it is, it is this cell's
            cell.status, cell.reason = "failed", _reason(e)
            if _full(e):
                changed()
                raise
        else:
            cell.status = "done"
        clock.note(cell, time.perf_counter() - began)
        changed()
        console.print(f"[{clock.place(cell)}] {cell.name()}: {outcome(cell)}; {clock.left()}", markup=False)


def do(cell: Cell, console: Console) -> None:
    """Train the cell where it has to be, and measure what is missing."""
    run = cell.run
    if cell.recipe is not None:
        folder = home() / "runs" / run
        Signals.unheeded = None
        pretrain(cell.recipe, folder, console)
        if Signals.unheeded:
            raise Interrupted(f"{Signals.unheeded} as {folder} ended; the same command goes on")
        run = str(folder)
    for m in cell.missing:
        cell.numbers[m.name] = m.take(run, cell.seed, console, cell.tuning)


def outcome(cell: Cell) -> str:
    """The first of its numbers, `knn_mean 34.2`, or why there is none."""
    if cell.status == "failed":
        return f"failed: {cell.reason}"
    return next((f"{name} {r.value:.1f}" for name, r in cell.numbers.items()), cell.status)


class Clock:
    """How far the whole is, and when it will be done: by the FLOPs, or the time, of what is left, at the rate so far.

    jobs: how many cells run at once.
    """

    def __init__(self, cells: list[Cell], jobs: int = 1) -> None:
        self.cells, self.jobs = cells, jobs
        self.spent: dict[str, tuple[float, float]] = {}  # row -> (seconds, what its budgets came to)

    def place(self, cell: Cell) -> str:
        return f"{self.cells.index(cell) + 1}/{len(self.cells)}"

    def note(self, cell: Cell, seconds: float) -> None:
        if (size := _size(cell)) and cell.status == "done":
            s, f = self.spent.get(cell.row, (0.0, 0.0))
            self.spent[cell.row] = s + seconds, f + size

    def left(self) -> str:
        """`1.2 h left, until 17:40`."""
        todo = [c for c in self.cells if c.status == "open"]
        if not todo:
            return "the last" if not any(c.status == "running" for c in self.cells) else "the last ones run"
        rates = {row: s / f for row, (s, f) in self.spent.items()}
        if not rates:
            return f"{len(todo)} left"
        usual = sum(rates.values()) / len(rates)
        seconds = sum(_size(c) * rates.get(c.row, usual) for c in todo) / self.jobs
        return f"{duration(seconds)} left, until {time.strftime('%H:%M', time.localtime(time.time() + seconds))}"


def _size(cell: Cell) -> float:
    """What its time is about in proportion to: FLOPs of training, or seconds; 0 of what only measures."""
    timed = cell.recipe.science.device_minutes if cell.recipe else None
    return 60 * timed if timed else cell.flops or 0.0


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


def _reason(e: Exception) -> str:
    said = " ".join(str(e).split())
    return said if isinstance(e, UserError | RunFailed) else f"{type(e).__name__}: {said}"


def _full(e: Exception) -> bool:
    return is_full(e) or is_full(e.__cause__) or str(e).startswith("no room on the disk")


# ------------------------------------------------------------------------------------------- several at once


def _several(
    todo: list[Cell], sets: DataSets, console: Console, jobs: int, changed: Callable[[], Any], clock: Clock
) -> None:
    """Each cell in a process of its own, with its GPU or its share of the cores; what it says goes into a log."""
    waiting, running = list(todo), dict[int, tuple[Cell, subprocess.Popen[bytes], float]]()
    with _passing_on(lambda: [process for _, process, _ in running.values()]) as stopped:
        while waiting or running:
            for slot in range(jobs):
                if slot not in running and waiting and not stopped:
                    cell = waiting.pop(0)
                    cell.status = "running"
                    console.print(f"[{clock.place(cell)}] {cell.name()}: running, log {log_of(cell)}", markup=False)
                    running[slot] = cell, start(cell, slot, jobs), time.perf_counter()
            for slot, (cell, process, began) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[slot]
                _collect(cell, process.returncode, sets)
                clock.note(cell, time.perf_counter() - began)
                changed()
                console.print(f"[{clock.place(cell)}] {cell.name()}: {outcome(cell)}; {clock.left()}", markup=False)
                if cell.status == "failed" and "no room on the disk" in cell.reason:
                    waiting.clear()
            if stopped and not running:
                break
            time.sleep(0.1)
    if stopped:
        raise Interrupted(f"{stopped[0]}; the same command goes on")


def log_of(cell: Cell) -> Path:
    return home() / "runs" / "logs" / f"{cell.run.replace(':', '-').replace('@', '-')}_s{cell.seed}.log"


def start(cell: Cell, slot: int, jobs: int) -> subprocess.Popen[bytes]:
    """`python -m sslbench.study.cell` on the cell, with slot number `slot` of `jobs`."""
    path = log_of(cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    mine, env = list(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [], dict(os.environ)
    share = mine[slot * len(mine) // jobs : (slot + 1) * len(mine) // jobs] or mine
    if default_device().type == "cuda":
        visible = env.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        devices = visible.split(",")
        env["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    env["OMP_NUM_THREADS"] = str(max(1, (len(share) or cores() // jobs)))
    process = subprocess.Popen(
        [sys.executable, "-m", "sslbench.study.cell"], stdin=subprocess.PIPE, stdout=path.open("wb"),
        stderr=subprocess.STDOUT, env=env, start_new_session=True,
    )  # fmt: skip
    if share and hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(process.pid, share)
    assert process.stdin
    process.stdin.write(json.dumps(as_json(cell)).encode())
    process.stdin.close()
    return process


def as_json(cell: Cell) -> dict[str, Any]:
    """What another process needs to do the cell."""
    return {
        "run": cell.run,
        "seed": cell.seed,
        "tuning": cell.tuning,
        "recipe": cell.recipe.model_dump(mode="json") if cell.recipe else None,
        "measures": [m.as_json() for m in cell.missing],
    }


def _collect(cell: Cell, code: int, sets: DataSets) -> None:
    """The cell's numbers from the ledger, or the last thing that its process said."""
    cell.look(ledger.read(), sets)
    if cell.status == "done":
        return
    said = [line for line in log_of(cell).read_text(errors="replace").splitlines() if line.strip()]
    cell.status = "interrupted" if code == 130 else "failed"
    cell.reason = said[-1].removeprefix("error: ") if said else f"exit status {code}"
    if code < 0:
        cell.reason = f"killed by {signal.Signals(-code).name}"


@contextlib.contextmanager
def _passing_on(processes: Callable[[], list[subprocess.Popen[bytes]]]) -> Iterator[list[str]]:
    """Signals that ask to stop are passed on to the processes, which save; the list then names what was received."""
    received: list[str] = []

    def note(number: int, _: Any) -> None:
        received.append(signal.Signals(number).name)
        for process in processes():
            if process.poll() is None:
                process.send_signal(number)

    before = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def from_json(tree: dict[str, Any]) -> Cell:
    """What `as_json` gave."""
    recipe = None if tree["recipe"] is None else Recipe.model_validate(tree["recipe"])
    measures = [measure.from_json(m) for m in tree["measures"]]
    return Cell("", "", tree["seed"], recipe, tree["run"], measures, tuning=tree["tuning"])
