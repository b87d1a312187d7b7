"""What a run writes into its folder as it goes on, and its cost so far. Who reads that: folder.py."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric
from lightning_fabric.strategies import ModelParallelStrategy
from torch.utils.flop_counter import FlopCounterMode

from .. import provenance
from ..errors import RunFailed
from ..files import write_atomically, write_json
from ..recipe import Batch, Machine, dump
from ..weights import hashes
from .build import CPU_ATTENTION
from .folder import milestone
from .job import Batches, Job, on
from .shard import whole_moments, whole_weights
from .state import checkpoint_path, load_checkpoint, newest_checkpoint, save_checkpoint
from .step import TrainStep


class Run:
    """A run as it goes on: its folder, and the cost so far."""

    def __init__(self, job: Job, folder: Path, fabric: Fabric, previous: dict[str, Any]) -> None:
        self.job, self.folder, self.fabric = job, folder, fabric
        self.label = job.label
        self.checkpoints = folder / "checkpoints"
        self.cost: dict[str, Any] = {  # before
            "wall_s": 0.0, "device_hours": 0.0, "joules": 0.0, "images_seen": 0, "peak_memory_gib": 0.0,
        }  # fmt: skip
        self.previous = previous
        self.earlier: list[str | None] = []  # commits
        self.resumed = previous.get("resumed", 0)
        self.created = previous.get("created", provenance.now())
        self.steps = 0
        self.info: dict[str, Any] = {}
        self.kept: dict[str, Any] = previous.get("kept", {})  # weights on the way: file name -> share, step, cost, hash
        self.flops_per_image: float | None = None
        self.began = time.perf_counter()

    def begin(self, fingerprint: str, total: int | None, per_epoch: int) -> None:
        """total: steps of the run; None where the clock ends it."""
        self.info = {
            "kind": self.job.kind,
            **self.job.info(),
            "data_fingerprint": fingerprint,
            "steps_total": total,
            "steps_per_epoch": per_epoch,
            "code": self._code(),
            "versions": provenance.versions(),
            "hardware": {
                **provenance.hardware(self.fabric.device.type, self.fabric.world_size),
                "precision": self.precision,
            },
        }
        known = self.job.flops_per_image()
        self.flops_per_image = self.flops_per_image if known is None else known
        self.began, self.energy = time.perf_counter(), provenance.EnergyMeter(self.fabric.device.type)
        if self.fabric.is_global_zero:
            write_atomically(self.folder / "recipe.yaml", dump(on(self.job, self._machine()).recipe).encode())
        self.write("running")

    @property
    def precision(self) -> str:
        """What it computes in: 32, bf16 or 16."""
        return {"32-true": "32", "bf16-mixed": "bf16"}.get(str(self.fabric.strategy.precision.precision), "16")

    def _machine(self) -> Machine:
        """The recipe's machine as it turned out, nothing left to `auto`."""
        turned_out = {"precision": self.precision}
        if self.fabric.world_size > 1:
            turned_out["strategy"] = "fsdp" if isinstance(self.fabric.strategy, ModelParallelStrategy) else "ddp"
        return self.job.machine.model_copy(update=turned_out)

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's cost."""
        self.cost, self.resumed = {**self.cost, **state["cost"]}, self.resumed + 1
        self.flops_per_image = state.get("flops_per_image", self.flops_per_image)
        code = self.previous.get("code", {})
        self.earlier = [*code.get("earlier", []), code.get("commit")]

    def _code(self) -> dict[str, Any]:
        """What trains now; `earlier`: the commits that trained the steps before, where those were others."""
        now = provenance.code()
        earlier = [commit for commit in dict.fromkeys(self.earlier) if commit != now["commit"]]
        return {**now, "earlier": earlier} if earlier else now

    @contextlib.contextmanager
    def count_flops(self, batch: Batch) -> Iterator[None]:
        """Count those of the step within, where nobody could know before what an image costs."""
        if self.flops_per_image is not None:
            yield
            return
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            yield
        self.flops_per_image = counter.get_total_flops() * batch.world / batch.total

    def to_keep(self) -> dict[str, Any]:
        """What `resume` takes up."""
        return {k: v for k, v in self.costs().items() if k in self.cost}

    def wall_s(self) -> float:
        """How long it has trained so far, in this process and before."""
        return self.cost["wall_s"] + time.perf_counter() - self.began

    def images_per_s(self, start: int) -> float:
        """How fast this process trains, which began at step `start`."""
        return (self.steps - start) * self.job.batch_size / (time.perf_counter() - self.began)

    def costs(self) -> dict[str, Any]:
        wall = time.perf_counter() - self.began
        images = self.steps * self.job.batch_size
        joules = [self.cost["joules"], self.energy.read() if self.fabric.world_size == 1 else None]  # of this device
        return {
            "wall_s": round(self.cost["wall_s"] + wall, 3),
            "device_hours": self.cost["device_hours"] + wall / 3600 * self.fabric.world_size,
            "flops": None if self.flops_per_image is None else self.flops_per_image * images,
            "peak_memory_gib": max(self.cost["peak_memory_gib"], provenance.peak_memory_gib(self.fabric.device.type)),
            "joules": None if None in joules else sum(joules),
            "images_seen": images,
        }

    def write(self, status: str, **more: Any) -> None:
        if not self.fabric.is_global_zero or not self.info:
            return
        record = {
            "status": status,
            "created": self.created,
            "updated": provenance.now(),
            "step": self.steps,
            "resumed": self.resumed,
            **self.info,
            **({"kept": self.kept} if self.kept else {}),
            "cost": self.costs(),
            **more,
        }
        write_json(self.folder / "run.json", record)

    def save(self, step_module: TrainStep, optimizer: Any, loader: Batches, over: bool) -> None:
        """A checkpoint. over: the run ends here, which a timed run knows from nothing else."""
        self.info["substituted"] = len(loader.corrupt)
        weights, moments = whole_weights(step_module), whole_moments(optimizer)
        if self.fabric.is_global_zero:
            state = {
                "method": weights,
                "optimizer": moments,
                "precision": self.fabric.strategy.precision.state_dict(),  # fp16's scale of the loss
                "cost": self.to_keep(),
                "flops_per_image": self.flops_per_image,
                "corrupt": sorted(loader.corrupt),
                "over": over,
            }
            save_checkpoint(self.checkpoints, self.steps, state)
            self.write("running")
        self.fabric.barrier()

    def keep(self, step_module: TrainStep, share: float) -> None:
        """The weights at that share of the run, beside those that it ends with."""
        path = milestone(self.folder, share)
        self._weights(path, step_module)
        if self.fabric.is_global_zero:
            facts = {"share": share, "step": self.steps, "cost": self.costs(), **hashes(path)}
            self.kept[path.name] = facts
            self.write("running")

    def finish(self, step_module: TrainStep) -> None:
        self._weights(self.folder / "weights.safetensors", step_module)
        if self.fabric.is_global_zero:
            self.info["steps_total"] = self.steps
            if self.job.device_minutes:  # of a timed run, whose recipe cannot know them
                self.info["epochs"] = self.steps / self.info["steps_per_epoch"]
            self.write("finished", **hashes(self.folder / "weights.safetensors"))
        self.fabric.barrier()

    def _weights(self, path: Path, step_module: TrainStep) -> None:
        """Have the job write its weights; all devices come here, the first one writes."""
        method, sharded = step_module.method, isinstance(self.fabric.strategy, ModelParallelStrategy)
        weights = whole_weights(step_module) if sharded else {}
        if self.fabric.is_global_zero:
            if sharded:
                method = self.job.build()
                method.load_state_dict(weights)
            self.job.save_weights(path, method)


def newest(run: Run) -> tuple[int, dict[str, Any] | None]:
    """(step, state) of the newest checkpoint that is whole, (0, None) without one. The first process chooses.

    To be called on every device. RunFailed where one cannot read what was chosen.
    """
    checkpoint = newest_checkpoint(run.checkpoints) if run.fabric.is_global_zero else None
    step = run.fabric.broadcast(checkpoint[0] if checkpoint else None)
    if step is None or checkpoint:
        return checkpoint or (0, None)
    path = checkpoint_path(run.checkpoints, step)
    try:
        return step, load_checkpoint(path)
    except (ValueError, OSError) as e:
        raise RunFailed(
            f"the first process goes on from {path}, and process {run.fabric.global_rank} cannot read it ({e}): "
            f"all of them need the same run folder, on a file system that they share"
        ) from None
