"""`sslbench doctor --try`: whether this machine's numbers can be trusted, by training a little on all that it has."""

from __future__ import annotations

import functools
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from .. import provenance
from ..data import open_split
from ..device import bf16_is_fast, default_device, device_count
from ..errors import RunFailed, UserError
from ..evaluate.start import pretrain
from ..files import write_json
from ..method import Method, methods
from ..paths import home
from ..recipe import Machine, Recipe, compose
from ..train.build import build
from ..train.loop import make_fabric

SETS = ["science.arch=vit_48x2_h3_p4_im32", "science.data.image_size=32",
        "science.batch_size=16", "science.epochs=0.032", "science.optim.lr=5e-5", "machine.precision=32",
        "machine.log_every=1", "machine.save_every=4", "machine.tensorboard=false", "machine.watch=false"]  # fmt: skip
# How far a step may be from one of float32 on the CPU: its loss and its whole gradient, relative. bf16 on a CPU was off
# by up to .001 and .06; LeJEPA's gradient by .1 and MoCo v3's by .2, since BatchNorm of features that are still alike
# magnifies rounding.
STEP = {"32": (1e-4, 1e-3), "bf16": (0.02, 0.3), "16": (0.005, 0.1)}
WEIGHTS = 1e-5  # weights of 8 steps, absolute: another order of the same sums
MEMORY = 0.1  # a run's peak against what `plan` says, relative
SENT = 64 << 20  # bytes


@dataclass
class Check:
    """What was tried, how far it was off and how far it may be, and what to do where that is not enough."""

    name: str
    where: str
    off: float | None  # None: it did not run
    allowed: float | None
    seconds: float
    said: str = ""

    @property
    def ok(self) -> bool:
        return self.off is not None and (self.allowed is None or self.off <= self.allowed)


@dataclass
class Trial:
    """A check that has yet to run. `run` gives how far it was off, and what there is to say."""

    name: str
    where: str
    allowed: float | None
    run: Callable[[], tuple[float, str]]
    advice: str

    def check(self) -> Check:
        start = time.perf_counter()
        try:
            off, said = self.run()
        except Exception as e:  # whatever goes wrong is what was to be found
            off, said = None, f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
        done = Check(self.name, self.where, off, self.allowed, round(time.perf_counter() - start, 2), said)
        if not done.ok:
            done.said = f"{said}; {self.advice}".removeprefix("; ")
        return done


