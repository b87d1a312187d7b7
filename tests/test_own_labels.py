"""`sslbench transfer` on sets of a user's own: any categories in COCO's format, label maps with a list of classes."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from transfer_data import OWN_CLASSES, own_coco, own_maps

from sslbench.data.dense import find_data, open_dense
from sslbench.data.instances import run_lengths
from sslbench.data.label_maps import ADE20K_CLASSES, read_pair
from sslbench.data.labelled import accept
from sslbench.data.names import data_name
from sslbench.errors import UserError
from sslbench.transfer.transfer import require

for module in ("mmengine", "mmcv", "mmdet", "mmseg", "pycocotools"):
    pytest.importorskip(module, reason="needs the extra `transfer`", exc_type=ImportError)
require()

SUBJECT = "untrained:vit_ti16"
KEYS = ("image_id", "category_id", "bbox")  # of an answer that is the truth
BY_ID = ["chat noir", "名札", "Wörk"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("own")
    return {"coco": own_coco(root / "marchés"), "ade20k": own_maps(root / "rues_val")}


@pytest.fixture
def coco(whole, tmp_path):
    return shutil.copytree(whole["coco"], tmp_path / "objects")


@pytest.fixture
def maps(whole, tmp_path):
    return shutil.copytree(whole["ade20k"], tmp_path / "streets")


def trained(done, tmp_path):
    """The record, the run folder, the classes and the shapes of what was trained."""
    assert done.exit_code == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    (folder,) = (tmp_path / "runs").iterdir()
    with safe_open(folder / "weights.safetensors", "pt") as f:
        shapes = {k: f.get_slice(k).get_shape() for k in f.keys()}  # noqa: SIM118
        return record, folder, json.loads(f.metadata()["classes"]), shapes


def smoke(kind, data):
    smaller = {"coco": ("science.input.size=64", "science.proposals=[20,10]"), "ade20k": ()}[kind]
    sets = [word for value in (*smaller, "machine.pictures=1") for word in ("--set", value)]
    return "transfer", kind, SUBJECT, "--recipe", f"{kind}_smoke", "--data", data, *sets, "--json"


def test_a_set_in_cocos_format_trains_with_heads_of_its_own_categories(whole, invoke, tmp_path):
    done = invoke(*smoke("coco", whole["coco"]))
    record, folder, classes, shapes = trained(done, tmp_path)
    assert record["dataset"] == "march-s" and record["scale"] == "tiny" and record["n"] == 3
    assert classes == BY_ID and "it does not list chat noir" in done.stderr
    assert shapes["roi_head.bbox_head.fc_cls.weight"][0] == 4 and shapes["roi_head.bbox_head.fc_reg.weight"][0] == 12
    assert shapes["roi_head.mask_head.conv_logits.weight"][0] == 3
    assert len(list((folder / "pictures").glob("*.png"))) == 1


def test_label_maps_with_a_class_list_train_with_heads_of_its_classes(whole, invoke, tmp_path):
    record, folder, classes, shapes = trained(invoke(*smoke("ade20k", whole["ade20k"])), tmp_path)
    assert record["dataset"] == "rues" and record["scale"] == "tiny" and record["n"] == 3
    assert classes == OWN_CLASSES and record["condition"]["classes"] <= 3
    assert shapes["decode_head.conv_seg.weight"][0] == shapes["auxiliary_head.conv_seg.weight"][0] == 3
    assert len(list((folder / "pictures").glob("*.png"))) == 1


def test_classes_have_trains_numbers_by_name_in_both_splits_and_the_truth_scores_100(coco):
    from mmengine.registry import DefaultScope

    from sslbench.transfer import coco as task
    from sslbench.transfer.protocol import transfer_recipe
    from sslbench.transfer.transfer import quiet

    with quiet(), DefaultScope.overwrite_default_scope("mmdet"):
        splits = task.open_data(coco, transfer_recipe("coco", "coco_smoke").science)
        for split in splits:
            assert split.dataset.metainfo["classes"] == tuple(BY_ID)
            tree = json.loads((coco / f"annotations/instances_{split.split}.json").read_text())
            names = {c["id"]: c["name"] for c in tree["categories"]}
            for at in range(len(split)):
                info = split.dataset.get_data_info(at)
                its = [names[a["category_id"]] for a in tree["annotations"] if a["image_id"] == info["img_id"]]
                assert [BY_ID[i["bbox_label"]] for i in info["instances"]] == its
        assert len(splits[0]) == 4 and len(splits[1]) == 3  # the image without objects is scored, not learnt from
        first = splits[0].dataset[0]["data_samples"]
        assert len(first.ignored_instances.bboxes) == 1 and len(first.gt_instances.bboxes) == 2  # the crowd apart
        truth = task.COCO(splits[1].dataset.ann_file, BY_ID)
        answers = [{"segmentation": truth.annToRLE(a), "score": 0.9, **{k: a[k] for k in KEYS}}
                   for a in truth.dataset["annotations"]]  # fmt: skip
        for kind in ("bbox", "segm"):
            assert task._average_precision(truth, [dict(a) for a in answers], kind)[0] == pytest.approx(1, abs=1e-2)


def test_both_libraries_and_the_suite_read_one_label_map_alike(maps):
    from mmengine.registry import DefaultScope

    from sslbench.transfer import ade20k as task
    from sslbench.transfer.protocol import transfer_recipe
    from sslbench.transfer.transfer import quiet

    with quiet(), DefaultScope.overwrite_default_scope("mmseg"):
        _, val = task.open_data(maps, transfer_recipe("ade20k", "ade20k_smoke").science)
        item = val.dataset[1]
    _, labelled = open_dense("ade20k", maps)
    picture, classes = read_pair(labelled, 1)
    assert np.array_equal(item["data_samples"].gt_sem_seg.data[0].numpy(), classes)
    assert item["data_samples"].img_path == str(labelled.files[1]) and picture.size == (48, 40)
    assert set(np.unique(classes)) == {0, 1, 2, 255}


@pytest.mark.parametrize(
    ("folder", "kind", "name"),
    [("coco", "coco", "own-coco"), ("COCO_val", "coco", "own-COCO"), ("ade20k", "coco", "own-ade20k"),
     ("coco:x", "coco", "own-coco"), ("ade20k_train", "ade20k", "own-ade20k"), ("cellules", "ade20k", "cellules")],
)  # fmt: skip
def test_a_set_of_ones_own_never_bears_the_name_of_the_papers(folder, kind, name, whole, tmp_path):
    root = shutil.copytree(whole[kind], tmp_path / folder)
    for labelled in open_dense(kind, root):
        assert labelled.name == name and data_name(labelled.name) not in ("coco", "ade20k") and labelled.own


def edit(root, change, split="train"):
    file = root / f"annotations/instances_{split}.json"
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))


def segmentation(value):
    return lambda t: t["annotations"][0].update(segmentation=value)


COCO_FAULTS = {
    "a category of val alone": (
        lambda r: edit(r, lambda t: t["categories"].append({"id": 5, "name": "chien"}), "val"),
        r"instances_val.json: categories that .*instances_train.json does not list \(chien\)",
    ),
    "two of one name": (lambda r: edit(r, lambda t: t["categories"][0].update(name="名札")), "a name that several"),
    "an id in words": (lambda r: edit(r, lambda t: t["categories"][0].update(id="a")), "'id' is not a whole number"),
    "no name": (lambda r: edit(r, lambda t: t["categories"][0].update(name=" ")), "'name' is no text"),
    "no categories": (lambda r: edit(r, lambda t: t.pop("categories")), "is not a COCO instance file"),
    "run lengths cut short": (
        lambda r: edit(r, segmentation({"size": [80, 96], "counts": "0o1"})),
        "run lengths do not fill the image",
    ),
    "run lengths of nothing": (
        lambda r: edit(r, segmentation({"size": [80, 96], "counts": "~é"})),
        "run lengths do not fill the image",
    ),
    "a photograph gone": (lambda r: (r / "val/lot 0/é0.png").unlink(), "1 of the 3 images are not there"),
}


def paint(root, value, split="train", everywhere=False):
    for path in sorted((root / "annotations" / split).rglob("*.png"))[: None if everywhere else 1]:
        classes = np.array(Image.open(path))
        classes[5] = value
        Image.fromarray(np.full_like(classes, value) if everywhere else classes).save(path)


def to_mask(root):
    for path in (root / "annotations").rglob("*.png"):
        Image.fromarray(np.where(np.array(Image.open(path)) == 1, 255, 0).astype(np.uint8)).save(path)


MAP_FAULTS = {
    "a value beyond the list": (lambda r: paint(r, 3), r"expected values 0 to 2, .* and 255 .*é\d.png: found 3"),
    "one in val": (lambda r: paint(r, 200, "val"), "annotations/val: .*found 200"),
    "a mask of 0 and 255": (to_mask, "pixels of 1 class.*save it as 0 and 1"),
    "nothing to score": (lambda r: paint(r, 255, "val", True), r"annotations/val: pixels of 0 class"),
    "an empty line": (lambda r: (r / "classes.txt").write_text("a\n\nb\n"), "classes.txt: line 2 is empty"),
    "a class twice": (lambda r: (r / "classes.txt").write_text("a\nb\na\n"), "several lines are 'a'"),
    "one class": (lambda r: (r / "classes.txt").write_text("a\n"), "expected 2 to 255"),
    "no text": (lambda r: (r / "classes.txt").write_bytes(b"\xff\xfe\x00a"), "not a text file in UTF-8"),
    "two photographs of a map": (
        lambda r: shutil.copy(r / "images/train/lot 0/é0.png", r / "images/train/lot 0/é0.webp"),
        "would both have the label map lot 0/é0.png",
    ),
    "no map": (lambda r: (r / "annotations/val/lot 0/é0.png").unlink(), "1 of 3 images have no label map"),
    "no val": (lambda r: shutil.rmtree(r / "images/val"), "expected the folder .*images/val, found"),
    "a map cut short": (
        lambda r: (r / "annotations/val/lot 0/é0.png").write_bytes(b"\x89PNG"),
        "label maps that cannot be read",
    ),
}


@pytest.mark.parametrize("how", [*COCO_FAULTS, *MAP_FAULTS])
def test_every_fault_is_one_message_with_status_2_and_nothing_is_written(how, coco, maps, invoke, tmp_path):
    kind = "coco" if how in COCO_FAULTS else "ade20k"
    breaks, says = {**COCO_FAULTS, **MAP_FAULTS}[how]
    root = coco if kind == "coco" else maps
    breaks(root)
    with pytest.raises(UserError, match=f"(?s){says}"):
        accept(*open_dense(kind, root))
    done = invoke(*smoke(kind, root))
    assert done.exit_code == 2 and done.stderr.count("error:") == 1 and "Traceback" not in done.stderr, done.stderr
    assert not done.stdout and not (tmp_path / "runs").exists() and not (tmp_path / "results").exists()


def test_values_of_ade20k_without_a_list_are_told_of_the_list(maps):
    (maps / "classes.txt").unlink()
    for kind in ("images", "annotations"):
        for a, b in (("train", "training"), ("val", "validation")):
            (maps / kind / a).rename(maps / kind / b)
    for path in (maps / "images").rglob("*.png"):
        Image.open(path).save(path.with_suffix(".jpg"))
    with pytest.raises(UserError, match="other classes need a list of their names"):
        accept(*open_dense("ade20k", maps))


def test_instances_lie_where_cocos_roboflows_or_one_folder_has_them(coco, whole, tmp_path):
    accept(*open_dense("coco", coco))
    roboflow, one = tmp_path / "roboflow", tmp_path / "one"
    for split, word in (("train", "train"), ("val", "valid")):
        shutil.copytree(coco / split, roboflow / word)
        shutil.copy(coco / f"annotations/instances_{split}.json", roboflow / word / "_annotations.coco.json")
        shutil.copytree(coco / split, one / "images" / f"{split} A")
    shutil.copytree(coco / "annotations", one / "annotations")
    for split in ("train", "val"):
        edit(one, lambda t, s=split: [i.update(file_name=f"{s} A/{i['file_name']}") for i in t["images"]], split)
    for root in (roboflow, one):
        train, val = open_dense("coco", root)
        accept(train, val)
        assert (len(train), len(val), train.classes) == (5, 3, BY_ID)
    assert find_data("coco", f"coco:{one}") == one


def test_data_check_reads_both_kinds_and_says_what_transfer_would_refuse(coco, maps, invoke):
    faults = {f"coco:{coco}": COCO_FAULTS["two of one name"], f"ade20k:{maps}": MAP_FAULTS["one in val"]}
    for spec, broken in faults.items():
        done = invoke("data", "check", spec, "--json")
        found = json.loads(done.stdout.splitlines()[-1])
        assert done.exit_code == 0 and not found["labels"]["missing"], done.stderr
        assert found["splits"]["val"]["images"] == 3
        broken[0](coco if "coco" in spec else maps)
        done = invoke("data", "check", spec, "--json")
        assert done.exit_code == 2 and json.loads(done.stdout.splitlines()[-1])["labels"]["faults"]


def test_run_lengths_are_pycocotools():
    from pycocotools import mask

    draws = np.random.default_rng(0)
    for _ in range(30):
        h, w = draws.integers(1, 90, 2)
        inside = np.asfortranarray((draws.random((h, w)) < draws.random()).astype(np.uint8))
        if draws.random() < 0.3:
            inside[: h // 2] = 1
        lengths = run_lengths(mask.encode(inside)["counts"].decode())
        flat = np.repeat(np.arange(len(lengths)) % 2, lengths)
        assert np.array_equal(flat, inside.ravel(order="F"))


def test_the_names_of_ade20ks_classes_are_mmsegs():
    from mmseg.datasets import ADE20KDataset

    assert [*ADE20K_CLASSES] == [name.strip() for name in ADE20KDataset.METAINFO["classes"]]
