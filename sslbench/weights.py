"""Weights in safetensors files: the same bytes for the same tensors, and their checksums."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from .errors import RunFailed, UserError
from .files import sha256_file, write_atomically


def tensors_sha256(tensors: dict[str, Tensor]) -> str:
    """64 hex digits over every tensor's name, type, shape and bytes, whatever their order and the file they lie in."""
    whole = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        whole.update(f"{name}\0{x.dtype}\0{list(x.shape)}\n".encode())
        whole.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return whole.hexdigest()


def not_finite(tensors: dict[str, Tensor]) -> str:
    """The names of the first tensors that hold NaN or infinity; '' where none does."""
    names = [k for k, x in tensors.items() if x.is_floating_point() and not x.isfinite().all()]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def write_weights(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file: the same bytes for the same tensors and metadata. RunFailed where one is not finite."""
    if names := not_finite(tensors):
        raise RunFailed(f"the weights are not finite: {names}. {path} is not written; try a lower learning rate")
    data = safetensors_bytes({k: x.detach().cpu().contiguous() for k, x in tensors.items()}, metadata)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    if metadata:  # safetensors writes it in the order of a hash map, another one in each process
        header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write_atomically(path, b"".join((len(text).to_bytes(8, "little"), text, memoryview(data)[end:])))


def hashes(path: Path) -> dict[str, str]:
    """What run.json keeps of a weights file: `weights_sha256` of its tensors, `file_sha256` of all of its bytes."""
    return {"weights_sha256": tensors_sha256(load_file(path)), "file_sha256": sha256_file(path)}


def check_weights(path: Path, run: dict[str, Any]) -> None:
    """UserError where a weights file is not the one that its run.json, `run`, knows."""
    # Version 0.1 kept the hash of the file alone, under the other name.
    written = run.get("file_sha256", run.get("weights_sha256"))
    if written is not None and written != sha256_file(path):
        raise UserError(
            f"{path} is damaged or another file: it does not match the hash in run.json. Remove it, and the command "
            f"that started the run writes it again from its checkpoint"
        )
