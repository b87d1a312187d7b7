"""COCO's format: an instance file a split with boxes and masks, of COCO's 80 categories or of a set's own."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from .labelled import Findings, Labelled, orient, some
from .photographs import examine, look_at_photograph

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


# Where a split's file lies, and its photographs: COCO's own places first, then Roboflow's. `{}` is train, val or valid.
FILES = ("annotations/instances_{}2017.json", "annotations/instances_{}.json", "{}/_annotations.coco.json")
FOLDERS = ("{}2017", "images/{}2017", "images/{}", "{}")
WORDS = {"train": ("train",), "val": ("val", "valid")}


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
        labelled.classes = classes_of(tree)
        labelled.own = labelled.classes != [*COCO_CLASSES]
        labelled.files = [images / i["file_name"] for i in tree["images"]]
        wrong = _compare(tree, labelled)
    labelled.faults = wrong.sentences(source)
    return labelled


def locate(root: Path, split: str) -> tuple[Path, Path]:
    """(instance file, image folder) of a split; a set may have all its photographs in one folder, `images`."""
    files, folders = (
        [root / form.format(word) for form in forms for word in WORDS[split]] for forms in (FILES, FOLDERS)
    )
    source = next((f for f in files if f.is_file()), None)
    images = next((f for f in (*folders, root / "images") if f.is_dir()), None)
    if source is None or images is None:
        what = files[0] if source is None else folders[0]
        raise UserError(f"data {root}: expected {what}{'' if source is None else '/*.jpg'}, found {_tree(root)}")
    return source, images


def _tree(root: Path) -> str:
    names = sorted(
        f"{p.relative_to(root)}{'/' if p.is_dir() else ''}" for g in ("*", "annotations/*") for p in root.glob(g)
    )
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") or "an empty folder"


def read_instances(file: Path) -> dict[str, Any]:
    """The content of an instance file. UserError where it is none."""
    try:
        tree = json.loads(file.read_bytes())
        assert all(isinstance(x, dict) for key in ("images", "annotations", "categories") for x in tree[key])
    except (ValueError, KeyError, TypeError, AssertionError) as e:
        raise UserError(
            f"{file} is not a COCO instance file: expected 'images', 'annotations' and 'categories' ({e!r})"
        ) from None
    return tree


def classes_of(tree: dict[str, Any]) -> list[str]:
    """The names of the categories in the order of the class numbers: COCO's own, else that of their ids."""
    names = [c["name"] for c in sorted(tree["categories"], key=lambda c: c["id"])]
    return [*COCO_CLASSES] if sorted(names) == sorted(COCO_CLASSES) else names


def number_alike(train: Labelled, val: Labelled) -> None:
    """Mend both, their classes numbered as train's by name, whatever their ids. Adds a fault where val has others."""
    if unknown := [name for name in val.classes if name not in train.classes]:
        val.faults.append(f"{val.source}: categories that {train.source} does not list ({some(unknown)})")
        return
    val.classes, val.own = train.classes, train.own
    for split in (train, val):
        split.said += [f"{split.source}: {said}" for said in mend(split.tree, train.classes)]
    used = {a["category_id"] for a in train.tree["annotations"]}
    if train.own and (bare := [c["name"] for c in train.tree["categories"] if c["id"] not in used]):
        train.said.append(f"{train.source}: no object of {some(bare)}")


def _repeated(values: Iterable[Any]) -> list[Any]:
    return [value for value, n in Counter(values).items() if n > 1]


