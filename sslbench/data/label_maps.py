"""A label map a photograph, as ADE20K has them, or in a set's own classes.

A set is somebody's own where `classes.txt` lies beside its `images/` and `annotations/`. It then has one class a line,
and a map's value is a line's number from 0 on; 255 is a pixel that is neither learnt from nor scored. Without that file
the values are ADE20K's: 0 for none of the classes, 1 to 150.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..errors import UserError
from .images import HIDDEN, is_image, rgb
from .labelled import Findings, Labelled, Size, orient, some
from .photographs import Facts, examine, look_at_classes, look_at_map, look_at_photograph

ADE20K_FOLDERS = {"train": "training", "val": "validation"}
ADE20K_CLASSES = (  # noqa: SIM905 - 150 lines otherwise
    "wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, "
    "door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, "
    "armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, "
    "chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, "
    "case, pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, "
    "book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, "
    "hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane, "
    "dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, "
    "fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, "
    "minibike, cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, "
    "screen, blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, "
    "monitor, bulletin board, shower, radiator, glass, clock, flag"
).split(", ")
LIST = "classes.txt"
OWN_FOLDERS = {"train": ("train", "training", "train2017"), "val": ("val", "validation", "val2017")}
IGNORED = 255  # the value of a pixel that does not count


def open_ade20k(root: Path, split: str) -> Labelled:
    """A split of ADEChallengeData2016's layout, or of a set with a class list of its own, every photograph and label
    map looked at. UserError: another layout, or a list that is none."""
    root = root / "ADEChallengeData2016" if (root / "ADEChallengeData2016").is_dir() else root
    own = (root / LIST).is_file()
    classes = read_classes(root / LIST) if own else [*ADE20K_CLASSES]
    images, labels = _folders(root, split, own)
    photographs = _photographs(images) if own else _files(images, ".jpg")
    if not photographs:
        raise UserError(f"data {root}: expected {images}/*.jpg, found none")
    maps, wrong = _files(labels, ".png"), Findings()
    labelled = Labelled(labels, images, [*photographs.values()], classes=classes, own=own)
    if missing := sorted(photographs.keys() - maps.keys()):
        wrong.add(f"{len(missing)} of {len(photographs)} images have no label map", f"{missing[0]}.png")
    if missing := sorted(maps.keys() - photographs.keys()):
        wrong.add(f"{len(missing)} of {len(maps)} label maps have no photograph in {images}", f"{missing[0]}.jpg")
    if not wrong:
        labelled.files += [maps[name] for name in photographs]
        wrong = _compare_maps(labelled, least=2 if split == "train" else 1)
    labelled.faults = wrong.sentences(labels)
    return labelled


def _folders(root: Path, split: str, own: bool) -> tuple[Path, Path]:
    """(photographs, label maps) of a split."""
    names = OWN_FOLDERS[split] if own else (ADE20K_FOLDERS[split],)
    folder = next((name for name in names if (root / "images" / name).is_dir()), names[0])
    images, labels = root / "images" / folder, root / "annotations" / folder
    for place in (images, labels):
        if not place.is_dir():
            there = ", ".join(sorted(p.relative_to(root).as_posix() for p in root.glob("*")) or ["nothing"])
            raise UserError(f"data {root}: expected the folder {place}, found {there}")
    return images, labels


def read_classes(file: Path) -> list[str]:
    """The names in a class list, a line each, in the order of the maps' values. UserError: it is no such list."""
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8-sig").rstrip().split("\n")]
    except UnicodeDecodeError as e:
        raise UserError(f"{file} is not a text file in UTF-8 ({e})") from None
    if "" in names:
        raise UserError(
            f"{file}: line {names.index('') + 1} is empty; expected a class a line, of which the first is value 0"
        )
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{file}: several lines are '{repeated[0]}'; every class needs a name of its own")
    if not 2 <= len(names) <= IGNORED:
        raise UserError(f"{file}: {len(names)} class(es); expected 2 to {IGNORED}, a line each")
    return names


