"""Data sets by SPEC: `builtin`, `npz:PATH`, `folder:DIR`, `packed:DIR`, or a bare name under $SSLBENCH_DATA."""

from __future__ import annotations

import functools
import io
import json
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from PIL import Image

from ..errors import UserError, nearest
from ..paths import data_root
from ..plugin import is_plugin, load_plugin
from .hub import open_hub
from .images import EXTENSIONS, HIDDEN, FolderImages, ImageSet, JoinedImages, MemoryImages, PackedImages, is_image
from .instances import FOLDERS, WORDS, locate, read_instances
from .label_maps import ADE20K_FOLDERS, OWN_FOLDERS
from .layouts import published, tiny_imagenet
from .listing import list_files, listing_of
from .names import data_name
from .shards import open_shards

KINDS = ("builtin", "npz", "folder", "imagenet", "coco", "ade20k", "wds", "hfds", "packed")
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test")}
HINT = "`--data builtin` and `sslbench quickstart` run now, with no download"
# Training images of sets that a plan may be asked about before they are on this machine.
SIZES = {
    "imagenet": 1_281_167,
    "imagenet100": 126_689,  # CMC's list; ASL's iteration counts fit it
    "coco": 118_287,
    "cifar10": 50_000,
    "cifar100": 50_000,
    "tiny-imagenet": 100_000,
    "imagenette": 9_469,
    "imagewoof": 9_025,
    "builtin": 4_000,
}


def open_split(spec: str, split: str) -> ImageSet:
    """The `train` or `val` split of a data SPEC. UserError says what was looked for and where."""
    if "+" in spec:
        return _joined([open_split(part, split) for part in spec.split("+")])
    kind, colon, where = spec.partition(":")
    if kind == "builtin" and not colon:
        return _builtin(split)
    if not colon:
        return _bare(spec, split)
    if is_plugin(spec):
        return _of_function(spec, split)
    if not where:
        raise UserError(f"data '{spec}': say where, as {kind}:PATH")
    path = Path(where).expanduser()
    if kind == "npz":
        return _npz(path, split)
    if kind in ("folder", "imagenet"):
        return _folder(kind, path, split)
    if kind in ("coco", "ade20k"):
        return _photographs(kind, path, split)
    if kind == "hfds":
        return open_hub(where, split, SPLITS[split])
    if kind == "wds":
        return open_shards(path, split)
    if kind == "packed":
        return _packed(path, split)
    raise UserError(f"data '{spec}': unknown kind '{kind}'{nearest(kind, KINDS)}; kinds: {', '.join(KINDS)}")


def open_both(spec: str) -> tuple[ImageSet, ImageSet]:
    """Train and val of a labelled SPEC, of which val's classes are numbered as train's."""
    train = open_split(spec, "train")
    return train, numbered_alike(train, open_split(spec, "val"), spec)


def numbered_alike(train: ImageSet, val: ImageSet, spec: str) -> ImageSet:
    """val with its classes numbered as train's, by name, wherever they come from.

    Sources number the classes of each split for themselves. One that names none (WebDataset's integers, an npz without
    `classes`) has its numbers for names, and these are trusted. UserError: a label is missing or hidden, or train has
    no image of one of val's classes.
    """
    trained, wanted = used_classes(train, spec), used_classes(val, spec)
    if lacking := [name for name in wanted if name not in trained]:
        what = "has no class in common with train" if len(lacking) == len(wanted) else "has classes that train lacks"
        raise UserError(
            f"data '{spec}': val {what}: {', '.join(lacking[:5])}{', ...' if len(lacking) > 5 else ''}; train has "
            f"images of {', '.join(list(trained)[:5])}{', ...' if len(trained) > 5 else ''}"
        )
    number = torch.zeros(len(val.classes), dtype=torch.long)
    for name, i in wanted.items():
        number[i] = trained[name]
    return replace(val, labels=number[val.labels], classes=train.classes)  # type: ignore[arg-type, index]


