"""`sslbench pretrain --seeds N`: a recipe under several seeds, one run after the other, each in a folder of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import Interrupted, RunFailed, UserError, is_full
from ..paths import home
from ..recipe import Recipe
from ..signals import Signals
from ..train.folder import check_same, read_run
from ..train.job import identity, run_name
from ..train.launch import first_process, launched
from .pretrain import dry, introduce, run

MOST = 2**31  # seeds are below


def start_seeds(
    recipe: Recipe, seeds: int, out: Path | None, console: Console, slurm: str | None = None
) -> dict[str, Any]:
    """Run the recipe with its seed and those that follow: {"runs": [{"seed", "run", "status"}, ...]}.

    The same command goes on: what is finished is left alone, what was stopped is resumed. A run that fails stops no
    other; RunFailed then names it at the end. slurm: sbatch's options; each run is a job of its own.
    """
    runs = _runs(recipe, seeds, out)
    if slurm is None:
        _refuse_several(recipe, seeds)
    for one, folder in runs:  # before the first of them trains
        check_same(identity(one), read_run(folder), folder)
    introduce(recipe, console)
    answers: list[dict[str, Any]] = []
    failed: list[str] = []
    for i, (one, folder) in enumerate(runs, 1):
        seed = one.science.seed
        console.print(f"seed {seed}, {i} of {seeds}", markup=False)
        Signals.unheeded = None
        try:
            answers.append({"seed": seed, **run(one, folder, console, slurm)})
        except RunFailed as e:
            if is_full(e.__cause__):
                raise
            failed.append(f"seed {seed} ({folder}): {e}")
            answers.append({"seed": seed, "run": str(folder), "status": "failed"})
        if Signals.unheeded and i < seeds:
            raise Interrupted(f"{Signals.unheeded} as {folder} ended; the same command goes on with the next seed")
    answer = {"runs": answers}
    if failed:
        raise RunFailed(f"{len(failed)} of {seeds} runs failed: {'; '.join(failed)}", answer)
    return answer


def dry_seeds(recipe: Recipe, seeds: int, out: Path | None, console: Console) -> dict[str, Any]:
    """Print what would run: the plan of one run, as `dry` has it, and where each of them is."""
    facts = dry(recipe, console)
    listed = []
    for one, folder in _runs(recipe, seeds, out):
        status = read_run(folder).get("status", "open")
        listed.append({"seed": one.science.seed, "run": str(folder), "status": status})
        console.print(f"seed {one.science.seed:<6} {status}: {folder}", markup=False)
    console.print(f"{seeds} runs, {facts['flops'] * seeds:.3g} FLOP in all of them")
    return {**facts, "runs": listed}


def _runs(recipe: Recipe, seeds: int, out: Path | None) -> list[tuple[Recipe, Path]]:
    """Each seed's recipe and folder. `--out DIR` is the folder of seed 0, as without --seeds; seed 1's is DIR_s1."""
    first_seed = recipe.science.seed
    if first_seed + seeds > MOST:
        raise UserError(f"--seeds {seeds} from --seed {first_seed} on: seeds are below {MOST}")
    runs = []
    for seed in range(first_seed, first_seed + seeds):
        one = recipe.model_copy(deep=True)
        one.science.seed = seed
        folder = home() / "runs" / run_name(one)
        if out:
            folder = out.parent / f"{out.name}_s{seed}" if seed else out
        runs.append((one, folder))
    return runs


def _refuse_several(recipe: Recipe, seeds: int) -> None:
    """UserError where a run has several processes, of which only the first would know that another run follows."""
    if launched() or recipe.machine.devices * recipe.machine.nodes > 1:
        if not first_process():
            raise SystemExit(2)
        raise UserError(
            f"--seeds {seeds} is for one process; on several devices give one --seed after the other, or --slurm, "
            f"which makes a job of each"
        )
