"""Checkpoints that are whole or absent: written aside, flushed, checksummed, renamed; tensors and plain data only."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..files import sha256_file, whole_file, write_atomically

KEEP = 2


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:09d}.pt"


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
