"""What keeps a step fast: nothing waits for the device, and a compiled step is one graph, made once."""

import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny import METHODS, SMALL, TINY, make, step
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from sslbench.commands import speed
from sslbench.commands.bench import matmul_peak
from sslbench.evaluate.start import pretrain
from sslbench.provenance import EnergyMeter
from sslbench.recipe import compose
from sslbench.vit import ARCHS

ROOT = Path(__file__).parents[1]
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::_to_cpu")  # on a GPU these wait for it


@pytest.mark.parametrize("name", METHODS)
def test_a_compiled_method_is_one_graph_and_stays_it(name):
    """dynamo's counts, by the backend that compiles nothing: of one trace, for every later step."""
    torch._dynamo.reset()
    counters.clear()
    method = make(name)
    method.compile(backend="eager")
    for i in range(3):
        step(method, i)["loss"].backward()
        method.after_step(i / 3)
    assert counters["stats"]["unique_graphs"] == counters["frames"]["total"] == 1, counters
    assert not counters["graph_break"] and not counters["recompiles"]


@pytest.mark.parametrize("name", METHODS)
def test_no_step_waits_for_the_device(name, tiny_arch, tmp_path):
    """Of the loop itself, four steps; between the first and the third update no log step comes to read anything."""
    sets = ["science.batch_size=16", "science.epochs=0.016", "machine.tensorboard=false", "machine.precision=32"]
    sets += [*tiny_arch[1::2], *(f"science.method.{key}={value}" for key, value in SMALL.get(name, {}).items())]
    recipe = compose(name, recipe=f"{name}_smoke", sets=[*sets, "machine.log_every=1000", "machine.save_every=1000"])
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        pretrain(recipe, tmp_path / "run", Console(quiet=True), progress=False)
    events = seen.events()
    updates = sorted(e.time_range.start for e in events if e.name == "aten::_fused_adamw_")
    per_step = len(updates) // 4
    first, third = updates[0], updates[2 * per_step]
    waits = [e for e in events if e.name in WAITS and first < e.time_range.start < third]
    # The CPU's fused AdamW reads its step counts, and on a CPU the loop its guard, once a step; a GPU's do neither.
    waits = [e for e in waits if "aten::_fused_adamw_" not in ancestors(e)]
    assert per_step and len(waits) == 2, [ancestors(e) for e in waits]


def ancestors(event):
    names = []
    while event := event.cpu_parent:
        names.append(event.name)
    return names


def curve(folder, how):
    """(Losses of 200 steps of MAE on a ViT of one block, each the mean of ten; the recipe's hash)."""
    sets = ["science.arch=tiny", "science.method.decoder_depth=1", "science.data.image_size=32",
            "science.batch_size=16", "science.epochs=0.8", "machine.precision=32", how, "machine.tensorboard=false",
            "machine.log_every=10"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHS, "tiny", replace(TINY, depth=1))
        recipe = compose("mae", recipe="mae_smoke", sets=sets)
        pretrain(recipe, folder, Console(quiet=True), progress=False)
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line], recipe.hash()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return curve(tmp_path_factory.mktemp("plain"), "machine.compile=false")


@pytest.mark.slow
@pytest.mark.parametrize(("how", "tolerance"), [("machine.precision=bf16", 0.02), ("machine.compile=true", 0.002)])
def test_bf16_and_compilation_leave_the_loss_curve_and_the_hash_as_they_are(how, tolerance, plain, tmp_path):
    if "compile" in how and not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    losses, science = plain
    assert len(losses) == 20 and losses[-1] < 0.9 * losses[0]
    assert curve(tmp_path / "run", how) == (pytest.approx(losses, rel=tolerance), science)


def test_bench_against_a_command_takes_turns_and_gives_the_ratio(invoke, tmp_path):
    (tmp_path / "rival.py").write_text("open('turns', 'a').write('B')\nprint('it ran at 100.0 images/s: 50')")
    bench = ["bench", "mae", "--arch", "vit_mini4", "--batch-size", 8, "--seconds", 0.1, "--json", "--against"]
    done = invoke(*bench, f"{sys.executable} rival.py")
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout)["rows"]
    assert (tmp_path / "turns").read_text() == "BB" and row["against_images_per_s"] == 50
    assert row["ratio"] == pytest.approx(row["images_per_s"] / 50)
    done = invoke(*bench, f"{sys.executable} -c 1/0")
    assert done.exit_code == 2 and "exit status 1 (ZeroDivisionError" in done.stderr


# What sslbench.reference takes from a clone of MAE's code: this name, these arguments, a block with qk_scale.
CLONE = """
import numpy as np
import torch
from timm.models.vision_transformer import Block

class MaskedAutoencoderViT(torch.nn.Module):
    def __init__(self, img_size, patch_size, embed_dim, depth, num_heads, decoder_embed_dim, decoder_depth,
                 decoder_num_heads, norm_layer, norm_pix_loss):
        super().__init__()
        assert (img_size, patch_size, embed_dim, depth, num_heads) == (32, 4, 192, 6, 3), np.float(1)
        assert (decoder_embed_dim, decoder_depth, decoder_num_heads, norm_pix_loss) == (128, 2, 4, False)
        self.block = Block(48, 3, 4, qkv_bias=True, qk_scale=None, norm_layer=norm_layer)

    def forward(self, images, mask_ratio):
        assert mask_ratio == 0.75
        return self.block(images.flatten(2).reshape(len(images), -1, 48)).square().mean(), None, None
"""


