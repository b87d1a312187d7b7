"""COCO's and ADE20K's photographs with their labels: where they lie, and all that is wrong, found before a run.

What can be mended without a doubt is, and `said` says so. Needs none of the mm libraries.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from .photographs import Facts, examine, look_at_map, look_at_photograph, turned

# The 80 categories in the order of their ids, which is that of the class numbers.
COCO_CLASSES = (  # noqa: SIM905 - 80 lines otherwise
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
    "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, "
    "broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, "
    "mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, "
    "teddy bear, hair drier, toothbrush"
).split(", ")
ADE20K_FOLDERS = {"train": "training", "val": "validation"}
ADE20K_CLASSES = 150
Size = tuple[int, int]  # width, height
NAMED = 3  # examples of each fault that a message gives


@dataclass
class Labelled:
    """A split as it was found. faults: what is wrong, a sentence a kind; said: what was mended or decided."""

    source: Path  # the instance file, or the folder of label maps
    images: Path  # the folder that the photographs' names begin at
    files: list[Path]
    tree: dict[str, Any] = field(default_factory=dict)  # COCO's file, mended
    turned: frozenset[str] = frozenset()  # photographs whose labels are for the picture as its EXIF tag turns it
    faults: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)


class Findings:
    """What was found, by kind, and where."""

    def __init__(self) -> None:
        self.at: dict[str, list[str]] = defaultdict(list)

    def add(self, what: str, where: object) -> None:
        self.at[what].append(str(where))

    def __bool__(self) -> bool:
        return bool(self.at)

    def sentences(self, source: Path) -> list[str]:
        return [
            f"{source}: {what} ({', '.join(at[:NAMED])}{f' and {len(at) - NAMED:,} more' if len(at) > NAMED else ''})"
            for what, at in self.at.items()
        ]


def accept(*splits: Labelled) -> None:
    """UserError with every fault of the splits, in one message."""
    if faults := [fault for split in splits for fault in split.faults]:
        raise UserError(f"{'; '.join(faults)}. Mend these or leave them out: `sslbench data check` looks again")


def check_labels(spec: str) -> dict[str, Any]:
    """{"faults", "said", "missing"} of `coco:DIR` or `ade20k:DIR`; {} of other sets."""
    kind, _, where = spec.partition(":")
    if kind not in READERS:
        return {}
    root = Path(where).expanduser() if where else Path(os.environ["SSLBENCH_DATA"]) / kind
    try:
        splits = [READERS[kind](root, split) for split in ("train", "val")]
    except UserError as e:  # enough to pre-train
        return {"faults": [], "said": [], "missing": str(e)}
    return {
        "faults": [fault for split in splits for fault in split.faults],
        "said": [said for split in splits for said in split.said],
        "missing": "",
    }


# ----------------------------------------------------------------------------------------------------------------- COCO


def open_coco(root: Path, split: str) -> Labelled:
    """A split of COCO's layout, every annotation and photograph looked at. UserError where the layout is another."""
    source, images = locate(root, split)
    tree = read_instances(source)
    labelled = Labelled(source, images, [], tree)
    try:
        wrong = _faults(tree, split)
    except TypeError as e:  # a list or a mapping
        raise UserError(f"{source}: every id is to be a number, and one is not ({e})") from None
    if not wrong:
        labelled.files = [images / i["file_name"] for i in tree["images"]]
        wrong = _compare(tree, labelled)
    labelled.faults = wrong.sentences(source)
    labelled.said += [] if labelled.faults else [f"{source}: {said}" for said in mend(tree)]
    return labelled


def locate(root: Path, split: str) -> tuple[Path, Path]:
    """(annotation file, image folder) of a split: `2017` in the names and `images/` above them may be left out."""
    files = [root / "annotations" / f"instances_{split}{year}.json" for year in ("2017", "")]
    folders = [root / f"{split}2017", root / "images" / f"{split}2017", root / "images" / split]
    annotations = next((f for f in files if f.is_file()), None)
    images = next((f for f in folders if f.is_dir()), None)
    if annotations is None or images is None:
        what = files[0] if annotations is None else folders[0]
        raise UserError(f"data {root}: expected {what}{'' if annotations is None else '/*.jpg'}, found {_tree(root)}")
    return annotations, images


