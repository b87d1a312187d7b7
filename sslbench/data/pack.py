"""`sslbench data pack`: a data set as raw pixels in one file a split, to be mapped into memory and not decoded.

PATH/pack.json says what was packed. PATH/SPLIT.images are the pixels: images of all sizes one after the other, uint8
(H, W, 3) each, found by PATH/SPLIT.table.npy; of a set that lives in memory, uint8 (N, 3, H, W). PATH/SPLIT.labels.npy
are the labels, where there are any.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from ..errors import Interrupted, UserError
from ..files import write_json
from ..signals import Signals
from .images import ImageSet, MemoryImages
from .names import data_name
from .sources import open_split

CHUNK = 256  # images between looks at signals


def pack(spec: str, out: Path | None, size: int, console: Console) -> dict[str, Any]:
    """Write train, and val where there is one, to `out` (the set's name if left out); all of it or nothing.

    Images whose short side is longer than `size` are shrunk to it by PIL's bicubic filter; the others are kept pixel
    for pixel, never enlarged. 256 is what evaluations at 224 shrink images to, so that they see the same pixels of a
    pack as of the files. A split that keeps every pixel keeps its fingerprint; a shrunk one has its own.
    UserError: `out` exists, the disk is too small, or images cannot be read (all are named).
    """
    with Signals() as signals:
        return _pack(spec, out or Path(data_name(spec)), size, console, signals)


def _pack(spec: str, out: Path, size: int, console: Console, signals: Signals) -> dict[str, Any]:
    if out.exists():
        raise UserError(f"{out} exists; remove it, or name another folder with --out")
    splits: dict[str, ImageSet] = {"train": open_split(spec, "train")}
    try:
        splits["val"] = open_split(spec, "val")
    except UserError as e:
        console.print(f"without a val split: {e}", markup=False)
    expected = sum(_expected_bytes(data, size) for data in splits.values())
    disk = next(folder for folder in out.resolve().parents if folder.is_dir())
    if (free := shutil.disk_usage(disk).free) < expected:
        raise UserError(
            f"'{spec}' packed at {size} pixels needs about {expected / 1e9:.3g} GB, but the disk of {disk} has "
            f"{free / 1e9:.3g} GB free; choose another disk with --out, or a smaller --size"
        )
    console.print(f"packing {spec}: about {expected / 1e9:.3g} GB to {out}", markup=False)
    try:
        name, written = _write_whole(spec, splits, out, size, signals)
    except OSError as e:
        raise UserError(f"{out} cannot be written: {e}; choose another place with --out, or a smaller --size") from None
    for split, part in written.items():
        kept = f"{part['shrunk']:,} shrunk to a short side of {size}" if part["shrunk"] else "every pixel kept"
        console.print(f"{split}: {part['images']:,} images, {kept}, fingerprint {part['fingerprint']}")
    console.print(f"read it with --data packed:{out}", markup=False)
    keys = ("images", "shrunk", "bytes", "fingerprint")
    shown = {split: {k: part[k] for k in keys} for split, part in written.items()}
    return {"data": f"packed:{out}", "name": name, "splits": shown}


def _write_whole(
    spec: str, splits: dict[str, ImageSet], out: Path, size: int, signals: Signals
) -> tuple[str, dict[str, Any]]:
    """All files, in a hidden folder beside `out` that takes its name at the end. (name of the set, what was written)"""
    aside = out.with_name(f".{out.name}.part")
    aside.mkdir(parents=True, exist_ok=True)
    lock = os.open(aside, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise UserError(f"another process is packing to {out}") from None
    try:
        for left in aside.iterdir():  # of a process that was killed
            left.unlink()
        written = {split: _write(data, aside, size, signals) for split, data in splits.items()}
        shrunk = any(part["shrunk"] for part in written.values())
        name = data_name(spec) + (f"-{size}px" if shrunk else "")
        write_json(aside / "pack.json", {"name": name, "short_side": size if shrunk else None, "splits": written})
        for file in aside.iterdir():
            with open(file, "rb") as f:
                os.fsync(f.fileno())
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        os.close(lock)
    return name, written


def _expected_bytes(data: ImageSet, size: int) -> int:
    """What the pixels will take, from up to 256 images, with 5 % to spare; a set in memory is counted exactly."""
    if isinstance(data, MemoryImages):
        return data.images.numel()
    sample = np.linspace(0, len(data) - 1, min(256, len(data))).astype(int).tolist()
    sizes = [_fit(image.size, size) for i in sample if (image := _try_read(data, i))]
    return int(1.05 * len(data) * 3 * sum(w * h for w, h in sizes) / max(1, len(sizes)))


def _fit(size: tuple[int, int], short: int) -> tuple[int, int]:
    """(width, height) with a short side of at most `short`; the long side truncates, as in evaluation's views."""
    least = min(size)
    w, h = (side if least <= short else short if side == least else int(short * side / least) for side in size)
    return w, h


def _try_read(data: ImageSet, index: int) -> Image.Image | None:
    with contextlib.suppress(OSError):
        return data.read(index)
    return None


def _write(data: ImageSet, folder: Path, size: int, signals: Signals) -> dict[str, Any]:
    """One split's files in `folder`, and what pack.json says of it."""
    table: list[tuple[int, int, int, int]] = []
    bad: list[str] = []
    shrunk = end = 0
    shape = None

    def prepare(index: int) -> tuple[np.ndarray, bool] | None:
        if (image := _try_read(data, index)) is None:
            return None
        to = _fit(image.size, size)
        return np.asarray(image.resize(to, Image.Resampling.BICUBIC)), to != image.size

    with (
        open(folder / f"{data.split}.images", "wb") as file,
        Progress(console=Console(stderr=True), transient=True) as bar,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        if isinstance(data, MemoryImages) and min(data.images.shape[2:]) <= size:
            shape = list(data.images.shape)
            file.write(data.images.contiguous().numpy().data)
        else:
            for start in bar.track(range(0, len(data), CHUNK), description=data.split):
                for i, prepared in enumerate(pool.map(prepare, range(start, min(start + CHUNK, len(data)))), start):
                    if prepared is None:
                        bad.append(data.where(i))
                    elif not bad:  # what is left is only looked at: nothing will be kept
                        pixels, changed = prepared
                        file.write(pixels.data)
                        table.append((end, *pixels.shape[:2], zlib.crc32(pixels)))
                        end, shrunk = end + pixels.nbytes, shrunk + changed
                if signals.received:
                    raise Interrupted(
                        f"{signals.received} while packing; nothing is kept, the same command starts anew"
                    )
        if bad:
            raise UserError(
                f"{len(bad)} of {len(data)} images of {data.name} cannot be read; replace or remove them: "
                f"{', '.join(bad[:20])}{', ...' if len(bad) > 20 else ''}"
            )
    if shape is None:
        np.save(folder / f"{data.split}.table.npy", np.array(table, np.int64))
    if data.labels is not None:
        np.save(folder / f"{data.split}.labels.npy", data.labels.numpy())
    own = hashlib.sha256(f"{data.fingerprint} short side {size}".encode()).hexdigest()[:12]
    return {
        "images": len(data),
        "shrunk": shrunk,
        "shape": shape,
        "bytes": (folder / f"{data.split}.images").stat().st_size,
        "labelled": data.labels is not None,
        "classes": data.classes,
        "fingerprint": own if shrunk else data.fingerprint,
    }
