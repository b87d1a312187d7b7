"""The one trainer: a recipe and a run folder in, weights out. Read it top to bottom."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy
from rich.console import Console

from .. import provenance
from ..device import bf16_is_fast, default_device, keep_freed_memory
from ..errors import Interrupted, RunFailed, UserError, full, is_full, lost_loader
from ..recipe import Batch, Machine
from ..signals import Signals
from .clock import Clock
from .folder import check_same, hold, read_run
from .job import Job, on
from .launch import agree, environment, meet
from .meter import Running, Stopwatch, note, progress_bar
from .run import Run, newest
from .shard import sharding, shards, unsharded
from .step import Learner
from .track import check_tracker, metrics_of


def resolve_precision(machine: Machine, device: str) -> str:
    if machine.precision != "auto":
        return machine.precision
    return "bf16" if bf16_is_fast(device) else "32"


def _check_mps(machine: Machine, precision: str) -> None:
    """UserError for what is not offered on Apple's GPUs."""
    world = machine.devices * machine.nodes
    for refused, asked, instead in (
        (precision != "32-true", f"machine.precision={machine.precision}", "machine.precision=32"),
        (world > 1, f"training on {world} devices", "machine.devices=1 and machine.nodes=1"),
        (machine.compile, "machine.compile=true", "machine.compile=false"),
    ):
        if refused:
            raise UserError(f"{asked} is not offered on Apple's GPU: set {instead}, or SSLBENCH_DEVICE=cpu")


def make_fabric(machine: Machine, sharded: bool = False) -> Fabric:
    world = machine.devices * machine.nodes
    device = default_device().type
    if device == "cpu":
        keep_freed_memory()
    if device == "cuda" and machine.devices > torch.cuda.device_count():
        raise UserError(f"machine.devices={machine.devices}, but this machine has {torch.cuda.device_count()} GPU(s)")
    precision = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}[resolve_precision(machine, device)]
    if precision == "16-mixed" and device == "cpu":
        raise UserError("precision 16 needs a GPU; on a CPU use 32 or bf16")
    if device == "mps":
        _check_mps(machine, precision)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # precision and devices stand in the run's header
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning_fabric")
        return Fabric(
            accelerator=device,
            devices=machine.devices,
            num_nodes=machine.nodes,
            # Buffers (memory banks, BatchNorm's statistics) are computed alike, or not read: none is sent.
            strategy=sharding(world) if sharded else DDPStrategy(broadcast_buffers=False) if world > 1 else "auto",
            plugins=[environment(machine)],
            precision=precision,  # type: ignore[arg-type]
        )


def fit(job: Job, folder: Path, console: Console, progress: bool = True) -> str:
    """Do `job` in `folder`, from its newest checkpoint where it has one.

    Returns "finished", or "already finished" where there was nothing to do. Raises UserError (input), RunFailed
    (non-finite loss, unreadable data), Interrupted (a signal; the folder can be resumed).
    """
    previous = read_run(folder)
    check_same(job.identity, previous, folder)
    whole = previous.get("status") == "finished" and (folder / "weights.safetensors").is_file()
    if whole and not _other_images(job, previous):
        return "already finished"
    job = on(job, agree(job.machine))
    check_tracker(job.machine.track)
    batch = job.batch()
    data = job.data()
    kept = previous.get("status") == "finished" or any((folder / "checkpoints").glob("*"))
    if kept and previous.get("data_fingerprint") != data.fingerprint:
        raise UserError(
            f"{folder} holds a run on other images than those of '{job.spec}' are now; choose another folder with --out"
        )
    if len(data) < batch.total:
        raise UserError(
            f"a batch of {batch.total} is more than the {len(data)} images of '{job.spec}'; "
            f"{job.too_large} {2 ** int(math.log2(len(data)))} or smaller"
        )
    fabric = make_fabric(job.machine, shards(job, batch))
    meet(fabric)
    fabric.launch()
    lock = hold(folder) if fabric.is_global_zero else None
    run = Run(job, folder, fabric, previous)
    try:
        with Signals() as signals:
            train(run, batch, data, signals, console, progress and fabric.is_global_zero)
    except Interrupted:
        run.write("interrupted")
        raise
    except (RunFailed, UserError) as e:
        run.write("failed", error=str(e))
        raise
    except torch.OutOfMemoryError as e:
        run.write("failed", error=str(e))
        hint = "set machine.micro_batch lower (what a loss compares stays the recipe's)"
        raise RunFailed(f"out of device memory at a micro-batch of {batch.micro} images; {hint}") from e
    except Exception as e:
        said = lost_loader(e) or (full(folder) if is_full(e) else None)
        run.write("failed", error=said or f"{type(e).__name__}: {e}")
        if said:
            raise RunFailed(said) from e
        if fabric.world_size > 1 and any(word in str(e) for word in ("gloo", "NCCL", "ProcessGroup")):
            raise RunFailed(
                f"another process of this run has died or cannot be reached, so this one (rank {fabric.global_rank} of "
                f"{fabric.world_size}) stops too; the same command resumes from the newest checkpoint"
            ) from e
        raise
    finally:
        if lock is not None:
            os.close(lock)
    return "finished"


