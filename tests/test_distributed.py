"""Several processes are one large device: the same weights, the same run folder, the same end when one of them dies."""

import json
import subprocess
import sys

import pytest
from safetensors.torch import load_file
from tiny import METHODS

# All methods in turn in each process, on a ViT of two blocks: the processes' start is most of the time.
TRAIN = """
import sys
from pathlib import Path
from rich.console import Console
from sslbench.pretrain import compose
from sslbench.train.loop import pretrain
from sslbench.vit import ARCHS, Arch
ARCHS["tiny"] = Arch(patch=8, dim=48, depth=2, heads=3, image=32)
out, world, *names = sys.argv[1:]
for name in names:
    sets = ["science.arch=tiny", "science.data.image_size=32", "science.batch_size=16", "science.epochs=0.08",
            "machine.precision=32", "machine.tensorboard=false", "machine.log_every=1"]
    if name == "ocl":
        sets.append("science.method.gather_negatives=true")
    if name == "mocov3":  # BatchNorm of features that are still much alike magnifies rounding: smaller steps
        sets.append("science.optim.lr=1e-5")
    recipe = compose(name, recipe=f"{name}_smoke", sets=sets, machine={"devices": int(world)})
    pretrain(recipe, Path(out) / name, Console(quiet=True), progress=False)
"""


def torchrun(world, *arguments, home, environment):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world), *map(str, arguments)]
    return subprocess.run([sys.executable, *command], cwd=home, env=environment(home, {"OMP_NUM_THREADS": "1"}),
                          capture_output=True, text=True, timeout=400)  # fmt: skip


def test_one_two_and_four_processes_end_with_the_same_weights(tmp_path, environment):
    """20 steps of each method, negatives gathered."""
    (tmp_path / "train.py").write_text(TRAIN)
    for world in (1, 2, 4):
        done = torchrun(world, "train.py", world, world, *METHODS, home=tmp_path, environment=environment)
        assert done.returncode == 0, done.stderr[-3000:]
    for name in METHODS:
        folders = [tmp_path / str(world) / name for world in (1, 2, 4)]
        one, *many = (load_file(folder / "weights.safetensors") for folder in folders)
        for k, x in one.items():
            # Two have no gradient but rounding, which Adam makes a step of: a key's bias, a shift before BatchNorm.
            if not k.endswith("qkv.bias") and (name, k) != ("mocov3", "norm.bias"):
                assert max((x - y[k]).abs().max().item() for y in many) < 1e-5, (name, k)
        logs = [[json.loads(x) for x in (f / "metrics.jsonl").read_text().splitlines()] for f in folders]
        for steps in zip(*logs, strict=True):
            for key in ("loss", "grad_norm"):  # Adam's weights do not show a gradient of another size
                assert [s[key] for s in steps] == pytest.approx([steps[0][key]] * 3, rel=1e-3), (name, steps[0]["step"])
