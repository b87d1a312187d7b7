"""What tests share: the command as a user runs it, a home for its output, and real images."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import TINY
from typer.testing import CliRunner

from sslbench.cli import app
from sslbench.data import open_split, sources, subset
from sslbench.vit import ARCHS

ROOT = Path(__file__).parents[1]

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)):  # threads that wait for each other's cores are slow
    threads = max(1, (os.cpu_count() or 1) // workers)
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the commands that tests start


def pytest_collection_modifyitems(items):
    """Long files first (with --no-loadscope-reorder): the last worker to end is then not minutes behind."""
    slow = {item.path for item in items if item.get_closest_marker("slow") or item.path.name == "test_readme.py"}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def environment():
    """environment(home): what a command sees, its output under `home`, no data sets of the developer's."""

    def make(home, env=None):
        base = {k: v for k, v in os.environ.items() if not k.startswith("SSLBENCH_")}
        return {**base, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **(env or {})}

    return make


@pytest.fixture(scope="session")
def run_sslbench(environment):
    """run_sslbench(*args, home=, env=): the command in a process of its own, with `home` as the current folder."""

    def run(*args, home, env=None, timeout=400):
        return subprocess.run(
            [sys.executable, "-m", "sslbench", *map(str, args)],
            cwd=home, env=environment(home, env), capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip

    return run


@pytest.fixture(scope="session")
def run_here():
    """run_here(*args, home=, env=): as run_sslbench, in this process, which spares the seconds of a start."""

    def run(*args, home, env=None):
        with pytest.MonkeyPatch.context() as patch:
            for name in [name for name in os.environ if name.startswith("SSLBENCH_")]:
                patch.delenv(name)
            for name, value in {"COLUMNS": "200", **(env or {})}.items():
                patch.setenv(name, value)
            patch.chdir(home)
            done = CliRunner().invoke(app, [str(a) for a in args])
        if isinstance(done.exception, Exception):  # not SystemExit: a traceback to a user
            raise done.exception
        return subprocess.CompletedProcess(args, done.exit_code, done.stdout, done.stderr)

    return run


@pytest.fixture
def invoke(tmp_path, monkeypatch):
    """invoke(*args): the command in this process, with tmp_path as the current folder. Quicker than `run_sslbench`."""
    for name in [name for name in os.environ if name.startswith("SSLBENCH_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)

    def run(*args, columns=200):
        monkeypatch.setenv("COLUMNS", str(columns))
        return CliRunner().invoke(app, [str(a) for a in args])

    return run


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLBENCH_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def tiny_arch(monkeypatch):
    """`science.arch=tiny`: what makes a recipe train two small blocks, as words for a command."""
    monkeypatch.setitem(ARCHS, "tiny", TINY)
    return ["--set", "science.arch=tiny", "--set", f"science.data.image_size={TINY.image}"]


@pytest.fixture
def few_images(monkeypatch):
    """Every eighth image of the built-in set, in its place, where an evaluation would be most of a test's time."""

    def few(split, whole=sources._builtin):
        data = whole(split)
        return subset(data, torch.arange(0, len(data), 8))

    monkeypatch.setattr(sources, "_builtin", few)


@pytest.fixture(scope="session")
def shared():
    """The folder of full data sets that developers have beside the checkout."""
    path = ROOT.parent / "shared"
    if not (path / "data").is_dir():
        pytest.skip("needs ../shared/data, which users do not have")
    return path


@pytest.fixture
def image_folder(tmp_path):
    """An ImageFolder of 40 + 20 real images over 4 classes."""
    for split, per_class in (("train", 10), ("val", 5)):
        data = open_split("builtin", split)
        for k in range(4):
            folder = tmp_path / "images" / split / data.classes[k]
            folder.mkdir(parents=True)
            for i, x in enumerate(data.images[data.labels == k][:per_class]):
                Image.fromarray(x.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    return tmp_path / "images"
