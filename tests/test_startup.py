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


@pytest.mark.parametrize(
    ("args", "status", "says"),
    [
        ([], 0, "To start with"),
        (["--help"], 0, "pretrain"),
        (["pretrain", "--help"], 0, "--recipe"),
        (["list", "methods"], 0, "macrl"),
        (["list", "recipes"], 0, "vit_b16_imagenet"),
        (["pretrain", "oci"], 2, "did you mean 'ocl'"),
        (["pretrain", "ocl", "--epoch", "3"], 2, "--epoch"),
        (["eval", "kmn"], 2, "knn"),
    ],
)
def test_it_answers_without_torch(args, status, says, environment, tmp_path):
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


def test_training_code_imports_no_timm_before_it_augments(environment, tmp_path):
    code = "import sys, sslbench.train.run, sslbench.evaluate.features, methods.mae; print('timm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(tmp_path),
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout == "False\n", done.stderr
