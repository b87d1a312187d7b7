"""Several processes are one large device: the same weights, the same run folder, the same end when one of them dies."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from tiny import METHODS

from sslbench.errors import UserError
from sslbench.recipe import compose
from sslbench.train.job import Pretraining
from sslbench.train.shard import shards
from sslbench.train.state import save_checkpoint

# Phases [name, processes, strategy, methods], the methods in turn in each process, on a ViT of two blocks. Under
# torchrun this is one of its processes; else it forks them, since to start them takes longer than to train.
TRAIN = """
import json, multiprocessing, os, socket, sys
from pathlib import Path
from rich.console import Console
from sslbench.recipe import compose
from sslbench.evaluate.start import pretrain
from sslbench.vit import ARCHS, Arch

def train(out, world, strategy, names, rank=None, port=0):
    if rank is not None:
        os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ARCHS["tiny"] = Arch(patch=8, dim=48, depth=2, heads=3, image=32)
    for name in names:
        sets = ["science.arch=tiny", "science.data.image_size=32", "science.batch_size=16", "science.epochs=0.048",
                "machine.precision=32", "machine.tensorboard=false", "machine.log_every=1", "machine.save_every=6"]
        if name == "ocl":
            sets += ["science.method.gather_negatives=true", "science.optim.clip_grad=0.5"]
        if name == "mocov3":  # BatchNorm of features that are still much alike magnifies rounding: smaller steps
            sets += ["science.optim.lr=1e-5", "science.method.hidden_dim=64", "science.method.projector_dim=16"]
        recipe = compose(name, recipe=f"{name}_smoke", sets=sets, machine={"devices": world, "strategy": strategy})
        for folder in (Path(out) / name, Path(f"resumed{out}") / name):
            if folder.parent.name == out or folder.is_dir():
                pretrain(recipe, folder, Console(quiet=True), progress=False)

for phase in json.loads(sys.argv[1]):
    if "TORCHELASTIC_RUN_ID" in os.environ:
        train(*phase)
        continue
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=train, args=(*phase, rank, port)) for rank in range(phase[1])]
    for p in processes:
        p.start()
    for p in processes:
        p.join()
    assert not any(p.exitcode for p in processes)
