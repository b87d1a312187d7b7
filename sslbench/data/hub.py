"""Hugging Face data sets, by name or as `save_to_disk` wrote them. Needs the extra `hf`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from .images import HubImages


def open_hub(where: str, split: str, words: tuple[str, ...]) -> HubImages:
    """WHERE: a folder, or a name on the hub, which is downloaded. words: what its split may be called."""
    spec = f"hfds:{where}"
    try:
        import datasets
    except ImportError:
        raise UserError(f"data '{spec}' needs Hugging Face's datasets: pip install 'sslbench[hf]'") from None
    folder = Path(where).expanduser()
    try:
        splits: Any = datasets.load_from_disk(str(folder)) if folder.is_dir() else datasets.load_dataset(where)
    except Exception as e:  # files, network, hub and builders raise many kinds
        raise UserError(f"data '{spec}' cannot be loaded: {' '.join(str(e).split())[:200]}") from None
    word = next((w for w in words if isinstance(splits, dict) and w in splits), None)
    if word is None:
        has = ", ".join(splits) if isinstance(splits, dict) else "one set without splits"
        raise UserError(f"data '{spec}': no {split} split; expected {', '.join(words)}, found {has}")
    rows = splits[word]
    images = [k for k, v in rows.features.items() if isinstance(v, datasets.Image)]
    if len(images) != 1:
        raise UserError(f"data '{spec}': expected one column of images, found {', '.join(images) or 'none'}")
    classes = {k: v.names for k, v in rows.features.items() if isinstance(v, datasets.ClassLabel)}
    column = "label" if "label" in classes else next(iter(classes), None) if len(classes) == 1 else None
    labels = None if column is None else torch.tensor([-1 if label is None else label for label in rows[column]])
    return HubImages(
        folder.name,
        split,
        rows.cast_column(images[0], datasets.Image(decode=False)),
        images[0],
        labels,
        [] if column is None else list(classes[column]),
    )
