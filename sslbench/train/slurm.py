"""`sslbench pretrain --slurm`: the run as a job of a SLURM cluster, queued again until it is done, through submitit."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import Interrupted, RunFailed, UserError, nearest
from ..recipe import Batch, Machine, Recipe
from .folder import check_same, read_run
from .job import identity
from .launch import first_process

WARNING_S = 300  # before the end of its time a job gets SIGUSR1; the next log step has to come within that


class Queued:
    """What each process of a job does. Its state is the run folder: queued again, it goes on from there."""

    def work(self, console: Console) -> str:
        raise NotImplementedError

    def __call__(self) -> str:
        try:
            return self.work(Console(stderr=True, highlight=False))
        except Interrupted as e:
            if e.requeue and first_process():
                os.kill(os.getpid(), signal.SIGUSR1)  # to submitit, now that all is saved: it queues the job again
            elif e.requeue:
                time.sleep(60)  # a process that ends could end the first one; queueing ends all
            raise SystemExit(130) from e
        except (UserError, RunFailed) as e:
            raise SystemExit(f"error: {e}" if first_process() else 1) from e

    def checkpoint(self) -> Any:
        """What submitit is to run the next time."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def submit(
    recipe: Recipe, folder: Path, options: str, console: Console, task: Callable[[Recipe, Path], Queued]
) -> dict[str, str]:
    """Submit `task(recipe, folder)`, which trains. options: sbatch's, as `partition=gpu,nodes=2,time=1440`.

    time is in minutes; nodes and gpus_per_node are the recipe's machine.nodes and machine.devices, one task a device.
    """
    folder = folder.resolve()
    given = options_of(options)
    machine = agree_with(given, recipe.machine)
    recipe = recipe.on(machine)
    Batch.of(recipe)  # refuses what does not divide
    previous = read_run(folder)
    check_same(identity(recipe), previous, folder)
    if previous.get("status") == "finished":
        return {"run": str(folder), "status": "finished"}
    id = send([task(recipe, folder)], folder / "slurm", folder.name, machine, given)[0]
    console.print(f"submitted as job {id}, {machine.nodes} machine(s) of {machine.devices} device(s); it says in "
                  f"{folder}/slurm/{id}_0_log.err what it does, and is queued again until it is done")  # fmt: skip
    return {"run": str(folder), "status": "submitted", "job": id}


def options_of(options: str) -> dict[str, Any]:
    """sbatch's options, as `partition=gpu,nodes=2,time=1440`; UserError where submitit is absent or knows none such."""
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"  # read when submitit is imported, here and in the job
    try:
        import submitit
    except ImportError:
        raise UserError("--slurm needs submitit: pip install 'sslbench[slurm]'") from None
    known = submitit.SlurmExecutor._valid_parameters() - {"ntasks_per_node", "setup"}
    given: dict[str, Any] = {}
    for pair in options.split(","):
        key, equals, value = (x.strip() for x in pair.partition("="))
        key = key.replace("-", "_")
        if not equals or not value:
            raise UserError(f"--slurm {options}: expected KEY=VALUE,KEY=VALUE, such as partition=gpu,nodes=2,time=1440")
        if key not in known:
            hint = "; that is --devices" if key == "ntasks_per_node" else nearest(key, known)
            raise UserError(f"--slurm: unknown option '{key}'{hint}")
        given[key] = int(value) if value.isdecimal() else value
    if not isinstance(given.get("time"), int):
        raise UserError("--slurm: give time=MINUTES; a run that takes longer is queued again and goes on")
    for key in ("nodes", "gpus_per_node"):
        if not isinstance(given.get(key, 0), int):
            raise UserError(f"--slurm: {key}={given[key]} is not a number")
    return given


def agree_with(given: dict[str, Any], machine: Machine) -> Machine:
    """The recipe's machine with nodes and devices of sbatch's options; UserError where it states others."""
    agreed = {}
    for key, option in (("nodes", "nodes"), ("devices", "gpus_per_node")):
        if given.get(option):
            if key in machine.model_fields_set and getattr(machine, key) != given[option]:
                raise UserError(f"--slurm {option}={given[option]}, but the run is for {getattr(machine, key)} {key}")
            agreed[key] = given[option]
    return machine.model_copy(update=agreed)


def send(tasks: list[Any], logs: Path, name: str, machine: Machine, given: dict[str, Any]) -> list[str]:
    """Submit one task as a job, several as an array, on that machine, the user's options on top: the jobs' numbers."""
    import submitit

    defaults = {
        "job_name": name,
        "nodes": machine.nodes,
        "ntasks_per_node": machine.devices,
        "gpus_per_node": machine.devices,
        "cpus_per_task": machine.workers + 1,
        "signal_delay_s": WARNING_S,
        "setup": ["export SUBMITIT_PREEMPT_SIGNAL=USR1"],
    }
    parameters = {k: v for k, v in {**defaults, **given}.items() if v != 0}  # gpus_per_node=0: on CPUs
    try:
        executor = submitit.SlurmExecutor(logs, max_num_timeout=1000)
        executor.update_parameters(**parameters)
        with executor.batch() if len(tasks) > 1 else contextlib.nullcontext():
            jobs = [executor.submit(task) for task in tasks]
    except RuntimeError as e:  # no srun
        raise UserError(f"--slurm: {e}") from None
    except submitit.core.utils.FailedJobError as e:
        raise UserError(f"--slurm: sbatch refused: {' '.join(str(e).split())}") from None
    return [job.job_id for job in jobs]
