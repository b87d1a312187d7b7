"""Frozen features on disk, for the next evaluation of the same: a file a pool, in runs/.features, the oldest leaving.

A file is NumPy's .npy, float32 (N, D), and behind it the SHA-256 of its rows, by which a damaged one is told.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..files import whole_file
from ..paths import home

LIMIT_GIB = 20.0  # of all files together, unless SSLBENCH_CACHE_GIB says otherwise


def folder() -> Path:
    return home() / "runs" / ".features"


def limit() -> float:
    """Return how many bytes the files may take together. UserError: SSLBENCH_CACHE_GIB is no number from 0 on."""
    said = os.environ.get("SSLBENCH_CACHE_GIB", LIMIT_GIB)
    with contextlib.suppress(ValueError):
        if float(said) >= 0:
            return float(said) * 2**30
    raise UserError(f"SSLBENCH_CACHE_GIB={said}: expected GiB for cached features, such as {LIMIT_GIB:g}")


def read(name: str, pool: str) -> Tensor | None:
    """Return (N, D) float32, mapped into memory; None where there is no such file, or a damaged one."""
    path = _path(name, pool)
    try:
        rows = mapped(name, pool)
        with open(path, "rb") as f:
            f.seek(-hashlib.sha256().digest_size, os.SEEK_END)
            if hashlib.sha256(rows.numpy().data).digest() != f.read():
                return None
        os.utime(path)  # the least recently read leaves first
    except (OSError, ValueError, EOFError):
        return None
    return rows


def mapped(name: str, pool: str) -> Tensor:
    """As `read`, of a file that this process has just written: its rows are not read to be checked."""
    # Copy-on-write: torch wants what could be written.
    return torch.from_numpy(np.asarray(np.load(_path(name, pool), mmap_mode="c")))


@contextlib.contextmanager
def writing(name: str, shapes: dict[str, tuple[int, int]]) -> Iterator[Callable[[str, Tensor], None]]:
    """Give add(pool, rows), which takes a file's rows as they are made, so that they are never all in memory.

    shapes: of each pool's features, (N, D). Afterwards the oldest files leave until all are within `limit`, but for
    these. RunFailed where the disk is full.
    """
    limit()  # refused before the work, not after it
    folder().mkdir(parents=True, exist_ok=True)
    paths = {pool: _path(name, pool) for pool in shapes}
    with contextlib.ExitStack() as stack:
        files, digests = {}, {}
        for pool, shape in shapes.items():
            aside = paths[pool].with_name(f".{paths[pool].name}.{os.getpid()}.part")
            files[pool], digests[pool] = stack.enter_context(whole_file(paths[pool], aside)), hashlib.sha256()
            np.lib.format.write_array_header_2_0(files[pool], {"descr": "<f4", "fortran_order": False, "shape": shape})

        def add(pool: str, rows: Tensor) -> None:
            data = rows.float().cpu().contiguous().numpy().astype("<f4", copy=False).data
            digests[pool].update(data)
            files[pool].write(data)

        yield add
        for pool, digest in digests.items():
            files[pool].write(digest.digest())
    _shrink(set(paths.values()))


def used() -> int:
    """Return how many bytes all files take, those that were never finished among them."""
    return sum(size for _, size, _ in _files())


def clean() -> tuple[int, int]:
    """Remove every file; return (files, bytes)."""
    gone = _files()
    for _, _, path in gone:
        path.unlink(missing_ok=True)
    return len(gone), sum(size for _, size, _ in gone)


def _path(name: str, pool: str) -> Path:
    return folder() / f"{name}_{pool}.npy"


def _files() -> list[tuple[float, int, Path]]:
    """(when it was last read, bytes, path) of each, the oldest first."""
    found = []
    for path in folder().glob("*") if folder().is_dir() else ():
        with contextlib.suppress(FileNotFoundError):  # another process removed it
            stat = path.stat()
            found.append((stat.st_mtime, stat.st_size, path))
    return sorted(found)


def _shrink(needed: set[Path]) -> None:
    allowed, total = limit(), used()
    for _, size, path in _files():
        if total <= allowed:
            return
        if path not in needed and path.suffix != ".part":
            path.unlink(missing_ok=True)
            total -= size
