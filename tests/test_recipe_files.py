"""`sslbench recipe copy` and `check`: a recipe as a file of one's own, and all that is wrong with one."""

import json
import re

import pytest
import yaml

from sslbench.commands import recipe as commands
from sslbench.paths import recipe_files
from sslbench.recipe import compose, read_tree
from sslbench.recipe.text import standalone

ALL = [(kind, name) for kind in ("pretrain", "eval", "transfer", "studies") for name in recipe_files(kind)]


def comments(text):
    return set(re.findall(r"(?:^|\s)(#.*)$", text, re.M))


@pytest.fixture
def answers(invoke):
    """answers(*args): the JSON of a command, else what it says of what is wrong."""

    def answer(*args, status=0):
        done = invoke("recipe", *args, "--json")
        assert done.exit_code == status, (done.stderr, done.exception)
        return json.loads(done.stdout.strip().splitlines()[-1]) if done.stdout.strip() else done.stderr

    return answer


def test_every_recipe_that_ships_stands_alone_with_the_same_values_and_its_comments():
    for kind, name in ALL:
        path = recipe_files(kind)[name]
        text, own = standalone(path, kind), path.read_text()
        assert yaml.safe_load(text) == read_tree(path, kind) and "extends" not in yaml.safe_load(text), name
        assert comments(own) <= comments(text), name
        assert "extends:" in own or text == own, name


def test_what_is_extended_is_merged_with_its_comments_spelling_and_lists(tmp_path):
    (tmp_path / "a.yaml").write_text(BASE)
    (tmp_path / "b.yaml").write_text(CHILD.format(base=tmp_path / "a.yaml"))
    assert standalone(tmp_path / "b.yaml", "pretrain") == MERGED


BASE = """\
# The base.
science:
  # How long.
  epochs: 8  # of 10
  optim: {lr: 1.0e-4,  # base lr
          warmup_epochs: 1}
  words: >-
    two
    lines
  betas:
    - 0.9
    # the second
    - 0.95
# Of this machine.
machine: {workers: 4}
"""
CHILD = """\
# The child.
extends: {base}
science:
  epochs: 2
  optim: {{lr: 3e-4}}
  seed: 1  # another
machine: {{compile: true}}
"""
MERGED = """\
# The child.
# b extends a, which is merged in here:
# The base.
science:
  # How long.
  epochs: 2
  # base lr
  optim: {lr: 3e-4, warmup_epochs: 1}
  words: >-
    two
    lines
  betas:
    - 0.9
    # the second
    - 0.95
  seed: 1  # another
# Of this machine.
machine: {workers: 4, compile: true}
"""


def test_a_copy_says_what_it_is_is_the_same_run_and_replaces_no_file_unasked(answers, tmp_path):
    made = answers("copy", "ocl_smoke", "mine.yaml")
    assert made == {"recipe": "ocl_smoke", "kind": "pretrain", "file": "mine.yaml",
                    "command": "sslbench pretrain ocl --recipe mine.yaml"}  # fmt: skip
    first = (tmp_path / "mine.yaml").read_text().splitlines()[0]
    assert first == ("# sslbench pretrain ocl --recipe mine.yaml   (stands alone: a copy of ocl_smoke, with "
                     "ocl/vit_mini4_builtin, which that extends, merged in)")  # fmt: skip
    theirs = compose("ocl", recipe="ocl_smoke").hash()
    assert answers("check", "mine.yaml")["hash"] == theirs
    (tmp_path / "mine.yaml").write_text("mine")
    assert "mine.yaml is there already" in answers("copy", "ocl_smoke", "mine.yaml", status=2)
    assert (tmp_path / "mine.yaml").read_text() == "mine"
    answers("copy", "ocl_smoke", "mine.yaml", "--force")
    assert answers("check", "mine.yaml")["ok"]
    assert answers("copy", "knn")["file"] == "knn.yaml"
    assert "ends in .yaml" in answers("copy", "knn", "mine.txt", status=2)
    assert "did you mean 'ocl_t5'" in answers("copy", "ocl_t55", status=2)


SOME = [*(("eval", name) for name in ("knn", "knn_held_out", "geometry", "linprobe_ocl_l", "finetune_macrl_subsets")),
        ("transfer", "coco_ocl"), ("transfer", "ade20k_smoke"), ("pretrain", "mae/vit_b16_imagenet"),
        ("pretrain", "ocl/vit_b16_imagenet_from_mae"), ("pretrain", "ccmim/ccmim_smoke"), ("studies", "asl_t7"),
        ("studies", "hybrids_cifar10")]  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), SOME)
