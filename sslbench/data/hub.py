"""Hugging Face data sets, by name or as `save_to_disk` wrote them. Needs the extra `hf`."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import UserError
from .shards import T, opened


@dataclass
class HubImages:
    """Rows of an Arrow table, each an encoded image."""

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
        return f"{self.name} {self.split} image {index}"

    def read(self, index: int) -> Image.Image:
        """The decoded RGB image; raises OSError where it is corrupt."""
        return self.use(index, lambda image: image.convert("RGB"))

    def use(self, index: int, f: Callable[[Image.Image], T]) -> T:
        """As `opened`."""
        cell = self.rows[int(index)][self.column]
        return opened(io.BytesIO(cell["bytes"]) if cell["bytes"] else cell["path"], f)


def open_hub(where: str, split: str, words: tuple[str, ...]) -> HubImages:
    """WHERE: a folder, or a name on the hub, which is downloaded. words: what its split may be called."""
    spec = f"hfds:{where}"
    try:
        import datasets
    except ImportError:
        raise UserError(f"data '{spec}' needs Hugging Face's datasets: pip install 'sslbench[hf]'") from None
    folder = Path(where).expanduser()
    try:
        found: Any = datasets.load_from_disk(str(folder)) if folder.is_dir() else datasets.load_dataset(where)
    except Exception as e:  # files, network, hub and builders raise many kinds
        raise UserError(f"data '{spec}' cannot be loaded: {' '.join(str(e).split())[:200]}") from None
    word = next((w for w in words if isinstance(found, dict) and w in found), None)
    if word is None:
        has = ", ".join(found) if isinstance(found, dict) else "one set without splits"
        raise UserError(f"data '{spec}': no {split} split; expected {', '.join(words)}, found {has}")
    rows = found[word]
    images = [k for k, v in rows.features.items() if isinstance(v, datasets.Image)]
    if len(images) != 1:
        raise UserError(f"data '{spec}': expected one column of images, found {', '.join(images) or 'none'}")
    classes = {k: v.names for k, v in rows.features.items() if isinstance(v, datasets.ClassLabel)}
    column = "label" if "label" in classes else next(iter(classes), None) if len(classes) == 1 else None
    labels = None if column is None else torch.from_numpy(np.array(rows[column], dtype=np.int64))
    return HubImages(
        folder.name,
        split,
        rows.cast_column(images[0], datasets.Image(decode=False)),
        images[0],
        labels,
        [] if column is None else list(classes[column]),
    )
