"""Sets as their authors publish them, where that is not a folder a class."""

from __future__ import annotations

import json
from pathlib import Path

import scipy

from ..errors import UserError

Listing = tuple[list[str], list[int], list[str]]  # files under the set's folder, their labels, the classes' names


def published(path: Path, split: str) -> Listing | None:
    """What `path` holds in a layout known here; None where it holds none of these.

    Flowers-102 (Nilsback and Zisserman 2008): jpg/, imagelabels.mat, setid.mat. As transfers use it, train is the
    official train and val together, 2,040 images, and val is test, 6,149.
    iNaturalist 2018 and 2019: train2018.json and val2018.json beside the images that they name.
    """
    if (path / "setid.mat").is_file():
        listed = _flowers(path, split)
    elif lists := sorted(path.glob(f"{split}20[0-9][0-9].json")):
        listed = _inaturalist(lists[0])
    else:
        return None
    files, _, _ = listed
    if lacking := [f for f in files if not (path / f).is_file()]:
        raise UserError(
            f"{path} lacks {len(lacking)} of the {len(files)} images of its {split} list: {lacking[0]}, ..."
        )
    return listed


def _flowers(path: Path, split: str) -> Listing:
    try:
        parts = scipy.io.loadmat(path / "setid.mat")
        labels = scipy.io.loadmat(path / "imagelabels.mat")["labels"].ravel()
        names = ("trnid", "valid") if split == "train" else ("tstid",)
        numbers = sorted(int(i) for name in names for i in parts[name].ravel())
        of = [int(labels[i - 1]) - 1 for i in numbers]
    except (OSError, KeyError, ValueError, IndexError, scipy.io.matlab.MatReadError) as e:
        raise UserError(f"{path} is not Flowers-102 (jpg/, imagelabels.mat, setid.mat): {e}") from None
    return [f"jpg/image_{i:05}.jpg" for i in numbers], of, [str(c + 1) for c in range(int(labels.max()))]


def _inaturalist(file: Path) -> Listing:
    try:
        tree = json.loads(file.read_text())
        classes = {c["id"]: str(c["name"]) for c in sorted(tree["categories"], key=lambda c: c["id"])}
        order = {category: i for i, category in enumerate(classes)}
        category = {a["image_id"]: a["category_id"] for a in tree["annotations"]}
        pairs = sorted((str(image["file_name"]), order[category[image["id"]]]) for image in tree["images"])
    except (OSError, KeyError, TypeError, ValueError) as e:
        raise UserError(
            f"{file} is not an iNaturalist list (images, annotations, categories): {type(e).__name__} {e}"
        ) from None
    return [f for f, _ in pairs], [label for _, label in pairs], list(classes.values())


def tiny_imagenet(root: Path) -> dict[str, str]:
    """{file name: class} of Tiny-ImageNet's val split, {} elsewhere."""
    file = root / "val_annotations.txt"
    if not file.is_file():
        return {}
    return {name: label for name, label, *_ in (line.split("\t") for line in file.read_text().splitlines() if line)}
