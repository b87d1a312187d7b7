"""Each command as a user types it, at smoke scale on real images, and what it says to bad input."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

from sslbench.cli import app
from sslbench.commands.ablate import ablations
from sslbench.data import open_split
from sslbench.evaluate.features import open_subject
from sslbench.method import methods
from sslbench.recipe import Batch
from sslbench.study.cells import rows_of
from sslbench.study.spec import read_study
from sslbench.train.build import build
from sslbench.train.meter import Metrics, read_metrics

METHODS = list(methods())
BENCHED = ["mae", "mocov3", "ocl"]  # each in a process of its own: seconds of start-up
SMOKE = ["--recipe", "ocl_smoke", "--set", "machine.tensorboard=false"]


def last_json(done):
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, run_here):
    """One smoke run that several tests read."""
    home = tmp_path_factory.mktemp("home")
    done = run_here("pretrain", "ocl", *SMOKE, "--json", home=home)
    assert done.returncode == 0, done.stderr
    return home, last_json(done)


def test_pretrain_writes_a_complete_run_folder(trained):
    home, answer = trained
    assert answer["status"] == "finished"
    folder = home / "runs" / answer["run"].rsplit("/", 1)[-1]
    assert re.fullmatch(r"ocl_vit_mini4_builtin_[0-9a-f]{8}", folder.name)
    assert {"recipe.yaml", "run.json", "metrics.jsonl", "checkpoints", "weights.safetensors"} <= {
        p.name for p in folder.iterdir()
    }
    run = json.loads((folder / "run.json").read_text())
    assert run["status"] == "finished" and run["cost"]["wall_s"] > 0 and run["cost"]["flops"] > 1e9
    assert run["hardware"]["device"] and run["versions"]["torch"] and run["data_fingerprint"]
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == run["steps_total"] and {
        "loss",
        "nce",
        "grad_norm",
        "lr",
        "images_per_s",
        "data_wait",
    } <= set(last)


def test_a_finished_run_is_left_alone(trained, run_here):
    home, _ = trained
    before = {p: p.stat().st_mtime_ns for p in (home / "runs").rglob("*.safetensors")}
    done = run_here("pretrain", "ocl", *SMOKE, "--json", home=home)
    assert done.returncode == 0 and "already finished" in done.stderr
    assert {p: p.stat().st_mtime_ns for p in (home / "runs").rglob("*.safetensors")} == before


def test_eval_reads_the_newest_run_and_says_so(trained, run_here):
    home, answer = trained
    done = run_here("eval", "knn", "--json", home=home)
    assert done.returncode == 0, done.stderr
    record = last_json(done)
    assert answer["run"].rsplit("/", 1)[-1] in done.stderr
    assert record["metric"] == "knn_top1" and 5 < record["value"] < 60 and record["n"] == 1000
    assert record["pretrain"]["run"] in answer["run"] and record["cost"]["flops"] > 1e9 and record["scale"] == "tiny"
    probe = run_here("eval", "linprobe", answer["run"], "--json", home=home)
    assert probe.returncode == 0 and last_json(probe)["metric"] == "linprobe_top1"
    lines = [json.loads(x) for x in (home / "results/ledger/ocl.jsonl").read_text().splitlines()]
    assert {r["metric"] for r in lines} >= {"knn_top1", "linprobe_top1"}


def test_export_for_timm_gives_the_same_features(trained, run_here):
    import timm
    import torch

    from sslbench.evaluate.features import open_subject

    home, answer = trained
    done = run_here("export", answer["run"], "--format", "timm", "--json", home=home)
    assert done.returncode == 0, done.stderr
    out = last_json(done)
    model = timm.create_model(out["model"], checkpoint_path=str(home / out["file"]), **out["kwargs"]).eval()
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    encoder = open_subject(str(home / answer["run"])).encoder.eval()
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(x), encoder(x), atol=1e-5, rtol=0)


def test_report_list_doctor_and_data_check(trained, invoke, monkeypatch):
    home, _ = trained
    monkeypatch.chdir(home)

    def run(*args):
        done = invoke(*args, "--json")
        assert done.exit_code == 0, done.stderr
        return last_json(done)

    run("eval", "knn")
    assert "<html" in (home / run("report")["report"]).read_text()
    for what in ("methods", "recipes", "archs", "tables", "runs"):
        assert isinstance(run("list", what)[what], list)
    assert {m["method"] for m in run("list", "methods")["methods"]} >= {"ocl", "mae"}
    assert [s["images"] for s in run("data", "list", "builtin")["data"]] == [4000, 1000]
    assert run("doctor")["torchvision_operators"] is True
    assert run("data", "check", "builtin")["splits"]["train"]["images"] == 4000
    assert invoke("data", "list").exit_code == 0


def test_bench_measures_methods_against_the_matmul_peak_each_with_its_own_memory(run_sslbench, tmp_path):
    done = run_sslbench("bench", *BENCHED, "ocl", "--arch", "vit_mini4", "--batch-size", "16", "--seconds", "0.1",
                        "--json", home=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = last_json(done)["rows"]
    assert [row["method"] for row in rows] == [*BENCHED, "ocl"]
    for row in rows:  # the share may pass 1 where other work slowed the peak's measurement
        assert row["images_per_s"] > 1 and row["matmul_share"] > 0.01 and row["peak_memory_gib"] > 0.1
    memory = {row["method"]: row["peak_memory_gib"] for row in rows[:-1]}
    assert memory["mocov3"] > memory["ocl"]  # all tokens of two views against a few of one
    assert abs(rows[-1]["peak_memory_gib"] - memory["ocl"]) < 0.15  # whatever ran before


FIVE = ["ocl", "asl", "ccmim", "macrl", "mae"]


@pytest.mark.parametrize("name", [*FIVE, *(pytest.param(n, marks=pytest.mark.slow) for n in METHODS if n not in FIVE)])
def test_every_methods_smoke_recipe_trains_and_is_evaluated(name, invoke, few_images, tmp_path):
    command = ["pretrain", name, "--recipe", f"{name}_smoke", "--epochs", "2", "--json"]
    done = invoke(*command)
    assert done.exit_code == 0, done.stderr
    run = last_json(done)["run"]
    assert json.loads((tmp_path / run / "metrics.jsonl").read_text().splitlines()[-1])["effective_rank"] > 1
    knn = invoke("eval", "knn", "--json")
    assert knn.exit_code == 0 and last_json(knn)["method"] == name, knn.stderr
    again = invoke(*command)
    assert last_json(again)["status"] == "finished" and "already finished" in again.stderr


def test_ablate_runs_every_row_and_prints_the_table(invoke, few_images, tmp_path):
    quick = ["science.epochs=0.3", "science.data.image_size=8", "machine.tensorboard=false"]
    sets = [word for s in quick for word in ("--set", s)]
    done = invoke("ablate", "asl_t7", *sets, columns=80)
    assert done.exit_code == 0, done.stderr
    table = [line for line in done.stdout.splitlines() if re.match(r"\s+[1-5]  ", line)]
    assert len(table) == 5 and all(len(line) <= 80 for line in table)
    for row, reported in zip(table, ("46.8", "46.5", "48.5", "46.6", "48.6"), strict=True):
        assert reported in row and row.count("±") == 2
    assert len((tmp_path / "results/ledger/asl.jsonl").read_text().splitlines()) == 5 * 5
    again = invoke("ablate", "asl_t7", *sets, "--dry-run", "--json")
    hashes = [row["hash"] for row in last_json(again)["rows"]]
    folders = {p.name for p in (tmp_path / "runs").iterdir() if p.name.startswith("asl")}
    assert len(set(hashes)) == 5 and {f.rsplit("_", 1)[1] for f in folders} == {h[:8] for h in hashes}


@pytest.mark.parametrize("table", ablations())
def test_every_ablation_resolves_at_every_scale_each_row_by_itself(table):
    ablation = read_study(table)
    assert set(ablation.scales) == {"tiny", "cifar", "paper"}
    for scale in ablation.scales:
        recipes = {row.name: row.recipe for row in rows_of(ablation, scale, None, [])}
        assert list(recipes) == [str(i) for i in range(1, len(recipes) + 1)]
        for recipe in recipes.values():
            Batch.of(recipe)
            with torch.device("meta"):
                build(recipe)
        if scale == "paper":
            assert len({r.hash() for r in recipes.values()}) == len(recipes)


@pytest.mark.parametrize(
    ("arch", "encoder", "tokens", "batch", "lr"),
    [("vit_b16", 85.798656, 138, "9600 = 2400 per device x 1 device(s) x 4 accumulation", 5.625e-3),
     ("vit_l16", 303.301632, 118, "2048 = 512 per device x 1 device(s) x 4 accumulation", 1.2e-3)],
)  # fmt: skip
def test_dry_run_prints_the_papers_plan_with_no_data(run_here, tmp_path, arch, encoder, tokens, batch, lr):
    done = run_here("pretrain", "ocl", "--arch", arch, "--dry-run", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{encoder:.1f}M parameters" in done.stdout and f"tokens      {tokens} " in done.stdout
    assert batch in done.stdout and f"lr          {lr:g} =" in done.stdout and "800 epochs" in done.stdout
    assert not list(tmp_path.iterdir())


# ruff: noqa: E501 - one case a line
BAD = {
    "method": (["pretrain", "oclx"], "unknown method 'oclx'; did you mean 'ocl'"),
    "arch": (["pretrain", "ocl", "--arch", "vit_b17"], "unknown arch 'vit_b17'; did you mean 'vit_b16'"),
    "recipe": (["pretrain", "ocl", "--recipe", "ocl_smokey"], "unknown recipe 'ocl_smokey'"),
    "preset": (["pretrain", "ocl", "--preset", "offical"], "no preset 'offical'; did you mean 'official'"),
    "recipe key": (["pretrain", "ocl", *SMOKE, "--set", "science.optim.lrr=1"], "unknown key 'science.optim.lrr'; did you mean 'lr'"),
    "method key": (["pretrain", "ocl", *SMOKE, "--set", "science.method.kapa=1"], "unknown key 'science.method.kapa'; did you mean 'kappa'"),
    "value": (["pretrain", "ocl", *SMOKE, "--set", "science.optim.lr=fast"], "science.optim.lr"),
    "data spec": (["pretrain", "ocl", "--data", "foldr:x"], "unknown kind 'foldr'; did you mean 'folder'"),
    "no imagenet": (["pretrain", "ocl", "--arch", "vit_l16"], "--data builtin"),
    "missing folder": (["pretrain", "ocl", "--data", "folder:nowhere"], "no such folder"),
    "batch": (["pretrain", "mae", "--recipe", "mae_smoke", "--set", "machine.micro_batch=100"], "does not divide"),
    "coupled batch": (["pretrain", "ocl", *SMOKE, "--set", "machine.micro_batch=48"], "does not divide 256"),
    "batch size": (["pretrain", "ocl", *SMOKE, "--batch-size", "8192"], "more than the 4000 images"),
    "no run": (["eval", "knn"], "no finished pre-training run"),
    "not a run": (["eval", "knn", "nothing"], "no run folder"),
    "betas": (["pretrain", "ocl", *SMOKE, "--set", "science.optim.betas=[2,3]"], "betas.0: Input should be less than 1"),
    "k": (["eval", "knn", "untrained:vit_mini4@8", "--set", "science.main_k=-5"], "main_k: Input should be greater"),
    "rate": (["eval", "linprobe", "untrained:vit_mini4@8", "--set", "science.lr=[-1]"], "lr.0: Input should be"),
    "seconds": (["bench", "ocl", "--seconds", "nan"], "--seconds nan"),
    "bench batch": (["bench", "ocl", "--batch-size", "8000"], "more than the 4000 images"),
    "minutes": (["quickstart", "--minutes", "nan"], "--minutes nan"),
    "devices": (["plan", "ocl", *SMOKE, "--on", "A100x0"], "expected DEVICExN"),
    "table format": (["report", "ocl_t6", "--format", "foo"], "unknown report format 'foo'"),
    "no format": (["report", "--format", ""], "unknown report format ''"),
    "random weights": (["export", "untrained:vit_mini4"], "is random weights"),
    "timm name": (["eval", "knn", "timm:nosuch", "--data", "builtin"], "could not be loaded; timm.list_models"),
    "set that is no YAML": (["pretrain", "ocl", "--set", "science.augment.crop_scale=[1"], "is not YAML"),
    "option": (["pretrain", "ocl", "--epoch", "3"], "--epoch"),
    "config against the encoder": (["pretrain", "ccmim", "--recipe", "ccmim_smoke", "--set", "science.method.score_layers=[6]", "--dry-run"], "blocks are 0 to 5"),
    "config against itself": (["pretrain", "asl", "--recipe", "asl_smoke", "--set", "science.method.align=false"], "set recon_on"),
    "ablation": (["ablate", "asl_t8"], "did you mean 'asl_t7'"),
    "scale": (["ablate", "asl_t7", "--scale", "small"], "has no scale 'small'"),
    "ablation without data": (["ablate", "asl_t7", "--scale", "paper"], "data set 'coco' not found"),
    "untrained size": (["eval", "knn", "untrained:vit_mini4@big", "--data", "builtin"], "untrained:ARCH[@PIXELS]"),
    "list": (["list", "method"], "did you mean 'methods'"),
    "table": (["report", "ocl_t66"], "ocl_t6"),
    "format": (["export", "x", "--format", "onnx"], "known: timm, safetensors, hf"),
}  # fmt: skip


FILES = {  # files, the command, what it says
    "science": ({"r.yaml": "science: 3"}, ["pretrain", "ocl", "--recipe", "r.yaml"], "science must be a mapping, found 3"),
    "method": ({"r.yaml": "science: {method: ocl}"}, ["pretrain", "ocl", "--recipe", "r.yaml"], "science.method must be"),
    "null": ({"r.yaml": "extends: ocl_smoke\nscience:"}, ["pretrain", "ocl", "--recipe", "r.yaml"], "science must be"),
    "out is a file": ({"F": ""}, ["pretrain", "ocl", *SMOKE, "--out", "F"], "F cannot be used: file exists"),
    "report in a file": ({"F": ""}, ["report", "--out", "F"], "cannot be used: not a directory"),
    "run.json": ({"z/run.json": "[]"}, ["eval", "knn", "z"], "is not what a run writes"),
    "no run": ({"z/notes": ""}, ["eval", "knn", "z"], "z is no run folder"),
    "text": ({"w.pth": "hi"}, ["eval", "knn", "w.pth", "--data", "builtin"], "w.pth is not a weights file"),
    "zip": ({"b_train.npz": "PK\x03\x04 junk"}, ["data", "check", "npz:b_train.npz"], "is not an image archive"),
    "ledger": ({"results/ledger/b.jsonl": "\udcff\n"}, ["report"], "b.jsonl, line 1 is not a ledger record"),
    "syntax": ({"m.py": "def x(:"}, ["pretrain", "m.py:X"], "does not load: SyntaxError"),
    "import": ({"m.py": "import nothing_here"}, ["pretrain", "m.py:X"], "does not load: ModuleNotFoundError"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_bad_files_get_one_message_and_status_2(case, invoke, tmp_path):
    files, arguments, message = FILES[case]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    done = invoke(*arguments, columns=300)
    assert done.exit_code == 2, (done.exit_code, done.output, done.exception)
    assert message in done.stderr and not isinstance(done.exception, Exception)
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"}
    assert left == set(files), "something was written"


@pytest.mark.parametrize(
    ("labels", "says"),
    [(["a"] * 20, "must be integers from 0 on"), ([-1] * 20, "has no labels")],
    ids=["words", "hidden"],
)
def test_labels_that_are_no_classes_are_refused(labels, says, invoke, tmp_path):
    for split in ("train", "test"):
        np.savez(tmp_path / f"s_{split}.npz", images=np.zeros((20, 8, 8, 3), np.uint8), labels=np.array(labels))
    done = invoke("eval", "knn", "untrained:vit_mini4@8", "--data", "npz:s")
    assert done.exit_code == 2 and says in done.stderr


def test_what_is_broken_beside_a_run_stops_no_command_that_does_not_name_it(trained, run_here, tmp_path):
    home, answer = trained
    shutil.copytree(home, tmp_path / "home")
    home = tmp_path / "home"
    (home / "runs/bad").mkdir()
    (home / "runs/bad/run.json").write_text("[]")
    for cache in (home / "runs/.features").glob("*"):
        cache.write_bytes(cache.read_bytes()[:100])
    listed = run_here("list", "runs", "--json", home=home, env={"COLUMNS": "80"})
    assert {r["run"]: r["status"] for r in last_json(listed)["runs"]}["bad"] == "unreadable"
    folder = Path(answer["run"]).name
    assert folder in listed.stderr  # whole, at 80 columns
    assert run_here("eval", "knn", home=home).returncode == 0
    (home / "runs" / folder / "weights.safetensors").unlink()
    gone = run_here("eval", "knn", f"runs/{folder}", home=home)
    assert gone.returncode == 2 and "is gone; the command that started the run" in gone.stderr
    assert last_json(run_here("pretrain", "ocl", *SMOKE, "--json", home=home))["status"] == "finished"
    assert (home / "runs" / folder / "weights.safetensors").is_file()


def changed(tree, path=()):
    """(key, the tree with something else there) for every key of a mapping in mappings."""
    for i, (key, value) in enumerate(tree.items()):
        for other in (None, (3, [1], {"a": [1]})[i % 3]):
            yield ".".join([*path, key]), {**tree, key: other}
        if isinstance(value, dict):
            yield from ((name, {**tree, key: inner}) for name, inner in changed(value, (*path, key)))


@pytest.mark.parametrize(
    ("file", "command"), [("run.json", "export"), ("run.json", "pretrain"), ("recipe.yaml", "export")]
)
def test_a_run_folder_that_was_edited_is_refused_in_one_message_or_read(file, command, trained, run_here, tmp_path):
    home, answer = trained
    path = tmp_path / "runs/z" / file
    shutil.copytree(home / answer["run"], path.parent)
    words = {"export": ["export", "runs/z"], "pretrain": ["pretrain", "ocl", *SMOKE, "--out", "runs/z"]}[command]
    read = {"run.json": json, "recipe.yaml": yaml}[file]
    tree = json.loads(path.read_text()) if read is json else yaml.safe_load(path.read_text())
    refused = set()
    for key, other in changed(tree):
        path.write_text(json.dumps(other))
        if command == "pretrain" and other.get("status") != "finished":
            continue  # it would train
        done = run_here(*words, home=tmp_path)  # raises where there is a traceback
        assert done.returncode in (0, 2), (key, done.stderr)
        if done.returncode == 2:
            refused.add(key)
            assert done.stderr.startswith("error: ") and str(path.parent.name) in done.stderr, (key, done.stderr)
    expected = {"cost", "cost.wall_s", "hardware", "seed", "step", "recipe_hash"} if file == "run.json" else {
        "science", "science.data", "science.data.spec", "science.epochs", "science.batch_size"}  # fmt: skip
    assert expected <= refused
    for content in (b"", b"\xff\x00", b"3", b"[]", b"null", b"{", b"[" * 9999, b"2020-13-45"):
        path.write_bytes(content)
        done = run_here(*words, home=tmp_path)
        assert done.returncode == 2 and file in done.stderr, (content, done.stderr)
    listed = run_here("list", "runs", "--json", home=tmp_path)
    assert last_json(listed)["runs"][0]["status"] == ("unreadable" if file == "run.json" else "finished")


def test_metrics_that_are_no_lines_of_a_run_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0, "x": []}\n[1]\n{"step": []}\n{"loss": 1}\n\xff\n3\n\n{"step": 2, "los')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}] and read_metrics(tmp_path / "none") == []
    Metrics(tmp_path, 1, tensorboard=False).close()
    assert path.read_text() == '{"step": 1, "loss": 2.0, "x": []}\n'


def test_a_named_table_is_written_alone(invoke, tmp_path):
    done = invoke("report", "ocl_t6", "--format", "md,tex,html,csv", "--out", "page", "--json")
    assert done.exit_code == 0, done.stderr
    assert {p.name for p in (tmp_path / "page").iterdir()} == {"report.md", "report.tex", "report.html", "ocl_t6.csv"}
    assert (tmp_path / "page/ocl_t6.csv").read_text().count("77.9") == 1
    page = (tmp_path / "page/report.html").read_text()
    assert page.count("<details open>") == page.count("<details") == 1 and "Nothing is measured" not in page
    text = (tmp_path / "page/report.md").read_text()
    assert "77.9" in text and "ocl_t6" in text and "ocl_t7" not in text


def test_what_others_published_is_exported_and_read_back(invoke, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3)
    torch.save(model.state_dict(), tmp_path / "pub.pth")
    for format in ("timm", "safetensors"):
        done = invoke("export", "pub.pth", "--format", format, "--json")
        assert done.exit_code == 0, done.stderr
        subject = open_subject(str(tmp_path / last_json(done)["file"]))
        assert subject.arch == "vit_ti16" and subject.encoder.pos_embed.equal(model.pos_embed)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_message_and_status_2(case, tmp_path, monkeypatch):
    arguments, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SSLBENCH_DATA", raising=False)
    monkeypatch.setenv("COLUMNS", "300")
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2, (done.exit_code, done.output, done.exception)
    assert message in done.stderr and not isinstance(done.exception, Exception)
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"], "something was written"


def test_a_message_about_missing_imagenet_says_where_it_looked_and_how_to_point(run_here, tmp_path):
    done = run_here("pretrain", "ocl", "--arch", "vit_l16", home=tmp_path, env={"SSLBENCH_DATA": str(tmp_path)})
    assert done.returncode == 2
    for words in (str(tmp_path / "imagenet"), "--data imagenet:DIR", "SSLBENCH_DATA", "--data builtin", "quickstart"):
        assert words in done.stderr


def test_a_folder_without_images_is_refused(run_here, tmp_path):
    (tmp_path / "set/train/a").mkdir(parents=True)
    done = run_here("pretrain", "ocl", "--data", f"folder:{tmp_path}/set", home=tmp_path)
    assert done.returncode == 2 and "no images under" in done.stderr


def test_a_run_folder_of_another_arch_is_refused(trained, run_here):
    home, answer = trained
    done = run_here("pretrain", "ocl", *SMOKE, "--arch", "vit_ti4", "--out", answer["run"], home=home)
    assert done.returncode == 2 and "arch vit_mini4" in done.stderr


def test_a_ledger_line_that_is_not_ours_names_file_and_line(trained, run_here, tmp_path):
    (tmp_path / "results/ledger").mkdir(parents=True)
    (tmp_path / "results/ledger/x.jsonl").write_text('{"value": 1}\n')
    done = run_here("report", home=tmp_path)
    assert done.returncode == 2 and "x.jsonl, line 1" in done.stderr


def test_a_folder_of_photographs_trains_with_workers_and_counts_what_it_cannot_read(run_here, tmp_path, image_folder):
    files = sorted((image_folder / "train").rglob("*.png"))
    files[0].write_bytes(b"not a picture")
    check = run_here("data", "check", f"folder:{image_folder}", "--json", home=tmp_path)
    assert check.returncode == 2 and str(files[0]) in check.stderr  # one of few: more than 0.1 %
    done = run_here("pretrain", "ocl", *SMOKE, "--data", f"folder:{image_folder}", "--batch-size", "16",
                        "--set", "machine.workers=1", home=tmp_path)  # fmt: skip
    assert done.returncode == 1 and "more than 0.1%" in done.stderr
    files[0].unlink()
    done = run_here("pretrain", "ocl", *SMOKE, "--data", f"folder:{image_folder}", "--batch-size", "16",
                        "--set", "machine.workers=1", "--json", home=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_one_corrupt_image_in_a_thousand_is_substituted_and_counted_in_the_run(run_here, tmp_path):
    data = open_split("builtin", "train")
    folder = tmp_path / "images/train/all"
    folder.mkdir(parents=True)
    for i, x in enumerate(data.images[:1100]):
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(folder / f"{i:04d}.png")
    (folder / "0007.png").write_bytes(b"torn")
    check = run_here("data", "check", f"folder:{tmp_path}/images", home=tmp_path)
    assert check.returncode == 0 and "0007.png" in check.stdout  # a run would accept it
    done = run_here("pretrain", "ocl", *SMOKE, "--data", f"folder:{tmp_path}/images", "--batch-size", "100",
                        "--set", "machine.workers=2", "--out", "r", home=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "r/run.json").read_text())["substituted"] == 1


@pytest.mark.slow
def test_two_processes_train_as_the_recipe_says(run_sslbench, tmp_path):
    done = run_sslbench("pretrain", "mae", "--recipe", "mae_smoke", "--devices", "2", "--set", "machine.tensorboard=false",
                        "--json", home=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert last_json(done)["status"] == "finished" and len(done.stdout.strip().splitlines()) == 1  # one process talks
    run = json.loads(next((tmp_path / "runs").glob("*/run.json")).read_text())
    assert run["hardware"]["devices"] == 2 and run["cost"]["images_seen"] == 15 * 256


@pytest.mark.slow
@pytest.mark.parametrize(("name", "epochs", "batch"), [("ocl", 0.1, 64), ("macrl", 0.04, 32)])
def test_bf16_on_a_cpu_follows_float32(name, epochs, batch, invoke, tmp_path):
    def losses(precision):
        done = invoke("pretrain", name, "--recipe", f"{name}_smoke", "--precision", precision, "--batch-size", batch,
                      "--epochs", epochs, "--set", "machine.log_every=1", "--out", precision)  # fmt: skip
        assert done.exit_code == 0, (done.stderr, done.exception)
        lines = (tmp_path / precision / "metrics.jsonl").read_text().splitlines()
        assert "grad_norm_nce" in lines[-1]
        return [json.loads(line)["loss"] for line in lines]

    a, b = losses("32"), losses("bf16")
    assert len(a) == round(4000 // batch * epochs) and a != b
    assert all(abs(x - y) < 0.05 * x for x, y in zip(a, b, strict=True))


def test_without_arguments_it_says_what_to_start_with(invoke):
    done = invoke()
    commands = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("  sslbench ")]
    assert done.exit_code == 0 and commands == ["quickstart", "pretrain", "eval", "report"]
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_every_argument_and_option_is_explained():
    def unexplained(command, path):
        yield from (f"{path} {p.name}" for p in command.params if not p.help)
        for name, sub in getattr(command, "commands", {}).items():
            yield from unexplained(sub, f"{path} {name}")

    assert list(unexplained(get_command(app), "sslbench")) == []


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("pretrain m", ["macrl", "mae", "mocov3"]),
        ("pretrain mae --recipe ocl/vit_l", ["ocl/vit_l16_builtin", "ocl/vit_l16_imagenet"]),
    ],
)
def test_the_shell_completes_methods_and_recipes(typed, offered):
    words = f"sslbench {typed}"
    env = {
        **os.environ,
        "_SSLBENCH_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    code = "import sys; sys.argv[0] = 'sslbench'; from sslbench.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.split() == offered, done.stderr
