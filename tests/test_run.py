"""The run folder: whose it is, what it costs, what is left of one that was killed; and fp16, by a scaler on the CPU."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from rich.console import Console
from safetensors.torch import load_file

from sslbench import provenance
from sslbench.data import open_split
from sslbench.errors import UserError
from sslbench.evaluate import start
from sslbench.recipe import compose
from sslbench.train import loop
from sslbench.train.job import Pretraining
from sslbench.train.launch import leave_the_others
from sslbench.train.state import load_checkpoint

QUIET = Console(quiet=True)


def recipe(**machine):
    sets = [
        f"machine.{k}={v}" for k, v in {"tensorboard": "false", "save_every": 3, "precision": 32, **machine}.items()
    ]
    science = {
        "epochs": 0.1,
        "batch_size": 64,
        "data": {"spec": "builtin", "image_size": 8},
        "optim": {"clip_grad": 1.0},
    }
    return compose("mae", recipe="mae_smoke", science=science, sets=sets)


def pretrain(folder, **machine):
    return start.pretrain(recipe(**machine), folder, QUIET, progress=False)


def weights(folder):
    return load_file(folder / "weights.safetensors")


def rewind(folder):
    """As if it had been killed before its last checkpoint."""
    newest = max((folder / "checkpoints").glob("*.pt"))
    newest.unlink()
    newest.with_suffix(".sha256").unlink()
    (folder / "weights.safetensors").unlink()
    info = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**info, "status": "running"}))


def test_fp16_unscales_clips_and_resumes_with_its_scale(home, monkeypatch):
    def fabric(machine, sharded=False):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=2)
        return Fabric(accelerator="cpu", devices=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])

    monkeypatch.setattr(loop, "make_fabric", fabric)
    pretrain(home / "whole")
    log = [json.loads(line) for line in (home / "whole" / "metrics.jsonl").open()]
    assert 0 < log[-1]["grad_norm"] < 50 and log[-1]["loss"] < 5  # of the gradient itself, not of the scaled one
    saved = [load_checkpoint(p)["precision"]["scale"] for p in sorted((home / "whole" / "checkpoints").glob("*.pt"))]
    assert saved[0] > 2.0**14  # it grew, and an exact resumption needs what it grew to
    shutil.copytree(home / "whole", home / "resumed")
    rewind(home / "resumed")
    pretrain(home / "resumed")
    assert all(x.equal(weights(home / "resumed")[k]) for k, x in weights(home / "whole").items())


def test_a_run_on_other_images_is_neither_resumed_nor_taken_for_finished(home, monkeypatch):
    """Two folders of one name have one recipe."""
    pretrain(home / "run")
    assert pretrain(home / "run") == "already finished"
    other = open_split("builtin", "val")
    monkeypatch.setattr(Pretraining, "data", lambda self: other)
    for _ in range(2):
        with pytest.raises(UserError, match="holds a run on other images"):
            pretrain(home / "run")
        rewind(home / "run") if (home / "run" / "weights.safetensors").exists() else None


def test_a_run_killed_while_it_wrote_its_first_file_starts_again(home):
    (home / "run").mkdir()
    (home / "run" / ".run.json.123.part").write_text("{")
    assert pretrain(home / "run") == "finished"
    (home / "other").mkdir()
    (home / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no run"):
        pretrain(home / "other")


def test_costs_add_up_over_resumptions_whatever_the_devices_were(home):
    r = recipe()
    run = loop.Run(Pretraining(r), home / "run", loop.make_fabric(r.machine), {})
    run.begin("f", 10, 5)
    assert run.costs()["device_hours"] < 0.01
    run.resume({"cost": {"wall_s": 3600.0, "device_hours": 4.0, "joules": None, "images_seen": 640}})
    costs = run.costs()
    assert costs["device_hours"] == pytest.approx(4.0, abs=0.01) and costs["wall_s"] == pytest.approx(3600, abs=30)
    assert costs["joules"] is None and run.to_keep().keys() == run.cost.keys()  # a part unknown: the sum is


@pytest.mark.parametrize("rank", [0, 1])
def test_of_processes_that_had_nothing_left_to_train_only_the_first_scores(monkeypatch, rank):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": 2, "GROUP_WORLD_SIZE": 1, "RANK": rank}.items():
        monkeypatch.setenv(name, str(value))
    assert leave_the_others() == (rank == 0)


def test_a_method_that_is_in_no_commit_makes_the_code_dirty(tmp_path, monkeypatch):
    def git(*args):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *args], check=True)

    for name in ("sslbench/provenance.py", "pyproject.toml", "results/numbers.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    git("init", "-q")
    git("add", "sslbench", "pyproject.toml")
    git("commit", "-qm", "first")
    monkeypatch.setattr(provenance, "__file__", str(Path(tmp_path).resolve() / "sslbench" / "provenance.py"))
    assert provenance.code.__wrapped__()["dirty"] is False  # results are not code
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "mine.py").write_text("")
    assert provenance.code.__wrapped__()["dirty"] is True
