"""What a device computes fast, and how the C library holds memory on a CPU."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import time

import torch

from .errors import UserError

# Dense peaks in TFLOP/s of bf16 (V100, T4: fp16), from the vendors' data sheets.
PEAK_TFLOPS = {
    "T4": 65, "V100": 125, "A10": 125, "RTX4090": 165, "L40S": 362, "A100": 312, "H100": 989, "H200": 989,
}  # fmt: skip
MEMORY_GIB = {"T4": 16, "V100": 32, "A10": 24, "RTX4090": 24, "L40S": 48, "A100": 80, "H100": 80, "H200": 141}
# Of that peak, for machines that are not here: what OCL's 532 A100 hours for its ViT-L (section 1) come to.
SHARE = 0.36


def default_device() -> torch.device:
    """A GPU where there is one (NVIDIA's, AMD's, Apple's), or $SSLBENCH_DEVICE; UserError where that is not here."""
    there = [*(["cuda"] if torch.cuda.is_available() else []), *(["mps"] if torch.backends.mps.is_available() else [])]
    wanted = os.environ.get("SSLBENCH_DEVICE")
    if wanted and wanted not in (*there, "cpu"):
        raise UserError(f"SSLBENCH_DEVICE={wanted}: this machine has {' and '.join((*there, 'cpu'))}")
    return torch.device(wanted or (*there, "cpu")[0])


def device_count(device: str) -> int:
    """How many of that kind a run may use."""
    return torch.cuda.device_count() if device == "cuda" else 1


def synchronize(device: torch.device) -> None:
    """Wait for what was asked of it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def memory_bytes(device: torch.device) -> int:
    """A GPU's memory, or the computer's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":  # the part of the computer's that its GPU may take
        return torch.mps.recommended_max_memory()
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def bf16_is_fast(device: str) -> bool:
    """Whether this device multiplies bf16 matrices faster than float32 ones."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and bf16_unit() is not None and _bf16_gains()


@functools.cache
def _bf16_gains() -> bool:
    """Measure it, since a unit for it is not enough: AVX-512 BF16 is twice float32's rate on AMD's Zen 4, and half of
    it on Intel's cores since Sapphire Rapids (83 and 157 GFLOP/s on one core of an Emerald Rapids, its AMX masked)."""
    fastest = {}
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            a, took = torch.ones(384, 384, dtype=dtype), []
            for _ in range(12):
                start = time.perf_counter()
                a @ a
                took.append(time.perf_counter() - start)
            fastest[dtype] = min(took)
    return fastest[torch.bfloat16] < fastest[torch.float32]


def bf16_unit() -> str | None:
    """What multiplies bf16 matrices on this CPU; None where that is emulated."""
    units = {"AMX": "_is_amx_tile_supported", "AVX-512 BF16": "_is_avx512_bf16_supported"}
    return next((unit for unit, check in units.items() if getattr(torch.cpu, check, bool)()), None)


def release_freed_memory() -> None:
    """Give what glibc kept back to the kernel, so that the next measurement of memory starts from what is in use."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next step, instead of giving it back to the kernel.

    Activations are larger than malloc's mmap threshold, so each step would map, zero and unmap gigabytes: a fifth of
    a training step on two cores (vit_ti4, batch 256: 90 -> 118 images/s). Does nothing without glibc.
    """
    m_trim_threshold, m_top_pad, m_mmap_max, m_arena_max = -1, -2, -4, -8
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_top_pad, 64 << 20)
        libc.mallopt(m_arena_max, 1)


def device_hours(flops: float, device: str) -> float:
    """How long one such device takes at the assumed share of its peak: not measured."""
    return flops / (PEAK_TFLOPS[device] * 1e12 * SHARE) / 3600