def test_a_copy_of_each_kind_is_found_right(kind, name, answers):
    made = answers("copy", f"{kind}/{name}", "mine.yaml")
    checked = answers("check", "mine.yaml")
    assert made["kind"] == checked["kind"] == kind and checked["ok"] and checked["hash"]


def test_a_good_one_is_said_in_short(invoke):
    done = invoke("recipe", "check", "mae/vit_mini4_builtin")
    assert done.exit_code == 0 and len(done.stdout.splitlines()) <= 9
    said = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in done.stdout.splitlines()[1:])
    assert said["method"].startswith("mae") and said["data"] == "builtin" and "per device x 1 device" in said["batch"]
    assert said["hash"] == compose("mae", recipe="mae/vit_mini4_builtin").hash()


WRONG = {  # a file, and every problem that is to be named
    "pretrain": (
        """
        science:
          method: {name: ocl, kapa: 3, mask_ratio: 2}
          arch: vit_b17
          epochs: -1
          epochs: -2
          data: {spec: "foldr:x"}
          optim: {lrr: 1}
        machin: {workers: 1}
        """,
        ["the key 'science.epochs' stands twice", "unknown key 'science.method.kapa'; did you mean 'kappa'?",
         "science.method.mask_ratio: Input", "unknown arch 'vit_b17'; did you mean 'vit_b16'?",
         "science.epochs: Input should be greater", "unknown key 'science.optim.lrr'; did you mean 'lr'?",
         "unknown key 'machin'; did you mean 'machine'?", "unknown kind 'foldr'; did you mean 'folder'?"],
    ),
    "no such method": ("science: {method: {name: oclx}, epoch: 3}", ["unknown method 'oclx'", "'science.epoch'"]),
    "no method": ("science: {epochs: 3}", ["science.method is missing"]),
    "a batch that does not divide": (
        "extends: ocl_smoke\nmachine: {micro_batch: 48}\nscience: {method: {name: ocl}}", ["does not divide 256"]),
    "a config against the encoder": (
        "extends: ccmim_smoke\nscience: {method: {score_layers: [6]}}", ["blocks are 0 to 5"]),
    "more than there is": ("extends: ocl_smoke\nscience: {batch_size: 8192}", ["more than the 4000 images"]),
    "eval": ("extends: linprobe\nscience: {epoch: 3, lr: []}", ["unknown key 'science.epoch'", "science.lr:"]),
    "transfer": ("extends: coco_smoke\nscience: {optim: {lr: -1}, nek: taps}", ["science.optim.lr:", "'neck'"]),
    "a study": (
        """
        rows: {ocl: {recipe: ocl/vit_mini4_builtin, science: {epoch: 3}}, maee: {}}
        budgets: [10epochs, 3TFLOP]
        evaluations: [{protocol: knn, recipe: knnn}]
        """,
        ["budgets 10epochs, 3TFLOP are of several kinds", "row ocl: recipe ocl/vit_mini4_builtin: unknown key",
         "row maee: unknown method 'maee'; did you mean 'mae'?", "evaluation knn: unknown recipe 'knnn'"],
    ),
    "a study's keys": ("rows: {ocl: {labl: x}}\nsede: 3", ["unknown key 'rows.ocl.labl'", "unknown key 'sede'"]),
    "no YAML": ("science: [1", ["is not a YAML file"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_every_problem_is_named_at_once_with_what_was_meant(case, answers, tmp_path, invoke):
    text, expected = WRONG[case]
    (tmp_path / "mine.yaml").write_text(text)
    done = invoke("recipe", "check", "mine.yaml", columns=300)
    assert done.exit_code == 2 and not isinstance(done.exception, Exception), done.exception
    for words in expected:
        assert words in done.stderr, (words, done.stderr)
    answer = answers("check", "mine.yaml", status=2)
    if isinstance(answer, dict):  # what cannot be read has no list
        assert not answer["ok"] and len(answer["problems"]) >= len(expected) - 1
    assert [p.name for p in tmp_path.iterdir()] == ["mine.yaml"]


def test_data_that_is_not_on_this_machine_is_no_problem_of_a_recipe(answers, tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: ocl_smoke\nscience: {data: {spec: 'folder:/nowhere/birds'}}")
    answer = answers("check", "mine.yaml")
    assert answer["data"] == "birds" and "its steps are not known" in answer["length"]


def test_every_kind_has_its_check():
    assert commands.CHECKS.keys() == {kind for kind, _ in ALL}