def try_out(console: Console) -> dict[str, Any]:
    """Run every check, print a table, write results/doctor.json, and return what it holds.

    RunFailed, with the same, where a check fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        done = []
        console.print(f"{'check':19} {'where':9} {'off by':>7} {'allowed':>7} {'s':>5}")
        for trial in trials(Path(folder)):
            done.append(trial.check())
            console.print(_line(done[-1]), markup=False)
    device = default_device().type
    answer = {
        "ok": all(check.ok for check in done),
        "hardware": provenance.hardware(device, device_count(device)),
        "versions": provenance.versions(),
        "checks": [{**asdict(check), "ok": check.ok} for check in done],
    }
    path = home() / "results" / "doctor.json"
    write_json(path, answer)
    console.print(f"{len(done)} checks in {sum(check.seconds for check in done):.0f} s; written to {path}")
    if failed := [f"{check.name} ({check.where}): {check.said}" for check in done if not check.ok]:
        raise RunFailed("numbers of this machine cannot be trusted:\n" + "\n".join(failed), answer)
    return answer


def _line(check: Check) -> str:
    off, allowed = ("-" if x is None else f"{x:.2g}" for x in (check.off, check.allowed))
    ok = "" if check.ok else "FAILED "
    return f"{check.name:19} {check.where:9} {off:>7} {allowed:>7} {check.seconds:5.1f}  {ok}{check.said}"


def trials(folder: Path) -> Iterator[Trial]:
    """Every check that this machine can make; `folder` takes their runs."""
    device = default_device().type
    for name in methods():
        reference = functools.cache(functools.partial(_reference, name))
        for precision, compiled in _ways(device):
            loss, gradient = STEP[precision]
            advice = f"use another --precision than {precision}" + " or --no-compile" * compiled
            yield Trial(
                f"{name} step" + ", compiled" * compiled,
                f"{device} {precision}",
                gradient,
                functools.partial(_step, reference, precision, compiled, loss / gradient),
                advice + ", or other versions of torch and driver",
            )
    yield Trial("save and resume", device, 0.0 if device == "cpu" else WEIGHTS, functools.partial(_resume, folder),
                "do not stop runs on this machine; its weights after a resume are others")  # fmt: skip
    yield Trial("images by workers", device, 0.0 if device == "cpu" else WEIGHTS, functools.partial(_workers, folder),
                "use --set machine.workers=0")  # fmt: skip
    yield Trial("memory against plan", device, MEMORY, functools.partial(_memory, folder),
                "leave more room than `sslbench plan` says")  # fmt: skip
    world = 2 if device == "cpu" else device_count(device)
    if world > 1:
        backend, near = ("nccl", 1e-4) if device == "cuda" else ("gloo", WEIGHTS)
        for strategy in ("ddp", "fsdp"):
            yield Trial(f"{world} processes, {strategy}", f"{device} {backend}", near,
                        functools.partial(_several, folder, world, strategy), "train on one device")  # fmt: skip
        yield Trial("sum over processes", f"{device} {backend}", 0.0, functools.partial(_rate, world, backend),
                    "look at the network between devices; NCCL_DEBUG=INFO says more")  # fmt: skip


def _ways(device: str) -> list[tuple[str, bool]]:
    """(precision, compiled): on a CPU nothing is compiled, which takes a method half a minute."""
    if device == "mps":
        return [("32", False)]
    if device == "cpu":
        return [("32", False), ("bf16", False)]
    return [(p, c) for p in ("32", *(["bf16"] if bf16_is_fast(device) else []), "16") for c in (False, True)]


def _recipe(name: str, *sets: str) -> Recipe:
    return compose(name, science={"arch": "vit_mini4", "data": {"spec": "builtin"}}, sets=[*SETS, *sets])


@dataclass
class Step:
    """A method's weights and views, and the loss and gradient that float32 gives on the CPU."""

    recipe: Recipe
    images: Tensor
    weights: dict[str, Tensor]
    views: dict[str, Tensor]
    loss: float
    gradient: dict[str, Tensor]


class OnViews(nn.Module):
    """A step as training has it, its views made inside: what goes in is made 16-bit by Fabric where the model is."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method
        self.views: dict[str, Tensor] = {}

    def forward(self) -> Tensor:
        return self.method.loss(self.method(self.views))["loss"]


def _reference(name: str) -> Step:
    recipe = _recipe(name)
    torch.manual_seed(0)
    method = build(recipe)
    weights = {k: v.clone() for k, v in method.state_dict().items()}
    data: Any = open_split("builtin", "train")
    data = data.images
    images = data[torch.linspace(0, len(data) - 1, 16).long()]
    views = method.build_views(images, torch.Generator().manual_seed(0))
    loss = method.loss(method(views))["loss"]
    loss.backward()
    return Step(recipe, images, weights, views, loss.item(), _gradient(method))


def _gradient(method: nn.Module, scale: float = 1.0) -> dict[str, Tensor]:
    """In float64 on the CPU."""
    return {k: p.grad.double().cpu() / scale for k, p in method.named_parameters() if p.grad is not None}


def _step(reference: Callable[[], Step], precision: str, compiled: bool, of_loss: float) -> tuple[float, str]:
    """How far the gradient is off, or the loss over `of_loss`, whichever is more; both are said.

    Then a step of the device's own views, which are drawn there and so are others: its loss has to be finite.
    """
    of = reference()
    method = build(of.recipe)
    method.load_state_dict(of.weights)
    fabric = make_fabric(Machine.model_validate({"precision": precision}))
    if compiled:
        method.compile()
    step = OnViews(method)
    model = fabric.setup_module(step)
    step.views = {k: v.to(fabric.device) for k, v in of.views.items()}
    loss = model()
    fabric.backward(loss)
    scaler: Any = getattr(fabric.strategy.precision, "scaler", None)
    gradient = _gradient(method, scaler.get_scale() if scaler else 1.0)
    off_loss = abs(loss.item() - of.loss) / abs(of.loss)
    difference = sum((gradient[k] - g).square().sum() for k, g in of.gradient.items())
    off_gradient = float((difference / sum(g.square().sum() for g in of.gradient.values())) ** 0.5)
    method.after_step(0.5)
    with torch.no_grad():
        step.views = method.build_views(of.images.to(fabric.device), torch.Generator(fabric.device).manual_seed(0))
        if not model().isfinite():
            raise RunFailed("the loss of views drawn on the device is not finite")
    return max(off_gradient, off_loss / of_loss), f"loss {off_loss:.1g}, gradient {off_gradient:.1g}"


def _run(folder: Path, recipe: Recipe, name: str) -> Path:
    pretrain(recipe, folder / name, Console(quiet=True), progress=False)
    return folder / name


def _distance(a: Path, b: Path) -> float:
    """The largest difference of two runs' weights."""
    one, other = (load_file(run / "weights.safetensors") for run in (a, b))
    return max((x - other[k]).abs().max().item() for k, x in one.items())


