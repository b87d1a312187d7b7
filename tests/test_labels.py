"""Class numbers of train and val agree by name, whatever the source; what cannot agree is refused."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from sslbench.data import open_both, open_split
from sslbench.data.check import check
from sslbench.errors import UserError

NAMES = ["cat", "dog", "owl"]


def picture(name):
    """One colour a class, so that its pixels say what its label must be."""
    x = np.zeros((8, 8, 3), np.uint8)
    x[..., NAMES.index(name)] = 200
    return x


def folder(root, train, val):
    for split, names in (("train", train), ("val", val)):
        for name in NAMES:
            (root / split / name).mkdir(parents=True, exist_ok=True)
        for i, name in enumerate(names):
            Image.fromarray(picture(name)).save(root / split / name / f"{i}.png")
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / "val" / "owl" / ".ipynb_checkpoints").mkdir()
    for hidden in (".ipynb_checkpoints/0-checkpoint.png", "._0.png"):
        Image.fromarray(picture("dog")).save(root / "val" / "owl" / hidden)
    return f"folder:{root}"


def npz(root, train, val, orders=(NAMES, ["owl", "cat", "dog"])):
    for split, names, order in (("train", train, orders[0]), ("val", val, orders[1])):
        labels = [order.index(n) for n in names]
        np.savez(root / f"x_{split}.npz", images=[picture(n) for n in names], labels=labels, classes=order)
    return f"npz:{root}/x"


def packed(root, train, val):
    from rich.console import Console

    from sslbench.data.pack import pack

    pack(npz(root, train, val), root / "p", 256, Console(quiet=True))
    return f"packed:{root}/p"


def hub(root, train, val):
    datasets = pytest.importorskip("datasets")
    for split, names, order in (("train", train, NAMES), ("validation", val, NAMES[::-1])):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=order)})
        rows = {"image": [Image.fromarray(picture(n)) for n in names], "label": [order.index(n) for n in names]}
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(root / "h" / split)
    (root / "h" / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    return f"hfds:{root}/h"


def inaturalist(root, train, val):
    for split, names in (("train", train), ("val", val)):
        used = sorted(set(names))
        tree = {"categories": [{"id": 10 * NAMES.index(n), "name": n} for n in used], "images": [], "annotations": []}
        for i, n in enumerate(names):
            Image.fromarray(picture(n)).save(root / f"{split}{i}.png")
            tree["images"].append({"id": i, "file_name": f"{split}{i}.png"})
            tree["annotations"].append({"image_id": i, "category_id": 10 * NAMES.index(n)})
        (root / f"{split}2019.json").write_text(json.dumps(tree))
    return f"folder:{root}"


def shards(root, train, val):
    for split, names in (("train", train), ("val", val)):
        with tarfile.open(root / f"{split}-0.tar", "w") as tar:
            for i, n in enumerate(names):
                png = io.BytesIO()
                Image.fromarray(picture(n)).save(png, "png")
                for file, data in ((f"{i}.png", png.getvalue()), (f"{i}.cls", str(NAMES.index(n)).encode()),
                                   (f"._{i}.png", b"macOS")):  # fmt: skip
                    member = tarfile.TarInfo(file)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return f"wds:{root}"


@pytest.mark.parametrize("source", [folder, npz, packed, hub, inaturalist, shards])
def test_classes_are_numbered_by_their_names_in_both_splits(tmp_path, source):
    """Val in another order, or with fewer classes; train with an empty folder or a hidden one."""
    spec = source(tmp_path, ["cat", "dog", "owl", "dog"], ["owl", "dog", "owl"])
    train, val = open_both(spec)
    assert train.classes == val.classes and len(train) == 4 and len(val) == 3
    of_colour = {}
    for data in (train, val):
        for i, label in enumerate(data.labels.tolist()):
            assert of_colour.setdefault(int(np.asarray(data.read(i)).mean((0, 1)).argmax()), label) == label
    assert sorted(of_colour) == [0, 1, 2] and len(set(of_colour.values())) == 3


@pytest.mark.parametrize("source", [folder, npz, packed, hub, inaturalist, shards])
def test_a_class_that_train_has_no_image_of_is_refused(tmp_path, source):
    spec = source(tmp_path, ["cat", "dog"], ["owl", "dog"])
    with pytest.raises(UserError, match=r"val has classes that train lacks: (owl|2);"):
        open_both(spec)
    assert "that train lacks" in check(spec)["missing"] and len(open_split(spec, "train")) == 2


def test_splits_without_a_class_in_common_are_refused(tmp_path):
    spec = npz(tmp_path, ["cat"], ["owl", "dog"])
    with pytest.raises(UserError, match="val has no class in common with train: owl, dog; train has images of cat"):
        open_both(spec)
    spec = npz(tmp_path, ["cat", "cat"], ["owl", "owl"], (["cat", "cat"], ["owl", "cat"]))
    with pytest.raises(UserError, match=r"no class in common with train: owl; .* of cat \(0\)"):  # which cat?
        open_both(spec)


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([-1, -1, -1], r"val has no labels \(all -1"),
        ([0, -1, 1], r"1 of the 3 images of val have no label \(-1 or null\): .* image 1"),
        ([0, 1, 3], "val has label 3, but names 3 classes"),
    ],
)
def test_hidden_missing_and_unnamed_labels_are_refused_by_every_evaluation(tmp_path, run_here, labels, says):
    spec = npz(tmp_path, NAMES, NAMES)
    np.savez(tmp_path / "x_val.npz", images=[picture(n) for n in NAMES], labels=labels, classes=NAMES)
    with pytest.raises(UserError, match=says):
        open_both(spec)
    done = run_here("eval", "knn", "untrained:vit_mini4", "--data", spec, home=tmp_path)
    assert done.returncode == 2 and not (tmp_path / "results").exists()


def test_a_null_label_of_a_hub_set_names_its_row(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    rows = {"image": [Image.fromarray(picture(n)) for n in NAMES], "label": [0, 1, None]}
    part = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(train=part, validation=part).save_to_disk(tmp_path / "h")
    assert open_split(f"hfds:{tmp_path}/h", "train").labels.equal(torch.tensor([0, 1, -1]))
    with pytest.raises(UserError, match=r"train have no label .* row 2"):
        open_both(f"hfds:{tmp_path}/h")


def test_names_saved_as_bytes_are_names(tmp_path):
    spec = npz(tmp_path, NAMES, NAMES)
    with np.load(tmp_path / "x_val.npz") as z:
        saved = {**z, "classes": z["classes"].astype(bytes)}
    np.savez(tmp_path / "x_val.npz", **saved)
    assert open_both(spec)[1].labels.tolist() == [0, 1, 2]