"""
# A parameter without a dimension; parts of blocks that are called by themselves; a momentum encoder and its memory.
SHARDED = ("ocl", "ccmim", "macrl")
# What is copied when, to be finished by how many.
RESUMED = {"2": [("1", "ocl"), ("4", "ocl"), ("4", "macrl"), ("fsdp", "ocl")], "fsdp": [("1", "macrl")]}


def rewound(run, folder):
    """A copy as it was after 6 of the 12 steps."""
    shutil.copytree(run, folder)
    for path in (folder / "weights.safetensors", *folder.glob("checkpoints/step_000000012.*")):
        path.unlink()
    info = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**info, "status": "running"}))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, environment, request):
    """WORLD/METHOD: runs of 12 steps, negatives gathered; fsdp: of 2 processes that shard. resumedWORLD/METHOD: what 2
    processes saved after 6 of them, finished by WORLD; what 1 finishes of MACRL, these 2 sharded."""
    home = tmp_path_factory.mktemp("distributed")
    (home / "train.py").write_text(TRAIN)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    compared = {item.name for item in request.session.items if item.name.startswith("test_one_two_and_four")}
    names = [name for name in METHODS if name in SHARDED or any(f"[{name}]" in test for test in compared)]
    two, fsdp = ["2", 2, "ddp", names], ["fsdp", 2, "fsdp", SHARDED]
    one, four = ["1", 1, "ddp", names], ["4", 4, "ddp", names]
    for launcher, phases in ((torchrun, [two, fsdp]), ([], [fsdp, one, four])):  # the second time fsdp resumes only
        done = subprocess.run([sys.executable, *launcher, "train.py", json.dumps(phases)], cwd=home,
                              env=environment(home, {"OMP_NUM_THREADS": "1"}), capture_output=True, text=True,
                              timeout=400)  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        if launcher:
            for out, copies in RESUMED.items():
                for to, name in copies:
                    rewound(home / out / name, home / f"resumed{to}" / name)
    return home


def same(one, other, name):
    """Weights to 1e-5. Not two that have no gradient but rounding, which Adam makes a step of: a key's bias, and a
    shift before BatchNorm."""
    one, other = (load_file(folder / "weights.safetensors") for folder in (one, other))
    for k, x in one.items():
        if not k.endswith("qkv.bias") and (name, k) not in [("mocov3", "norm.bias"), ("lejepa", "norm.bias")]:
            assert (x - other[k]).abs().max().item() < 1e-5, (name, k)


@pytest.mark.parametrize(
    "name", [name if name in SHARDED else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_one_two_and_four_processes_end_with_the_same_weights(name, trained):
    folders = [trained / out / name for out in ("1", "2", "4", *(["fsdp"] if name in SHARDED else []))]
    for folder in folders[1:]:
        same(folders[0], folder, name)
    if name in SHARDED:
        assert "strategy: fsdp" in (folders[3] / "recipe.yaml").read_text()
    logs = [[json.loads(x) for x in (f / "metrics.jsonl").read_text().splitlines()] for f in folders]
    assert len(logs[0]) == 12
    for steps in zip(*logs, strict=True):
        for key in ("loss", "grad_norm"):  # Adam's weights do not show a gradient of another size
            assert [s[key] for s in steps] == pytest.approx([steps[0][key]] * len(folders), rel=1e-3), steps[0]["step"]


@pytest.mark.parametrize(("to", "name"), [x for copied in RESUMED.values() for x in copied])
def test_what_two_processes_saved_one_or_four_finish_sharded_or_not(to, name, trained):
    folder, world = trained / f"resumed{to}" / name, 2 if to == "fsdp" else int(to)
    info = json.loads((folder / "run.json").read_text())
    assert (info["status"], info["step"], info["resumed"], info["hardware"]["devices"]) == ("finished", 12, 1, world)
    same(trained / "2" / name, folder, name)


@pytest.mark.slow
def test_a_signal_or_a_death_in_one_process_stops_all_and_the_same_command_resumes(tmp_path, environment):
    command = [sys.executable, "-m", "sslbench", "pretrain", "ocl", "--recipe", "ocl_smoke", "--batch-size", "32",
               "--epochs", "0.48", "--devices", "2", "--set", "machine.save_every=5",
               "--set", "machine.log_every=1",
               "--set", "machine.tensorboard=false", "--set", "science.method.gather_negatives=true"]  # fmt: skip
    env = environment(tmp_path, {"OMP_NUM_THREADS": "1"})

    def start():
        return subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)

    def wait_for_more(process):
        """Until there is a checkpoint that was not there."""
        before = set(tmp_path.glob("runs/*/checkpoints/step_*.sha256"))
        while not set(tmp_path.glob("runs/*/checkpoints/step_*.sha256")) - before:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)

    def facts():
        (path,) = tmp_path.glob("runs/*/run.json")
        run = json.loads(path.read_text())
        return run["status"], run["step"], run["resumed"]

    process = start()
    wait_for_more(process)
    process.send_signal(signal.SIGUSR1)  # to the first alone
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "SIGUSR1 after step" in said, said
    status, stopped, _ = facts()
    assert status == "interrupted" and 5 <= stopped < 60

    process = start()
    wait_for_more(process)
    child = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()[0]
    os.kill(int(child), signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and "another process of this run has died" in said and "Traceback" not in said
    assert facts()[0] == "failed" and stopped < facts()[1] < 60

    _, said = (process := start()).communicate(timeout=200)
    assert process.returncode == 0 and facts() == ("finished", 60, 2), said


SRUN = {"SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_ID": "4711"}


def test_what_srun_started_is_one_run_that_talks_and_scores_once(tmp_path, environment):
    command = [sys.executable, "-m", "sslbench", "eval", "finetune", "untrained:vit_mini4@16", "--data", "builtin",
               "--recipe", "finetune_smoke", "--set", "science.epochs=0.05", "--json"]  # fmt: skip
    tasks = []
    for i in "01":
        env = environment(tmp_path, {**SRUN, "OMP_NUM_THREADS": "1", "SLURM_PROCID": i, "SLURM_LOCALID": i})
        tasks.append(subprocess.Popen(command, cwd=tmp_path, env=env, text=True,
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE))  # fmt: skip
    (out, said), (nothing, _) = (task.communicate(timeout=200) for task in tasks)
    assert [task.returncode for task in tasks] == [0, 0], said
    (line,) = (tmp_path / "results/ledger/untrained.jsonl").read_text().splitlines()
    assert json.loads(out) == json.loads(line) and json.loads(line)["hardware"]["devices"] == 2 and not nothing


@pytest.mark.parametrize(
    ("env", "args", "says"),
    [
        (
            {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2", "RANK": "0"},
            ["--devices", "4"],
            "torchrun started 2 process(es) on each of 2 machine(s)",
        ),
        ({**SRUN, "SLURM_PROCID": "0"}, ["--devices", "3"], "give --devices 2 --nodes 1"),
        ({**SRUN, "SLURM_PROCID": "1"}, ["--devices", "3"], ""),  # the first has said it
        ({**SRUN, "SLURM_PROCID": "0", "SLURM_NTASKS": "3", "SLURM_NNODES": "2"}, [], "3 processes on 2 machines"),
        ({}, ["--nodes", "2"], "torchrun or srun"),
    ],
)
def test_what_started_the_processes_and_what_the_recipe_says_must_agree(env, args, says, invoke, monkeypatch, tmp_path):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    done = invoke("pretrain", "mae", "--recipe", "mae_smoke", *args)
    assert done.exit_code == 2 and says in done.stderr and "Traceback" not in done.stderr
    assert says or not done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", ["eval knn", "eval linprobe", "eval robustness", "report", "doctor", "inspect"])
def test_what_one_process_measures_the_others_leave_to_it(command, invoke, monkeypatch, tmp_path):
    for name, value in {**SRUN, "SLURM_PROCID": "1"}.items():
        monkeypatch.setenv(name, value)
    done = invoke(*command.split(), "--json")
    assert (done.exit_code, done.output, list(tmp_path.iterdir())) == (0, "", [])


def test_several_processes_that_measure_write_one_line(invoke, few_images, monkeypatch, tmp_path):
    for rank in "01":
        for name, value in {
            "TORCHELASTIC_RUN_ID": "x",
            "WORLD_SIZE": "2",
            "GROUP_WORLD_SIZE": "1",
            "RANK": rank,
        }.items():
            monkeypatch.setenv(name, value)
        done = invoke("eval", "knn", "untrained:vit_mini4@16", "--data", "builtin", "--set", "science.k=[20]", "--json")
        assert done.exit_code == 0, done.stderr
        assert (json.loads(done.stdout)["metric"] == "knn_top1") if rank == "0" else not done.output
    assert len((tmp_path / "results/ledger/untrained.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("command", ["ablate asl_t7", "quickstart", "plan mae", "bench mae"])
@pytest.mark.parametrize("rank", "01")
def test_what_trains_more_than_one_run_is_refused_to_several_processes(command, rank, invoke, monkeypatch, tmp_path):
    for name, value in {**SRUN, "SLURM_PROCID": rank}.items():
        monkeypatch.setenv(name, value)
    done = invoke(*command.split())
    assert done.exit_code == 2 and not list(tmp_path.iterdir())
    assert ("srun started 2 processes" in done.stderr) == (rank == "0") and len(done.stderr.splitlines()) <= 1


def test_an_ablation_over_several_devices_is_refused(invoke, tmp_path):
    done = invoke("ablate", "asl_t7", "--set", "machine.devices=2")
    assert done.exit_code == 2 and "leave machine.devices" in done.stderr and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("devices", "batch"), [(3, 9900), (3, 100), (8, 100)])
def test_images_that_one_loss_compares_divide_over_the_devices_or_are_refused(devices, batch, invoke):
    """Never 99 of them under a hash that says 100."""
    done = invoke("pretrain", "ocl", "--recipe", "ocl_smoke", "--batch-size", batch, "--devices", devices,
                  "--dry-run", "--set", "science.contrastive_batch=100",
                  "--set", "science.method.gather_negatives=true")  # fmt: skip
    assert done.exit_code == 2 and f"compares 100 images over all devices, which {devices}" in done.stderr


AGREE = """
import json, multiprocessing, os, socket, sys
from pathlib import Path
from types import SimpleNamespace
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from lightning_fabric.plugins.environments import LightningEnvironment
from rich.console import Console
from sslbench.data import open_split
from sslbench.data.loader import MicroBatches
from sslbench.errors import RunFailed
from sslbench.method import get_method
from sslbench.recipe import compose
from sslbench.evaluate.start import pretrain
from sslbench.train import loop
from sslbench.train.run import newest

