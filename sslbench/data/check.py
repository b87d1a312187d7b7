"""`sslbench data check`: what a data SPEC holds, and which of its files cannot be read."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..errors import UserError
from .dense import check_labels
from .images import ImageSet, MemoryImages, PackedImages
from .loader import CORRUPT_LIMIT
from .sources import numbered_alike, open_split


def check(spec: str) -> dict[str, Any]:
    """{"spec", "ok", "splits": {"train": {images, classes, fingerprint, size, corrupt}, ...}}; decodes every image.

    ok: a run would accept it, that is, at most 0.1 % of a split's files are unreadable. Of COCO and ADE20K also
    "labels": {"faults", "said", "missing"}, what `sslbench transfer` would refuse, mend, or not find.
    """
    splits: dict[str, ImageSet] = {"train": open_split(spec, "train")}
    missing = ""
    try:
        splits["val"] = open_split(spec, "val")
        if splits["train"].labels is not None or splits["val"].labels is not None:
            numbered_alike(splits["train"], splits["val"], spec)
    except UserError as e:  # enough to pre-train
        missing = str(e)
    described = {name: _describe(data) for name, data in splits.items()}
    ok = all(len(f["corrupt"]) <= CORRUPT_LIMIT * f["images"] for f in described.values())
    answer = {"spec": spec, "ok": ok, "splits": described, "missing": missing}
    if labels := check_labels(spec):
        answer |= {"labels": labels, "ok": ok and not labels["faults"]}
    return answer


def _describe(data: ImageSet) -> dict[str, Any]:
    corrupt: list[str] = []
    if isinstance(data, PackedImages):
        corrupt = [data.where(i) for i in range(len(data)) if not data.intact(i)]
        pixels = sorted((w, h) for _, h, w, _ in data.table.tolist())
    elif not isinstance(data, MemoryImages):
        with ThreadPoolExecutor(4) as pool:
            sizes = list(pool.map(lambda i: _size(data, i), range(len(data))))
        corrupt = [size for size in sizes if isinstance(size, str)]
        pixels = sorted(size for size in sizes if not isinstance(size, str))
    else:
        pixels = [(data.images.shape[3], data.images.shape[2])] * len(data)
    return {
        "images": len(data),
        "classes": len(data.classes),
        "fingerprint": data.fingerprint,
        "median_size": list(pixels[len(pixels) // 2]) if pixels else None,
        "corrupt": corrupt,
    }


def _size(data: ImageSet, index: int) -> tuple[int, int] | str:
    """(width, height), or which image cannot be read."""
    try:
        return data.read(index).size
    except OSError:
        return data.where(index)
    except UserError as e:
        return str(e)
