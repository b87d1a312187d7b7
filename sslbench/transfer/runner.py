"""mmengine's Runner inside the suite's run folder: order of data, schedule, checkpoints, meters."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from .. import provenance
from ..data.loader import decoders, epoch_order, host_seed, seed_of
from ..errors import Interrupted, RunFailed, UserError
from ..files import hashes
from ..recipe import Batch
from ..signals import Signals
from ..train.meter import Metrics, Running, Stopwatch, note, progress_bar
from ..train.optim import layer_groups
from ..train.run import Run, newest
from ..train.state import save_checkpoint
from ..train.track import metrics_of
from ..vit import RelativeTable
from .backbone import Decomposed
from .protocol import IterationOptim

CPU_ATTENTION = {  # which torch's counter knows on GPUs only
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


class Order:
    """The batch sampler: this rank's micro-batches of steps first .. last - 1, as lists of (epoch, index)."""

    def __init__(self, n: int, seed: int, batch: Batch, rank: int, first: int, last: int) -> None:
        self.n, self.seed, self.batch, self.rank, self.steps = n, seed, batch, rank, range(first, last)

    def __len__(self) -> int:
        return len(self.steps) * self.batch.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        b = self.batch
        per_epoch = self.n // b.total
        for step in self.steps:
            epoch = step // per_epoch
            if step == self.steps.start or step % per_epoch == 0:
                order = epoch_order(self.n, self.seed, epoch).tolist()
            for a in range(b.accumulation):
                start = step % per_epoch * b.total + (a * b.world + self.rank) * b.micro
                yield [(epoch, i) for i in order[start : start + b.micro]]


class Drawn(Dataset[Any]):
    """A data set of mmdet or mmseg whose augmentation is a function of seed, epoch and index, whoever computes it."""

    def __init__(self, data: Any, seed: int) -> None:
        self.data, self.seed, self.metainfo = data, seed, data.metainfo

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        with host_seed(seed_of("views", self.seed, *key)):
            return self.data[key[1]]


@OPTIM_WRAPPERS.register_module(name="SslbenchBf16")
class Bf16(OptimWrapper):
    """bfloat16, on CPUs too, where mmengine's own wrapper refuses; it has float32's range, so no loss is scaled."""

    @contextlib.contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with super().optim_context(model), torch.autocast(next(model.parameters()).device.type, torch.bfloat16):
            yield


WRAPPERS: dict[str, dict[str, Any]] = {
    "32": {"type": "OptimWrapper"},
    "bf16": {"type": "SslbenchBf16"},
    "16": {"type": "AmpOptimWrapper", "dtype": "float16", "loss_scale": "dynamic"},
}


@OPTIM_WRAPPER_CONSTRUCTORS.register_module(name="SslbenchLayerDecay")
class LayerDecay:
    """AdamW whose lr falls layer by layer from the head to the patches. paramwise_cfg: {"depth", "optim"}."""

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any]) -> None:
        self.wrapper, self.depth, self.optim = dict(optim_wrapper_cfg), paramwise_cfg["depth"], paramwise_cfg["optim"]

    def __call__(self, model: nn.Module) -> OptimWrapper:
        o: IterationOptim = self.optim
        model = getattr(model, "module", model)
        tables = [] if o.decay_relative else [m for m in model.modules() if isinstance(m, RelativeTable | Decomposed)]
        plain = frozenset(p for m in tables for p in m.parameters())
        groups = layer_groups(model, self.depth, o.weight_decay, o.layer_decay, "backbone.", o.decay_biases, plain)
        for group in groups:
            group["lr"] = o.lr * group["lr_scale"]
        optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, fused=True)
        return OPTIM_WRAPPERS.build({**self.wrapper, "optimizer": optimizer})


def schedule(o: IterationOptim, total: int) -> list[dict[str, Any]]:
    """mmengine's schedulers of the lr over `total` iterations."""
    warmup = min(o.warmup, total)
    steps = {"by_epoch": False, "end": total}
    out: list[dict[str, Any]] = []
    if warmup:
        out.append({"type": "LinearLR", "start_factor": o.warmup_factor, "by_epoch": False, "begin": 0, "end": warmup})
    if o.decay == "steps":
        out.append(
            {"type": "MultiStepLR", "milestones": [round(m * total) for m in o.milestones], "gamma": 0.1, **steps}
        )
    elif warmup < total:
        if o.decay == "cosine":
            out.append({"type": "CosineAnnealingLR", "T_max": total - warmup, "begin": warmup, **steps})
        else:
            out.append({"type": "PolyLR", "power": 1.0, "eta_min": 0.0, "begin": warmup, **steps})
    return out