def fabric(*_):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    precision = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    return Fabric(accelerator="cpu", devices=2, strategy="ddp", plugins=[LightningEnvironment(), precision])

def outcome(f, *args):
    try:
        return f(*args)
    except RunFailed as e:
        return str(e)

def agree(rank, port):
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    mae = get_method("mae")
    honest = mae.loss
    mae.loss = lambda self, x: {k: v * (float("nan") if rank else 1) for k, v in honest(self, x).items()}
    loop.make_fabric = fabric
    sets = ["science.batch_size=16", "science.epochs=0.08", "machine.log_every=5", "machine.tensorboard=false"]
    recipe = compose("mae", recipe="mae_smoke", sets=sets, machine={"devices": 2})
    found = {"fp16": outcome(pretrain, recipe, Path("fp16"), Console(quiet=True), False)}
    run = SimpleNamespace(fabric=(f := fabric()), checkpoints=Path(f"checkpoints{rank}"))
    f.launch()
    found["step"] = outcome(lambda: newest(run)[0])
    loader = MicroBatches(open_split("builtin", "train"), seed=0, micro=4, world=2, accumulation=1, rank=rank,
                          device=f.device, crops=1, image_size=16, crop_scale=(1, 1), workers=0, distort=str)
    loader.corrupt = {3, 4} if rank else {0, 1, 2}  # each fewer than a thousandth of 4,000
    found["corrupt"] = outcome(loader.check_corrupt)
    Path(f"found{rank}").write_text(json.dumps(found))