@pytest.mark.slow
def test_bench_targets_measures_what_is_here_and_keeps_what_is_not(invoke, home, tmp_path, monkeypatch):
    clone = tmp_path / "mae"
    clone.mkdir()
    (clone / "models_mae.py").write_text(CLONE)
    targets = [
        speed.Target("mae", "vit_mini4", "times MAE's code", 1.5, "CPU", 4),
        speed.Target("ocl", "vit_mini4", "of MAE's FLOP/s", 0.9, "CPU", 4),
        speed.Target("ocl", "vit_l16", "images/s", 2141, "H200", 256),
    ]
    monkeypatch.setattr(speed, "TARGETS", targets)
    bench = ["bench", "--targets", "--seconds", 0.1, "--json"]
    monkeypatch.setattr(speed, "bf16_is_fast", lambda device: False)
    done = invoke(*bench)
    assert done.exit_code == 0, done.output
    assert [row["measured"] for row in json.loads(done.stdout)["rows"]] == [None] * 3
    assert "no faster" in json.loads((home / "results" / "speed.json").read_text())[1]["why"]
    (home / "results" / "speed.json").unlink()
    monkeypatch.setattr(speed, "bf16_is_fast", lambda device: True)  # measured as it would be, however slowly
    done = invoke(*bench)
    assert done.exit_code == 0, done.output
    mae, ocl, far = json.loads(done.stdout)["rows"]
    assert mae["measured"] is far["measured"] is None and ocl["measured"] > 0
    assert "--reference" in mae["why"] and far["why"] == "no H200 at hand"
    elsewhere = far | {"measured": 2500.0, "images_per_s": 2500.0, "batch": 256, "hardware": {"device": "NVIDIA H200",
                       "threads": 16}} | {k: ocl[k] for k in ("versions", "commit", "command", "date", "matmul_share",
                       "peak_memory_gib")}  # fmt: skip
    path = home / "results" / "speed.json"
    rival = ocl | {"hardware": {"device": "another CPU", "devices": 1, "threads": 2, "bf16": "AMX"}}
    path.write_text(json.dumps([mae, rival, ocl, elsewhere]))
    done = invoke(*bench, "--reference", clone)
    assert done.exit_code == 0, done.output
    mae, other, again, far = json.loads(path.read_text())
    assert far == elsewhere and other == rival and again["hardware"] == ocl["hardware"] and again["date"] >= ocl["date"]
    assert mae["measured"] == pytest.approx(mae["images_per_s"] / mae["against_images_per_s"])
    assert {"hardware", "versions", "commit", "command", "date"} < mae.keys()
    page = (home / "results" / "speed.md").read_text()
    assert "NVIDIA H200" in page and "another CPU (AMX), 2 threads" in page
    assert "| ocl vit_l16, images/s | ≥ 2,141 | 2,500 |" in page
    (clone / "models_mae.py").unlink()
    for wrong in (["--targets", "--reference", clone], ["--targets", "ocl"], ["--reference", clone]):
        assert invoke("bench", *wrong).exit_code == 2
    assert json.loads(path.read_text())[3] == elsewhere


def test_the_matmul_peak_is_found_in_seconds_where_bf16_is_emulated_too():
    began = time.perf_counter()
    assert 0 < matmul_peak(torch.device("cpu"), torch.bfloat16) < 1e14
    assert time.perf_counter() - began < 60  # at 2048, 8 products of a minute each on a core without bf16


def test_the_committed_speeds_are_those_of_the_targets():
    rows = json.loads((ROOT / "results" / "speed.json").read_text())
    at_least = {t.name: t.at_least for t in speed.TARGETS}
    assert list(dict.fromkeys(row["target"] for row in rows)) == list(at_least)
    for row in rows:
        assert row["at_least"] == at_least[row["target"]] and ("why" in row) == (row["measured"] is None)
    assert len({(row["target"], str(row.get("hardware"))) for row in rows}) == len(rows)
    assert (ROOT / "results" / "speed.md").read_text() == speed.page(rows)


def test_joules_are_read_where_the_device_reports_them(tmp_path):
    assert EnergyMeter("cpu", tmp_path).read() is None
    socket = tmp_path / "intel-rapl:0"
    socket.mkdir()
    (socket / "energy_uj").write_text("1000000\n")
    meter = EnergyMeter("cpu", tmp_path)
    (socket / "energy_uj").write_text("3500000\n")
    assert meter.read() == 2.5
    (socket / "energy_uj").write_text("10\n")  # it went round
    assert meter.read() is None
