"""`sslbench doctor`: what this machine has, what is missing, and what to do about it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .. import provenance
from ..device import bf16_is_fast, default_device, device_count
from ..errors import UserError
from ..evaluate import feature_cache
from ..paths import data_root, home
from ..transfer.transfer import EXTRA, require


def doctor(console: Console) -> dict[str, Any]:
    """Print and return the findings; `advice` lists what a user could do."""
    device = default_device().type
    data = data_root()
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        **{k: v for k, v in provenance.versions().items() if k != "python"},
        "device": provenance.hardware(device, device_count(device))["device"],
        "devices": device_count(device),
        "cores": provenance.cores(),
        "memory_gib": _memory_gib(),
        "precision_auto": "bf16" if bf16_is_fast(device) else "32",
        "torchvision_operators": _torchvision_operators(),
        **_transfer(),
        "home": str(home().resolve()),
        "disk_free_gib": round(shutil.disk_usage(_existing(home())).free / 2**30, 1),
        "features_gib": round(feature_cache.used() / 2**30, 2),
        "features_limit_gib": feature_cache.limit() / 2**30,
        "SSLBENCH_DATA": str(data) if data else None,
    }
    advice = []
    if not data:
        advice.append("set SSLBENCH_DATA to the folder that holds your data sets, or use --data; builtin needs nothing")
    elif not data.is_dir():
        advice.append(f"SSLBENCH_DATA={data} is not a folder")
    if not facts["torchvision_operators"]:
        advice.append("torchvision's operators do not load: install torch and torchvision from one source, together")
    if facts["transfer_problem"]:
        advice.append(facts["transfer_problem"])
    if facts["disk_free_gib"] < 5:
        advice.append(f"only {facts['disk_free_gib']} GiB free where runs/ is written; checkpoints may not fit")
    if device == "cpu":
        advice.append("no GPU: quickstart and the *_builtin recipes are sized for this; ImageNet recipes are not")
    for key, value in facts.items():
        console.print(f"{key:22} {value}", markup=False)
    for line in advice:
        console.print(f"- {line}", markup=False)
    return {**facts, "advice": advice}


def _existing(folder: Path) -> Path:
    """The folder, or what of its path is there: what will be written goes to that disk."""
    folder = folder.resolve()
    return folder if folder.exists() else _existing(folder.parent)


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _transfer() -> dict[str, Any]:
    """Whether `sslbench transfer` would run, whose nms and RoIAlign it would use, and what to do where it would not."""
    if not importlib.util.find_spec("mmengine"):
        problem = f"for COCO and ADE20K: {EXTRA}"
        return {"transfer_extra": False, "transfer_operators": None, "transfer_problem": problem}
    try:
        require()
    except UserError as e:
        return {"transfer_extra": False, "transfer_operators": None, "transfer_problem": str(e)}
    from ..transfer.ops import implementation

    return {"transfer_extra": True, "transfer_operators": implementation(), "transfer_problem": None}


def _torchvision_operators() -> bool:
    try:
        from torchvision.ops import nms

        boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2]])
        return nms(boxes, torch.tensor([0.9, 0.8]), 0.5).tolist() == [0]
    except Exception:  # whatever keeps it from loading is the finding
        return False
