"""What users bring of their own: images, an evaluation, a ViT."""

import json

import pytest
import yaml

from sslbench.data import data_name, open_split
from sslbench.errors import UserError
from sslbench.recipe import compose
from sslbench.vit import VisionTransformer, arch_name, get_arch

MINE = """
import torch
from sslbench.data import MemoryImages, open_split

def few(split):
    data = open_split("builtin", split)
    return MemoryImages("", split, data.images[:64], data.labels[:64], data.classes)

def unlabelled(split):
    data = open_split("builtin", split)
    return MemoryImages("", split, data.images[:64], data.labels[:3], data.classes)

def none(split):
    return [1, 2]

def lost(split):
    return open(f"{split}.csv")

def first(train, train_labels, val, val_labels, seed):
    return val_labels == 0

def score(train, train_labels, val, val_labels, seed):
    return 0.9
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path / "mine.py"


def test_images_of_a_function_are_trained_on_packed_and_named_after_it(mine, invoke, tmp_path):
    few = open_split(f"{mine}:few", "train")
    assert few.name == data_name("elsewhere/mine.py:few") == "few" and len(few) == 64
    checked = invoke("data", "check", "mine.py:few", "--json")
    assert checked.exit_code == 0, checked.stderr
    done = invoke("data", "pack", "mine.py:few", "--out", "packed")
    assert done.exit_code == 0 and open_split("packed:packed", "train").images.equal(few.images), done.stderr


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("unlabelled", "64 images of train, and 3 labels"),
        ("none", "expected one of sslbench.data's MemoryImages"),
        ("lost", "FileNotFoundError for split 'train'"),
        ("fw", "no function of images 'fw' in .*did you mean 'few'"),
    ],
)
def test_a_function_that_gives_no_images_is_refused(name, says, mine):
    with pytest.raises(UserError, match=says):
        open_split(f"mine.py:{name}", "train")


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"no file nowhere/mine.py"):
        open_split("nowhere/mine.py:few", "train")


def test_an_evaluation_of_ones_own_is_in_the_ledger_under_its_files_hash(mine, invoke, tmp_path):
    def evaluate(name):
        return invoke("eval", f"mine.py:{name}", "untrained:vit_micro4", "--data", "builtin", "--json")

    done = evaluate("first")
    assert done.exit_code == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["metric"] == "function_top1" and record["value"] == 10 and record["n"] == 1000
    assert record["protocol"]["name"] == "first_cls" and record["stderr"] > 0
    mine.write_text(MINE + "\n# another version\n")
    assert json.loads(evaluate("first").stdout)["protocol"]["hash"] != record["protocol"]["hash"]
    refused = evaluate("score")
    assert refused.exit_code == 2 and "as a tensor of booleans (1000,), found float" in refused.stderr
    assert len((tmp_path / "results/ledger/untrained.jsonl").read_text().splitlines()) == 2


def test_an_arch_that_says_its_sizes_is_one_in_recipes_names_and_files(tmp_path):
    sizes = {"patch": 8, "dim": 96, "depth": 2, "heads": 3, "image": 32}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"extends": "mae/vit_mini4_builtin", "science": {"arch": sizes}}))
    by_file, by_name = compose("mae", recipe=str(path)), compose("mae", recipe="mae/vit_mini4_builtin",
                                                                science={"arch": "vit_96x2_h3_p8_im32"})  # fmt: skip
    assert by_file.science == by_name.science and by_file.science.arch == "vit_96x2_h3_p8_im32"
    encoder = VisionTransformer(get_arch(by_file.science.arch), 32)
    assert len(encoder.blocks) == 2 and encoder.grid == (4, 4) and encoder.blocks[0].attn.num_heads == 3
    assert arch_name(16, 768, 12, 12) == "vit_b16"  # a ViT has one name


@pytest.mark.parametrize(
    ("arch", "says"),
    [
        ({"patch": 8, "dim": 96, "depth": 2, "heds": 3}, "unknown key 'science.arch.heds'; did you mean 'heads'"),
        ({"patch": 8, "dim": 96, "depth": 2, "heads": 5}, "dim=96 must divide by heads=5"),
        ({"patch": 7, "dim": 96, "depth": 2, "heads": 3, "image": 32}, "image=32 is not a multiple of patch=7"),
        ("vit_96x2_h5_p8_im32", "unknown arch 'vit_96x2_h5_p8_im32'"),
    ],
)
def test_a_vit_that_cannot_be_built_is_refused(arch, says, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"extends": "mae/vit_mini4_builtin", "science": {"arch": arch}}))
    with pytest.raises(UserError, match=says):
        compose("mae", recipe=str(path))
