"""Speed, cost and progress of a run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from ..errors import Interrupted
from ..files import write_atomically

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Running:
    """Sums of scalars that stay on the device until `means` reads them all at once."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.total: Tensor | None = None
        self.steps = 0

    def add(self, values: dict[str, Tensor]) -> None:
        self.names = list(values)
        stacked = torch.stack([v.detach().float() for v in values.values()])
        self.total = stacked if self.total is None else self.total + stacked
        self.steps += 1

    def means(self, fabric: Fabric | None = None) -> dict[str, float]:
        """Over the steps since the last reading and, by `fabric`, over its devices, which all ask for it together."""
        if self.total is None:
            return {}
        if fabric is not None and fabric.world_size > 1:
            self.total = cast(Tensor, fabric.all_reduce(self.total, reduce_op="mean"))
        means = dict(zip(self.names, (self.total / self.steps).tolist(), strict=True))
        self.total, self.steps = None, 0
        return means


class Sink(Protocol):
    """What gets the metrics beside metrics.jsonl and TensorBoard."""

    def log(self, step: int, values: dict[str, Any]) -> None: ...

    def close(self, status: str) -> None: ...


class Metrics:
    """metrics.jsonl, TensorBoard, and a tracker. A resumed run drops what was logged after its checkpoint.

    Left by an exception, it tells the tracker that the run was interrupted, or failed.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool, tracker: Sink | None = None) -> None:
        self.tracker = tracker
        self.path = folder / "metrics.jsonl"
        lines = self.path.read_text(errors="replace").splitlines() if self.path.is_file() else []
        kept = [line for line in lines if _step(line) <= step]
        write_atomically(self.path, "".join(line + "\n" for line in kept).encode())
        self.file = open(self.path, "a", buffering=1)  # noqa: SIM115 - closed by close()
        self.board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
        if self.tracker:
            self.tracker.log(step, values)

    def close(self, status: str = "finished") -> None:
        self.file.close()
        if self.board:
            self.board.close()
        if self.tracker:
            self.tracker.close(status)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        stopped = kind is not None and issubclass(kind, Interrupted | KeyboardInterrupt)
        self.close("interrupted" if stopped else "failed" if kind else "finished")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The steps of a metrics.jsonl, [] where there is none; without what is no number of a step."""
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return [_numbers(line) for line in lines if _step(line) < float("inf")]


def _numbers(line: str) -> dict[str, float]:
    return {k: v for k, v in json.loads(line).items() if type(v) in (int, float)}


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):  # the torn last line of a killed run
        return float("inf")


class Stopwatch:
    """Images a second and the share of host time spent waiting for data, since the last reading."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.waited = 0.0
        self.images = 0

    def read(self, waited: float) -> dict[str, float]:
        now = time.perf_counter()
        elapsed = max(now - self.began, 1e-9)
        out = {"images_per_s": self.images / elapsed, "data_wait": (waited - self.waited) / elapsed}
        self.began, self.waited, self.images = now, waited, 0
        return out


def note(loss: float, speed: dict[str, float], knn: float | None = None) -> str:
    """What the terminal shows of a log step, beside the bar; knn: accuracy on part of train, where it was looked at."""
    watched = "" if knn is None else f" knn {knn:.0f}%"
    return f"loss {loss:.3f} {speed['images_per_s']:.1f} img/s wait {speed['data_wait']:.1%}{watched}"


def progress_bar(console: Console, shown: bool) -> Progress:
    """Fits 80 columns: what, bar, share, time left, then the loop's own words."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not shown,
        transient=False,
    )