def _tree(root: Path) -> str:
    names = sorted(
        f"{p.relative_to(root)}{'/' if p.is_dir() else ''}" for g in ("*", "annotations/*") for p in root.glob(g)
    )
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") or "an empty folder"


def read_instances(file: Path) -> dict[str, Any]:
    """The content of an instance file. UserError where it is none, or of other categories than COCO's 80."""
    try:
        tree = json.loads(file.read_bytes())
        names = Counter(c["name"] for c in tree["categories"])
        assert all(isinstance(x, dict) for key in ("images", "annotations", "categories") for x in tree[key])
    except (ValueError, KeyError, TypeError, AssertionError) as e:
        raise UserError(
            f"{file} is not a COCO instance file: expected 'images', 'annotations' and 'categories' ({e!r})"
        ) from None
    if names != Counter(COCO_CLASSES):
        lacks, has = sorted(set(COCO_CLASSES) - set(names)), sorted(names - Counter(COCO_CLASSES))
        raise UserError(
            f"{file}: expected COCO's 80 categories, found {names.total()}"
            + (f"; it lacks {', '.join(lacks[:5])}" if lacks else "")
            + (f"; it has {', '.join(has[:5])}" if has else "")
        )
    return tree


def _repeated(values: Iterable[Any]) -> list[Any]:
    return [value for value, n in Counter(values).items() if n > 1]


def _faults(tree: dict[str, Any], split: str) -> Findings:
    """What no reading of an instance file can make right."""
    found, sizes = Findings(), {}
    for at, i in enumerate(tree["images"]):
        where = f"image {i.get('id', f'number {at}')}"
        if not isinstance(i.get("id"), int | str) or not isinstance(i.get("file_name"), str):
            found.add("images without an 'id' or a 'file_name'", where)
        elif not all(isinstance(i.get(side), int) and i[side] > 0 for side in ("width", "height")):
            found.add("images whose 'width' and 'height' are not whole numbers of pixels", where)
        else:
            sizes[i["id"]] = [i["height"], i["width"]]
    if found:
        return found
    for key, what in (("id", "an image id that several images have"), ("file_name", "a file that several images name")):
        for value in _repeated(i[key] for i in tree["images"]):
            found.add(what, value)
    for value in _repeated(a.get("id") for a in tree["annotations"]):
        found.add("an annotation id that several annotations have", value)
    for value in _repeated(c.get("id") for c in tree["categories"]):
        found.add("a category id that several categories have", value)
    categories = {c.get("id") for c in tree["categories"]}
    for a in tree["annotations"]:
        where = f"annotation {a.get('id')} of image {a.get('image_id')}"
        if not isinstance(a.get("id"), int):
            found.add("annotations whose 'id' is not a whole number", where)
        if a.get("image_id") not in sizes:
            found.add("annotations of an image that the file does not list", where)
            continue
        if a.get("category_id") not in categories:
            found.add("annotations of a category that the file does not list", f"{where}: {a.get('category_id')}")
        if not _is_box(a.get("bbox")):
            found.add("annotations whose 'bbox' is not [x, y, width, height] in pixels", where)
        if a.get("iscrowd") not in (None, 0, 1):
            found.add("annotations whose 'iscrowd' is neither 0 nor 1", where)
        if problem := _mask_problem(a.get("segmentation"), sizes[a["image_id"]]):
            found.add(problem, where)
    if not any(not a.get("iscrowd") for a in tree["annotations"]):
        found.add(f"no object to {'learn from' if split == 'train' else 'score'}", f"{len(sizes)} images")
    return found


def _numbers(values: Any) -> bool:
    try:
        return isinstance(values, list) and math.isfinite(sum(values))
    except TypeError:
        return False


def _is_box(box: Any) -> bool:
    return _numbers(box) and len(box) == 4 and box[2] >= 0 and box[3] >= 0


