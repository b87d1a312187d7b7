"""Small parts of the real images in ../shared/data, in the layouts that `sslbench transfer` reads."""

import json
import shutil
import tarfile

import numpy as np
from PIL import Image


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