def train(run: Run, batch: Batch, data: Any, signals: Signals, console: Console, progress: bool) -> None:
    """Train from the newest checkpoint, if there is one, to the end. What moves the weights is `Learner.one_step`."""
    job, machine, fabric = run.job, run.job.machine, run.fabric
    provenance.reset_peak_memory(fabric.device.type)
    learner = Learner(job, batch, fabric)
    method = learner.method
    for warning in job.warnings(method, batch):
        console.print(warning, markup=False)
    loader = job.batches(data, method, batch, fabric)
    per_epoch, total = loader.steps_per_epoch, job.steps(loader.steps_per_epoch)
    clock = _clock(run, batch, total, per_epoch)
    save_every = machine.saves_every(per_epoch, per_epoch if clock.seconds else total)

    start, state = newest(run)
    if state:
        with of_this(run, start):
            learner.load_weights(state)
        run.resume(state)
        loader.corrupt = set(state["corrupt"])
    learner.set_up()
    if state:
        with of_this(run, start):
            learner.load_moments(state)
    run.begin(data.fingerprint, None if clock.seconds else total, per_epoch)
    run.steps = start
    clock.begin()

    running, watch = Running(), Stopwatch()
    here = fabric.is_global_zero
    metrics = metrics_of(run, start) if here else None
    meters = job.meters(data, method, batch, fabric.device) if here or learner.sharded else None
    knn = job.watch(data, method, batch) if here and not learner.sharded else None
    milestones = [share for share in sorted(machine.keep_at) if share > clock.share(start)]

    end = start if state and state.get("over") else clock.steps
    with (
        metrics or contextlib.nullcontext(),
        contextlib.closing(loader(start, end)) as micro_batches,
        progress_bar(console, progress) as bar,
    ):
        task = bar.add_task(run.label, total=1.0, note="")
        bar.update(task, completed=clock.share(start))
        for step in range(start, end):
            epoch = clock.epoch(step)
            lr, decay = job.learning_rate(step, epoch), job.weight_decay(step, epoch)
            look = (step + 1) % machine.meters_every == 0 or step + 1 == total
            seen: dict[str, float] = {}  # what metrics.jsonl gets of this step
            with run.count_flops(batch):
                values = learner.one_step(step, micro_batches, lr, decay, seen if look and job.pulls else None)
            clock.tick()
            run.steps = step + 1
            share = clock.share(run.steps)
            method.after_step(share)
            running.add(values)
            watch.images += batch.total

            last = clock.over(run.steps)
            log = last or run.steps % machine.log_every == 0
            stop = signals.asked(fabric, log)
            save = last or stop or run.steps % save_every == 0
            if (log or save) and batch.world > 1:
                loader.check_corrupt()
            # Only here does the host wait for the device (a CPU keeps nobody waiting).
            if (log or save or fabric.device.type == "cpu") and learner.guard.tripped():
                raise RunFailed(
                    f"the gradient is not finite at or before step {run.steps} (loss {running.means()['loss']:.4g}); "
                    f"the weights did not move. Try a lower science.optim.lr, a longer warm-up, or precision 32"
                )
            if look and meters:
                with unsharded(learner.module):
                    seen.update(meters.read(fabric))
            if knn and knn.due(share, run.wall_s(), run.images_per_s(start)):
                seen["knn_watch"] = knn.look(fabric)
            while milestones and share >= milestones[0]:
                run.keep(learner.module, milestones.pop(0))
            if log:
                means = running.means(fabric)
                speed = watch.read(loader.wait_s)
                seen.update({"epoch": run.steps / per_epoch, "lr": lr, **means, **speed})
                bar.update(task, note=note(means["loss"], speed, knn.top1 if knn else None))
            if metrics and seen:
                metrics.write(run.steps, seen)
            bar.update(task, completed=1.0 if last else share)
            if save:
                run.save(learner.module, learner.optimizer, loader, last)
                clock.saved()
            if stop and not last:
                of = f", {share:.0%} of its time" if clock.seconds else f" of {total}"
                what = f"{signals.received} after step {run.steps}{of}; the same command resumes"
                raise Interrupted(what, signals.requeue)
            if last:
                break
    run.finish(learner.module)


def _clock(run: Run, batch: Batch, total: int, per_epoch: int) -> Clock:
    """What says when the run ends: after `total` steps, or when its device's time is spent."""
    minutes = run.job.device_minutes
    if minutes and batch.world > 1:
        raise UserError(f"science.device_minutes is for one device, whose time it is; this run has {batch.world}")
    return Clock(total, per_epoch, run.job.epochs, None if minutes is None else 60 * minutes, run.wall_s)


@contextlib.contextmanager
def of_this(run: Run, step: int) -> Iterator[None]:
    """Loading a checkpoint: what does not fit was of another run."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError) as e:
        raise UserError(
            f"the checkpoint of step {step} in {run.checkpoints} is not of this {run.label}: "
            f"{' '.join(str(e).split())[:200]}; remove it, or choose another folder with --out"
        ) from None


def _other_images(job: Job, previous: dict[str, Any]) -> bool:
    """Whether a finished run was on other images. Where they are gone nobody can tell: then it is finished."""
    try:
        return job.data().fingerprint != previous["data_fingerprint"]
    except UserError:
        return False