def _photographs(folder: Path) -> dict[str, Path]:
    """Find as `_files` does images of any format. UserError: two share the name before the dot, and so the map."""
    by_stem: dict[str, Path] = {}
    for path in sorted(p for p in folder.rglob("*") if is_image(p.name) and not _hidden(p, folder)):
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if stem in by_stem:
            raise UserError(f"{by_stem[stem]} and {path.name} would both have the label map {stem}.png; rename one")
        by_stem[stem] = path
    return by_stem


def _files(folder: Path, end: str) -> dict[str, Path]:
    """{path under the folder, without its end: path}, sorted; hidden files are none."""
    paths = sorted(p for p in folder.rglob(f"*{end}") if not _hidden(p, folder))
    return {p.relative_to(folder).as_posix().removesuffix(end): p for p in paths}


def _hidden(path: Path, folder: Path) -> bool:
    """Whether the file, or a folder between it and `folder`, is one of those that notebooks and systems leave."""
    return any(part.startswith(HIDDEN) for part in path.relative_to(folder).parts)


def _compare_maps(split: Labelled, least: int) -> Findings:
    wrong, photographs, maps = Findings(), *zip(*split.pairs, strict=True)
    of_maps = examine("classes", [*maps], look_at_classes) if split.own else examine("maps", [*maps], look_at_map)
    labelled: list[tuple[str, Size | None]] = []
    for path, fact in zip(maps, of_maps, strict=True):
        labelled.append((f"{path} has", None if isinstance(fact, str) else (fact[0], fact[1])))
        if isinstance(fact, str):
            wrong.add("label maps that cannot be read", f"{path} {fact}")
    if split.own:
        _own_values(split, of_maps, wrong, least)
    else:
        _ade20k_values(split, of_maps, wrong)
    orient(split, [*photographs], examine("photographs", [*photographs], look_at_photograph), labelled, wrong)
    return wrong


def _ade20k_values(split: Labelled, of_maps: list[Facts | str], wrong: Findings) -> None:
    """Add what of the maps' values is not ADE20K's."""
    last = len(split.classes)
    for (_, path), fact in zip(split.pairs, of_maps, strict=True):
        if not isinstance(fact, str) and (fact[2] < 0 or fact[3] > last):
            wrong.add(
                f"expected maps of ADE20K's categories, 0 (other) and 1 to {last}; other classes need a list of their "
                f"names, {LIST}, in the set's folder",
                f"{path}: found category {fact[3] if fact[3] > last else fact[2]}",
            )
    if not any(isinstance(fact, str) or fact[3] for fact in of_maps):
        wrong.add(f"no map has a pixel of a category, 1 to {last}", f"{len(of_maps)} maps")


def _own_values(split: Labelled, of_maps: list[Facts | str], wrong: Findings, least: int) -> None:
    """Add what of the maps' values is no line of the list; say which classes have no pixel. least: how many must."""
    known, used = {*range(len(split.classes)), IGNORED}, set[int]()
    for (_, path), fact in zip(split.pairs, of_maps, strict=True):
        values = set() if isinstance(fact, str) else set(fact[2:])
        if odd := sorted(values - known):
            wrong.add(
                f"expected values 0 to {len(split.classes) - 1}, the lines of {LIST} from the first on, and {IGNORED} "
                f"where pixels do not count",
                f"{path}: found {some([str(v) for v in odd])}",
            )
        used |= values
    absent = [name for value, name in enumerate(split.classes) if value not in used]
    present = len(split.classes) - len(absent)
    if present < least and not wrong:
        wrong.add(
            f"pixels of {present} class(es), and it takes {least}; where a mask is 0 and {IGNORED}, save it as 0 and 1",
            f"{len(of_maps)} maps",
        )
    elif absent:
        split.said.append(f"{split.source}: no pixel of {some(absent)}")


def read_pair(split: Labelled, index: int) -> tuple[Image.Image, np.ndarray]:
    """(an RGB photograph, the class number of each of its pixels, uint8 (H, W), 255 where it does not count)."""
    photograph, label_map = split.files[index], split.files[len(split) + index]
    with Image.open(photograph) as image:
        picture = rgb(ImageOps.exif_transpose(image) if str(photograph) in split.turned else image)
    with Image.open(label_map) as image:
        values = np.asarray(image).astype(np.uint8)
    return picture, values if split.own else values - np.uint8(1)