class Loop(IterBasedTrainLoop):
    """One iteration is one step of the recipe's batch, however many micro-batches that takes here."""

    def __init__(
        self, runner: Runner, dataloader: Any, max_iters: int, accumulation: int, first: int, seed: int
    ) -> None:
        super().__init__(runner, dataloader, max_iters, val_interval=max_iters + 1)
        self.accumulation, self.seed, self.wait_s = accumulation, seed, 0.0
        self.flops_per_image: float | None = None
        self._iter = first  # the data loader starts there too

    def run(self) -> nn.Module:
        try:
            return self._run()
        finally:
            del self.dataloader_iterator  # and its processes, though a traceback may hold this loop

    def _run(self) -> nn.Module:
        call, wrapper = self.runner.call_hook, self.runner.optim_wrapper
        model = self.runner.model
        call("before_train")
        call("before_train_epoch")
        wrapper.initialize_count_status(model, self._iter * self.accumulation, self._max_iters * self.accumulation)
        while self._iter < self._max_iters:
            # What the model draws (drop path, which proposals to learn from) is a function of the step.
            torch.manual_seed(seed_of("model", self.seed, self._iter, self.runner.rank))
            model.train()
            call("before_train_iter", batch_idx=self._iter, data_batch=None)
            for _ in range(self.accumulation):
                began = time.perf_counter()
                batch = next(self.dataloader_iterator)
                self.wait_s += time.perf_counter() - began
                if self.flops_per_image is None:  # the first iteration says, for all of them
                    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
                        outputs = model.train_step(batch, optim_wrapper=wrapper)
                    self.flops_per_image = counter.get_total_flops() / len(batch["inputs"])
                else:
                    outputs = model.train_step(batch, optim_wrapper=wrapper)
            call("after_train_iter", batch_idx=self._iter, data_batch=None, outputs=outputs)
            self._iter += 1
        call("after_train_epoch")
        call("after_train")
        return model


class Keeper(Hook):
    """What the suite keeps of a run, and says of it while it runs."""

    priority = "LOWEST"  # after the schedulers' step

    def __init__(
        self, run: Run, batch: Batch, signals: Signals, bar: Any, save_every: int, state: Any, metrics: Metrics | None
    ) -> None:
        self.run, self.batch, self.signals, self.bar, self.save_every = run, batch, signals, bar, save_every
        self.state, self.running, self.watch = state, Running(), Stopwatch()
        self.metrics = metrics

    def before_train(self, runner: Runner) -> None:
        if self.state:
            _bare(runner.model).load_state_dict(self.state["model"])
            runner.optim_wrapper.load_state_dict(self.state["optimizer"])
            for scheduler, state in zip(runner.param_schedulers, self.state["schedulers"], strict=True):
                scheduler.load_state_dict(state)
            runner.train_loop.flops_per_image = self.state.get("flops_per_image")
        self.task = self.bar.add_task(self.run.label, total=runner.max_iters, completed=runner.iter, note="")

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self.lr = max(runner.optim_wrapper.get_lr()["lr"])

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        run, machine, total = self.run, self.run.job.machine, runner.max_iters
        run.steps, run.flops_per_image = batch_idx + 1, runner.train_loop.flops_per_image
        self.running.add(outputs)
        self.watch.images += self.batch.total
        last = run.steps == total
        log = run.steps % machine.log_every == 0
        stop = self.signals.asked(run.fabric, log)
        save = last or stop or run.steps % self.save_every == 0
        if save or log:
            means = self.running.means(run.fabric)
            # A loss is of the weights before the step, what is saved those after it.
            if not math.isfinite(means["loss"]) or (save and not _finite(runner.model)):
                raise RunFailed(
                    f"the loss or its gradient is not finite at or before iteration {run.steps}; the newest checkpoint "
                    f"is from before it. Try a lower science.optim.lr, a longer warm-up, or precision 32"
                )
            speed = self.watch.read(runner.train_loop.wait_s)
            self.bar.update(self.task, note=note(means["loss"], speed))
            if self.metrics:
                self.metrics.write(run.steps, {"lr": self.lr, **means, **speed})
        self.bar.update(self.task, completed=run.steps)
        if save:
            self._save(runner)
        if stop and not last:
            raise Interrupted(
                f"{self.signals.received} after iteration {run.steps} of {total}; the same command resumes"
            )

    def _save(self, runner: Runner) -> None:
        if self.run.fabric.is_global_zero:
            state = {
                "model": _bare(runner.model).state_dict(),
                "optimizer": runner.optim_wrapper.state_dict(),
                "schedulers": [s.state_dict() for s in runner.param_schedulers],
                "cost": self.run.to_keep(),
                "flops_per_image": self.run.flops_per_image,
            }
            save_checkpoint(self.run.checkpoints, self.run.steps, state)
            self.run.write("running")
        self.run.fabric.barrier()


def _finite(model: nn.Module) -> bool:
    return bool(torch.stack([p.detach().sum().isfinite() for p in model.parameters()]).all())


def _bare(model: Any) -> nn.Module:
    return getattr(model, "module", model)