def used_classes(data: ImageSet, spec: str) -> dict[str, int]:
    """{name: number} of the classes that have images; of classes with one name, each has its number in it.

    UserError: an image has no label.
    """
    if data.labels is None:
        where = "a folder a class, `labels` in an npz, a ClassLabel column of a Hugging Face set"
        why = "sets joined by + have none" if "+" in spec else where
        raise UserError(f"data '{spec}': {data.split} has no labels, which an evaluation needs: {why}")
    if len(without := (data.labels < 0).nonzero().flatten()):
        raise UserError(
            f"data '{spec}': {data.split} has no labels (all -1, as where those of a test are kept secret)"
            if len(without) == len(data)
            else f"data '{spec}': {len(without)} of the {len(data)} images of {data.split} have no label (-1 or null): "
            f"{data.where(int(without[0]))}{', ...' if len(without) > 1 else ''}; label them, or leave them out"
        )
    used = data.labels.unique().tolist()
    if used[-1] >= len(data.classes):
        raise UserError(f"data '{spec}': {data.split} has label {used[-1]}, but names {len(data.classes)} classes")
    times = Counter(data.classes)
    return {name if times[name := data.classes[i]] == 1 else f"{name} ({i})": i for i in used}


def open_test(spec: str) -> ImageSet:
    """The val split of a SPEC, or all of a folder that has class folders and no splits."""
    kind, _, where = spec.partition(":")
    if kind == "folder" and where:
        return _folder(kind, Path(where).expanduser(), "val", whole=True)
    return open_split(spec, "val")


def known_size(spec: str) -> int | None:
    """Training images of a set that need not be on this machine; None where only a look can tell."""

    def size(part: str) -> int | None:
        kind, _, where = part.partition(":")
        return None if "@" in where or Path(where or "nowhere").expanduser().exists() else SIZES.get(kind)

    sizes = [size(part) for part in spec.split("+")]
    return None if None in sizes else sum(n or 0 for n in sizes)


def _joined(parts: list[ImageSet]) -> ImageSet:
    """The parts one after the other; small sets of one image size stay in memory, without labels."""
    flat = [p for part in parts for p in (part.parts if isinstance(part, JoinedImages) else [part])]
    name, split = "+".join(p.name for p in flat), flat[0].split
    memory = [p.images for p in flat if isinstance(p, MemoryImages)]
    if len(memory) == len(flat) and len({x.shape[1:] for x in memory}) == 1:
        return MemoryImages(name, split, torch.cat(memory), None, [])
    return JoinedImages(name, split, flat)


def _photographs(kind: str, path: Path, split: str) -> FolderImages:
    """Without labels. COCO's: PATH/train2017/*.jpg and PATH/val2017/*.jpg, or the same under images/; ADE20K's:
    PATH/images/training/*.jpg and PATH/images/validation/*.jpg; a set's of its own: where its labels are read from."""
    if kind == "ade20k":
        places = [path / "images" / name for name in dict.fromkeys([ADE20K_FOLDERS[split], *OWN_FOLDERS[split]])]
    else:
        places = [path / form.format(word) for form in FOLDERS for word in WORDS[split]]
    root = next((place for place in places if place.is_dir()), None)
    if root is None and kind == "coco" and (path / "images").is_dir():
        source, root = locate(path, split)  # all photographs in one folder: the instance file says which
        files = sorted(str(i.get("file_name")) for i in read_instances(source)["images"])
    elif root is None:
        there = _listing(path) if path.is_dir() else "no such folder"
        raise UserError(f"data '{kind}:{path}': expected {places[0]}/*.jpg, found {there}. {HINT}")
    else:
        files = sorted(p.name for p in root.iterdir() if is_image(p.name)) or sorted(_images_under(root, ""))
    if not files:
        raise UserError(f"data '{kind}:{path}': no images in {root}")
    return FolderImages(kind, split, root, files, None, [])


@functools.cache
def _builtin(split: str) -> MemoryImages:
    """4,000 + 1,000 images of CIFAR-10 (Krizhevsky 2009), class-balanced, in their official splits, lossless."""
    with np.load(Path(__file__).parent / "builtin_cifar10.npz") as z:
        blob, offsets, labels = z[f"{split}_strips"], z[f"{split}_offsets"], z[f"{split}_labels"]
        classes = [str(c) for c in z["classes"]]
    strips = [np.asarray(Image.open(io.BytesIO(blob[a:b].tobytes()))) for a, b in pairwise(offsets)]
    images = torch.from_numpy(np.concatenate(strips).reshape(-1, 32, 32, 3)).permute(0, 3, 1, 2).contiguous()
    return MemoryImages("builtin", split, images, torch.from_numpy(labels.astype(np.int64)), classes)


