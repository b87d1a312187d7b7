"""A wheel, installed into an empty folder, works as the checkout does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = """
from typer.testing import CliRunner
from sslbench import cli
print(cli.__file__)
for command in ("list methods", "list recipes", "list tables", "pretrain ocl --recipe ocl_smoke", "eval knn", "report"):
    done = CliRunner().invoke(cli.app, command.split())
    assert done.exit_code == 0, done.stderr
    print(done.stdout)
"""


@pytest.mark.slow
def test_the_wheel_carries_methods_recipes_tables_and_data(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", ROOT],
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel], check=True, timeout=300
    )
    env = {**os.environ, "PYTHONPATH": str(site)}
    env.pop("SSLBENCH_HOME", None)
    command = [sys.executable, "-c", COMMANDS]
    done = subprocess.run(command, cwd=empty, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for words in (f"{site}/sslbench/cli.py", "macrl", "ocl/vit_l16_imagenet", "ocl_t6", "knn_top1", "report.html"):
        assert words in done.stdout
