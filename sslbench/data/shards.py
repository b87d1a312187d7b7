"""WebDataset's shards, read where they lie: tar files in which KEY.jpg is an image and KEY.cls its class."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from ..errors import UserError

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff"}
T = TypeVar("T")


def opened(source: Any, f: Callable[[Image.Image], T]) -> T:
    """f of the image in a file, which decodes it as it likes; OSError (PIL's errors are some) where it is corrupt."""
    try:
        with Image.open(source) as image:
            return f(image)
    except (SyntaxError, ValueError, Image.DecompressionBombError) as e:  # PIL's other words for 'corrupt'
        raise OSError(str(e)) from e


@dataclass
class ShardImages:
    """Images in tar files, each read by itself at its place: in any order, so that a run resumes exactly."""

    name: str
    split: str
    shards: list[Path]
    table: Tensor  # (N, 3) int64: the shard that an image is in, where it begins there, its bytes
    labels: Tensor | None
    classes: list[str]

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def fingerprint(self) -> str:
        """12 hex digits over every shard's name and every image's place and label."""
        digest = hashlib.sha256("\n".join(s.name for s in self.shards).encode())
        digest.update(self.table.numpy().tobytes())
        if self.labels is not None:
            digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()[:12]

    def where(self, index: int) -> str:
        shard, begin, _ = self.table[index].tolist()
        return f"{self.shards[shard]}, the image at byte {begin}"

    def read(self, index: int) -> Image.Image:
        """The decoded RGB image; raises OSError where it is corrupt."""
        return self.use(index, lambda image: image.convert("RGB"))

    def use(self, index: int, f: Callable[[Image.Image], T]) -> T:
        """As `opened`."""
        shard, begin, size = self.table[index].tolist()
        with open(self.shards[shard], "rb") as file:
            file.seek(begin)
            return opened(io.BytesIO(file.read(size)), f)


def open_shards(path: Path, split: str) -> ShardImages:
    """PATH/*train*.tar, or PATH/*val*.tar, in the order of their names. Without labels unless every image has one."""
    shards = sorted(path.glob(f"*{split}*.tar"))
    if not shards:
        raise UserError(f"data 'wds:{path}': no {split} split; expected tar files named {path}/*{split}*.tar")
    places: dict[tuple[int, str], list[int]] = {}
    labels: dict[tuple[int, str], int] = {}
    for number, shard in enumerate(shards):
        try:
            with tarfile.open(shard, "r:") as tar:
                for member in tar:
                    folder, _, name = member.name.rpartition("/")
                    stem, _, extension = name.partition(".")
                    key = number, f"{folder}/{stem}"
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
    found = [labels[key] for key in places] if places.keys() <= labels.keys() else None
    if found is not None and min(found) < 0:
        raise UserError(f"data 'wds:{path}': classes must be integers from 0 on, found {min(found)}")
    return ShardImages(
        path.resolve().name,
        split,
        shards,
        torch.tensor(list(places.values())),
        None if found is None else torch.tensor(found),
        [] if found is None else [str(i) for i in range(max(found) + 1)],
    )
