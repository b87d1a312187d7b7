"""Small parts of the real images in ../shared/data, in the layouts that `sslbench transfer` reads."""

import json
import shutil
import tarfile

import numpy as np
from PIL import Image

from sslbench.data import open_split


def unpack(shared, name, out):
    archive = shared / "data" / f"{name}.tar"
    if not (out / name).is_dir():
        with tarfile.open(archive) as tar:
            tar.extractall(out, filter="data")
    return out / name


def coco_part(whole, out, train=4, val=3, same=False):
    """The first images of coco_mini with 2 to 8 large objects, under COCO's own names. same: val is train."""
    (out / "annotations").mkdir(parents=True)
    for split, count in (("train", train), ("val", train if same else val)):
        source = "train" if same else split
        tree = json.loads((whole / "annotations" / f"instances_{source}.json").read_text())
        large = {i["id"]: 0 for i in tree["images"]}
        small = dict(large)
        for a in tree["annotations"]:
            kind = large if a["area"] > 40**2 and not a["iscrowd"] else small
            kind[a["image_id"]] += 1
        images = [i for i in tree["images"] if 2 <= large[i["id"]] <= 8 and not small[i["id"]]][:count]
        ids = {i["id"] for i in images}
        tree |= {"images": images, "annotations": [a for a in tree["annotations"] if a["image_id"] in ids]}
        (out / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(tree))
        (out / f"{split}2017").mkdir()
        for i in images:
            shutil.copy(whole / "images" / source / i["file_name"], out / f"{split}2017")
    return out


def ade20k_part(whole, out, train=4, val=2, same=False):
    """The first images of an ADE20K-like set. same: val is train, and every class in an image is large there."""
    for split, count in (("training", train), ("validation", train if same else val)):
        source = "training" if same else split
        maps = sorted((whole / "annotations" / source).glob("*.png"))
        stems = [path.stem for path in maps if not same or all_large(path)][:count]
        for kind, end in (("images", ".jpg"), ("annotations", ".png")):
            folder = out / kind / split
            folder.mkdir(parents=True)
            for stem in stems:
                shutil.copy(whole / kind / source / f"{stem}{end}", folder)
    return out


def all_large(path):
    """Whether each class of a label map has a tenth of its pixels, and all of them 0.7."""
    labels = np.asarray(Image.open(path))
    shares = np.bincount(labels.ravel(), minlength=2) / labels.size
    return shares[0] <= 0.3 and shares[1:][shares[1:] > 0].min() >= 0.1


def photographs(split, n, size):
    """n images of the built-in set, enlarged to `size` (width, height)."""
    data = open_split("builtin", split)
    return [data.read(i).resize(size) for i in np.linspace(0, len(data) - 1, n).astype(int)]


OWN_CATEGORIES = {"train": {900: "Wörk", -3: "chat noir", 7: "名札"}, "val": {1: "Wörk", 2: "名札"}}


def own_coco(out):
    """Images in folders with categories of their own, their ids another in each split: a polygon, a mask of compressed
    and one of plain run lengths, a crowd, and in each split an image without objects."""
    from pycocotools import mask

    (out / "annotations").mkdir(parents=True)
    for split, n in (("train", 5), ("val", 3)):
        ids = {name: id for id, name in OWN_CATEGORIES[split].items()}
        tree = {"images": [], "annotations": [], "categories": [{"id": id, "name": n} for n, id in ids.items()]}
        for i, picture in enumerate(photographs(split, n, (96, 80))):
            name = f"lot {i % 2}/é{i}.png"
            (out / split / name).parent.mkdir(parents=True, exist_ok=True)
            picture.save(out / split / name)
            tree["images"].append({"id": f"{split}{i}", "file_name": name, "width": 96, "height": 80})
            inside = np.zeros((80, 96), np.uint8, order="F")
            inside[20:60, 30:80] = 1
            flat = inside.ravel(order="F")
            edges = [0, *(np.flatnonzero(np.diff(flat)) + 1).tolist(), len(flat)]
            plain = {"size": [80, 96], "counts": np.diff(edges).tolist()}
            packed = mask.encode(inside)
            masks = {
                "名札": [[10, 10, 60, 10, 60, 50, 10, 50]],
                "Wörk": {"size": [80, 96], "counts": packed["counts"].decode()},
                "chat noir": plain,
            }
            for name in ids if i else []:
                box = [10, 10, 50, 40] if name == "名札" else [30, 20, 50, 40]
                tree["annotations"].append(
                    {"id": len(tree["annotations"]), "image_id": f"{split}{i}", "category_id": ids[name],
                     "bbox": box, "area": 2000, "iscrowd": int(name == "chat noir" and i == 1),
                     "segmentation": masks[name]}
                )  # fmt: skip
        (out / f"annotations/instances_{split}.json").write_text(json.dumps(tree), encoding="utf-8")
    return out


OWN_CLASSES = ["sombre", "中", "bright"]


def own_maps(out, train=6, val=3):
    """Photographs of several formats in folders, label maps of three classes, how bright a pixel is, framed by 255."""
    for split, n in (("train", train), ("val", val)):
        for i, picture in enumerate(photographs(split, n, (48, 40))):
            grey = np.asarray(picture.convert("L")).astype(int)
            classes = np.digitize(grey, np.quantile(grey, [0.33, 0.67])).astype(np.uint8)
            classes[:2] = 255
            for kind, image, end in (("images", picture, (".png", ".jpg")[i % 2]), ("annotations", classes, ".png")):
                path = out / kind / split / f"lot {i % 2}" / f"é{i}{end}"
                path.parent.mkdir(parents=True, exist_ok=True)
                (image if kind == "images" else Image.fromarray(image)).save(path)
    (out / "classes.txt").write_text("\n".join(OWN_CLASSES) + "\n", encoding="utf-8")
    return out