def _faults(tree: dict[str, Any], split: str) -> Findings:
    """What no reading of an instance file can make right."""
    faults, sizes = Findings(), {}
    for at, i in enumerate(tree["images"]):
        where = f"image {i.get('id', f'number {at}')}"
        if not isinstance(i.get("id"), int | str) or not isinstance(i.get("file_name"), str):
            faults.add("images without an 'id' or a 'file_name'", where)
        elif not all(isinstance(i.get(side), int) and i[side] > 0 for side in ("width", "height")):
            faults.add("images whose 'width' and 'height' are not whole numbers of pixels", where)
        else:
            sizes[i["id"]] = [i["height"], i["width"]]
    if faults:
        return faults
    for key, what in (("id", "an image id that several images have"), ("file_name", "a file that several images name")):
        for value in _repeated(i[key] for i in tree["images"]):
            faults.add(what, value)
    for value in _repeated(a.get("id") for a in tree["annotations"]):
        faults.add("an annotation id that several annotations have", value)
    for value in _repeated(c.get("id") for c in tree["categories"]):
        faults.add("a category id that several categories have", value)
    for c in tree["categories"]:
        if not isinstance(c.get("id"), int):
            faults.add("categories whose 'id' is not a whole number", c)
        if not isinstance(c.get("name"), str) or not c["name"].strip():
            faults.add("categories whose 'name' is no text", c)
    for name in _repeated(c["name"] for c in tree["categories"] if isinstance(c.get("name"), str)):
        faults.add("a name that several categories have", name)
    categories = {c.get("id") for c in tree["categories"]}
    for a in tree["annotations"]:
        where = f"annotation {a.get('id')} of image {a.get('image_id')}"
        if not isinstance(a.get("id"), int):
            faults.add("annotations whose 'id' is not a whole number", where)
        if a.get("image_id") not in sizes:
            faults.add("annotations of an image that the file does not list", where)
            continue
        if a.get("category_id") not in categories:
            faults.add("annotations of a category that the file does not list", f"{where}: {a.get('category_id')}")
        if not _is_box(a.get("bbox")):
            faults.add("annotations whose 'bbox' is not [x, y, width, height] in pixels", where)
        if a.get("iscrowd") not in (None, 0, 1):
            faults.add("annotations whose 'iscrowd' is neither 0 nor 1", where)
        if problem := _mask_problem(a.get("segmentation"), sizes[a["image_id"]]):
            faults.add(problem, where)
    if not any(not a.get("iscrowd") for a in tree["annotations"]):
        faults.add(f"no object to {'learn from' if split == 'train' else 'score'}", f"{len(sizes)} images")
    return faults


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
        if mask.get("size") != size:
            return "masks of another size than their image"
        return "" if _fills(mask.get("counts"), size) else "masks whose run lengths do not fill the image"
    if not mask:
        return "objects without a mask ('segmentation'), which Mask R-CNN learns and is scored by"
    if not isinstance(mask, list) or not all(_numbers(p) and len(p) >= 6 and len(p) % 2 == 0 for p in mask):
        return "masks that are not polygons [x1, y1, x2, y2, x3, y3, ...] of three corners or more"
    return ""


def _fills(counts: Any, size: list[int]) -> bool:
    try:
        lengths = run_lengths(counts)
        return _numbers(lengths) and min(lengths) >= 0 and sum(lengths) == size[0] * size[1]
    except (TypeError, ValueError):
        return False


def _compare(tree: dict[str, Any], split: Labelled) -> Findings:
    """Photographs that cannot be read or have not the size that the file says; sets `split.turned` and `.said`."""
    wrong, facts = Findings(), examine("photographs", split.files, look_at_photograph)
    missing = [i["file_name"] for i, fact in zip(tree["images"], facts, strict=True) if fact == "is not there"]
    if missing:
        wrong.add(f"{len(missing)} of the {len(facts)} images are not there, under {split.images}", missing[0])
    labelled = [("the file says", (i["width"], i["height"])) for i in tree["images"]]
    orient(split, split.files, facts, labelled, wrong)
    return wrong


def mend(tree: dict[str, Any], classes: Sequence[str]) -> list[str]:
    """Make of an instance file without faults what pycocotools and mmdet read rightly; what that took, in words.

    pycocotools takes an annotation's id 0 for no match; both want iscrowd and area; mmdet numbers the classes by the
    order in which the file lists its categories, which becomes that of `classes`.
    """
    said, changed = [], Counter[str]()
    listed = {c["name"]: c for c in tree["categories"]}
    if lacking := [name for name in classes if name not in listed]:
        next_id = max((c["id"] for c in tree["categories"]), default=0) + 1
        listed |= {name: {"id": id, "name": name} for id, name in enumerate(lacking, next_id)}
        said.append(f"it does not list {some(lacking)}, as train does: taken as without objects of these")
    categories = [listed[name] for name in classes]
    if not lacking and categories != tree["categories"] and [*classes] == [*COCO_CLASSES]:
        said.append("its categories are listed in another order than COCO's; class numbers go by name")
    tree["categories"] = categories
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
    """Square pixels of a segmentation."""
    if isinstance(mask, list):
        corners = [(p[0::2], p[1::2]) for p in mask]
        return sum(abs(sum(x[i - 1] * y[i] - x[i] * y[i - 1] for i in range(len(x)))) / 2 for x, y in corners)
    return sum(run_lengths(mask["counts"])[1::2])


def run_lengths(counts: list[int] | str) -> list[int]:
    """How many pixels are outside, inside, outside ... a mask, column by column. ValueError: no such text.

    Compressed, they are text of pycocotools' (maskApi.c, rleFrString): 5 bits a character from `0` on, the lowest
    first, the next bit saying whether more follow, and from the fourth length on the difference to that before last.
    """
    if isinstance(counts, list):
        return counts
    lengths: list[int] = []
    value = shift = 0
    for code in (ord(character) - 48 for character in counts):
        if not 0 <= code < 64:
            raise ValueError(f"code {code}")
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            value -= (1 << shift) if code & 16 else 0
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("it is cut short")
    return lengths
