"""Sets of images: small ones in memory, large ones that a loader's workers decode. sources.py opens them."""

from __future__ import annotations

import hashlib
import io
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from torch import Tensor

from ..errors import UserError
from .listing import Names

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff"}
HIDDEN = (".", "__MACOSX", "@eaDir")  # how names begin of what notebooks, macOS and network disks leave in folders
KNOWN_MODES = {"RGB", "L", "1", "P", "CMYK", "YCbCr", "HSV", "RGBA", "LA", "PA", "RGBX", "RGBa", "La"}
BITS_PER_SAMPLE = 258  # TIFF's tag
T = TypeVar("T")


def is_image(name: str) -> bool:
    """Whether a file of that name is an image, by its extension, and not a hidden one."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(HIDDEN)


def _at(labels: Tensor | None, index: Tensor) -> Tensor | None:
    return None if labels is None else labels[index]


class NoImage(OSError):
    """There is none where one should be."""


class UnknownScale(ValueError):
    """An image whose mode does not say which of its values are black and white."""


def rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB: grey of 16 bits is scaled by 1/257 (of 12 by 1/16), a palette looked up, transparency
    dropped, as torchvision's loader does. UnknownScale: floats, integers of 32 bits, and what PIL does not convert."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))[0]
        levels = np.rint(np.asarray(image) * (255 / (2**bits - 1)))
        return Image.fromarray(levels.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode not in KNOWN_MODES:
        raise UnknownScale(f"mode {image.mode}, of which black and white are not known; save it with 8 or 16 bits")
    return image.convert("RGB")


class Decoded:
    """What has its pixels at hand."""

    def read(self, index: int) -> Image.Image:
        raise NotImplementedError

    def use(self, index: int, f: Callable[[Image.Image], T]) -> T:
        return f(self.read(index))


class Encoded:
    """What has image files, or their bytes."""

    def encoded(self, index: int) -> Any:
        """What PIL opens: a path or a file."""
        raise NotImplementedError

    def stored(self, index: int) -> bytes:
        """The bytes of the image's file; raises OSError where there is none."""
        file = self.encoded(index)
        return file.getvalue() if isinstance(file, io.BytesIO) else Path(file).read_bytes()

    def read(self, index: int) -> Image.Image:
        """The image by `rgb`. OSError: it is corrupt, which is tolerated in few; UserError: it has no known scale."""
        return self.use(index, rgb)

    def where(self, index: int) -> str:
        """What a message calls an image."""
        raise NotImplementedError

    def use(self, index: int, f: Callable[[Image.Image], T]) -> T:
        """f of the opened image, which decodes it by `rgb`; raises as `read` (PIL's errors are OSErrors)."""
        try:
            with Image.open(self.encoded(index)) as image:
                return f(image)
        except UnknownScale as e:
            raise UserError(f"{self.where(index)} is an image of {e}") from None
        except (SyntaxError, ValueError, Image.DecompressionBombError) as e:  # PIL's other words for 'corrupt'
            raise OSError(str(e)) from e


@dataclass
class MemoryImages(Decoded):
    """A small set, decoded: images uint8 (N, 3, H, W), labels int64 (N,) or None."""

    name: str
    split: str
    images: Tensor
    labels: Tensor | None
    classes: list[str]

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def fingerprint(self) -> str:
        """12 hex digits over every pixel and label."""
        digest = hashlib.sha256(self.images.numpy().tobytes())
        if self.labels is not None:
            digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()[:12]

    def where(self, index: int) -> str:
        return f"{self.name} image {index}"

    def stored(self, index: int) -> bytes:
        return self.images[index].numpy().tobytes()

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index].permute(1, 2, 0).numpy())

    def part(self, index: Tensor) -> MemoryImages:
        return replace(self, images=self.images[index], labels=_at(self.labels, index))


@dataclass
class FolderImages(Encoded):
    """A large set: files that workers decode. labels as MemoryImages'."""

    name: str
    split: str
    root: Path
    files: Sequence[str]  # relative to root, sorted
    labels: Tensor | None
    classes: list[str]

    def __len__(self) -> int:
        return len(self.files)

    @cached_property
    def fingerprint(self) -> str:
        """12 hex digits over every file's relative path and size."""
        if isinstance(self.files, Names) and self.files.fingerprint:
            return self.files.fingerprint
        digest = hashlib.sha256()
        for f in self.files:
            digest.update(b"%s\0%d\n" % (os.fsencode(f), (self.root / f).stat().st_size))
        return digest.hexdigest()[:12]

    def where(self, index: int) -> str:
        """What a message calls an image."""
        return str(self.root / self.files[index])

    def encoded(self, index: int) -> Path:
        return self.root / self.files[index]

    def part(self, index: Tensor) -> FolderImages:
        files = self.files.part(index) if isinstance(self.files, Names) else [self.files[i] for i in index.tolist()]
        return replace(self, files=files, labels=_at(self.labels, index))


