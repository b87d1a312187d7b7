"""Exactness: a run killed at any instant and resumed ends with the weights of an undisturbed one, bit for bit."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from sslbench.errors import UserError
from sslbench.train.folder import hold

COMMAND = ["pretrain", "ocl", "--recipe", "ocl_smoke", "--epochs", "0.5", "--batch-size", "64", "--set",
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


def rewound(run, folder):
    """A copy of a finished run as it was before the last of its checkpoints."""
    shutil.copytree(run, folder)
    newest = max((folder / "checkpoints").glob("*.pt"))
    for path in (folder / "weights.safetensors", newest, newest.with_suffix(".sha256")):
        path.unlink()
    info = json.loads((folder / "run.json").read_text())
    info.pop("record", None)
    (folder / "run.json").write_text(json.dumps({**info, "status": "running"}))


SMALL = ["--set", "science.batch_size=16", "--set", "science.epochs=2", "--set", "machine.save_every=3",
         "--set", "machine.tensorboard=false", "--json"]  # fmt: skip
DECODES = {  # fine-tuning is the one whose model draws too: which paths it drops
    "mae": ["pretrain", "mae", "--recipe", "mae_smoke"],
    "finetune": ["eval", "finetune", "untrained:vit_mini4@16", "--recipe", "finetune_smoke",
                 "--set", "science.drop_path=0.5"],
    "linprobe": ["eval", "linprobe", "untrained:vit_mini4@16", "--recipe", "linprobe_mae",
                 "--set", "science.warmup_epochs=0"],
    "attentive": ["eval", "attentive", "untrained:vit_mini4@16", "--set", "science.warmup_epochs=0"],
}  # fmt: skip


@pytest.mark.parametrize("kind", [*list(DECODES)[:3], pytest.param("attentive", marks=pytest.mark.slow)])
def test_every_job_that_decodes_files_is_resumed_exactly(kind, run_here, image_folder, tmp_path):
    """Within an epoch, and whether or not processes decode: a loader draws nothing from what the model draws from."""
    command, values = [*DECODES[kind], *SMALL, "--data", f"folder:{image_folder}"], []
    homes = tmp_path / "whole", tmp_path / "killed"
    for home, workers in zip(homes, (0, 1), strict=True):
        home.mkdir(exist_ok=True)
        done = run_here(*command, "--set", f"machine.workers={workers}", home=home)
        assert done.returncode == 0, done.stderr
        values.append(json.loads(done.stdout.splitlines()[-1]).get("value"))
        (run,) = (home / "runs").glob(f"{kind}_*")
        if home == homes[0]:
            rewound(run, homes[1] / "runs" / run.name)
    assert json.loads((run / "run.json").read_text())["resumed"] == 1
    assert same_weights(homes[0] / "runs" / run.name, run) and values[0] == values[1]


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


def members(group):
    return subprocess.run(["pgrep", "-g", str(group)], capture_output=True, text=True).stdout.split()


@pytest.mark.parametrize(
    ("devices", "numbers"), [(1, [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]), (2, [signal.SIGINT])]
)
def test_a_signal_to_all_processes_saves_and_exits_130(devices, numbers, run_here, environment, image_folder, tmp_path):
    """Ctrl-C, scancel and a cluster's warning reach the processes that decode too, in the middle of a step."""
    command = ["pretrain", "mae", "--recipe", "mae_smoke", "--data", f"folder:{image_folder}", "--out", "run",
               "--batch-size", "16", "--epochs", "40", "--devices", devices]  # fmt: skip
    for key in (f"micro_batch={4 // devices}", "workers=2", "save_every=2", "log_every=1", "tensorboard=false"):
        command += ["--set", f"machine.{key}"]
    process = subprocess.Popen([sys.executable, "-m", "sslbench", *map(str, command)], cwd=tmp_path, text=True,
                               env=environment(tmp_path), stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip
    while not list(tmp_path.glob("run/checkpoints/*.sha256")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    for number in numbers:
        os.killpg(process.pid, number)
    _, said = process.communicate(timeout=60)
    info = json.loads((tmp_path / "run/run.json").read_text())
    assert process.returncode == 130 and "resumes" in said and "Traceback" not in said, said
    assert info["status"] == "interrupted" and 2 <= info["step"] < 80
    ended = time.monotonic()
    while left := members(process.pid):  # what decoded ends with the run
        assert time.monotonic() < ended + 20, left
        time.sleep(0.1)
    if devices == 1:
        assert run_here(*command, "--set", "machine.workers=0", home=tmp_path).returncode == 0


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


def test_one_process_trains_in_a_folder_and_a_file_system_without_locks_says_so(monkeypatch, tmp_path):
    lock = hold(tmp_path)
    with pytest.raises(UserError, match="another process is training"):
        hold(tmp_path)
    os.close(lock)

    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)  # as some network file systems do
    with pytest.warns(UserWarning, match=r"has no locks \(No locks available\)"):
        os.close(hold(tmp_path))


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