def _mask_problem(mask: Any, size: list[int]) -> str:
    """What is wrong with a segmentation in an image of `size` [height, width], or ''."""
    if isinstance(mask, dict):
        counts = mask.get("counts")
        if mask.get("size") != size:
            return "masks of another size than their image"
        whole = isinstance(counts, list) and _numbers(counts) and sum(counts) == size[0] * size[1]
        return "" if whole or (isinstance(counts, str) and counts) else "masks whose run lengths do not fill the image"
    if not mask:
        return "objects without a mask ('segmentation'), which Mask R-CNN learns and is scored by"
    if not isinstance(mask, list) or not all(_numbers(p) and len(p) >= 6 and len(p) % 2 == 0 for p in mask):
        return "masks that are not polygons [x1, y1, x2, y2, x3, y3, ...] of three corners or more"
    return ""


def _compare(tree: dict[str, Any], split: Labelled) -> Findings:
    """Photographs that cannot be read or have not the size that the file says; sets `split.turned` and `.said`."""
    wrong, facts = Findings(), examine("photographs", split.files, look_at_photograph)
    missing = [i["file_name"] for i, fact in zip(tree["images"], facts, strict=True) if fact == "is not there"]
    if missing:
        wrong.add(f"{len(missing)} of the {len(facts)} images are not there, under {split.images}", missing[0])
    labelled = [("the file says", (i["width"], i["height"])) for i in tree["images"]]
    _orient(split, split.files, facts, labelled, wrong)
    return wrong


def mend(tree: dict[str, Any]) -> list[str]:
    """Make of an instance file without faults what pycocotools and mmdet read rightly; what that took, in words.

    pycocotools takes an annotation's id 0 for no match; both want iscrowd and area; mmdet numbers the classes by the
    order in which the file lists its categories.
    """
    said, changed = [], Counter[str]()
    order = {name: at for at, name in enumerate(COCO_CLASSES)}
    categories = sorted(tree["categories"], key=lambda c: order[c["name"]])
    if categories != tree["categories"]:
        tree["categories"] = categories
        said.append("its categories are listed in another order than COCO's; class numbers go by name")
    free = max((a["id"] for a in tree["annotations"]), default=0) + 1
    for a in tree["annotations"]:
        if a["id"] == 0:
            a["id"] = max(free, 1)
            said.append(f"annotation id 0, which pycocotools takes for no match, is now {a['id']}")
        if a.get("iscrowd") is None:
            a["iscrowd"] = 0
            changed["iscrowd: taken as 0"] += 1
        area, (_, _, w, h) = a.get("area"), a["bbox"]
        if not _numbers([area]) or (area <= 0 and w >= 1 and h >= 1):
            a["area"] = _area(a["segmentation"]) or w * h
            changed["area: computed from mask or box"] += 1
    return said + [f"{n:,} annotations have no {what}" for what, n in changed.items()]


def _area(mask: Any) -> float:
    """Square pixels of a segmentation; 0 of compressed run lengths where pycocotools is not installed."""
    if isinstance(mask, list):
        corners = [(p[0::2], p[1::2]) for p in mask]
        return sum(abs(sum(x[i - 1] * y[i] - x[i] * y[i - 1] for i in range(len(x)))) / 2 for x, y in corners)
    if isinstance(mask["counts"], list):
        return sum(mask["counts"][1::2])
    with contextlib.suppress(ImportError):
        from pycocotools.mask import area

        return float(area(mask))
    return 0.0


# --------------------------------------------------------------------------------------------------------------- ADE20K