def _of_function(spec: str, split: str) -> ImageSet:
    """What the function says that FILE.py:NAME names, asked for "train" or "val": an ImageSet of this package."""
    try:
        images = load_plugin(spec, "function of images")(split)
    except (OSError, LookupError, TypeError, ValueError) as e:
        raise UserError(f"data '{spec}': {type(e).__name__} for split '{split}': {e}") from e
    if not isinstance(images, ImageSet):
        known = ", ".join(kind.__name__ for kind in get_args(ImageSet))
        raise UserError(f"data '{spec}': expected one of sslbench.data's {known}; found {type(images).__name__}")
    if images.labels is not None and len(images.labels) != len(images):
        raise UserError(f"data '{spec}': {len(images)} images of {split}, and {len(images.labels)} labels")
    if not len(images):
        raise UserError(f"data '{spec}': no images of {split}")
    return replace(images, name=data_name(spec), split=split)


def _npz(path: Path, split: str) -> MemoryImages:
    """`images` uint8 (N, H, W, 3), and, where there are labels, `labels` (N,) and `classes`.

    PATH: the train file, whose val file has `test` or `val` in place of `train`; or what both names begin with.
    """
    stem = str(path).removesuffix(".npz")
    if "train" in path.name:
        candidates = [Path(str(path.with_name(path.name.replace("train", word)))) for word in SPLITS[split]]
    else:
        candidates = [Path(f"{stem}_{word}.npz") for word in SPLITS[split]]
        if split == "train" and path.is_file():
            candidates = [path]
    file = next((c for c in candidates if c.is_file()), None)
    if file is None:
        raise UserError(f"data 'npz:{path}': no {split} split; looked for {', '.join(map(str, candidates))}")
    try:
        with np.load(file, allow_pickle=False) as z:
            images = z["images"]
            labels = z["labels"] if "labels" in z.files else None
            classes = np.atleast_1d(z["classes"]).astype(str).tolist() if "classes" in z.files else []
    except (KeyError, ValueError, OSError, zipfile.BadZipFile, zlib.error) as e:
        raise UserError(f"{file} is not an image archive: expected `images` uint8 (N, H, W, 3); {e}") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
        raise UserError(f"{file}: `images` must be uint8 (N, H, W, 3), found {images.dtype} {images.shape}")
    if labels is not None and labels.shape != (len(images),):
        raise UserError(f"{file}: {len(images)} images but labels of shape {labels.shape}")
    if labels is not None and (labels.dtype.kind not in "iu" or labels.min() < -1):  # -1: not known
        raise UserError(
            f"{file}: `labels` must be integers from 0 on, found {labels.dtype}, such as {min(labels.tolist())}"
        )
    return MemoryImages(
        data_name(f"npz:{path}"),
        split,
        torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))),
        None if labels is None else torch.from_numpy(labels.astype(np.int64)),
        classes or ([] if labels is None else [str(i) for i in range(int(labels.max()) + 1)]),
    )


def _packed(path: Path, split: str) -> MemoryImages | PackedImages:
    """What `sslbench data pack` wrote to PATH; pack.py says how. Sets that lived in memory do so again."""
    try:
        pack = json.loads((path / "pack.json").read_text())
        if split not in pack["splits"]:
            raise UserError(f"data 'packed:{path}': no {split} split; it was packed without")
        part, file, labels = pack["splits"][split], path / f"{split}.images", None
        if (size := file.stat().st_size) != part["bytes"]:
            raise ValueError(f"{file} has {size} bytes, not {part['bytes']}")
        if part["labelled"]:
            labels = torch.from_numpy(np.load(path / f"{split}.labels.npy"))
        if shape := part["shape"]:
            images = torch.from_numpy(np.memmap(file, np.uint8, "c", shape=tuple(shape)))
            return MemoryImages(pack["name"], split, images, labels, part["classes"])
        table = torch.from_numpy(np.load(path / f"{split}.table.npy"))
        return PackedImages(pack["name"], split, file, table, part["fingerprint"], labels, part["classes"])
    except (OSError, KeyError, TypeError, ValueError) as e:
        raise UserError(
            f"data 'packed:{path}' is not what `sslbench data pack SPEC --out {path}` writes, or not all of it: {e}"
        ) from None


