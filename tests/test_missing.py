"""Every command that `report --missing` prints, run without training or images, fills the cell it was printed for."""

import contextlib
import functools
import io
import itertools
import json
import shlex
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from sslbench import ledger, provenance
from sslbench.data import open_split
from sslbench.evaluate import evaluation, features, finetune, probe
from sslbench.method import get_method, methods
from sslbench.recipe import dump
from sslbench.report.missing import missing
from sslbench.report.papers import measured_for
from sslbench.report.tables import newest
from sslbench.study import measure
from sslbench.study.printed import paper_tables, plugin_of, protocol_of, read_paper
from sslbench.study.tables import behind, pretraining_of
from sslbench.train import loop
from sslbench.train.job import save_weights
from sslbench.transfer import job as transfer_job
from sslbench.transfer import transfer
from sslbench.vit import VisionTransformer, get_arch
from sslbench.weights import hashes

NUMBERS = [name for name in paper_tables() if not name.endswith("_text")]
SPENT = {"wall_s": 1.0, "device_hours": 0.1, "flops": 1e9, "peak_memory_gib": 1.0, "joules": None, "images_seen": 1}


def pretend(job, folder, console, progress=True):
    """In place of `fit`: the run folder of a finished run, its weights one number with the true metadata."""
    if (folder / "run.json").is_file():
        return "already finished"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump(job.recipe))
    weights, tensors = folder / "weights.safetensors", {"of": torch.tensor([hash(folder.name)])}
    if job.kind == "pretrain":
        s = job.recipe.science
        encoder = SimpleNamespace(state_dict=lambda: tensors, arch=get_arch(s.arch), image=(s.data.image_size,) * 2)
        save_weights(weights, SimpleNamespace(encoder=encoder, pool=get_method(job.recipe.method).pool), job.recipe)
    else:
        save_file(tensors, weights)
    info = {"kind": job.kind, **job.info(), "status": "finished", "updated": provenance.now(), "cost": SPENT}
    info["data_fingerprint"] = open_split("builtin", "train").fingerprint
    info |= hashes(weights)
    (folder / "run.json").write_text(json.dumps(info))
    return "finished"


@pytest.fixture
def virtually(tmp_path, monkeypatch, run_here):
    """virtually(command): what the command line does, its folders, hashes and records too, but for images, training and
    forward passes. Every value differs."""
    monkeypatch.setenv("SSLBENCH_HOME", str(tmp_path))
    values = itertools.count(1)
    splits = [open_split("builtin", split) for split in ("train", "val")]

    @functools.cache
    def shapes(arch, image):
        with torch.device("meta"):
            return VisionTransformer(arch, image)

    def right(model, data, *_):
        """Logits that are right for as many of the images as the next value says."""
        logits = torch.nn.functional.one_hot(data.labels, len(data.classes)).float()
        return logits * torch.where(torch.arange(len(data)) < next(values), 1, -1)[:, None]

    def task(kind, names):
        def open_data(root, science):
            return [transfer_job.Split(kind, split, [0] * 100, kind) for split in ("train", "val")]

        def score(*_):
            return {name: next(values) / 10 for name in names}, {}

        module = SimpleNamespace(open_data=open_data, score=score, draw=lambda *_: None, image_size=lambda s: 1024)
        monkeypatch.setitem(sys.modules, f"sslbench.transfer.{kind}", module)

    task("coco", [f"{what}_ap{at}" for what in ("bbox", "mask") for at in ("", "50", "75")])
    task("ade20k", ["miou", "aacc", "macc"])
    monkeypatch.setattr(loop, "fit", pretend)
    monkeypatch.setattr(features, "VisionTransformer", shapes)
    monkeypatch.setattr(features, "load_exactly", lambda *_: None)
    for module in (measure, evaluation):
        monkeypatch.setattr(module, "open_both", lambda spec: splits)
        monkeypatch.setattr(module, "open_test", lambda spec: splits[1])
    monkeypatch.setattr(measure, "open_split", lambda spec, split: splits[0])
    monkeypatch.setattr(evaluation, "predict", right)
    tuned = SimpleNamespace(encoder=SimpleNamespace(image=(224, 224)))
    monkeypatch.setattr(evaluation, "load_classifier", lambda path: (tuned, splits[1].classes, "vit_b16"))
    for job in (finetune.FinetuneJob, probe.ProbeJob):
        monkeypatch.setattr(job, "score", lambda *_: (next(values) / 10, {}))
    monkeypatch.setattr(transfer, "require", lambda: None)
    monkeypatch.setattr(transfer_job, "check_encoder", lambda *_: None)  # of positions, which shapes do not have
    monkeypatch.setattr(transfer, "find_data", lambda kind, data: tmp_path)
    monkeypatch.setattr(transfer, "read_safetensors", lambda path: ({}, {}))
    for module in (transfer, transfer_job):
        monkeypatch.setattr(module, "scope_of", lambda task: contextlib.nullcontext())
    monkeypatch.setattr(transfer.TransferJob, "build", lambda self: SimpleNamespace(model=nn.Identity()))
    for module in ("report.missing", "study.cells"):
        monkeypatch.setattr(f"sslbench.{module}.flops_per_image", lambda recipe: 1.0)

    def run(command, status=0):
        words = shlex.split(command)
        assert words[0] == "sslbench"
        done = run_here(*words[1:], home=tmp_path, env={"SSLBENCH_HOME": str(tmp_path)})
        assert done.returncode == status, (command, done.stderr)
        return done

    return run