with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
fork = multiprocessing.get_context("fork")
processes = [fork.Process(target=agree, args=(rank, port)) for rank in range(2)]
for p in processes:
    p.start()
for p in processes:
    p.join()
assert not any(p.exitcode for p in processes)
"""


def test_processes_agree_on_what_one_of_them_finds(tmp_path, environment):
    """A loss that is not finite under fp16, where gradients may overflow; a damaged checkpoint; unreadable files."""
    for rank in (0, 1):
        for step in (10, 20):
            save_checkpoint(tmp_path / f"checkpoints{rank}", step, {"step": torch.tensor(step)})
    (tmp_path / "checkpoints0/step_000000020.sha256").unlink()  # the first process goes back to 10
    (tmp_path / "agree.py").write_text(AGREE)
    done = subprocess.run([sys.executable, "agree.py"], cwd=tmp_path, capture_output=True, text=True, timeout=400,
                          env=environment(tmp_path, {"OMP_NUM_THREADS": "1"}))  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"found{rank}").read_text()) for rank in (0, 1))
    assert first["step"] == second["step"] == 10
    assert "5 of 4000 images cannot be read" in first["corrupt"] and first["corrupt"] == second["corrupt"]
    assert first["fp16"] == second["fp16"] and "not finite at or before step 1" in first["fp16"]


SMALL = ["science.data.image_size=224", "science.method.gather_negatives=true", "machine.devices=2"]


@pytest.mark.parametrize(
    ("args", "sharded"),
    [
        (["science.arch=vit_h14"], True),
        (["science.arch=vit_l16"], False),
        (["science.arch=vit_h14", "machine.devices=1"], False),
        (["science.arch=vit_h14", "machine.compile=true"], False),
        (["science.arch=vit_h14", "machine.strategy=ddp"], False),
        (["machine.strategy=fsdp"], True),
        (["machine.strategy=fsdp", "machine.compile=true"], "machine.compile"),
        (["machine.strategy=fsdp", "machine.micro_batch=8"], "gradient cache"),
        (["machine.strategy=fsdp", "machine.precision=16"], "machine.precision=16"),
    ],
)
def test_large_encoders_are_sharded_over_several_devices(args, sharded):
    job = Pretraining(compose("ocl", recipe="ocl_smoke", sets=[*SMALL, *args]))
    if isinstance(sharded, bool):
        assert shards(job, job.batch()) == sharded
    else:
        with pytest.raises(UserError, match=sharded):
            shards(job, job.batch())
