"""The one trainer: a recipe and a run folder in, weights out. Read it top to bottom."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy
from rich.console import Console
from torch import Tensor, nn

from .. import provenance
from ..data.loader import MicroBatches, seed_of
from ..device import bf16_is_fast, default_device, keep_freed_memory
from ..draws import Draws
from ..errors import Interrupted, RunFailed, UserError, full, is_full, lost_loader
from ..recipe import Batch, Machine, Recipe
from ..signals import Signals
from .cache import average_gradients, cached_backward
from .clock import Clock
from .diagnose import CollapseMeters, term_gradients
from .guard import FiniteGuard
from .job import Job, on
from .launch import agree, environment, meet
from .meter import Metrics, Running, Stopwatch, note, progress_bar
from .optim import learning_rate
from .run import Run, check_same, hold, newest, read_run
from .shard import load_optimizer, sharding, shards, unsharded
from .step import TrainStep
from .watch import Watch


def resolve_precision(machine: Machine, device: str) -> str:
    if machine.precision != "auto":
        return machine.precision
    return "bf16" if bf16_is_fast(device) else "32"


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


def pretrain(recipe: Recipe, folder: Path, console: Console, progress: bool = True) -> str:
    """Pre-train `recipe` in `folder`; see `fit`."""
    return fit(Job(recipe), folder, console, progress)


def fit(job: Job, folder: Path, console: Console, progress: bool = True, by: Callable[..., None] | None = None) -> str:
    """Do `job` in `folder`, from its newest checkpoint where it has one. by: what trains; `train` if left out.

    Returns "finished", or "already finished" where there was nothing to do. Raises UserError (input), RunFailed
    (non-finite loss, unreadable data), Interrupted (a signal; the folder can be resumed).
    """
    previous = read_run(folder)
    check_same(job, previous, folder)
    whole = previous.get("status") == "finished" and (folder / "weights.safetensors").is_file()
    if whole and not _other_images(job, previous):
        return "already finished"
    job = on(job, agree(job.machine))
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
            (by or train)(run, batch, data, signals, console, progress and fabric.is_global_zero)
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
    job, machine, fabric = run.job, run.job.machine, run.fabric
    provenance.reset_peak_memory(fabric.device.type)
    torch.manual_seed(seed_of("weights", job.seed))
    step_module = TrainStep(job.build())
    method = step_module.method
    if machine.compile:
        if batch.passes == 1:
            method.compile()
        else:
            method.embed = torch.compile(method.embed)  # type: ignore[method-assign]
        torch._functorch.config.donated_buffer = False  # terms' gradients go through the graph more than once
    loader = MicroBatches(
        data,
        seed=job.seed,
        micro=batch.micro * batch.passes,
        world=batch.world,
        accumulation=batch.accumulation,
        rank=fabric.global_rank,
        device=fabric.device,
        crops=method.crops,
        image_size=job.image_size,
        crop_scale=job.crop_scale,
        crop_tries=job.crop_tries,
        interpolation=job.interpolation,
        workers=machine.workers,
        distort=job.distort,
        labelled=job.labelled,
    )
    per_epoch = loader.steps_per_epoch
    total = round(per_epoch * job.epochs)
    seconds = None if job.device_minutes is None else 60 * job.device_minutes
    if seconds and batch.world > 1:
        raise UserError(f"science.device_minutes is for one device, whose time it is; this run has {batch.world}")
    clock = Clock(total, per_epoch, job.epochs, seconds, run.wall_s)
    save_every = machine.saves_every(per_epoch, per_epoch if seconds else total)

    first, state = newest(run)
    if state:
        with of_this(run, first):
            method.load_state_dict(state["method"])
        run.resume(state)
        loader.corrupt = set(state["corrupt"])
    model = fabric.setup_module(step_module)
    optimizer: Any = fabric.setup_optimizers(job.optimizer(method))  # sharded weights are other tensors
    if state:
        with of_this(run, first):
            load_optimizer(optimizer, state["optimizer"])
            fabric.strategy.precision.load_state_dict(state.get("precision", {}))
    sharded = isinstance(fabric.strategy, ModelParallelStrategy)
    run.begin(data.fingerprint, None if seconds else total, per_epoch)
    run.steps = first
    clock.begin()

    guard = FiniteGuard(fabric.device)
    guard.arm(optimizer)
    scaler = getattr(fabric.strategy.precision, "scaler", None)  # fp16 only: it has its own way with infinities
    running, watch = Running(), Stopwatch()
    metrics = Metrics(run.folder, first, machine.tensorboard) if fabric.is_global_zero else None
    meters = CollapseMeters(data, method, fabric.device, batch.total) if fabric.is_global_zero or sharded else None
    watched = machine.watch and job.kind == "pretrain" and fabric.is_global_zero and not sharded
    knn = Watch(data, batch.total) if watched else None
    milestones = [share for share in sorted(machine.keep_at) if share > clock.share(first)]
    seen: dict[str, float] = {}

    def look_at_terms(losses: dict[str, Tensor]) -> None:
        seen.update(term_gradients(losses, method.encoder, fabric))

    draws = Draws(fabric.device)

    def seek(step: int, first: int) -> Draws:
        """The generator for the views of the images from number `first` of the step's on."""
        draws.seek(seed_of("views", job.seed, step, 0), seed_of("alone", job.seed, step, first), batch.total, first)
        return draws

    def replay(images: Tensor, step: int, first: int) -> Callable[[int], dict[str, Tensor]]:
        """views(i) of the i-th pass over `images`, for the gradient cache."""

        def views(i: int) -> dict[str, Tensor]:
            torch.manual_seed(seed_of("model", job.seed, step, first, i))
            with torch.no_grad():
                return method.build_views(images.split(batch.micro)[i], seek(step, first + i * batch.micro))

        return views

    end = first if state and state.get("over") else clock.steps
    with contextlib.closing(loader(first, end)) as micro_batches, progress_bar(console, progress) as bar:
        task = bar.add_task(run.label, total=1.0, note="")
        bar.update(task, completed=clock.share(first))
        for step in range(first, end):
            # Anything a model draws on its own (drop path) is a function of the step too.
            torch.manual_seed(seed_of("model", job.seed, step, fabric.global_rank))
            lr = learning_rate(job.optim, batch.total, clock.epoch(step), job.epochs)
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            look = (step + 1) % machine.meters_every == 0 or step + 1 == total
            seen.clear()
            mean: dict[str, Any] = {}  # losses of the step
            for a in range(batch.accumulation):
                images = next(micro_batches)
                index = (a * batch.world + fabric.global_rank) * batch.micro * batch.passes
                if batch.passes > 1:
                    views = replay(images, step, index)
                    losses = cached_backward(method, views, batch.passes, fabric, batch.accumulation)
                else:
                    with fabric.no_backward_sync(model, enabled=a < batch.accumulation - 1):
                        losses = model(
                            images, seek(step, index), look_at_terms if look and a == 0 and not sharded else None
                        )
                        fabric.backward(losses["loss"] / batch.accumulation)
                mean = {k: mean.get(k, 0.0) + x.detach() / batch.accumulation for k, x in losses.items()}
            if batch.passes > 1 and batch.world > 1:
                average_gradients(method)
            if scaler is not None:  # by hand: Fabric does not unscale for a fused optimiser
                scaler.unscale_(optimizer.optimizer)
            norm: Any = nn.utils.get_total_norm([p.grad for p in method.parameters() if p.grad is not None])
            if job.optim.clip_grad:
                nn.utils.clip_grads_with_norm_(method.parameters(), job.optim.clip_grad, norm)
            if sharded:
                norm = norm.full_tensor()
            # fp16's norm may be infinite, and is left out then; a loss is of one device, a gradient of all.
            finite: Any = norm if scaler is None else fabric.all_reduce(mean["loss"])
            guard.check(finite)
            optimizer.step()
            optimizer.zero_grad()
            clock.tick()
            run.steps = step + 1
            share = clock.share(run.steps)
            method.after_step(share)
            running.add({**mean, "grad_norm": norm})
            watch.images += batch.total

            last = clock.over(run.steps)
            log = last or run.steps % machine.log_every == 0
            stop = signals.asked(fabric, log)
            save = last or stop or run.steps % save_every == 0
            if (log or save) and batch.world > 1:
                loader.check_corrupt()
            # Only here does the host wait for the device (a CPU keeps nobody waiting).
            if (log or save or fabric.device.type == "cpu") and guard.tripped():
                raise RunFailed(
                    f"the gradient is not finite at or before step {run.steps} (loss {running.means()['loss']:.4g}); "
                    f"the weights did not move. Try a lower science.optim.lr, a longer warm-up, or precision 32"
                )
            if look and meters:
                with unsharded(step_module):
                    seen.update(meters.read(method, fabric))
            if knn and knn.due(share, run.wall_s(), run.images_per_s(first)):
                seen["knn_watch"] = knn.look(method, fabric)
            while milestones and share >= milestones[0]:
                run.keep(step_module, milestones.pop(0))
            if log:
                means = running.means(fabric)
                speed = watch.read(loader.wait_s)
                seen.update({"epoch": run.steps / per_epoch, "lr": lr, **means, **speed})
                bar.update(task, note=note(means["loss"], speed, knn.top1 if knn else None))
            if metrics and seen:
                metrics.write(run.steps, seen)
            bar.update(task, completed=1.0 if last else share)
            if save:
                run.save(step_module, optimizer, loader, last)
                clock.saved()
            if stop and not last:
                of = f", {share:.0%} of its time" if seconds else f" of {total}"
                what = f"{signals.received} after step {run.steps}{of}; the same command resumes"
                raise Interrupted(what, signals.requeue)
            if last:
                break
    if metrics:
        metrics.close()
    run.finish(step_module)


@contextlib.contextmanager
def of_this(run: Run, step: int) -> Iterator[None]:
    """Loading a checkpoint: what does not fit was of another run."""
    try:
        yield
    except (RuntimeError, ValueError) as e:
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
