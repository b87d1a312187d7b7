"""What needs no tensor answers without importing torch, which takes longer than all else at the start of a command."""

import json
import subprocess
import sys

import pytest

from sslbench.commands.listing import _imported, _read
from sslbench.paths import bundled

ASK = """
import json, sys
from typer.testing import CliRunner
from sslbench.cli import app
done = CliRunner().invoke(app, json.loads(sys.argv[1]))
slow = [name for name in ("torch", "timm", "torchvision", "pandas", "matplotlib", "scipy") if name in sys.modules]
print(json.dumps([done.exit_code, done.output, slow]))
"""

SLOW = {"lightning_fabric", "torch._dynamo", "torch.distributed.fsdp", "timm", "torchvision", "scipy.stats"}


@pytest.mark.parametrize(
    ("args", "status", "says"),
    [
        ([], 0, "To start with"),
        (["--help"], 0, "pretrain"),
        (["pretrain", "--help"], 0, "--recipe"),
        (["list", "methods"], 0, "macrl"),
        (["list", "recipes"], 0, "vit_b16_imagenet"),
        (["list", "runs"], 0, "unreadable"),
        (["pretrain", "oci"], 2, "did you mean 'ocl'"),
        (["pretrain", "ocl", "--epoch", "3"], 2, "--epoch"),
        (["eval", "kmn"], 2, "knn"),
    ],
)
def test_it_answers_without_torch(args, status, says, environment, tmp_path):
    (tmp_path / "runs" / "torn").mkdir(parents=True)
    (tmp_path / "runs" / "torn" / "run.json").write_text("{")
    done = subprocess.run([sys.executable, "-c", ASK, json.dumps(args)], cwd=tmp_path, env=environment(tmp_path),
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    code, output, slow = json.loads(done.stdout)
    assert code == status and says in output and slow == []


def test_a_methods_file_says_of_itself_what_its_class_does(tmp_path):
    for name, row in _imported():
        assert _read(bundled("methods") / f"{name}.py") == row, name
    own = tmp_path / "own.py"
    for line in ("class Own(MAE): pass", "class Own(Method): hybrid = yes()", "class Own(Method): presets = P"):
        own.write_text(line)
        assert _read(own) == {}  # and the file is imported instead


def test_what_does_not_train_waits_for_torch_alone(environment, tmp_path):
    """Fabric imports torch._dynamo, and so does torchvision: together as long as torch. scipy.stats comes when used."""
    parts = ("report.page", "evaluate.evaluation", "evaluate.start", "study.executor", "commands.inspect", "train.job")
    code = f"""
import importlib, sys
for part in {parts}:
    importlib.import_module("sslbench." + part)
    print(part, "torch" in sys.modules, *sorted({SLOW} & sys.modules.keys()))
import sslbench.train.loop, methods.mae
print("timm" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(tmp_path),
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout.splitlines() == [*(f"{part} True" for part in parts), "False"], done.stdout + done.stderr
