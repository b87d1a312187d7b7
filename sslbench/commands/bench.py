"""`sslbench bench`: how fast a training step is, against what this machine's matrix product can do."""

from __future__ import annotations

import re
import shlex
import statistics
import subprocess
import time
from typing import Any

import torch
from rich.console import Console

from .. import provenance
from ..data import MemoryImages, open_split
from ..data.loader import MicroBatches
from ..device import default_device, synchronize
from ..errors import UserError
from ..method import methods
from ..recipe import Recipe, compose
from ..train.build import build, flops_per_image
from ..train.loop import make_fabric
from ..train.optim import adamw
from ..train.step import TrainStep
from ..vit import get_arch
from .listing import show


def bench(
    names: list[str],
    archs: list[str],
    batch_size: int | None,
    precisions: list[str],
    compiled: bool,
    seconds: float,
    sets: list[str],
    console: Console,
    against: str | None = None,
) -> dict[str, Any]:
    """Rows of {method, arch, precision, batch, images_per_s, matmul_share, peak_memory_gib, data_wait, ...}.

    against: a command to run in turn with each measurement, A B A B, whose last line of output ends in its images/s;
    the row then has `against_images_per_s`, its mean, and `ratio`, ours to it.
    """
    rows = []
    for arch in archs:
        for name in names or list(methods()):
            for precision in precisions:
                batch = batch_size or (256 if get_arch(arch).image <= 64 else 64)
                recipe = recipe_of(name, arch, batch, precision, compiled, sets)
                row = measure(recipe, seconds)
                if against:
                    row |= beside(row, recipe, seconds, against)
                rows.append(row)
                console.print(
                    f"{row['method']} {row['arch']} {row['precision']} batch {batch}: {row['images_per_s']:.1f} img/s, "
                    f"{row['matmul_share']:.0%} of the matmul peak, {row['peak_memory_gib']:.2f} GiB"
                )
                if against:
                    console.print(
                        f"  {row['ratio']:.3f} times the {row['against_images_per_s']:.1f} img/s of {against}"
                    )
    columns = ["method", "arch", "precision", "images_per_s", "matmul_share", "peak_memory_gib", "data_wait"]
    columns += ["joules_per_image"] if any(r["joules_per_image"] for r in rows) else []
    columns += ["ratio"] if against else []
    console.print()
    show([{k: round(r[k], 3) if isinstance(r[k], float) else r[k] for k in columns} for r in rows], console)
    return {"hardware": provenance.hardware(default_device().type), "versions": provenance.versions(), "rows": rows}


def recipe_of(name: str, arch: str, batch: int, precision: str, compiled: bool, more: list[str]) -> Recipe:
    """The arch's own recipe, at this batch, on the built-in images enlarged to its resolution."""
    sets = ["science.data.spec=builtin", f"science.batch_size={batch}", f"science.contrastive_batch={batch}"]
    sets.append(f"machine.micro_batch={batch}")
    return compose(
        name, sets=[*sets, *more], science={"arch": arch}, machine={"precision": precision, "compile": compiled}
    )


def beside(row: dict[str, Any], recipe: Recipe, seconds: float, against: str) -> dict[str, Any]:
    """After our first measurement: theirs, ours, theirs."""
    theirs = [_external(against)]
    ours = [row["images_per_s"], measure(recipe, seconds)["images_per_s"]]
    theirs.append(_external(against))
    mean, other = statistics.mean(ours), statistics.mean(theirs)
    return {"images_per_s": mean, "against": against, "against_images_per_s": other, "ratio": mean / other}