def train(run: Run, batch: Batch, data: Any, signals: Signals, console: Any, progress: bool) -> None:
    """What `fit` calls for a transfer: `run.job` trained by mmengine, from its newest checkpoint where it has one."""
    job: Any = run.job  # a TransferJob
    machine, fabric, o, seed = job.machine, run.fabric, job.optim, job.seed
    provenance.reset_peak_memory(fabric.device.type)
    model = job.build(synchronised=fabric.world_size > 1 and fabric.device.type == "cuda")
    total, per_epoch = job.total(batch.total), len(data) // batch.total
    start, state = newest(run)
    if state:
        run.resume(state)
    warn(job, model, batch, console)
    run.begin(data.fingerprint, total, per_epoch)
    run.steps = start
    loader = DataLoader(
        Drawn(data.dataset, seed),
        batch_sampler=Order(len(data), seed, batch, fabric.global_rank, start, total),  # type: ignore[arg-type]
        collate_fn=pseudo_collate,
        **decoders(machine.workers, fabric.device),
    )
    save_every = machine.saves_every(per_epoch, total)
    tracked = metrics_of(run, start) if fabric.is_global_zero else contextlib.nullcontext()
    with tracked as metrics, progress_bar(console, progress) as bar:
        runner = make_runner(
            run.folder,
            model,
            fabric,
            train_dataloader=loader,
            train_cfg={
                "type": Loop, "max_iters": total, "accumulation": batch.accumulation, "first": start, "seed": seed,
            },
            optim_wrapper={
                **WRAPPERS[run.precision],
                "accumulative_counts": batch.accumulation,
                "constructor": "SslbenchLayerDecay",
                "paramwise_cfg": {"depth": job.depth, "optim": o},
            },
            param_scheduler=schedule(o, total),
            custom_hooks=[Keeper(run, batch, signals, bar, save_every, state, metrics)],
        )  # fmt: skip
        runner.train()
    if fabric.is_global_zero:
        job.save_weights(run.folder / "weights.safetensors", _bare(runner.model))
        run.write("finished", **hashes(run.folder / "weights.safetensors"))
    fabric.barrier()


def warn(job: Any, model: nn.Module, batch: Batch, console: Any) -> None:
    """Say where BatchNorm's statistics are not those of the recipe's batch; UserError where it cannot compute any."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    synchronised = any(isinstance(m, nn.SyncBatchNorm) for m in norms)
    seen = batch.micro * batch.world if synchronised else batch.micro
    if norms and seen == 1 and job.kind == "ade20k":
        raise UserError(
            f"UPerNet's BatchNorm pools an image to one pixel, so it needs two images or more a device, not {batch}: "
            f"raise science.batch_size or machine.micro_batch"
        )
    if norms and (seen == 1 or seen < batch.total):
        console.print(
            f"warning: BatchNorm in the heads sees {seen} image(s) at a time, not the batch of {batch.total}; "
            f"a run with more images a device will give other numbers"
        )


def make_runner(folder: Path, model: nn.Module, fabric: Any, **more: Any) -> Runner:
    """mmengine's Runner without what the suite does itself: logging to the console, checkpoints, seeds."""
    on_gpu = fabric.device.type == "cuda"
    ours = ("runtime_info", "timer", "sampler_seed", "logger", "checkpoint")
    wrapper = {
        "type": "MMDistributedDataParallel",
        "broadcast_buffers": False,
        "device_ids": [fabric.device.index] if on_gpu else None,
    }
    return Runner(
        model=model,
        work_dir=str(folder / "mmengine"),
        default_hooks=dict.fromkeys(ours),
        visualizer={"type": "Visualizer"},
        log_level="ERROR",
        default_scope="mmengine",
        launcher="pytorch" if fabric.world_size > 1 else "none",
        env_cfg={"dist_cfg": {"backend": "nccl" if on_gpu else "gloo"}},
        experiment_name=f"{folder.name}_{time.time_ns()}",
        cfg={"model_wrapper_cfg": wrapper},
        **more,
    )


def test(job: Any, net: nn.Module, folder: Path, fabric: Any, metric: Any) -> dict[str, float]:
    """What mmengine's `metric` says of the job's validation images, in order."""
    loader = DataLoader(job.val.dataset, 1, collate_fn=pseudo_collate, **decoders(job.machine.workers, fabric.device))
    more = {"test_dataloader": loader, "test_cfg": {"type": "TestLoop"}, "test_evaluator": Evaluator([metric])}
    return make_runner(folder, net, fabric, **more).test()


def pictures(job: Any, net: Any, folder: Path, visualizer: Any, **show: Any) -> None:
    """`folder`/pictures: of some validation images, ground truth left, predictions right."""
    visualizer.dataset_meta = job.val.dataset.metainfo
    load = job.val.dataset.pipeline.transforms[0]
    count = min(job.machine.pictures, len(job.val))
    for index in np.linspace(0, len(job.val) - 1, count).astype(int).tolist():
        item = job.val.dataset[index]
        (sample,) = net.test_step({"inputs": [item["inputs"]], "data_samples": [item["data_samples"]]})
        image = load.read(sample.img_path)[..., ::-1]
        out = folder / "pictures" / f"{index}_{Path(sample.img_path).stem}.png"
        visualizer.add_datasample("val", image, sample.cpu(), out_file=str(out), **show)
