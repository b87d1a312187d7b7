"""`pretrain --seeds`: a recipe under several seeds, one after the other, that goes on where it was stopped."""

import json

import pytest

from sslbench.errors import Interrupted
from sslbench.train import loop

QUICK = ["pretrain", "mae", "--recipe", "mae_smoke", "--epochs", "0.2", "--set", "machine.tensorboard=false",
         "--set", "machine.watch=false"]  # fmt: skip


@pytest.fixture
def train(invoke, tiny_arch):
    return lambda *args: invoke(*QUICK, *tiny_arch, *args, "--json")


def last_json(done):
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_of(folder):
    return json.loads((folder / "run.json").read_text())


def test_each_seed_is_the_run_that_it_is_by_itself_and_a_finished_one_is_not_run_again(train, tmp_path):
    alone = train("--seed", 1)
    assert alone.exit_code == 0, alone.stderr
    before = (tmp_path / last_json(alone)["run"] / "weights.safetensors").stat().st_mtime_ns
    done = train("--seeds", 3)
    assert done.exit_code == 0, done.stderr
    runs = last_json(done)["runs"]
    assert [(r["seed"], r["status"]) for r in runs] == [(0, "finished"), (1, "finished"), (2, "finished")]
    assert runs[1]["run"] == last_json(alone)["run"] and "already finished" in done.stderr
    folders = [tmp_path / r["run"] for r in runs]
    assert (folders[1] / "weights.safetensors").stat().st_mtime_ns == before
    facts = [run_of(f) for f in folders]
    assert [f["seed"] for f in facts] == [0, 1, 2] and len({f["recipe_hash"] for f in facts}) == 1
    assert len({f["weights_sha256"] for f in facts}) == 3


def test_the_same_command_goes_on_where_it_was_stopped(train, tmp_path, monkeypatch):
    """Stopped as the second of three begins: the first is left alone, the second resumed, the third begun."""
    trained = []

    def stop_second(run, *args, whole=loop.train):
        trained.append(run.job.seed)
        if trained == [4, 5]:
            raise Interrupted("SIGINT after step 1 of 3; the same command resumes")
        whole(run, *args)

    monkeypatch.setattr(loop, "train", stop_second)
    words = ("--seeds", 3, "--seed", 4, "--out", "mine")
    stopped = train(*words)
    assert stopped.exit_code == 130 and not stopped.stdout.strip() and "the same command resumes" in stopped.stderr
    assert run_of(tmp_path / "mine_s4")["status"] == "finished" and not (tmp_path / "mine_s6").exists()
    done = train(*words)
    assert done.exit_code == 0, done.stderr
    assert [r["run"] for r in last_json(done)["runs"]] == ["mine_s4", "mine_s5", "mine_s6"]
    assert trained == [4, 5, 5, 6]


def test_a_run_that_fails_stops_no_other_and_is_named(train, tmp_path, monkeypatch):
    def fail_first(run, *args, whole=loop.train):
        if run.job.seed == 0:
            raise loop.RunFailed("the gradient is not finite")
        whole(run, *args)

    monkeypatch.setattr(loop, "train", fail_first)
    done = train("--seeds", 2, "--out", "mine")
    assert done.exit_code == 1 and "1 of 2 runs failed: seed 0 (mine): the gradient is not finite" in done.stderr
    assert [r["status"] for r in last_json(done)["runs"]] == ["failed", "finished"]


def test_what_cannot_be_meant_is_refused_before_anything_trains(train, tmp_path, monkeypatch):
    def said(*args):
        done = train(*args)
        assert done.exit_code == 2 and not list(tmp_path.rglob("run.json")), done.output
        return done.stderr

    assert "--seeds" in said("--seeds", 0)
    assert "seeds are below 2147483648" in said("--seeds", 2, "--seed", 2**31 - 1)
    assert "is for one process; on several devices" in said("--seeds", 2, "--devices", 2)
    (tmp_path / "mine_s1").mkdir()
    (tmp_path / "mine_s1/notes").touch()
    assert "mine_s1 is not empty and holds no run" in said("--seeds", 2, "--out", "mine")
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert "is for one process" in said("--seeds", 2)


def test_a_dry_run_lists_every_seeds_folder(train, tmp_path):
    done = train("--seeds", 2, "--out", "mine", "--dry-run")
    assert [(r["run"], r["status"]) for r in last_json(done)["runs"]] == [("mine", "open"), ("mine_s1", "open")]
    assert "2 runs, " in done.stderr and not list(tmp_path.iterdir())