def _external(command: str) -> float:
    try:
        done = subprocess.run(shlex.split(command), capture_output=True, text=True)
    except (ValueError, OSError) as e:
        raise UserError(f"--against {command}: it cannot be run: {e}") from None
    numbers = re.findall(r"\d+(?:\.\d+)?(?:[eE][+-]?\d+)?", (done.stdout.strip().splitlines() or [""])[-1])
    if done.returncode or not numbers or not float(numbers[-1]):
        last = (done.stderr.strip().splitlines() or ["nothing on standard error"])[-1]
        raise UserError(
            f"--against {command}: exit status {done.returncode} ({last}); expected 0, and a last line of output that "
            f"ends in its images/s"
        )
    return float(numbers[-1])


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product here: the best of several, after a warm-up, at growing sizes.

    It ends at the size whose next would take over a tenth of a second: a slow machine is at its peak by then, and where
    a type is emulated, 2048 takes a minute a product.
    """
    best, size, largest = 0.0, 256, 2048 if device.type == "cpu" else 8192
    while size <= largest:
        a = torch.randn(size, size, device=device, dtype=dtype)
        b = torch.randn(size, size, device=device, dtype=dtype)
        fastest = float("inf")
        for i in range(5):
            start = time.perf_counter()
            a @ b
            synchronize(device)
            if i:
                fastest = min(fastest, time.perf_counter() - start)
        best = max(best, 2 * size**3 / fastest)
        if 8 * fastest > 0.1:
            break
        size *= 2
    return best


def measure(recipe: Recipe, seconds: float) -> dict[str, Any]:
    """Whole training steps, views to weights, for about `seconds`; the median counts. The loader's part: data_wait."""
    if not seconds > 0:
        raise UserError(f"--seconds {seconds}: expected a time, such as 10")
    fabric = make_fabric(recipe.machine)
    dtype = {"32-true": torch.float32, "16-mixed": torch.float16}.get(
        str(fabric.strategy.precision.precision), torch.bfloat16
    )
    provenance.reset_peak_memory(fabric.device.type)
    torch.manual_seed(0)
    data = open_split("builtin", "train")
    assert isinstance(data, MemoryImages)
    if recipe.science.batch_size > len(data):
        raise UserError(f"a batch of {recipe.science.batch_size} is more than the {len(data)} images that bench reads")
    method = build(recipe)
    if recipe.machine.compile:
        method.compile()
    model, optimizer = fabric.setup(TrainStep(method), adamw(method, recipe.science.optim))
    s = recipe.science
    loader = MicroBatches(
        data, seed=0, micro=s.batch_size, world=1, accumulation=1, rank=0, device=fabric.device,
        crops=method.crop_list(), image_size=s.data.image_size or 0, crop_scale=s.augment.crop_scale, workers=0,
        interpolation=s.augment.interpolation,
    )  # fmt: skip
    generator = torch.Generator(fabric.device).manual_seed(0)
    before = matmul_peak(fabric.device, dtype)
    times: list[float] = []
    began, end = time.perf_counter(), float("inf")
    for i, images in enumerate(loader(0, 10**9)):
        start = time.perf_counter()
        fabric.backward(model(images, generator)["loss"])
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(0.5)
        synchronize(fabric.device)
        if i < 2:  # allocation, and compilation where asked for
            loader.wait_s, began, end = 0.0, time.perf_counter(), time.perf_counter() + seconds
            energy = provenance.EnergyMeter(fabric.device.type)
            continue
        times.append(time.perf_counter() - start)
        if len(times) >= 3 and time.perf_counter() > end:
            break
    wait, joules = loader.wait_s / (time.perf_counter() - began), energy.read()
    peak = max(before, matmul_peak(fabric.device, dtype))  # both ends: the machine's speed drifts
    rate = s.batch_size / statistics.median(times)
    flops = flops_per_image(recipe)
    return {
        "method": recipe.method_name,
        "arch": s.arch,
        "image_size": s.data.image_size,
        "precision": {torch.float32: "32", torch.float16: "16"}.get(dtype, "bf16"),
        "compile": recipe.machine.compile,
        "batch": s.batch_size,
        "images_per_s": rate,
        "gflop_per_image": flops / 1e9,
        "matmul_peak_gflops": peak / 1e9,
        "matmul_share": rate * flops / peak,
        "peak_memory_gib": provenance.peak_memory_gib(fabric.device.type),
        "data_wait": wait,
        "joules_per_image": None if joules is None else joules / (len(times) * s.batch_size),
        "steps": len(times),
    }