def own_numbers():
    """(table, line) of every number that a paper prints of what this suite trains."""
    for name in NUMBERS:
        for _, line in read_paper(name).iterrows():
            if line["value"] and plugin_of(line) in methods() and protocol_of(line):
                yield name, line


def test_every_command_of_missing_fills_the_cells_it_was_printed_for(virtually):
    quiet = Console(file=io.StringIO())
    entries = missing([], [], quiet)
    for command in dict.fromkeys(c for entry in entries for c in (entry["pretrain"], *entry["eval"])):
        virtually(command)
    records, lines = newest(ledger.read()), list(own_numbers())
    held = {(name, *line[["row", "method", "metric", "dataset"]]): len(behind(line, records)) for name, line in lines}
    assert len(lines) > 300 and {k: n for k, n in held.items() if n != 1} == {}
    assert all(measured_for(line, records) for _, line in lines) and missing([], records, quiet) == []


@pytest.mark.parametrize("name", ["asl_t1", "ocl_t6", "asl_t4", "asl_t6", "ccmim_t4", "macrl_t1"])
def test_a_papers_table_is_a_study_that_fills_its_cells_and_is_not_run_twice(name, virtually):
    trained = [line for table, line in own_numbers() if table == name and pretraining_of(line)]
    for _ in range(2):
        virtually(f"sslbench study {name} --scale paper")
        records = ledger.read()
        assert [len(behind(line, newest(records))) for line in trained] == [1] * len(trained) != []
        assert len({(r.metric, r.dataset, r.protocol.hash, r.pretrain.recipe_hash) for r in records}) == len(records)


def test_robustness_scores_the_model_that_is_meant_or_none(virtually, tmp_path):
    """Of two fine-tuned models the first is tuned "again" and found finished, which does not make it the newest."""
    for method in ("mae", "ocl"):
        virtually(f"sslbench pretrain {method} --arch vit_b16 --data imagenet")
    mae, ocl = sorted((tmp_path / "runs").iterdir())
    for run in (mae, ocl, mae):
        virtually(f"sslbench eval finetune {run} --recipe finetune --data imagenet")
    score = "sslbench eval robustness {} --data folder:imagenet-a --json"
    said = virtually(score.format(""), status=2).stderr
    assert "2 fine-tuned models" in said and f"finetune_{mae.name}" in said and f"finetune_{ocl.name}" in said
    for run in (mae, ocl, mae.name):
        answer = json.loads(virtually(score.format(run)).stdout.splitlines()[-1])
        assert (answer["method"], answer["metric"]) == (getattr(run, "name", run).partition("_")[0], "top1")
    virtually(f"sslbench eval finetune {mae} --recipe finetune_ccmim --data imagenet")
    assert "--set science.finetune=" in virtually(score.format(mae), status=2).stderr
    by = [json.loads(virtually(score.format(f"{mae} --set science.finetune={name}")).stdout.splitlines()[-1])
          for name in ("finetune", "finetune_ccmim")]  # fmt: skip
    assert by[0]["protocol"]["hash"] != by[1]["protocol"]["hash"] and answer["protocol"] == by[0]["protocol"]
    assert "by that recipe" in virtually(score.format(f"{mae} --set science.finetune=finetune_l"), status=2).stderr
    virtually(score.format(f"{mae} --set science.finetune=finetune_x"), status=2)