@functools.cache
def _whole(folder: Path) -> Path:
    """OCL's run of 8 steps on one device, whose negatives all devices gather."""
    return _run(folder, _recipe("ocl", "science.method.gather_negatives=true"), "whole")


def _resume(folder: Path) -> tuple[float, str]:
    whole, half = _whole(folder), folder / "half"
    shutil.copytree(whole, half)
    for path in (half / "weights.safetensors", *half.glob("checkpoints/step_000000008.*")):
        path.unlink()
    info = json.loads((half / "run.json").read_text())
    (half / "run.json").write_text(json.dumps({**info, "status": "running"}))
    _run(folder, _recipe("ocl", "science.method.gather_negatives=true"), "half")
    return _distance(whole, half), "from step 4 of 8"


def _workers(folder: Path) -> tuple[float, str]:
    data: Any = open_split("builtin", "train")
    data = data.images[:64]
    images = folder / "images" / "train" / "all"
    images.mkdir(parents=True)
    for i, x in enumerate(data):
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(images / f"{i}.png")
    sets = (f"science.data.spec=folder:{folder / 'images'}", "science.epochs=2")
    runs = [_run(folder, _recipe("mae", *sets, f"machine.workers={n}"), f"workers{n}") for n in (0, 2)]
    return _distance(*runs), "none and two, of PNG files"


def _memory(folder: Path) -> tuple[float, str]:
    """By the commands, each in a process of its own: memory that one has held is not given back."""
    recipe = ("mae", "--recipe", "mae/vit_micro4_builtin", "--epochs", "0.5")
    planned = _command("plan", *recipe, "--seconds", "20")["peak_memory_gib"]
    run = _command("pretrain", *recipe, "--out", str(folder / "memory"))["run"]
    peak = json.loads((Path(run) / "run.json").read_text())["cost"]["peak_memory_gib"]
    return abs(peak / planned - 1), f"planned {planned:.2f}, took {peak:.2f} GiB"


def _several(folder: Path, world: int, strategy: str) -> tuple[float, str]:
    out = folder / strategy
    sets = [*SETS, "science.method.gather_negatives=true", f"machine.strategy={strategy}"]
    words = ("ocl", "--arch", "vit_mini4", "--data", "builtin", "--devices", str(world), "--out", str(out))
    _command("pretrain", *words, *(word for key in sets for word in ("--set", key)))
    return _distance(_whole(folder), out), "8 steps, against one"


def _command(*words: str) -> dict[str, Any]:
    """What `sslbench WORDS --json` answers. UserError with what it says, where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "sslbench", *words, "--json"], capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        raise UserError(done.stderr.strip()[-300:])
    return json.loads(done.stdout.splitlines()[-1])


def _rate(world: int, backend: str) -> tuple[float, str]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    told = context.Queue()
    torch.multiprocessing.spawn(_all_reduce, (world, backend, port, told), nprocs=world)
    off, seconds = told.get()
    return off, f"{SENT / seconds / 1e9:.1f} GB/s of {SENT >> 20} MiB"


def _all_reduce(rank: int, world: int, backend: str, port: int, told: Any) -> None:
    dist.init_process_group(backend, f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    took = []
    for _ in range(4):
        x = torch.full((SENT // 4,), float(rank + 1), device=device)
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(x)
        off = (x - world * (world + 1) / 2).abs().max().item()  # waits for the device
        took.append(time.perf_counter() - start)
    if rank == 0:
        told.put((off, min(took)))
    dist.destroy_process_group()
