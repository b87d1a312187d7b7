"""`sslbench doctor --try`: the checks themselves, on what this machine has."""

import json

import pytest
import torch

from sslbench.commands import trial
from sslbench.method import methods

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def some(*names):
    """The trials that are called so, as `doctor --try` makes them."""
    every = trial.trials
    return lambda folder: (t for t in every(folder) if t.name in names)


def test_it_says_what_is_off_by_how_much_writes_it_and_exits_0(invoke, monkeypatch, tmp_path):
    monkeypatch.setattr(trial, "trials", some("mae step", "mocov3 step", "save and resume", "images by workers"))
    done = invoke("doctor", "--try", "--json", columns=80)
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said == json.loads((tmp_path / "results" / "doctor.json").read_text()) and said["ok"]
    steps = [c for c in said["checks"] if c["name"] == "mocov3 step"]
    bf16 = next(c for c in steps if c["where"].endswith("bf16"))
    assert 0.001 < bf16["off"] < bf16["allowed"]  # it was bf16: float32's rounding is a thousand times less
    assert max(map(len, done.stderr.splitlines())) <= 80
    if not torch.cuda.is_available():
        assert [c["off"] for c in said["checks"] if c["name"] == "save and resume"] == [0.0]


def test_what_is_off_is_named_with_what_to_do_and_exits_1(invoke, monkeypatch, tmp_path):
    monkeypatch.setattr(trial, "trials", some("mae step", "save and resume"))
    monkeypatch.setitem(trial.STEP, "bf16", (1e-9, 1e-9))
    monkeypatch.setattr(trial, "_distance", lambda *_: 1 / 0)
    done = invoke("doctor", "--try", "--json")
    said = json.loads(done.stdout.splitlines()[-1])
    assert done.exit_code == 1 and not said["ok"]
    assert [(c["name"], c["ok"]) for c in said["checks"] if c["where"].endswith(("32", "bf16"))] == [
        ("mae step", True), ("mae step", False)]  # fmt: skip
    assert "use another --precision than bf16" in done.stderr and "ZeroDivisionError" in done.stderr


def test_another_gradient_is_found(monkeypatch):
    """A factor of 1.01 on the loss is what a wrong reduction would do to it."""
    reference = trial._reference("mae")
    reference.loss *= 1.01
    off, said = trial._step(lambda: reference, "32", False, 0.1)
    assert off > trial.STEP["32"][1] and "loss 0.0" in said
    reference = trial._reference("mae")
    next(iter(reference.gradient.values())).mul_(1.5)
    assert trial._step(lambda: reference, "32", False, 0.1)[0] > trial.STEP["32"][1]


@pytest.mark.slow
def test_every_check_passes_here(run_sslbench, tmp_path):
    done = run_sslbench("doctor", "--try", "--json", home=tmp_path, timeout=900)
    assert done.returncode == 0, done.stderr
    names = {c["name"] for c in json.loads(done.stdout.splitlines()[-1])["checks"]}
    assert names >= {f"{name} step" for name in methods()} | {"memory against plan"}


@pytest.mark.gpu
@needs_gpu
def test_every_check_passes_on_a_gpu(tmp_path):
    """The same checks as `doctor --try`, in this process."""
    failed = [done for done in (chosen.check() for chosen in trial.trials(tmp_path)) if not done.ok]
    assert not failed