@dataclass
class PackedImages(Decoded):
    """A large set as `sslbench data pack` writes it: raw pixels in one file, mapped into memory, never copied there."""

    name: str
    split: str
    file: Path
    table: Tensor  # (N, 4) int64: where an image begins in the file, its height, its width, the CRC-32 of its pixels
    fingerprint: str
    labels: Tensor | None
    classes: list[str]

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def mapped(self) -> np.ndarray:
        # Copy-on-write, since torch wants memory that could be written; nobody writes.
        return np.memmap(self.file, np.uint8, "c")

    def __getstate__(self) -> dict[str, Any]:
        """What a loader's worker is sent: it maps the file itself."""
        return {k: v for k, v in self.__dict__.items() if k != "mapped"}

    def where(self, index: int) -> str:
        return f"{self.file} image {index}"

    def pixels(self, index: int) -> np.ndarray:
        """uint8 (H, W, 3), a view of the file."""
        begin, height, width, _ = self.table[index].tolist()
        return self.mapped[begin : begin + height * width * 3].reshape(height, width, 3)

    def stored(self, index: int) -> bytes:
        return self.pixels(index).tobytes()

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels(index))

    def part(self, index: Tensor) -> PackedImages:
        fingerprint = hashlib.sha256(self.fingerprint.encode() + index.numpy().tobytes()).hexdigest()[:12]
        return replace(self, table=self.table[index], labels=_at(self.labels, index), fingerprint=fingerprint)

    def intact(self, index: int) -> bool:
        """Whether the pixels are those that were written."""
        return zlib.crc32(self.pixels(index)) == self.table[index, 3]


@dataclass
class ShardImages(Encoded):
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

    def encoded(self, index: int) -> io.BytesIO:
        shard, begin, size = self.table[index].tolist()
        with open(self.shards[shard], "rb") as file:
            file.seek(begin)
            return io.BytesIO(file.read(size))

    def part(self, index: Tensor) -> ShardImages:
        return replace(self, table=self.table[index], labels=_at(self.labels, index))


@dataclass
class HubImages(Encoded):
    """Rows of a Hugging Face data set, an Arrow table whose cells are encoded images."""

    name: str
    split: str
    rows: Any  # datasets.Dataset whose `column` is not decoded
    column: str
    labels: Tensor | None
    classes: list[str]

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def fingerprint(self) -> str:
        """12 hex digits over the number of images, the bytes of their table, and every label."""
        digest = hashlib.sha256(f"{len(self)} {self.rows.data.nbytes}".encode())
        if self.labels is not None:
            digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()[:12]

    def where(self, index: int) -> str:
        return f"{self.name} {self.split}, row {index}"

    def encoded(self, index: int) -> io.BytesIO | str:
        cell = self.rows[int(index)][self.column]
        if not cell or not (cell["bytes"] or cell["path"]):
            raise NoImage("null")
        return io.BytesIO(cell["bytes"]) if cell["bytes"] else cell["path"]

    def part(self, index: Tensor) -> HubImages:
        return replace(self, rows=self.rows.select(index.tolist()), labels=_at(self.labels, index))


OneSet = MemoryImages | FolderImages | PackedImages | ShardImages | HubImages


@dataclass
class JoinedImages:
    """Several sets as one, for pre-training: their images one set after the other, without labels."""

    name: str
    split: str
    parts: list[OneSet]
    labels: None = None
    classes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @cached_property
    def fingerprint(self) -> str:
        """12 hex digits over those of the parts, in order."""
        return hashlib.sha256("+".join(p.fingerprint for p in self.parts).encode()).hexdigest()[:12]

    def where(self, index: int) -> str:
        part, at = self._find(index)
        return part.where(at)

    def stored(self, index: int) -> bytes:
        part, at = self._find(index)
        return part.stored(at)

    def read(self, index: int) -> Image.Image:
        part, at = self._find(index)
        return part.read(at)

    def use(self, index: int, f: Callable[[Image.Image], T]) -> T:
        part, at = self._find(index)
        return part.use(at, f)

    def _find(self, index: int) -> tuple[OneSet, int]:
        for part in self.parts:
            if index < len(part):
                return part, index
            index -= len(part)
        raise IndexError(index)

    def part(self, index: Tensor) -> JoinedImages:
        raise TypeError("joined sets have no labels, so nothing is held out of them")


ImageSet = OneSet | JoinedImages


def subset(data: ImageSet, index: Tensor) -> ImageSet:
    """The images at `index` (K,), in that order, with their labels."""
    return data.part(index)
