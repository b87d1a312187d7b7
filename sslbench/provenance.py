"""Where a number comes from: code, versions, hardware, cost. What cannot be measured is None, never a guess."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import platform
import resource
import subprocess
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .device import release_freed_memory


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@functools.cache
def code() -> dict[str, Any]:
    """{"commit", "dirty"} of the checkout that runs, or the version of the wheel, whose commit is unknown."""
    root = Path(__file__).resolve().parent.parent

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # A wheel inside somebody else's checkout is not that checkout.
    if not (root / "pyproject.toml").is_file() or git("rev-parse", "--show-toplevel") != str(root):
        return {"commit": None, "dirty": None}
    changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")  # numbers are not code
    changes = changes or git("status", "--porcelain", "--", "methods", "recipes", "sslbench")  # what is read is
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changes)}


@functools.cache
def versions() -> dict[str, str]:
    installed = {"python": platform.python_version()}
    transfer = ("mmengine", "mmcv", "mmdetection", "mmsegmentation")
    ours = ("sslbench", "torch", "torchvision", "timm", "lightning-fabric", "numpy")
    for name in (*ours, *(f"onedl-{name}" for name in transfer), *transfer, "mmdet"):
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


def cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def hardware(device: str = "cpu", devices: int = 1) -> dict[str, Any]:
    """{"device", "devices", "threads"}: what the numbers were computed on."""
    if device == "cuda":
        return {"device": torch.cuda.get_device_name(), "devices": devices, "threads": torch.get_num_threads()}
    name = f"{_cpu_name()} GPU" if device == "mps" else _cpu_name()
    return {"device": name, "devices": devices, "threads": torch.get_num_threads()}


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # macOS
        said = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, timeout=5)
        if said.returncode == 0 and said.stdout.strip():
            return said.stdout.strip()
    return platform.processor() or platform.machine()


def reset_peak_memory(device: str = "cpu") -> None:
    """Count peak memory from here on. On a CPU that needs Linux; elsewhere the peak is the process' own."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    if device == "mps":
        torch.mps.empty_cache()
    gc.collect()
    release_freed_memory()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_gib(device: str = "cpu") -> float:
    """The device's peak allocation, or on a CPU the peak resident size of this process, since the last reset."""
    if device == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
    if device == "mps":  # what the allocator ever had at once, for it gives nothing back before it is asked
        return round(torch.mps.driver_allocated_memory() / 2**30, 3)
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) / 2**20, 3)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**30 if platform.system() == "Darwin" else 2**20), 3)


class EnergyMeter:
    """Joules that the device has used since the meter was made, where it says: a GPU through pynvml, a CPU by RAPL."""

    def __init__(self, device: str = "cpu", rapl: Path = Path("/sys/class/powercap")) -> None:
        self.device, self.rapl = device, rapl
        self.began = self._read()

    def read(self) -> float | None:
        """None where nothing reports it, or a counter went round."""
        began, now = self.began, self._read()
        return None if began is None or now is None or now < began else now - began

    def _read(self) -> float | None:
        if self.device == "cuda":
            try:
                import pynvml  # type: ignore[import-untyped, unused-ignore, import-not-found]

                pynvml.nvmlInit()
                handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties().uuid}")
                return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
            except Exception:
                return None
        try:  # of each socket; readable by root alone on most machines
            sockets = [int(p.read_text()) for p in self.rapl.glob("intel-rapl:?/energy_uj")]
        except OSError:
            return None
        return sum(sockets) / 1e6 if sockets else None


class Spent:
    """What an evaluation takes from when this was made."""

    def __init__(self, device: str) -> None:
        self.began, self.energy = time.perf_counter(), EnergyMeter(device)

    def after(self, training: dict[str, Any] | None = None) -> dict[str, Any]:
        """The cost of a training and of what followed; joules None where those of either are not known."""
        cost, wall = training or {}, time.perf_counter() - self.began
        known = [cost.get("joules", 0.0), self.energy.read()]
        return {
            **cost,
            "wall_s": cost.get("wall_s", 0.0) + wall,
            "device_hours": cost.get("device_hours", 0.0) + wall / 3600,
            "joules": None if None in known else sum(known),
        }
