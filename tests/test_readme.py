"""The README is true: every command in it runs, and the method it shows trains."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transfer_data import coco_part, own_maps, unpack

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
COMMANDS = [
    line.split("#")[0].split() for block in BLOCKS for line in block.splitlines() if line.startswith("sslbench ")
]
# What a command needs to be quick here; each is still the README's command.
QUICKER = {
    ("sslbench", "pretrain", "mae", "--data", "builtin", "--epochs", "1"): [
        "--arch",
        "vit_mini4",
        "--out",
        "runs/RUN",
        "--set",
        "science.data.image_size=16",
    ],
    ("sslbench", "pretrain", "mae", "--data", "builtin", "--seeds", "3"): [
        "--epochs",
        "0.1",
        "--set",
        "science.data.image_size=16",
    ],
    ("sslbench", "eval", "finetune"): ["--recipe", "finetune_smoke", "--set", "science.batch_size=500"],
    ("sslbench", "eval", "attentive"): ["--set", "science.epochs=1"],
    ("sslbench", "bench", "ocl", "mae", "--seconds", "2"): [
        "--arch",
        "vit_mini4",
        "--batch-size",
        "32",
        "--seconds",
        "0.2",
    ],
}


STUDY = next(b for b in re.findall(r"```text\n(.*?)```", README, re.S) if "knn_mean" in b).splitlines()


def test_the_study_that_the_readme_shows_is_the_committed_one(invoke, tmp_path):
    shutil.copytree(ROOT / "results", tmp_path / "results")
    done = invoke("study", "quickstart")
    said = [line.rstrip() for line in done.stdout.splitlines()]
    assert done.exit_code == 0 and "39 of them in the ledger" in done.stdout
    assert [line for line in STUDY if line not in said] == []


def test_every_command_of_the_readme_runs_in_order(invoke, few_images, tmp_path):
    assert len(COMMANDS) > 8
    coco = ROOT.parent / "shared" / "data"  # of developers; without it the command says that DIR is no folder
    lacking = [["pretrain", "ocl", "--arch", "vit_l16"]]  # no ImageNet here
    Path("mine.py").write_text(re.search(r"^`mine.py`:\n\n```python\n(.*?)```", README, re.S | re.M)[1])
    if (coco / "coco_mini.tar").is_file():
        part = coco_part(unpack(coco.parent, "coco_mini", tmp_path), tmp_path / "part")
        QUICKER["sslbench", "transfer", "coco", "--data", "DIR"] = ["--data", part, "--recipe", "coco_smoke"]
    else:
        lacking.append(["transfer", "coco", "--data", "DIR"])
    maps = own_maps(tmp_path / "maps")
    for probe in ("segprobe", "segknn"):
        QUICKER["sslbench", "eval", probe, "--data", "DIR"] = ["--data", maps, "--set", "science.crop=32"]
    said = []
    for command in COMMANDS:
        if command == ["sslbench", "quickstart"]:  # test_quickstart.py runs it
            continue
        done = invoke(*command[1:], *QUICKER.get(tuple(command), []))
        expected = 2 if command[1:] in lacking else 0
        assert done.exit_code == expected, (command, done.stderr)
        said += [line.rstrip() for line in done.stdout.splitlines()]
    shown = [line for block in re.findall(r"```text\n(.*?)```", README, re.S) for line in block.splitlines()]
    # What trains is quicker here than in the README, on fewer images: its numbers are others.
    assert [line for line in shown if line not in (*STUDY, *said) and not line.startswith(("knn_top1", "train:"))] == []


def test_the_two_set_up_commands_are_those_that_ci_runs():
    setup = [line for block in BLOCKS for line in block.splitlines() if line.startswith(("python3", ".venv"))]
    assert len(setup) == 2 and setup[0].endswith("sslbench quickstart") and setup[1].endswith("pytest")
    ci = (ROOT / ".ci" / "run").read_text()
    assert "pip\" install -q -e '.[dev]'" in ci and "pip install -q -e '.[dev]'" in setup[1]
    assert '"$bin/pytest"' in ci and ".venv/bin/pytest" in setup[1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the checkout with the README's method added: one file in methods/, one recipe."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("sslbench", "methods", "recipes", "results/paper"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "tests").mkdir()
    for name in ("conftest.py", "tiny.py", "goldens.json", "test_methods.py"):
        shutil.copy(ROOT / "tests" / name, copy / "tests")
    for name, text in re.findall(r"^`((?:methods|recipes)/\S+)`:\n\n```\w+\n(.*?)```", README, re.S | re.M):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text(text)
    return copy


def in_checkout(checkout, *commands):
    """What each of the commands answers, one after the other in one process that imports the copy."""
    done = subprocess.run(
        [sys.executable, "-c", COMMAND_LINES, json.dumps(commands)],
        cwd=checkout, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


COMMAND_LINES = """
import json, sys
from sslbench.cli import app
for command in json.loads(sys.argv[1]):
    app([*command, "--json"], standalone_mode=False)
"""


def test_the_fifth_method_is_one_file_and_one_recipe(checkout):
    code = re.search(r"```python\n(.*?)```", README, re.S)
    assert code and len(code[1].splitlines()) < 40
    size = ("--set", "science.data.image_size=16")
    listed, run, knn, bench = in_checkout(
        checkout,
        ["list", "methods"],
        ["pretrain", "simclr", "--data", "builtin", "--epochs", "0.2", *size],
        ["eval", "knn"],
        ["bench", "simclr", "--arch", "vit_mini4", "--batch-size", "16", "--seconds", "0.5"],
    )
    assert "simclr" in {m["method"] for m in listed["methods"]}
    assert run["status"] == "finished" and knn["method"] == "simclr" and bench["rows"][0]["images_per_s"] > 0


def test_the_fifth_method_keeps_the_contract_that_is_tested_for_every_file_in_methods(checkout):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/test_methods.py", "-k", "simclr and not committed"],
        cwd=checkout, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(checkout)},
    )  # fmt: skip
    assert done.returncode == 0 and " passed" in done.stdout and "failed" not in done.stdout, done.stdout
