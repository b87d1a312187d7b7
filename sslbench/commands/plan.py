"""`sslbench plan`: hours, memory and disk of a pre-training, from a short run of it on this machine."""

from __future__ import annotations

import json
import math
import re
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from .. import provenance
from ..data import open_split
from ..device import MEMORY_GIB, PEAK_TFLOPS, SHARE, bf16_is_fast, default_device, device_hours
from ..errors import UserError, nearest
from ..losses import recorded_gathers
from ..method import Method
from ..recipe import Batch, Recipe, length
from ..train.build import flops_per_image, step_on_shapes
from ..train.folder import read_run
from ..train.job import Pretraining
from ..train.loop import fit
from ..train.memory import ROOM, fitted, held, peak, proposed
from ..train.shard import shards, units
from ..train.state import KEEP
from .bench import matmul_peak

STEPS = 8  # of a calibration, at least; half where they stand for larger ones


@dataclass
class Calibration:
    """What a short run measured, in seconds, GiB and bytes; a step here has `batch` images."""

    batch: int
    first_s: float
    step_s: float
    look_s: float  # what a look at gradients and collapse adds to a step
    save_s: float
    memory_gib: float
    checkpoint: int
    weights: int
    data: str
    scaled: bool = False  # whether its steps stand for larger ones, and memory_gib is of these


def plan(recipe: Recipe, seconds: float, on: str | None, console: Console, link: str | None = None) -> dict[str, Any]:
    """Print and return what the run will take: {"hours", "device_hours", "peak_memory_gib", "disk_gib", ...}.

    `seconds`: about how long to calibrate for. Where a step of the recipe is too long for that, the steps are of fewer
    images and time and memory are scaled, which the answer says. `on`: DEVICExN, from FLOPs alone. `link`: the rate at
    which devices send to each other, such as 100Gb/s, for the speed of all of them on paper.
    """
    if recipe.science.init:  # a step costs the same
        recipe = recipe.model_copy(update={"science": recipe.science.model_copy(update={"init": None})})
    recipe = recipe if on else fitted(recipe, console)
    batch, s, m = Batch.of(recipe), recipe.science, recipe.machine
    (_, per_epoch, steps), flops = length(recipe), flops_per_image(recipe)
    answer: dict[str, Any] = {"method": recipe.method, "arch": s.arch, "epochs": s.epochs, "steps": steps,
                              "batch": str(batch), "flops": flops * steps * batch.total}  # fmt: skip
    rate = _rate(link) if link else None
    if batch.world > 1:
        answer["bytes_sent_per_step"] = bytes_sent(recipe, batch)
    elif link:
        raise UserError("--link is for several devices: give --devices too")
    if on:
        if link:
            raise UserError("--link goes with what is measured on this machine; leave --on out")
        return _elsewhere(answer, recipe, on, console)
    c = _calibrated(recipe, batch, flops, seconds)
    scale = batch.total // batch.world / c.batch
    looks, saves = math.ceil(steps / m.meters_every), math.ceil(steps / m.saves_every(per_epoch, steps))
    wall = c.first_s * scale + c.step_s * scale * max(0, steps - 1) + c.look_s * scale * looks + c.save_s * saves
    kept = min(KEEP, saves) * c.checkpoint + c.weights
    answer |= {
        "hours": wall / 3600,
        "device_hours": wall / 3600 * batch.world,
        "peak_memory_gib": round(c.memory_gib, 2),
        "disk_gib": round(kept / 2**30, 3),
        "disk_peak_gib": round(max(kept, min(KEEP + 1, saves) * c.checkpoint) / 2**30, 3),  # before the oldest goes
        "images_per_s": steps * batch.total / wall if wall else None,
        "calibration": {"images_a_step": c.batch, "data": c.data, "scaled": c.scaled},
        "hardware": provenance.hardware(default_device().type, batch.world),
    }
    _show(answer, batch, console)
    if batch.world > 1:
        _scaling(answer, batch, c.step_s * scale, rate, console)
    return answer