def _folder(kind: str, path: Path, split: str, whole: bool = False) -> FolderImages:
    """ImageFolder: PATH/train and PATH/val, each with a folder a class. Without class folders: no labels.

    whole: PATH itself is the val split where it has none, as ImageNet-A comes. PATH@FILE: only the classes that FILE
    names, one a line, as ImageNet-100 is defined. Tiny-ImageNet as it is published works too (the classes of val/images
    are in val/val_annotations.txt), and what layouts.py knows.
    """
    path, only = _class_list(path)
    if not path.is_dir():
        raise UserError(f"data '{kind}:{path}': no such folder. {HINT}")
    if not only and (of_publisher := published(path, split)):
        files, numbers, classes = of_publisher
        return FolderImages(path.resolve().name, split, path, files, torch.tensor(numbers), classes)
    root = next((path / word for word in SPLITS[split] if (path / word).is_dir()), None)
    if root is None and split == "val" and whole:
        root = path
    if root is None:
        raise UserError(
            f"data '{kind}:{path}': no {split} split; expected {path}/{SPLITS[split][0]}/CLASS/IMAGE, "
            f"found {_listing(path)}"
        )
    if lacking := [c for c in only if not (root / c).is_dir()]:
        raise UserError(
            f"data '{kind}:{path}': {root} lacks {len(lacking)} of the classes listed: {', '.join(lacking[:5])}"
        )
    if only:
        listing = listing_of(sorted(f for top in only for f in _images_under(root, top)))
    else:
        listing = list_files(root, functools.partial(_walk, root))
    if not listing.files:
        raise UserError(f"data '{kind}:{path}': no images under {root} (looked for {', '.join(sorted(EXTENSIONS))})")
    if annotated := tiny_imagenet(root):
        listing = listing_of(listing.files, [annotated.get(os.path.basename(f)) for f in listing.files])
    classes = sorted(listing.tops)
    if only and (lacking := sorted(set(only) - set(classes))):
        raise UserError(
            f"data '{kind}:{path}': no images in {root} of {len(lacking)} listed classes: {lacking[0]}, ..."
        )
    if kind == "imagenet" and not only and len(classes) != 1000:
        raise UserError(
            f"data 'imagenet:{path}': {len(classes)} class folders in {root}, ImageNet-1K has 1000; "
            f"for another set of classes use folder:{path}"
        )
    labels = None
    if "" not in classes:
        number = {c: i for i, c in enumerate(classes)}
        labels = torch.tensor([number[top] for top in listing.tops])[listing.top]
    name = "imagenet" if kind == "imagenet" else path.resolve().name
    return FolderImages(name, split, root, listing.files, labels, classes if labels is not None else [])


def _class_list(path: Path) -> tuple[Path, list[str]]:
    """PATH@FILE -> PATH and the class names in FILE; PATH alone -> PATH and []."""
    where, at, file = str(path).rpartition("@")
    if not at or path.is_dir():
        return path, []
    if not Path(file).is_file():
        raise UserError(f"data '{path}': no class list {file}; expected a text file with a class folder's name a line")
    names = [line.split()[0] for line in Path(file).read_text().splitlines() if line.strip()]
    if not names:
        raise UserError(f"data '{path}': the class list {file} is empty")
    return Path(where), sorted(set(names))


def _images_under(root: Path, top: str) -> Iterator[str]:
    """Image files in root/top and below, relative to root, but for what notebooks, macOS and others hide there."""
    for folder, names in _walk(root, top):
        for f in names:
            yield os.path.join(folder, f)


def _walk(root: Path, top: str = "") -> Iterator[tuple[str, list[str]]]:
    """Of root/top and each folder below: its path relative to root, "" for root itself, and its image files."""
    for folder, below, names in os.walk(root / top, followlinks=True):
        below[:] = [name for name in below if not name.startswith(HIDDEN)]
        inside = os.path.relpath(folder, root)
        yield "" if inside == "." else inside, [f for f in names if is_image(f)]


def _bare(name: str, split: str) -> ImageSet:
    """NAME as a folder, or as NAME_train.npz, under $SSLBENCH_DATA."""
    kind = name if name in ("imagenet", "coco", "ade20k") else "folder"
    root = data_root()
    if root and kind in ("coco", "ade20k") and (root / name).is_dir():
        return _photographs(kind, root / name, split)
    if root and (root / name).is_dir():
        return _folder(kind, root / name, split)
    if root and (root / f"{name}_train.npz").is_file():
        return _npz(root / name, split)
    looked = f"looked for {root / name}" if root else "SSLBENCH_DATA is not set"
    near = "" if name in SIZES else nearest(name, KINDS) if "_" not in name else ""
    layout = "DIR/train2017/*.jpg" if name == "coco" else "DIR/train/CLASS/IMAGE, DIR/val/CLASS/IMAGE"
    raise UserError(
        f"data set '{name}' not found ({looked}){near if near.startswith('; did') else ''}. "
        f"Point to it with --data {kind}:DIR ({layout}), or set SSLBENCH_DATA to "
        f"the folder that holds '{name}'. {HINT}"
    )


def _listing(path: Path) -> str:
    names = sorted(p.name for p in path.iterdir())
    return (", ".join(names[:5]) + (", ..." if len(names) > 5 else "")) or "an empty folder"
