"""`pretrain --slurm`. The cluster is four scripts that do what SLURM's commands of those names do, on this machine."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

COMMANDS = {
    "sbatch": 'cp "$1" $CLUSTER/batch.sh; echo Submitted batch job 77',
    # The tasks, without srun's own flags; each writes its process id.
    "srun": """
while [[ $1 == --* ]]; do case $1 in --output|--error) shift 2 ;; *) shift ;; esac; done
for ((i = 0; i < SLURM_NTASKS; i++)); do
  SLURM_PROCID=$i SLURM_LOCALID=$i bash -c 'echo $$ > $CLUSTER/task$SLURM_PROCID; exec "$@"' task "$@" \
    2> $CLUSTER/said$i &
done
wait
""",
    "scontrol": 'echo "$@" >> $CLUSTER/scontrol; kill -9 $(cat $CLUSTER/task1)',  # queueing again ends all tasks
}
RUN = ["pretrain", "ocl", "--recipe", "ocl_smoke", "--batch-size", "32", "--epochs", "0.24", "--devices", "2",
       "--set", "science.method.gather_negatives=true", "--set", "machine.tensorboard=false",
       "--set", "machine.save_every=5", "--set", "machine.log_every=1", "--out", "run"]  # fmt: skip
OPTIONS = "partition=gpu,time=60,gpus_per_node=0,account=me"


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    for name, text in COMMANDS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CLUSTER", str(tmp_path))
    return tmp_path


@pytest.mark.slow
def test_a_job_that_is_told_to_make_room_saves_is_queued_again_and_goes_on(cluster, invoke, environment):
    done = invoke(*RUN, "--slurm", OPTIONS, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"run": str(cluster / "run"), "status": "submitted", "job": "77"}
    batch = (cluster / "batch.sh").read_text().splitlines()
    for flag in ("partition=gpu", "account=me", "time=60", "nodes=1", "ntasks-per-node=2", "signal=USR1@300"):
        assert f"#SBATCH --{flag}" in batch
    assert not any("gpus" in line for line in batch)

    env = environment(cluster, {"OMP_NUM_THREADS": "1", "SLURM_JOB_ID": "77", "SLURM_NTASKS": "2",
                                "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "localhost"})  # fmt: skip

    def start():
        return subprocess.Popen(["bash", "batch.sh"], cwd=cluster, env=env)

    def said():
        return "".join((cluster / f"said{i}").read_text() for i in (0, 1))

    job = start()
    while not list(cluster.glob("run/checkpoints/*.sha256")):
        assert job.poll() is None, said()
        time.sleep(0.05)
    for number in (signal.SIGTERM, signal.SIGUSR1):  # as a preemption comes
        for i in (0, 1):
            os.kill(int((cluster / f"task{i}").read_text()), number)
    job.wait(60)
    info = json.loads((cluster / "run/run.json").read_text())
    assert info["status"] == "interrupted" and 5 <= info["step"] < 30, said()
    assert (cluster / "scontrol").read_text() == "requeue 77\n"

    assert start().wait(100) == 0, said()
    info = json.loads((cluster / "run/run.json").read_text())
    assert (info["status"], info["step"], info["resumed"], info["hardware"]["devices"]) == ("finished", 30, 1, 2)
    assert (cluster / "scontrol").read_text() == "requeue 77\n"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("partition", "expected KEY=VALUE"),
        ("particion=gpu,time=60", "'partition'"),
        ("partition=gpu", "give time=MINUTES"),
        ("time=1:00:00", "give time=MINUTES"),
        ("time=60,ntasks_per_node=2", "--devices"),
        ("time=60,gpus_per_node=8", "the run is for 2 devices"),
        ("time=60,nodes=3", "not divide"),
    ],
)
def test_bad_options_are_one_message_and_status_2(options, says, cluster, invoke):
    done = invoke(*RUN, "--slurm", options)
    assert done.exit_code == 2 and says in done.stderr, done.output
    assert not (cluster / "batch.sh").exists() and not (cluster / "run").exists()


def test_without_submitit_or_a_cluster_it_says_what_is_missing(invoke, monkeypatch, tmp_path):
    done = invoke(*RUN, "--slurm", OPTIONS)
    assert done.exit_code == 2 and "srun" in done.stderr and not (tmp_path / "run").exists(), done.output
    monkeypatch.setitem(sys.modules, "submitit", None)
    done = invoke(*RUN, "--slurm", OPTIONS)
    assert done.exit_code == 2 and "pip install 'sslbench[slurm]'" in done.stderr, done.output


@pytest.mark.slow
def test_a_study_is_an_array_of_jobs_whose_numbers_the_same_command_finds(cluster, invoke, environment):
    rows = ["--rows", "mae,ocl", "--data", "builtin", "--budget", "64images", "--set", "science.data.image_size=16"]
    sent = invoke("study", *rows, "--slurm", OPTIONS, "--json")
    assert sent.exit_code == 0, sent.output
    answer = json.loads(sent.stdout.splitlines()[-1])
    assert [c["status"] for c in answer["cells"]] == ["submitted"] * 3 and answer["jobs"] == ["77_0", "77_1", "77_2"]
    assert "#SBATCH --array=0-2" in (cluster / "batch.sh").read_text()
    for i in range(3):
        ids = {"SLURM_JOB_ID": f"{78 + i}", "SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": f"{i}"}
        env = environment(cluster, {**ids, "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1",
                                    "SLURM_JOB_NODELIST": "localhost"})  # fmt: skip
        subprocess.run(["bash", "batch.sh"], cwd=cluster, env=env, check=True)
        assert "Traceback" not in (cluster / "said0").read_text(), (cluster / "said0").read_text()
    again = invoke("study", *rows, "--json")
    assert again.exit_code == 0 and "3 runs, 3 of them in the ledger" in again.stderr, again.output
    assert len(list((cluster / "runs").glob("*/run.json"))) == 2


def test_each_of_several_seeds_is_a_job_of_its_own(cluster, invoke):
    done = invoke(*RUN, "--seeds", "2", "--slurm", OPTIONS, "--json")
    assert done.exit_code == 0, done.output
    submitted = {"status": "submitted", "job": "77"}
    assert json.loads(done.stdout) == {
        "runs": [{"seed": 0, "run": str(cluster / "run"), **submitted},
                 {"seed": 1, "run": str(cluster / "run_s1"), **submitted}]
    }  # fmt: skip
