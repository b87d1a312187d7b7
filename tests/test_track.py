"""`machine.track`: what TensorBoard gets, in wandb, trackio or mlflow too; none of them has to be installed."""

import importlib.util
import json
import sqlite3
import struct
import sys

import pytest
from test_resume import rewound

from sslbench.recipe import compose
from sslbench.train import track
from sslbench.train.meter import Metrics, read_metrics

QUICK = ["pretrain", "mae", "--recipe", "mae_smoke", "--epochs", "0.3", "--set", "machine.log_every=1",
         "--set", "machine.save_every=2", "--set", "machine.watch=false"]  # fmt: skip


@pytest.fixture
def train(invoke, tiny_arch, tmp_path, monkeypatch):
    """train(tracker, out): the JSON of a run that is tracked on this machine alone."""
    for name, value in {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio"),
                        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)

    def run(tracker, out="run"):
        done = invoke(*QUICK, *tiny_arch, "--set", f"machine.track={tracker}", "--out", out, "--json")
        assert done.exit_code == 0, (done.stderr, done.exception)
        assert len(done.stdout.strip().splitlines()) == 1  # standard output is JSON, whatever a library prints
        return json.loads(done.stdout)

    return run


def needs(library):
    missing = importlib.util.find_spec(library) is None
    return pytest.mark.skipif(missing, reason=f"needs {library}, which the suite does not install")


def in_mlflow(home, id):
    """(name, config, {metric: {step: value}}, status) of a run."""
    import mlflow

    client = mlflow.MlflowClient()
    run = client.get_run(id)
    seen = {k: {m.step: m.value for m in client.get_metric_history(id, k)} for k in run.data.metrics}
    assert client.get_experiment(run.info.experiment_id).name == "sslbench"
    return run.info.run_name, run.data.params, seen, run.info.status


def in_trackio(home, id):
    with sqlite3.connect(home / "trackio/sslbench.db") as db:
        rows = db.execute("select step, metrics from metrics where run_id = ? order by id", [id]).fetchall()
        name, config = db.execute("select run_name, config from configs where run_id = ?", [id]).fetchone()
    seen = {}
    for step, values in rows:
        for key, value in json.loads(values).items():
            seen.setdefault(key, {})[step] = value
    return name, track.flat(json.loads(config)), seen, "FINISHED"


def logged(data):
    """The records of a file in LevelDB's log format, as wandb writes it, with a head of seven bytes."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no record's head begins at the end of a block
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # the whole of it, or the last part
            yield whole
            whole = b""


def in_wandb(home, id):
    """From the files that `wandb sync` would send: one a process that trained, all of one run."""
    from wandb.proto import wandb_internal_pb2

    names, config, seen = set(), {}, {}
    for path in sorted(home.glob(f"run/wandb/offline-run-*/run-{id}.wandb")):
        for data in logged(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            names |= {record.run.display_name} if record.run.run_id else set()
            config |= {u.key: json.loads(u.value_json) for u in record.run.config.update}
            values = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item}
            for key, value in values.items():
                seen.setdefault(key, {})[values.get("step")] = value
    (name,) = names
    return (
        name,
        track.flat(config),
        {k: v for k, v in seen.items() if not k.startswith("_") and k != "step"},
        "FINISHED",
    )


READ = {"mlflow": in_mlflow, "trackio": in_trackio, "wandb": in_wandb}


@pytest.mark.parametrize("library", [pytest.param(name, marks=needs(name)) for name in READ])
def test_a_tracked_run_has_the_config_and_metrics_and_is_gone_on_with(library, train, tmp_path):
    assert train(library)["status"] == "finished"
    id = json.loads((tmp_path / "run/track.json").read_text())[library]
    rewound(tmp_path / "run", tmp_path / "before")
    (tmp_path / "run").rename(tmp_path / "whole")
    (tmp_path / "before").rename(tmp_path / "run")
    if library == "wandb":  # what was not sent yet lies in the folder of the run
        assert list((tmp_path / "run/wandb").glob("offline-run-*"))
    train(library)
    assert json.loads((tmp_path / "run/track.json").read_text()) == {library: id}
    run = json.loads((tmp_path / "run/run.json").read_text())
    assert run["resumed"] == 1
    name, config, seen, status = READ[library](tmp_path, id)
    assert name == "run" and status == "FINISHED"
    assert str(config["recipe_hash"]) == run["recipe_hash"] and float(config["science.optim.lr"]) > 0
    assert str(config["machine.track"]) == library
    for line in read_metrics(tmp_path / "run/metrics.jsonl"):
        step = line.pop("step")
        for key in line.keys() - {"images_per_s", "data_wait"}:  # what is not the same when it is trained again
            assert seen[key][step] == pytest.approx(line[key]), (key, step)


@pytest.mark.parametrize("library", track.TRACKERS)
def test_without_its_library_a_run_does_not_start_and_says_what_to_install(
    library, invoke, tiny_arch, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / library).mkdir()  # as wandb leaves one: Python takes it for a module
    done = invoke(*QUICK, *tiny_arch, "--set", f"machine.track={library}", "--out", "run")
    assert done.exit_code == 2 and f"pip install {library}" in done.stderr
    assert not (tmp_path / "run").exists()


class Broken:
    """A tracker whose server goes away after the first step."""

    def __init__(self, folder, config, id):
        self.id = id or "7"
        print("a library's greeting")

    def log(self, step, values):
        SEEN.append(step)
        if step > 1:
            raise ConnectionError("the server is gone")

    def close(self, status):
        SEEN.append(status)


SEEN: list = []


@pytest.fixture
def tracked(monkeypatch):
    """A library that stands for wandb's."""
    monkeypatch.setitem(track.TRACKERS, "wandb", Broken)
    monkeypatch.setattr(track, "check_tracker", lambda name: None)
    monkeypatch.setattr("sslbench.train.loop.check_tracker", lambda name: None)
    SEEN.clear()


def test_a_tracker_that_fails_on_the_way_costs_a_warning_and_no_training(tracked, train, tmp_path):
    with pytest.warns(UserWarning, match="wandb gets no more of this run .ConnectionError: the server is gone"):
        assert train("wandb")["status"] == "finished"
    assert SEEN == [1, 2] and len(read_metrics(tmp_path / "run/metrics.jsonl")) > 2


def test_a_tracker_that_takes_no_run_is_the_users_to_mend(tracked, invoke, tiny_arch, monkeypatch):
    def refuse(folder, config, id):
        raise PermissionError("no login")

    monkeypatch.setitem(track.TRACKERS, "wandb", refuse)
    done = invoke(*QUICK, *tiny_arch, "--set", "machine.track=wandb")
    assert (
        done.exit_code == 2
        and "machine.track=wandb: it does not take the run (PermissionError: no login)" in done.stderr
    )


def test_a_tracker_is_told_how_a_run_ended(tmp_path):
    from sslbench.errors import Interrupted, RunFailed

    ended = []
    for error in (Interrupted("stop"), KeyboardInterrupt(), RunFailed("nan")):
        tracker = Broken(tmp_path, {}, None)
        tracker.close = ended.append
        with pytest.raises(type(error)), Metrics(tmp_path, 0, False, tracker):
            raise error
    assert ended == ["interrupted", "interrupted", "failed"]


def test_a_tracker_is_no_part_of_science():
    plain, tracked = (compose("mae", recipe="mae_smoke", sets=s) for s in ([], ["machine.track=mlflow"]))
    assert plain.hash() == tracked.hash() and tracked.machine.track == "mlflow"
