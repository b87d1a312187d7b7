"""Exactness: a run killed at any instant and resumed ends with the weights of an undisturbed one, bit for bit."""

import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

COMMAND = ["pretrain", "ocl", "--recipe", "ocl_smoke", "--epochs", "1", "--batch-size", "64", "--set",
           "machine.save_every=3", "--set", "machine.log_every=2", "--set", "machine.tensorboard=false"]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, run_here):
    home = tmp_path_factory.mktemp("undisturbed")
    began = time.monotonic()
    done = run_here(*COMMAND, home=home)
    assert done.returncode == 0, done.stderr
    return next((home / "runs").iterdir()), time.monotonic() - began


def start(home, env):
    return subprocess.Popen(
        [sys.executable, "-m", "sslbench", *COMMAND],
        cwd=home,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def checkpoints(home):
    return {p.name for p in home.glob("runs/*/checkpoints/*.pt")}


def same_weights(a, b):
    x, y = load_file(a / "weights.safetensors"), load_file(b / "weights.safetensors")
    return x.keys() == y.keys() and all(x[k].equal(y[k]) for k in x)


@pytest.mark.slow
def test_sigkill_at_random_instants_changes_nothing(undisturbed, run_here, tmp_path, environment):
    whole, seconds = undisturbed
    draw = random.Random(0)
    for _ in range(3):
        before = checkpoints(tmp_path)
        process = start(tmp_path, environment(tmp_path))
        while checkpoints(tmp_path) == before:  # it got on: the next kill is not at the same place
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.08) * seconds)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    done = run_here(*COMMAND, home=tmp_path)
    assert done.returncode == 0, done.stderr
    resumed = next((tmp_path / "runs").iterdir())
    assert json.loads((resumed / "run.json").read_text())["resumed"] >= 1
    assert same_weights(whole, resumed)
    steps = [json.loads(line)["step"] for line in (resumed / "metrics.jsonl").read_text().splitlines()]
    assert steps == [json.loads(line)["step"] for line in (whole / "metrics.jsonl").read_text().splitlines()]


def test_sigterm_saves_exits_130_and_resumes(undisturbed, run_sslbench, tmp_path, environment):
    whole, _ = undisturbed
    process = start(tmp_path, environment(tmp_path))
    while not list(tmp_path.glob("runs/*/checkpoints/*.pt")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    assert b"resumes" in process.stderr.read()
    folder = next((tmp_path / "runs").iterdir())
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    newest = sorted((folder / "checkpoints").glob("*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[:1000])  # the disk was full, say
    done = run_sslbench(*COMMAND, home=tmp_path)
    assert done.returncode == 0 and "falling back" in done.stderr, done.stderr
    assert same_weights(whole, folder)


def test_a_full_disk_is_one_message_and_nothing_is_lost(undisturbed, run_here, environment, tmp_path):
    """The kernel refuses files of over 1 MiB, as it does where a quota is used up."""
    whole, _ = undisturbed
    limit = (1 << 20, resource.RLIM_INFINITY)
    done = subprocess.run(
        [sys.executable, "-m", "sslbench", *COMMAND], cwd=tmp_path, env=environment(tmp_path), capture_output=True,
        text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )  # fmt: skip
    assert done.returncode == 1 and "no room on the disk" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and "step_000000003.pt" in done.stderr
    folder = next((tmp_path / "runs").iterdir())
    assert not checkpoints(tmp_path) and not list(folder.rglob("*.part"))
    run = json.loads((folder / "run.json").read_text())
    assert run["status"] == "failed" and "no room" in run["error"]
    done = run_here(*COMMAND, home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert same_weights(whole, folder)


def test_a_non_finite_step_stops_before_the_weights_move(run_here, tmp_path):
    done = run_here("pretrain", "ocl", "--recipe", "ocl_smoke", "--set", "science.optim.lr=1e30", "--set",
                        "science.optim.warmup_epochs=0", "--set", "machine.save_every=1", home=tmp_path)  # fmt: skip
    assert done.returncode == 1 and "not finite" in done.stderr, done.stderr
    folder = next((tmp_path / "runs").iterdir())
    run = json.loads((folder / "run.json").read_text())
    assert run["status"] == "failed" and "not finite" in run["error"]


def test_a_checkpoint_of_another_arch_is_refused(run_here, tmp_path):
    args = ["pretrain", "mae", "--recipe", "mae_smoke", "--set", "machine.tensorboard=false"]
    assert run_here(*args, "--out", "a", home=tmp_path).returncode == 0
    assert run_here(*args, "--arch", "vit_ti4", "--epochs", "0", "--out", "b", home=tmp_path).returncode == 0
    run = json.loads((tmp_path / "b/run.json").read_text())
    (tmp_path / "b/run.json").write_text(json.dumps({**run, "status": "interrupted"}))
    shutil.copytree(tmp_path / "a/checkpoints", tmp_path / "b/checkpoints", dirs_exist_ok=True)
    done = run_here(*args, "--arch", "vit_ti4", "--epochs", "0", "--out", "b", home=tmp_path)
    assert done.returncode == 2 and "not of this mae vit_ti4" in done.stderr, done.stderr