def open_ade20k(root: Path, split: str) -> Labelled:
    """A split of ADEChallengeData2016's layout, every photograph and label map looked at. UserError: another layout."""
    root = root / "ADEChallengeData2016" if (root / "ADEChallengeData2016").is_dir() else root
    folder = ADE20K_FOLDERS[split]
    images, labels = root / "images" / folder, root / "annotations" / folder
    for place in (images, labels):
        if not place.is_dir():
            there = ", ".join(sorted(p.relative_to(root).as_posix() for p in root.glob("*")) or ["nothing"])
            raise UserError(f"data {root}: expected the folder {place}, found {there}")
    photographs, maps = _files(images, ".jpg"), _files(labels, ".png")
    if not photographs:
        raise UserError(f"data {root}: expected {images}/*.jpg, found none")
    found, wrong = Labelled(labels, images, [*photographs.values(), *maps.values()]), Findings()
    if missing := sorted(photographs.keys() - maps.keys()):
        wrong.add(f"{len(missing)} of {len(photographs)} images have no label map", f"{missing[0]}.png")
    if missing := sorted(maps.keys() - photographs.keys()):
        wrong.add(f"{len(missing)} of {len(maps)} label maps have no photograph in {images}", f"{missing[0]}.jpg")
    if not wrong:
        wrong = _compare_maps(found, list(photographs.values()), [maps[name] for name in photographs])
    found.faults = wrong.sentences(labels)
    return found


def _files(folder: Path, end: str) -> dict[str, Path]:
    """{path under the folder, without its end: path}, sorted; hidden files are none."""
    paths = sorted(p for p in folder.rglob(f"*{end}") if not p.name.startswith("."))
    return {p.relative_to(folder).as_posix().removesuffix(end): p for p in paths}


def _compare_maps(split: Labelled, photographs: list[Path], maps: list[Path]) -> Findings:
    wrong = Findings()
    of_maps = examine("maps", maps, look_at_map)
    labelled: list[tuple[str, Size | None]] = []
    for path, fact in zip(maps, of_maps, strict=True):
        labelled.append((f"{path} has", None if isinstance(fact, str) else (fact[0], fact[1])))
        if isinstance(fact, str):
            wrong.add("label maps that cannot be read", f"{path} {fact}")
        elif fact[2] < 0 or fact[3] > ADE20K_CLASSES:
            which = f"category {fact[3] if fact[3] > ADE20K_CLASSES else fact[2]}"
            wrong.add(
                f"expected maps of ADE20K's categories, 0 (other) and 1 to {ADE20K_CLASSES}", f"{path}: found {which}"
            )
    if not any(isinstance(fact, str) or fact[3] for fact in of_maps):
        wrong.add("no map has a pixel of a category, 1 to 150", f"{len(maps)} maps")
    facts = examine("photographs", photographs, look_at_photograph)
    _orient(split, photographs, facts, labelled, wrong)
    return wrong


# ---------------------------------------------------------------------------------------------------------------- both


def _orient(
    split: Labelled,
    files: list[Path],
    facts: list[Facts | str],
    labelled: Iterable[tuple[str, Size | None]],
    wrong: Findings,
) -> None:
    """Which way each photograph is up: as it is stored, the convention of both sets, unless only its EXIF tag makes it
    of the size that its labels are for. A photograph that is neither is a fault.

    labelled: of each photograph who says what size, and that size, None where it is not known."""
    as_tagged, undecided = set(), Findings()
    for path, fact, (who, size) in zip(files, facts, labelled, strict=True):
        if isinstance(fact, str):
            if fact != "is not there":
                wrong.add("photographs that cannot be read", f"{path} {fact}")
            continue
        stored, orientation = (fact[0], fact[1]), fact[2]
        if size is None:
            continue
        if size == stored:
            if orientation != 1 and turned(stored, orientation) == stored:
                undecided.add("photographs that an EXIF tag turns, their labels maybe not: taken as stored", path)
        elif size == turned(stored, orientation):
            as_tagged.add(str(path))
        else:
            sizes = f"{path} has {stored[0]} x {stored[1]}, {who} {size[0]} x {size[1]}"
            wrong.add("photographs of another size than their labels", sizes)
    split.turned = frozenset(as_tagged)
    if as_tagged:
        split.said.append(
            f"{split.source}: {len(as_tagged):,} photographs are turned as their EXIF tag says, as their labels are"
        )
    split.said += undecided.sentences(split.source)


READERS = {"coco": open_coco, "ade20k": open_ade20k}
