"""`machine.track`: what TensorBoard gets of a run, in wandb, trackio or mlflow too. None of them is installed with us.

Where each one keeps or sends it is said by its own environment variables, such as WANDB_MODE=offline,
MLFLOW_TRACKING_URI or TRACKIO_SPACE_ID.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ..errors import UserError
from ..files import write_json
from .meter import Metrics
from .run import Run

PROJECT = "sslbench"  # unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME says another
KEPT = "track.json"  # in the run folder: the run's id in each tracker
PARAMS = 100  # that mlflow takes at once


class Tracker(Protocol):
    """A run in one of them. id: what it is gone on with by."""

    id: str

    def log(self, step: int, values: dict[str, Any]) -> None: ...

    def close(self, status: str) -> None: ...


class Wandb:
    def __init__(self, folder: Path, config: dict[str, Any], id: str | None) -> None:
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=folder.name, id=id, resume="allow" if id else None,
            config=config, allow_val_change=True, dir=str(folder), reinit="create_new",
            settings=wandb.Settings(console="off"),
        )  # fmt: skip
        self.id = self.run.id
        # A resumed run logs again what came after its checkpoint, and wandb drops steps that go back: ours is a metric.
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, Any]) -> None:
        self.run.log({**values, "step": step})

    def close(self, status: str) -> None:
        self.run.finish(exit_code=0 if status == "finished" else 1)


class Trackio:
    """It goes on with a run by the run's name; its own id is kept to be looked up by."""

    def __init__(self, folder: Path, config: dict[str, Any], id: str | None) -> None:
        import trackio

        self.end = trackio.finish  # of the run that began last: trackio has one at a time
        self.run = trackio.init(PROJECT, folder.name, config=config, resume="allow" if id else "never", embed=False)
        self.id = self.run.id

    def log(self, step: int, values: dict[str, Any]) -> None:
        self.run.log(values, step=step)

    def close(self, status: str) -> None:
        self.end()


class Mlflow:
    def __init__(self, folder: Path, config: dict[str, Any], id: str | None) -> None:
        import mlflow

        self.client = mlflow.MlflowClient()
        self.metric, param = mlflow.entities.Metric, mlflow.entities.Param
        if id:
            self.id = self.client.get_run(id).info.run_id
            self.client.update_run(self.id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self.client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self.client.create_experiment(name)
        self.id = self.client.create_run(experiment, run_name=folder.name).info.run_id
        params = [param(key, str(value)) for key, value in flat(config).items()]
        for i in range(0, len(params), PARAMS):
            self.client.log_batch(self.id, params=params[i : i + PARAMS])

    def log(self, step: int, values: dict[str, Any]) -> None:
        now = int(1000 * time.time())
        self.client.log_batch(self.id, [self.metric(k, float(v), now, step) for k, v in values.items()])

    def close(self, status: str) -> None:
        ended = {"finished": "FINISHED", "interrupted": "KILLED"}
        self.client.set_terminated(self.id, ended.get(status, "FAILED"))


TRACKERS: dict[str, Callable[[Path, dict[str, Any], str | None], Tracker]] = {
    "wandb": Wandb,
    "trackio": Trackio,
    "mlflow": Mlflow,
}


class Tracked:
    """A tracker that costs no training: where it fails, it is left with one warning, and metrics.jsonl has the rest."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self.name = name
        self.tracker: Tracker | None = tracker

    def log(self, step: int, values: dict[str, Any]) -> None:
        self._try(lambda tracker: tracker.log(step, values))

    def close(self, status: str) -> None:
        self._try(lambda tracker: tracker.close(status))
        self.tracker = None

    def _try(self, act: Callable[[Tracker], None]) -> None:
        if self.tracker is None:
            return
        try:
            with _aside():
                act(self.tracker)
        except Exception as e:  # network, server and disk: each of them raises its own kinds
            self.tracker = None
            warnings.warn(
                f"{self.name} gets no more of this run ({_said(e)}); metrics.jsonl has all of it", stacklevel=4
            )


def check_tracker(name: str | None) -> None:
    """UserError where it is not installed, before anything is trained."""
    if name is None:
        return
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:  # a folder `wandb` that an earlier run left here is no module
        raise UserError(f"machine.track={name} needs {name}: pip install {name}, or leave machine.track out")


def metrics_of(run: Run, step: int) -> Metrics:
    """Where the metrics of a run go, on its first process, from `step` on."""
    machine = run.job.machine
    tracked = _open(machine.track, run) if machine.track else None
    return Metrics(run.folder, step, machine.tensorboard, tracked)


def _open(name: str, run: Run) -> Tracked:
    """The run in its tracker: the one that its folder knows, or a new one. UserError: the tracker does not take it."""
    config = {**run.job.info(), **run.job.recipe.model_dump(mode="json")}
    kept = _kept(run.folder)
    try:
        with _aside():
            tracker = TRACKERS[name](run.folder, config, kept.get(name))
    except Exception as e:  # a login that is missing, a server that does not answer, a run that was deleted
        raise UserError(
            f"machine.track={name}: it does not take the run ({_said(e)}); mend that, or leave machine.track out"
        ) from None
    write_json(run.folder / KEPT, {**kept, name: tracker.id})
    return Tracked(name, tracker)


def _kept(folder: Path) -> dict[str, str]:
    try:
        kept = json.loads((folder / KEPT).read_text())
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _aside() -> contextlib.AbstractContextManager[Any]:
    """Standard output belongs to the command's JSON: what a library prints goes to standard error."""
    return contextlib.redirect_stdout(sys.stderr)


def _said(e: Exception) -> str:
    return " ".join(f"{type(e).__name__}: {e}".split())[:200]


def flat(tree: dict[str, Any], where: str = "") -> dict[str, Any]:
    """{"science": {"optim": {"lr": 1}}} -> {"science.optim.lr": 1}"""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flat(value, f"{where}{key}.") if isinstance(value, dict) and value else {f"{where}{key}": value}
    return out
