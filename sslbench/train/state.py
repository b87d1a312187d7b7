"""Checkpoints that are whole or absent: written aside, flushed, checksummed, renamed; tensors and plain data only."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from ..errors import RunFailed, UserError, full, is_full

KEEP = 2


@contextlib.contextmanager
def whole_file(path: Path, aside: Path) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` at the end: the old one or the new one, never a part.

    Where writing fails nothing is left of it; RunFailed where the disk is full.
    """
    try:
        with open(aside, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, path)
        _sync_folder(path.parent)
    except BaseException as e:
        aside.unlink(missing_ok=True)
        # torch.save fails over its unfinished archive while the disk's own error is on its way.
        for cause in (e, e.__context__):
            if is_full(cause):
                raise RunFailed(full(path)) from e
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """The file is the old one or the new one, never a part. RunFailed where the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path, path.with_name(f".{path.name}.{os.getpid()}.part")) as f:
        f.write(data)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:09d}.pt"


def tensors_sha256(tensors: dict[str, Tensor]) -> str:
    """64 hex digits over every tensor's name, type, shape and bytes, whatever their order and the file they lie in."""
    digest = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        digest.update(f"{name}\0{x.dtype}\0{list(x.shape)}\n".encode())
        digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


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


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `folder/step_<step>.pt` and its checksum, and remove all but the newest two."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".*.part"):  # of a process that was killed while writing
        left.unlink()
    path = checkpoint_path(folder, step)
    aside = folder / f".{path.name}.part"
    with whole_file(path, aside) as f:
        torch.save(state, f)
        f.flush()
        # The checksum stands before the file does: a checkpoint without one was never finished.
        write_atomically(path.with_suffix(".sha256"), sha256_file(aside).encode())
    for old in sorted(folder.glob("step_*.pt"))[:-KEEP]:
        old.unlink()
        old.with_suffix(".sha256").unlink(missing_ok=True)
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state in `path`, checked against its checksum. ValueError where the file is damaged or incomplete.

    UserError where it would run code: only tensors and plain data are loaded.
    """
    checksum = path.with_suffix(".sha256")
    if not checksum.is_file() or checksum.read_text().strip() != sha256_file(path):
        raise ValueError(f"checkpoint {path} is damaged: it does not match its checksum")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise UserError(
            f"checkpoint {path} holds more than tensors and plain data, so loading it could run code; refused "
            f"({str(e).splitlines()[0]}). Remove it, or start a new run with --out DIR"
        ) from None


def newest_checkpoint(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """(step, state) of the newest checkpoint that is whole, with a warning for each newer one that is not."""
    for path in sorted(folder.glob("step_*.pt"), reverse=True):
        try:
            return int(path.stem.removeprefix("step_")), load_checkpoint(path)
        except ValueError as e:
            warnings.warn(f"{e}; falling back to the one before", stacklevel=2)
    return None
