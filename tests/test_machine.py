"""The user's machine: variables left over from a cluster, read-only folders, paths with ~, lost workers."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from sslbench.paths import expand
from sslbench.train import launch
from sslbench.train.job import Pretraining

SMOKE = ["pretrain", "mae", "--recipe", "mae_smoke", "--set", "machine.tensorboard=false", "--set",
         "science.epochs=0.07", "--set", "science.data.image_size=8", "--json"]  # fmt: skip
SHELL = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "4711", "SLURM_NTASKS_PER_NODE": "2"}
ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
LEFT_OVER = {
    "a rank": {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2"},
    "a machine's rank": {"NODE_RANK": "1", "GROUP_RANK": "1"},
    "all of a launcher's": {"LOCAL_RANK": "1", "NODE_RANK": "1", "RANK": "3", "WORLD_SIZE": "4", **ADDRESS},
    "a job's, in its shell": {**SHELL, "SLURM_JOB_NAME": "bash"},
    "a step of one task": {**SHELL, "SLURM_STEP_NUM_TASKS": "1"},
    "a job's, outside its step": {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "4711"},
}


@pytest.mark.parametrize("case", LEFT_OVER)
def test_variables_left_over_from_a_launcher_change_nothing(case, run_here, tmp_path):
    listed = run_here("list", "archs", "--json", home=tmp_path, env=LEFT_OVER[case])
    assert json.loads(listed.stdout.splitlines()[-1])["archs"]
    done = run_here(*SMOKE, home=tmp_path, env=LEFT_OVER[case])
    assert done.returncode == 0 and json.loads(done.stdout)["status"] == "finished", done.stderr
    run = json.loads((tmp_path / json.loads(done.stdout)["run"] / "run.json").read_text())
    assert run["hardware"]["devices"] == 1 and "batch 256" in done.stderr


def test_a_rank_left_over_does_not_keep_two_devices_from_starting(run_sslbench, tmp_path):
    done = run_sslbench(*SMOKE, "--devices", "2", home=tmp_path, env={**LEFT_OVER["a rank"], "NODE_RANK": "1"})
    assert done.returncode == 0 and json.loads(done.stdout)["status"] == "finished", done.stderr


@pytest.mark.parametrize(
    ("env", "args", "says"),
    [(SHELL, [], "process 1 of 2 (SLURM_PROCID=0, SLURM_NTASKS=2)"),
     ({**SHELL, "SLURM_PROCID": "1"}, [], "process 2 of 2 (SLURM_PROCID=1, SLURM_NTASKS=2)"),
     ({"LOCAL_RANK": "1", **ADDRESS}, ["--devices", "2"], "unset LOCAL_RANK MASTER_ADDR MASTER_PORT"),
     ({**SHELL, "SLURM_NTASKS": "2(x2)"}, [], "SLURM_NTASKS=2(x2)"),
     ({"TORCHELASTIC_RUN_ID": "x"}, [], "WORLD_SIZE=(nothing)"),
     ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "1"}, [], "torchrun would set LOCAL_RANK")],
)  # fmt: skip
def test_processes_that_nobody_starts_are_not_waited_for_for_ever(env, args, says, run_here, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "MEET_S", 1)
    done = run_here(*SMOKE, *args, home=tmp_path, env=env)
    assert done.returncode == 2 and says in done.stderr and "unset" in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


def test_a_path_with_a_tilde_is_the_home_folders_wherever_a_shell_leaves_it(run_here, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "r.yaml").write_text("extends: mae/mae_smoke")
    shutil.copy(launch.__file__.replace("sslbench/train/launch.py", "methods/mae.py"), tmp_path / "mae.py")
    (tmp_path / "cwd").mkdir()
    words = [word for word in SMOKE if word != "mae_smoke"]
    words[1:3] = ["~/mae.py:MAE", "--recipe=~/r.yaml"]
    done = run_here(*words, "--out=~/x", home=tmp_path / "cwd")
    assert done.returncode == 0 and (tmp_path / "x/weights.safetensors").is_file(), done.stderr
    done = run_here("export", "~/x", "--out=~/w.safetensors", home=tmp_path / "cwd")
    assert done.returncode == 0 and (tmp_path / "w.safetensors").is_file(), done.stderr
    env = {"SSLBENCH_HOME": "~/h", "SSLBENCH_DATA": "~/d"}
    assert run_here(*SMOKE, home=tmp_path / "cwd", env=env).returncode == 0
    assert len(list((tmp_path / "h/runs").iterdir())) == 1 and not list((tmp_path / "cwd").iterdir())
    for spec in ("npz:~/s", "folder:~/s@~/c.txt", "s"):
        done = run_here("data", "check", spec, home=tmp_path / "cwd", env=env)
        assert done.returncode == 2 and str(tmp_path) in done.stderr and "~" not in done.stderr
    assert run_here("doctor", home=tmp_path / "cwd", env=env).stdout.count(str(tmp_path)) >= 2


@pytest.mark.parametrize("word", ["science.contrastive_batch=~", "a~b", "~", "x/~/y", "~nobody-of-that-name/x"])
def test_a_tilde_that_is_no_home_folder_stays(word):
    assert expand(word) == word


def mounted(script, tmp_path, environment):
    """Run a script that may mount; skips where this machine does not let it."""
    if subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    return subprocess.run(["unshare", "-m", "bash", "-c", script], cwd=tmp_path, env=environment(tmp_path),
                          capture_output=True, text=True, timeout=200)  # fmt: skip


def test_a_folder_that_is_read_only_is_named(tmp_path, environment):
    (tmp_path / "ro").mkdir()
    done = mounted(f"mount -t tmpfs -o ro none ro && SSLBENCH_HOME=ro {sys.executable} -m sslbench " + " ".join(SMOKE),
                   tmp_path, environment)  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "cannot be used: read-only file system; give another folder by --out or SSLBENCH_HOME" in done.stderr


def test_no_room_for_a_batch_in_shared_memory_is_said_and_not_waited_for(tmp_path, environment, image_folder):
    words = [*SMOKE, "--data", f"folder:{image_folder}", "--batch-size", "32", "--out", "r", "--set",
             "machine.workers=1", "--set", "science.epochs=1", "--set", "science.data.image_size=64"]  # fmt: skip
    done = mounted(f"mount -t tmpfs -o size=100k none /dev/shm && {sys.executable} -m sslbench " + " ".join(words),
                   tmp_path, environment)  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "no room in /dev/shm" in done.stderr and "--set machine.workers=0" in done.stderr
    run = json.loads((tmp_path / "r/run.json").read_text())
    assert run["status"] == "failed" and "/dev/shm" in run["error"]


def killed(picture):
    """What the kernel does to a process when memory is used up."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_message_and_the_same_command_goes_on(run_here, tmp_path, image_folder, monkeypatch):
    words = [*SMOKE, "--data", f"folder:{image_folder}", "--batch-size", "8", "--out", "r", "--set", "science.epochs=1",
             "--set", "machine.workers=1"]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(Pretraining, "distort", staticmethod(killed))
        done = run_here(*words, home=tmp_path)
    assert done.returncode == 1 and "a process that decodes images has died" in done.stderr, done.stderr
    assert "machine.workers=1" in json.loads((tmp_path / "r/run.json").read_text())["error"]
    again = run_here(*words, home=tmp_path)
    assert again.returncode == 0 and json.loads(again.stdout)["status"] == "finished", again.stderr
