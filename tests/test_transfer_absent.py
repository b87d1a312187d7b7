"""Without the mm libraries: one message, and all else works."""

import json
import subprocess
import sys

HIDE = """
import sys
for name in ("mmengine", "mmcv", "mmdet", "mmseg", "pycocotools"):
    sys.modules[name] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if sys.modules.get(name, 0) is None else find(name, *a)
import json
from typer.testing import CliRunner
from sslbench.cli import app
for command in sys.argv[1:]:
    done = CliRunner().invoke(app, command.split())
    print(json.dumps([done.exit_code, done.stdout, done.stderr]))
"""


def test_the_command_says_what_to_install_and_the_rest_works(environment, tmp_path):
    transfers = [f"transfer {kind} untrained:vit_ti16 --data ." for kind in ("coco", "ade20k")]
    done = subprocess.run(
        [sys.executable, "-c", HIDE, *transfers, "doctor", "list recipes"],
        cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *transferred, doctor, recipes = map(json.loads, done.stdout.splitlines())
    for status, _, said in transferred:
        assert status == 2 and "pip install 'sslbench[transfer]'" in said
    assert doctor[0] == recipes[0] == 0
    assert "pip install 'sslbench[transfer]'" in doctor[1] and "coco_vitdet" in recipes[1]
