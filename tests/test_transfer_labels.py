"""What is wrong with COCO's and ADE20K's files is said before a run, and what can be mended is."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from transfer_data import ade20k_part, coco_part, unpack

from sslbench.data import photographs
from sslbench.data.instances import COCO_CLASSES, open_coco
from sslbench.data.label_maps import open_ade20k
from sslbench.data.labelled import accept
from sslbench.errors import UserError

EXIF = 0x0112


@pytest.fixture(scope="session")
def whole(shared, tmp_path_factory):
    root = tmp_path_factory.mktemp("labels")
    return {
        "coco": coco_part(unpack(shared, "coco_mini", root), root / "coco"),
        "ade20k": ade20k_part(unpack(shared, "ade20k_real6", root), root / "ade20k", train=3),
    }


@pytest.fixture
def coco(whole, tmp_path):
    return shutil.copytree(whole["coco"], tmp_path / "coco")


@pytest.fixture
def ade20k(whole, tmp_path):
    return shutil.copytree(whole["ade20k"], tmp_path / "ade20k")


def edit(root, change, split="val"):
    file = root / f"annotations/instances_{split}2017.json"
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))


def turn(path, orientation):
    """Give a photograph an EXIF tag, its pixels as they are."""
    exif = Image.Exif()
    exif[EXIF] = orientation
    Image.open(path).save(path, exif=exif, quality=95)


def resize(width, height, index=0):
    """What says another size of an image, its masks being triangles, which say none."""

    def change(t):
        t["images"][index].update(width=width, height=height)
        every_annotation(segmentation=[[1, 1, 9, 1, 9, 9]])(t)

    return change


def first(root, folder="val2017"):
    return min((root / folder).iterdir())


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def every_annotation(**values):
    return lambda t: [a.update(values) for a in t["annotations"]]


COCO_FAULTS = {
    "a photograph cut short": (lambda r: truncate(first(r)), "cannot be read.*truncated"),
    "an empty photograph": (lambda r: first(r, "train2017").write_bytes(b""), "cannot be read.*is empty"),
    "no photograph": (lambda r: first(r).unlink(), "1 of the 3 images are not there"),
    "no picture": (lambda r: first(r).write_text("<html>"), "cannot be read.*cannot identify"),
    "one id for all": (lambda r: edit(r, every_annotation(id=1)), r"an annotation id that several .*\(1\)"),
    "an id that is a list": (lambda r: edit(r, every_annotation(image_id=[1])), "every id is to be a number"),
    "an image twice": (lambda r: edit(r, lambda t: t["images"].append(t["images"][0])), "an image id that several"),
    "a file twice": (
        lambda r: edit(r, lambda t: t["images"].append({**t["images"][0], "id": 7})),
        "a file that several",
    ),
    "no mask": (lambda r: edit(r, lambda t: t["annotations"][0].pop("segmentation")), "objects without a mask"),
    "an empty mask": (lambda r: edit(r, every_annotation(segmentation=[]), "train"), "objects without a mask"),
    "a box as a mask": (lambda r: edit(r, every_annotation(segmentation=[[1, 1, 9, 9]])), "not polygons"),
    "a mask of another size": (
        lambda r: edit(r, every_annotation(segmentation={"size": [2, 2], "counts": [4]})),
        "masks of another size",
    ),
    "a box of three": (lambda r: edit(r, every_annotation(bbox=[1, 2, 3])), r"'bbox' is not \[x, y, width, height\]"),
    "an unknown image": (lambda r: edit(r, every_annotation(image_id=-1)), "an image that the file does not list"),
    "an unknown category": (
        lambda r: edit(r, every_annotation(category_id=12)),
        "a category that the file does not list",
    ),
    "another size": (lambda r: edit(r, resize(10, 20)), r"has \d+ x \d+, the file says 10 x 20"),
    "nothing to score": (lambda r: edit(r, lambda t: t.update(annotations=[])), "no object to score"),
}


@pytest.mark.parametrize("how", COCO_FAULTS)
def test_every_fault_of_coco_is_named_with_file_and_example(how, coco):
    breaks, says = COCO_FAULTS[how]
    breaks(coco)
    with pytest.raises(UserError, match=f"instances_(train|val)2017.json: .*{says}"):
        accept(*(open_coco(coco, split) for split in ("train", "val")))


def test_the_faults_of_both_splits_are_one_message_and_data_check_says_the_same(coco, invoke):
    truncate(first(coco, "train2017"))
    edit(coco, every_annotation(id=5))
    pytest.importorskip("mmdet", reason="needs the extra `transfer`", exc_type=ImportError)
    done = invoke("transfer", "coco", "untrained:vit_ti16", "--recipe", "coco_smoke", "--data", coco)
    said = [str(first(coco, "train2017")), "several annotations have (5)"]
    assert done.exit_code == 2 and all(word in done.stderr.replace("\n", "") for word in said), done.stderr
    assert not (coco.parent / "runs").exists()
    done = invoke("data", "check", f"coco:{coco}", "--json")
    found = json.loads(done.stdout.splitlines()[-1])
    assert done.exit_code == 2 and not found["ok"]
    assert all(word in " ".join(found["labels"]["faults"]) for word in said)


def test_photographs_without_labels_are_enough_to_pre_train(coco, invoke):
    shutil.rmtree(coco / "annotations")
    done = invoke("data", "check", f"coco:{coco}")
    assert done.exit_code == 0 and "no labels for `sslbench transfer`" in done.stdout, done.output


def test_what_mmdet_and_pycocotools_would_misread_is_mended_and_said(coco):
    pytest.importorskip("mmdet", reason="needs the extra `transfer`", exc_type=ImportError)
    from sslbench.transfer.job import quiet
    from sslbench.transfer.transfer import require

    require()
    from mmdet.datasets import CocoDataset
    from mmengine.registry import DefaultScope

    from sslbench.transfer import coco as task
    from sslbench.transfer.protocol import transfer_recipe

    assert tuple(COCO_CLASSES) == CocoDataset.METAINFO["classes"]

    def odd(t):
        t["categories"].reverse()
        t["images"] = [{**i, "file_name": f"a/b/{i['file_name']}"} for i in t["images"]]
        for at, a in enumerate(t["annotations"]):
            a["id"] = at
            a.pop("area"), a.pop("iscrowd")

    before = json.loads((coco / "annotations/instances_val2017.json").read_text())
    edit(coco, odd)
    shutil.move(coco / "val2017", coco / "b")
    (coco / "val2017/a").mkdir(parents=True)
    shutil.move(coco / "b", coco / "val2017/a/b")
    with quiet(), DefaultScope.overwrite_default_scope("mmdet"):
        _, val = task.open_data(coco, transfer_recipe("coco", "coco_smoke").science)
        truth = task.COCO(val.dataset.ann_file, COCO_CLASSES)
        answer = [{**{k: a[k] for k in ("image_id", "category_id", "bbox", "segmentation")}, "score": 0.9}
                  for a in before["annotations"]]  # fmt: skip
        assert task._average_precision(truth, answer, "bbox")[0] == pytest.approx(1)
    said = " ".join(val.said)
    assert all(word in said for word in ("annotation id 0", "iscrowd", "area", "another order")), said
    assert val.dataset[0]["inputs"].shape[0] == 3  # of a file in a folder in the folder
    names = {c["id"]: c["name"] for c in before["categories"]}
    known = {a["category_id"] for a in before["annotations"]}
    found = {i["bbox_label"] for at in range(len(val)) for i in val.dataset.get_data_info(at)["instances"]}
    assert {COCO_CLASSES[label] for label in found} == {names[c] for c in known}
    for old in before["annotations"]:
        (new,) = [a for a in truth.dataset["annotations"] if a["bbox"] == old["bbox"]]
        assert new["id"] > 0 and new["iscrowd"] == 0 and new["area"] == pytest.approx(old["area"], rel=0.05)


@pytest.mark.parametrize(
    ("tag", "labels_for", "expected"),
    [(6, "stored", "stored"), (6, "turned", "turned"), (3, "stored", "stored"), (1, "stored", "stored")],
)
def test_a_photograph_is_the_way_up_that_its_labels_are_for(tag, labels_for, expected, coco):
    pytest.importorskip("mmdet", reason="needs the extra `transfer`", exc_type=ImportError)
    from sslbench.transfer.transfer import require

    require()
    from sslbench.transfer.loading import LoadImage

    tree = json.loads((coco / "annotations/instances_val2017.json").read_text())
    at, image = next((at, i) for at, i in enumerate(tree["images"]) if i["width"] != i["height"])
    path = coco / "val2017" / image["file_name"]
    turn(path, tag)
    stored = np.asarray(Image.open(path).convert("RGB")).astype(int)
    pixels = {"stored": stored, "turned": np.rot90(stored, -1)}
    if labels_for == "turned":
        edit(coco, resize(image["height"], image["width"], at))
    found = open_coco(coco, "val")
    assert not found.faults and (str(path) in found.turned) == (expected == "turned")
    assert any("EXIF" in said for said in found.said) == (tag == 3 or expected == "turned")
    read = LoadImage(found.turned).read(str(path))[..., ::-1].astype(int)
    assert read.shape == pixels[expected].shape and abs(read - pixels[expected]).mean() < 2


def save_map(path, values):
    Image.fromarray(np.asarray(values)).save(path)


def full(path, value):
    with Image.open(path) as image:
        size = image.size
    save_map(path, np.full((size[1], size[0]), value, np.uint8))


ADE20K_FAULTS = {
    "a label beyond 150": (lambda m, p: full(m, 151), "found category 151"),
    "a map in colour": (lambda m, p: save_map(m, np.zeros((9, 9, 3), np.uint8)), "has 3 dimensions"),
    "a map cut short": (lambda m, p: truncate(m), "label maps that cannot be read"),
    "a map of another size": (lambda m, p: save_map(m, np.ones((9, 8), np.uint8)), r"has \d+ x \d+, .*png has 8 x 9"),
    "no map": (lambda m, p: m.unlink(), "images have no label map"),
    "no photograph": (lambda m, p: p.unlink(), "label maps have no photograph"),
    "a photograph cut short": (lambda m, p: truncate(p), "photographs that cannot be read.*truncated"),
}


@pytest.mark.parametrize("split", ["training", "validation"])
@pytest.mark.parametrize("how", ADE20K_FAULTS)
def test_every_fault_of_ade20k_is_named_in_either_split(how, split, ade20k):
    breaks, says = ADE20K_FAULTS[how]
    label_map = max((ade20k / "annotations" / split).iterdir())
    breaks(label_map, ade20k / "images" / split / f"{label_map.stem}.jpg")
    with pytest.raises(UserError, match=f"annotations/{split}: .*{says}"):
        accept(*(open_ade20k(ade20k, part) for part in ("train", "val")))


def test_a_set_of_unlabelled_maps_is_refused(ade20k):
    for path in (ade20k / "annotations/validation").iterdir():
        full(path, 0)
    assert "no map has a pixel of a category" in " ".join(open_ade20k(ade20k, "val").faults)
    assert not open_ade20k(ade20k, "train").faults


def test_a_look_that_took_long_is_not_taken_again_until_a_file_changes(coco, monkeypatch, tmp_path):
    monkeypatch.setenv("SSLBENCH_HOME", str(tmp_path))
    looked = []

    def look(path):
        looked.append(path)
        return photographs.look_at_photograph(path)

    files = sorted((coco / "val2017").iterdir())
    monkeypatch.setattr(photographs, "WORTH_KEEPING", 0)
    once = photographs.examine("photographs", files, look)
    assert photographs.examine("photographs", files, look) == once and len(looked) == len(files)
    truncate(files[0])
    assert "truncated" in photographs.examine("photographs", files, look)[0]
    assert "truncated" in photographs.examine("photographs", files, look)[0]  # what is wrong is not kept
    assert len(looked) == 3 * len(files)
