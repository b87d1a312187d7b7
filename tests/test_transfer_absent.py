"""Without the mm libraries: one message, and all else works."""

import subprocess
import sys

import pytest

HIDE = """
import sys
for name in ("mmengine", "mmcv", "mmdet", "mmseg", "pycocotools"):
    sys.modules[name] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if sys.modules.get(name, 0) is None else find(name, *a)
from sslbench.cli import main
sys.argv = ["sslbench", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize("kind", ["coco", "ade20k"])
def test_the_command_says_what_to_install(kind, environment, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", HIDE, "transfer", kind, "untrained:vit_ti16", "--data", "."],
        cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 2 and "pip install 'sslbench[transfer]'" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_doctor_says_so_and_recipes_are_listed(environment, tmp_path):
    for args, says in ((["doctor"], "pip install 'sslbench[transfer]'"), (["list", "recipes"], "coco_vitdet")):
        done = subprocess.run(
            [sys.executable, "-c", HIDE, *args],
            cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert done.returncode == 0 and says in done.stdout, done.stderr
