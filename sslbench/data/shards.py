"""WebDataset's shards, read where they lie: tar files in which KEY.jpg is an image and KEY.cls its class."""

from __future__ import annotations

import tarfile
import time
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from .images import EXTENSIONS, HIDDEN, ShardImages
from .listing import LEAST, alone, keep, recall


def open_shards(path: Path, split: str) -> ShardImages:
    """PATH/*train*.tar, or PATH/*val*.tar, in the order of their names. Without labels unless every image has one:
    an integer, without a name, that means the same in both splits."""
    shards = sorted(path.glob(f"*{split}*.tar"))
    if not shards:
        raise UserError(f"data 'wds:{path}': no {split} split; expected tar files named {path}/*{split}*.tar")
    table, labels = _table(path, split, shards)
    return ShardImages(
        path.resolve().name,
        split,
        shards,
        table,
        labels,
        [] if labels is None else [str(i) for i in range(int(labels.max()) + 1)],
    )


def _table(path: Path, split: str, shards: list[Path]) -> tuple[Tensor, Tensor | None]:
    """Where each image is, (N, 3) as in ShardImages, and its class. Read once: see listing.py."""
    kind, names = f"wds {split}", [shard.name for shard in shards]
    with alone(path):
        if (kept := recall(kind, path)) and [name for name, *_ in kept[1]["read"]] == names:
            return kept[0]["table"], kept[0].get("labels")
        began = time.time_ns()
        table, labels = _read(path, shards)
        if len(table) >= LEAST:
            arrays = {"table": table.numpy()} | ({} if labels is None else {"labels": labels.numpy()})
            keep(kind, path, names, began, arrays, {})
    return table, labels


def _read(path: Path, shards: list[Path]) -> tuple[Tensor, Tensor | None]:
    places: dict[tuple[int, str], list[int]] = {}
    labels: dict[tuple[int, str], int] = {}
    for number, shard in enumerate(shards):
        try:
            with tarfile.open(shard, "r:") as tar:
                for member in tar:
                    folder, _, name = member.name.rpartition("/")
                    stem, _, extension = name.partition(".")
                    key = number, f"{folder}/{stem}"
                    if name.startswith(HIDDEN):  # as macOS's tar writes beside each file
                        continue
                    if f".{extension.lower()}" in EXTENSIONS:
                        places[key] = [number, member.offset_data, member.size]
                    elif extension == "cls" and (file := tar.extractfile(member)):
                        labels[key] = int(file.read())
        except (tarfile.TarError, ValueError, EOFError) as e:
            raise UserError(
                f"{shard} is not a shard of WebDataset: expected KEY.jpg and KEY.cls, an integer; {e}"
            ) from None
    if not places:
        raise UserError(f"data 'wds:{path}': no images in {shards[0].name} to {shards[-1].name}")
    numbers = [labels[key] for key in places] if places.keys() <= labels.keys() else None
    if numbers is not None and min(numbers) < -1:  # -1: not known
        raise UserError(f"data 'wds:{path}': classes must be integers from 0 on, found {min(numbers)}")
    return torch.tensor(list(places.values())), None if numbers is None else torch.tensor(numbers)