def _calibrated(recipe: Recipe, batch: Batch, flops: float, seconds: float) -> Calibration:
    """Measure whole steps where they are quick enough, else smaller ones, and scale their memory to the micro-batch."""
    spec, there = _at_hand(recipe.science.data.spec)
    a_step = batch.total // batch.world  # images of a device
    affordable = min(_affordable(flops, seconds), there)
    if affordable >= a_step:
        return calibrate(recipe, spec, there, a_step, batch.micro, seconds)
    passes = min(batch.passes, 2)  # a gradient cache embeds twice, in however many passes
    micro = min(affordable, batch.micro, there // passes)
    if micro == batch.micro:
        return replace(calibrate(recipe, spec, there, micro * passes, micro, seconds), scaled=True)
    half = max(2, micro // 2)
    smaller = calibrate(recipe, spec, there, half * passes, half, 0)  # first, for a process may keep what it held
    larger = calibrate(recipe, spec, there, micro * passes, micro, seconds)
    an_image = max(0.0, larger.memory_gib - smaller.memory_gib) / max(1, micro - half)
    return replace(larger, memory_gib=larger.memory_gib + an_image * (batch.micro - micro), scaled=True)


def _at_hand(spec: str) -> tuple[str, int]:
    """What to calibrate on, and how many images it has: the built-in ones where the recipe's are not here."""
    try:
        return spec, len(open_split(spec, "train"))
    except UserError:
        return "builtin", len(open_split("builtin", "train"))


def _affordable(flops: float, seconds: float) -> int:
    """Images a step, so that STEPS of them take no more than `seconds`."""
    device = default_device()
    dtype = torch.bfloat16 if bf16_is_fast(device.type) else torch.float32
    rate = SHARE * matmul_peak(device, dtype) / flops
    return max(4, int(rate * seconds / STEPS) // 2 * 2)


def calibrate(recipe: Recipe, spec: str, images: int, batch: int, micro: int, seconds: float) -> Calibration:
    """Train `recipe` for some steps of `batch` images on one device, through the loop, in a folder that is not kept.

    spec: of the data to use, which has so many images.
    """
    short = recipe.model_copy(deep=True)
    s, m = short.science, short.machine
    whole = batch == s.batch_size
    m.devices, m.nodes, m.log_every, m.meters_every, m.save_every = 1, 1, 1, 10**9, None
    s.batch_size, s.data.spec = batch, spec
    if not whole:
        s.contrastive_batch = min(s.contrastive_batch or batch, batch)
        m.micro_batch = None if micro == batch else micro
    per_epoch = images // batch
    steps = STEPS if whole else STEPS // 2
    for _ in range(2):  # the second time for as long as was asked, if the first was quicker
        s.epochs = steps / per_epoch
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            fit(Pretraining(short), Path(folder), Console(quiet=True), progress=False)
            took = time.perf_counter() - began
            measured = _read(Path(folder), batch, spec)
        more = int(min(200, steps * seconds / took))
        if more < 2 * steps:
            break
        steps = more
    return measured


def _read(folder: Path, batch: int, data: str) -> Calibration:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = [batch / line["images_per_s"] for line in lines if "images_per_s" in line]
    run = read_run(folder)
    usual = statistics.median(times[1:-1])
    return Calibration(
        batch=batch,
        first_s=times[0],
        step_s=usual,
        look_s=max(0.0, times[-1] - usual),  # the last step always looks
        save_s=max(0.0, run["cost"]["wall_s"] - sum(times)),
        memory_gib=run["cost"]["peak_memory_gib"],
        checkpoint=max(p.stat().st_size for p in (folder / "checkpoints").glob("*.pt")),
        weights=(folder / "weights.safetensors").stat().st_size,
        data=data,
    )


def bytes_sent(recipe: Recipe, batch: Batch) -> float:
    """What a device sends in one step, in rings: the mean of all gradients, and what is gathered and comes back.

    A mean over N devices costs each of them 2 (N - 1) / N times its size, a gathering N - 1 times its own part. Where
    weights are sharded, the mean costs half of that, since each keeps its part; but each micro-batch gathers them, and
    those of `shard.units` for each call and again for its backward pass.
    """
    called: list[tuple[nn.Module, bool]] = []  # and whether a backward pass comes back there
    note = register_module_forward_hook(lambda m, _, out: called.append((m, getattr(out, "requires_grad", False))))
    with recorded_gathers() as gathered, note:
        step_on_shapes(recipe)
    method = next(m for m, _ in called if isinstance(m, Method))
    gradients: float = sum(p.nbytes for p in method.parameters() if p.requires_grad)
    if shards(Pretraining(recipe), batch):
        size = {m: sum(p.nbytes for p in m.parameters()) for m in (method, *units(method))}
        whole = 2 * size[method] - sum(size.values())  # all but the units
        parts = sum(size[m] * (2 if back else 1) for m, back in called if m in size and m is not method)
        gradients = (gradients + batch.accumulation * (whole + parts)) / 2
    images = batch.micro * batch.passes  # that one loss has of a device; BatchNorm gathers one row of statistics
    mine = batch.accumulation * sum(n_bytes / 2 * images if rows == 2 else n_bytes for rows, n_bytes in gathered)
    n = batch.world
    return 2 * (n - 1) / n * (gradients + n * mine) + (n - 1) * mine


def _rate(link: str) -> float:
    """100Gb/s -> bytes a second."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([GM])(b|B)(?:it|yte)?(?:/s|ps)?", link)
    if not match or not float(match[1]):
        raise UserError(f"--link {link}: expected a rate such as 100Gb/s (bits) or 12GB/s (bytes)")
    return float(match[1]) * {"G": 1e9, "M": 1e6}[match[2]] / (8 if match[3] == "b" else 1)


def _scaling(answer: dict[str, Any], batch: Batch, step_s: float, rate: float | None, console: Console) -> None:
    sent = answer["bytes_sent_per_step"]
    console.print(f"sent       {sent / 2**20:,.1f} MiB a device and step, on paper")
    if rate is None:
        return
    share = step_s / (step_s + sent / rate)
    answer["on_paper"] = {"link_bytes_per_s": rate, "step_s": step_s, "sending_s": sent / rate, "efficiency": share}
    console.print(
        f"scaling    on paper: a step takes {step_s:.3g} s, measured, and sends for {sent / rate:.3g} s at "
        f"{rate / 1e9:g} GB/s:\n           {batch.world} devices do {share * batch.world:.2f} times one's work "
        f"({share:.0%}), more where the two overlap"
    )


def _elsewhere(answer: dict[str, Any], recipe: Recipe, on: str, console: Console) -> dict[str, Any]:
    match = re.fullmatch(r"([A-Za-z0-9]+?)(?:x([1-9]\d*))?", on)
    name = next((k for k in PEAK_TFLOPS if match and k.lower() == match[1].lower()), None)
    if name is None or match is None:
        raise UserError(f"--on {on}: expected DEVICExN, such as A100x4{nearest(on, PEAK_TFLOPS)}; "
                        f"known: {', '.join(PEAK_TFLOPS)}")  # fmt: skip
    devices = int(match[2] or 1)
    hours = device_hours(answer["flops"], name) / devices
    answer |= {"hours": hours, "device_hours": hours * devices, "on": f"{name}x{devices}", "assumed_share": SHARE}
    console.print(
        f"about {_time(hours)} on {devices} {name}, {hours * devices:,.1f} device hours: not measured, but "
        f"{answer['flops']:.3g} FLOP at {SHARE:.0%} of {devices} x {PEAK_TFLOPS[name]} TFLOP/s"
    )
    return answer | _memory(recipe, devices, name, console)


def _memory(recipe: Recipe, devices: int, name: str, console: Console) -> dict[str, Any]:
    """Whether a step fits into each device's memory, counted on shapes, and the micro-batch that would."""
    if recipe.machine.devices == recipe.machine.nodes == 1:
        recipe = recipe.on(recipe.machine.model_copy(update={"devices": devices}))
    try:
        batch = Batch.of(recipe)
    except UserError as e:  # so many devices do not divide it
        console.print(f"memory     {e}", markup=False)
        return {"fits": None}
    counted, there = held(recipe), MEMORY_GIB[name]
    room, takes = ROOM * there * 2**30, peak(recipe, counted, batch)
    fitting = batch.micro if takes <= room else proposed(recipe, counted, room)
    said = ""
    if recipe.machine.micro_batch == "auto" and fitting:
        batch = Batch.of(recipe.on(recipe.machine.model_copy(update={"micro_batch": fitting})))
        takes = peak(recipe, counted, batch)
    if takes > room:
        said = ": too much; " + (f"--set machine.micro_batch={fitting} fits" if fitting else "no smaller pass fits")
    console.print(
        f"memory     about {takes / 2**30:.1f} of {there} GiB a device, counted for passes of {batch.micro} images in "
        f"16 bits{said}"
    )
    return {
        "peak_memory_gib": round(takes / 2**30, 2),
        "memory_gib": there,
        "fits": takes <= room,
        "micro_batch": fitting,
    }


def _show(answer: dict[str, Any], batch: Batch, console: Console) -> None:
    c, h = answer["calibration"], answer["hardware"]
    console.print(f"steps      {answer['steps']:,} of {batch}")
    console.print(f"time       {_time(answer['hours'])}, {answer['device_hours']:,.2f} device hours")
    console.print(f"memory     {answer['peak_memory_gib']:.2f} GiB a device at its peak")
    console.print(
        f"disk       {answer['disk_gib']:.3f} GiB, {answer['disk_peak_gib']:.3f} while a checkpoint is written"
    )
    console.print(f"compute    {answer['flops']:.3g} FLOP")
    console.print(f"on         {h['devices']} x {h['device']}, {h['threads']} threads")
    scaled = f"; scaled from steps of {c['images_a_step']} images" if c["scaled"] else ""
    apart = "" if batch.world == 1 else "; what devices send each other is not counted"
    console.print(f"measured   over some steps on '{c['data']}'{scaled}{apart}")


def _time(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    return f"{hours * 60:.1f} min" if hours < 1 else f"{hours:,.1f} h" if hours < 48 else f"{hours / 24:,.1f} days"
