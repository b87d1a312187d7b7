"""A number stands on the weights, the images and the pre-training that it names, and on no others."""

import hashlib
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_report import cost, fields, pretrain, records
from test_shards import shard

from sslbench import provenance
from sslbench.data import open_split, sources, subset
from sslbench.errors import RunFailed, UserError
from sslbench.evaluate import features
from sslbench.evaluate.features import contents, extract, open_subject
from sslbench.report.equal import equal
from sslbench.report.tables import tables
from sslbench.weights import tensors_sha256, write_weights

SMOKE = ["pretrain", "mae", "--recipe", "mae_smoke", "--set", "machine.tensorboard=false", "--batch-size", "128"]
TUNE = ["--recipe", "finetune_smoke", "--set", "science.auto_augment=null", "--set", "science.batch_size=250"]


def last_json(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module", autouse=True)
def few_images_all_along():
    """Every eighth of the built-in images, as the fixture `few_images` has them."""

    def few(split, whole=sources._builtin):
        data = whole(split)
        return subset(data, torch.arange(0, len(data), 8))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_builtin", few)
        yield


@pytest.fixture(scope="module")
def trained(run_here, tmp_path_factory):
    """A home with the same run twice, `runs/a` and `runs/b`, and a fine-tuning of the first."""
    home = tmp_path_factory.mktemp("trained")
    for name in "ab":
        assert run_here(*SMOKE, "--out", f"runs/{name}", home=home).returncode == 0
    tuned = last_json(run_here("eval", "finetune", "runs/a", *TUNE, "--json", home=home))
    return home, tuned


@pytest.fixture
def copy(trained, tmp_path):
    """That home to break."""
    shutil.copytree(trained[0], tmp_path / "home")
    return tmp_path / "home"


def edit(path, **over):
    path.write_text(json.dumps({**json.loads(path.read_text()), **over}))


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# ------------------------------------------------------------------------------------------------------ the weights


def test_two_identical_runs_give_identical_files(trained):
    home, _ = trained
    a, b = (home / "runs" / name / "weights.safetensors" for name in "ab")
    assert a.read_bytes() == b.read_bytes()
    of_a, of_b = (json.loads((f.parent / "run.json").read_text()) for f in (a, b))
    assert of_a["weights_sha256"] == of_b["weights_sha256"] == tensors_sha256(load_file(a))
    assert of_a["file_sha256"] == hashlib.sha256(a.read_bytes()).hexdigest()


def test_exported_files_are_identical_and_have_the_hash_of_the_run(trained, run_here, tmp_path):
    home, _ = trained
    for name in "ab":
        for format in ("timm", "safetensors"):
            out = tmp_path / f"{name}_{format}.safetensors"
            assert run_here("export", f"runs/{name}", "--format", format, "--out", out, home=home).returncode == 0
    a, b, ours = (tmp_path / f"{name}.safetensors" for name in ("a_timm", "b_timm", "a_safetensors"))
    assert a.read_bytes() == b.read_bytes() != ours.read_bytes()
    run = json.loads((home / "runs/a/run.json").read_text())
    assert {open_subject(str(f)).sha256 for f in (a, b, ours)} == {run["weights_sha256"]}


def test_the_hash_is_of_names_types_shapes_and_values_and_of_nothing_else(tmp_path):
    x = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1.0), "c": torch.ones(2, dtype=torch.bfloat16)}
    same = dict(reversed([(k, v.clone().T.contiguous().T if v.ndim == 2 else v) for k, v in x.items()]))
    others = [
        {**x, "a": x["a"].view(3, 2)}, {**x, "a": x["a"].int()}, {**x, "b": torch.tensor(-1.0)},
        {k: v for k, v in x.items() if k != "b"}, {("d" if k == "b" else k): v for k, v in x.items()},
    ]  # fmt: skip
    assert tensors_sha256(same) == tensors_sha256(x)
    assert len({tensors_sha256(y) for y in (x, *others)}) == 6
    write_weights(tmp_path / "w", x, {"one": "1", "two": "\u2028"})
    write_weights(tmp_path / "v", same, {"two": "\u2028", "one": "1"})
    assert (tmp_path / "w").read_bytes() == (tmp_path / "v").read_bytes()
    with safe_open(tmp_path / "w", "pt") as f:
        assert f.metadata() == {"one": "1", "two": "\u2028"} and f.get_tensor("c").equal(x["c"])


@pytest.mark.parametrize("where", ["a tensor", "the metadata"])
def test_a_flipped_byte_is_refused_wherever_weights_are_read(copy, run_here, where):
    weights = copy / "runs/a/weights.safetensors"
    flip(weights, -1000 if where == "a tensor" else weights.read_bytes().index(b'"mean"') + 10)
    lines = (copy / "results/ledger/mae.jsonl").read_text()
    for command in (
        ["eval", "knn", "runs/a"], ["eval", "knn", "a"], ["eval", "knn", "runs/a/weights.safetensors"],
        ["eval", "linprobe", "runs/a"], ["eval", "finetune", "runs/a", *TUNE], ["inspect", "runs/a"],
        ["export", "runs/a"],
    ):  # fmt: skip
        done = run_here(*command, home=copy)
        assert done.returncode == 2 and "does not match the hash in run.json" in done.stderr, (command, done.stderr)
    assert (copy / "results/ledger/mae.jsonl").read_text() == lines
    weights.unlink()  # as the message says
    assert run_here(*SMOKE, "--out", "runs/a", home=copy).returncode == 0
    assert weights.read_bytes() == (copy / "runs/b/weights.safetensors").read_bytes()


def test_a_flipped_byte_of_a_fine_tuned_model_is_refused(copy, run_here):
    (folder,) = (copy / "runs").glob("finetune_*")
    flip(folder / "weights.safetensors", -1000)
    done = run_here("eval", "robustness", "--data", "builtin", home=copy)
    assert done.returncode == 2 and "does not match the hash in run.json" in done.stderr, done.stderr
    edit(folder / "run.json", record=None)  # it was killed before it was scored
    done = run_here("eval", "finetune", "runs/a", *TUNE, home=copy)
    assert done.returncode == 2 and "does not match the hash in run.json" in done.stderr, done.stderr


def test_a_run_of_an_earlier_version_is_read_and_checked(copy, run_here):
    """Its run.json had the hash of the file, and neither epochs nor batch."""
    path, weights = copy / "runs/a/run.json", copy / "runs/a/weights.safetensors"
    save_file(load_file(weights), weights, dict(safe_open(weights, "pt").metadata()))  # in any order
    run = json.loads(path.read_text())
    old = {k: v for k, v in run.items() if k not in ("file_sha256", "epochs", "batch_size")}
    path.write_text(json.dumps({**old, "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}))
    record = last_json(run_here("eval", "knn", "runs/a", "--json", home=copy))
    assert (record["pretrain"]["epochs"], record["pretrain"]["batch"]) == (1, 128)
    assert record["weights_sha256"] == run["weights_sha256"]
    flip(weights, -1000)
    assert run_here("eval", "knn", "runs/a", home=copy).returncode == 2


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_weights_that_are_not_finite_are_refused_whatever_the_file(copy, run_here, tmp_path, value):
    weights = load_file(copy / "runs/a/weights.safetensors")
    weights["blocks.3.mlp.fc1.weight"][0, 0] = float(value)
    torch.save({"model": {f"module.{k}": v for k, v in weights.items()}}, tmp_path / "theirs.pth")
    save_file(weights, tmp_path / "plain.safetensors")
    with safe_open(copy / "runs/a/weights.safetensors", "pt") as f:
        save_file(weights, tmp_path / "ours.safetensors", f.metadata())
    for name in ("theirs.pth", "plain.safetensors", "ours.safetensors"):
        for command in (["eval", "knn"], ["export"]):
            done = run_here(*command, tmp_path / name, *(["--data", "builtin"] * (command[0] == "eval")), home=copy)
            assert done.returncode == 2 and "not finite: blocks.3.mlp.fc1.weight;" in done.stderr, done.stderr


def test_weights_that_are_not_finite_are_never_written(tmp_path):
    path = tmp_path / "weights.safetensors"
    write_weights(path, {"x": torch.ones(2)})
    before = path.read_bytes()
    with pytest.raises(RunFailed, match="not finite: y"):
        write_weights(path, {"x": torch.ones(2), "y": torch.tensor([1, float("nan")])})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------------------------------ the pre-training


def test_a_record_says_what_was_trained_apart_from_what_was_evaluated(copy, trained, run_here):
    """As run.json was written by training, whatever recipe.yaml and this checkout say today."""
    tuned, path = trained[1], copy / "runs/a/run.json"
    then = {
        "code": {"commit": "c" * 40, "dirty": False}, "versions": {"torch": "1.0"},
        "hardware": {"device": "A100", "devices": 8}, "cost": {**json.loads(path.read_text())["cost"], "joules": 5e3},
    }  # fmt: skip
    edit(path, **then)
    recipe = copy / "runs/a/recipe.yaml"
    today = recipe.read_text().replace("batch_size: 128", "batch_size: 9")
    recipe.write_text(re.sub(r"\n  epochs: [\d.]+\n", "\n  epochs: 800\n", today))
    assert recipe.read_text().count("epochs: 800") == recipe.read_text().count("batch_size: 9") == 1
    run, knn = json.loads(path.read_text()), last_json(run_here("eval", "knn", "runs/a", "--json", home=copy))
    trained_by = knn["pretrain"]
    assert (trained_by["epochs"], trained_by["batch"]) == (1, 128)
    assert trained_by["data_fingerprint"] == run["data_fingerprint"] == open_split("builtin", "train").fingerprint
    assert all(trained_by[k] == then[k] for k in ("code", "versions", "hardware"))
    assert (
        trained_by["cost"] == {k: run["cost"].get(k) for k in trained_by["cost"]}
        and trained_by["cost"]["joules"] == 5e3
    )
    assert knn["code"] == provenance.code() and knn["versions"] == provenance.versions()
    assert knn["hardware"]["device"] == provenance.hardware()["device"]
    assert 0 < knn["cost"]["wall_s"] - run["cost"]["wall_s"] < 60
    assert (knn["weights_sha256"], knn["head_sha256"]) == (run["weights_sha256"], None)
    (folder,) = (copy / "runs").glob("finetune_*")
    head = json.loads((folder / "run.json").read_text())
    assert tuned["weights_sha256"] == run["weights_sha256"] and tuned["head_sha256"] == head["weights_sha256"]
    assert tuned["cost"]["flops"] == tuned["pretrain"]["cost"]["flops"] + head["cost"]["flops"]
    hard = last_json(run_here("eval", "robustness", folder, "--data", "builtin", "--json", home=copy))
    assert (hard["weights_sha256"], hard["head_sha256"]) == (tuned["weights_sha256"], tuned["head_sha256"])


def test_joules_are_the_sum_of_all_parts_or_unknown(tmp_path):
    socket = tmp_path / "intel-rapl:0"
    socket.mkdir()
    (socket / "energy_uj").write_text("1000000")
    spent = provenance.Spent("cpu")
    spent.energy = provenance.EnergyMeter("cpu", tmp_path)
    (socket / "energy_uj").write_text("3000000")
    assert spent.after()["joules"] == 2 and spent.after({"joules": 5.0, "wall_s": 1.0})["joules"] == 7
    assert spent.after({"joules": None})["joules"] is None
    (socket / "energy_uj").unlink()
    assert spent.after({"joules": 5.0})["joules"] is None


def test_a_run_that_went_on_under_another_commit_names_both(copy, monkeypatch, run_here):
    path = copy / "runs/a/run.json"
    edit(path, code={"commit": "c" * 40, "dirty": True, "earlier": ["b" * 40]})
    (copy / "runs/a/weights.safetensors").unlink()
    assert run_here(*SMOKE, "--out", "runs/a", home=copy).returncode == 0
    assert json.loads(path.read_text())["code"] == {**provenance.code(), "earlier": ["b" * 40, "c" * 40]}
    (copy / "runs/b/weights.safetensors").unlink()
    assert run_here(*SMOKE, "--out", "runs/b", home=copy).returncode == 0
    assert json.loads((copy / "runs/b/run.json").read_text())["code"] == provenance.code()


def test_sets_in_two_folders_of_one_name_are_two_rows_and_an_old_record_joins_the_only_one_known(home):
    def of(seed, images, value=40.0, recipe="r"):
        return fields(value, seed=seed, pretrain=pretrain(recipe_hash=recipe, data_fingerprint=images))

    (two,) = tables(records(of(0, "aaaaaaaa"), of(1, "bbbbbbbb"), of(2, None)))
    assert [(row.label, [c.seeds() for c in row.cells.values()]) for row in two.rows] == [
        ("ocl, 10 ep [r], images not recorded", [[2]]), ("ocl, 10 ep [r], images aaaaaa", [[0]]),
        ("ocl, 10 ep [r], images bbbbbb", [[1]]),
    ]  # fmt: skip
    (one,) = tables(records(of(0, "aaaaaaaa", 41.0), of(1, None, 42.0)))
    assert [(row.label, row.cells["k-NN, cls"].seeds()) for row in one.rows] == [("ocl", [0, 1])]


def test_equal_budgets_are_those_of_pre_training_whatever_its_evaluation_took(home):
    """Fine-tuned at ten times the cost; of `asl` the record is old, and knows no more than the sum."""
    spent = {name: pretrain(recipe_hash=name, cost=cost(100, 5e12)) for name in ("ocl", "mae")}
    tuned = {
        "metric": "finetune_top1", "protocol": {"name": "finetune_mean", "hash": "f"}, "cost": cost(1000, 50e12),
        "condition": {"eval_run": "x"},
    }  # fmt: skip
    rows = records(
        fields(40, "ocl", pretrain=spent["ocl"], **tuned), fields(41, "mae", pretrain=spent["mae"], **tuned),
        fields(42, "asl", **tuned),
    )  # fmt: skip
    (table,) = tables(rows)
    by = {row.method: row for row in table.rows}
    assert [by[m].wall_s() for m in ("ocl", "mae", "asl")] == [100, 100, None]
    flops = equal(table)[-1]
    assert [[row.method for row in g.rows] for g in flops.groups] == [["mae", "ocl"]]
    assert flops.groups[0].budget == "5.0 TFLOP" and flops.alone == ["asl (none known)"]


# ----------------------------------------------------------------------------------------------------- the features


def bmp_folder(root, noise=0):
    """Two classes of 32-pixel BMPs; with `noise` other pixels, in files of the same names, sizes and times."""
    draw = torch.Generator().manual_seed(noise)
    for split in ("train", "val"):
        for name in "ab":
            for i in range(4):
                path = root / split / name / f"{i}.bmp"
                path.parent.mkdir(parents=True, exist_ok=True)
                times = (path.stat().st_atime_ns, path.stat().st_mtime_ns) if path.exists() else None
                Image.fromarray(torch.randint(0, 255, (32, 32, 3), generator=draw).byte().numpy()).save(path)
                if times:
                    os.utime(path, ns=times)
    return root


def cached(spec, size=32):
    subject = open_subject("untrained:vit_mini4", 0, size)
    return extract(subject, open_split(spec, "val"), torch.device("cpu"), 0, "mean")


def fresh(spec, home, size=32):
    shutil.rmtree(home / "runs/.features")
    return cached(spec, size)


def test_images_edited_in_place_have_features_of_their_own(home, tmp_path):
    spec = f"folder:{bmp_folder(tmp_path / 'set')}"
    fingerprint, before = open_split(spec, "val").fingerprint, cached(spec)
    bmp_folder(tmp_path / "set", noise=1)
    assert open_split(spec, "val").fingerprint == fingerprint  # of names and sizes
    after = cached(spec)
    assert not after.equal(before) and after.equal(fresh(spec, home))
    bmp_folder(tmp_path / "set")
    assert cached(spec).equal(before)


def test_a_byte_of_a_packed_set_or_a_shard_is_content_too(home, tmp_path, run_here):
    x = open_split("builtin", "val")
    shard(tmp_path / "tars/val.tar", x.images[:3], [0, 1, 2])
    shard(tmp_path / "tars/train.tar", x.images[:3], [0, 1, 2])
    bmp_folder(tmp_path / "set")
    assert run_here("data", "pack", f"folder:{tmp_path}/set", "--out", "packed", home=tmp_path).returncode == 0
    for spec, where in ((f"wds:{tmp_path}/tars", "tars"), (f"packed:{tmp_path}/packed", "packed")):
        before = contents(open_split(spec, "val"))
        assert contents(open_split(spec, "val")) == before
        largest = max((f for f in (tmp_path / where).rglob("*val*") if f.is_file()), key=lambda f: f.stat().st_size)
        flip(largest, 700)
        assert contents(open_split(spec, "val")) != before, spec


def test_another_version_of_the_view_has_features_of_its_own(home, tmp_path, monkeypatch):
    spec = f"folder:{bmp_folder(tmp_path / 'set')}"
    before = cached(spec, 24)
    monkeypatch.setattr("sslbench.views.centre_window", lambda size, crop: ((crop, crop), (0, 0)))
    monkeypatch.setattr(features, "VIEW", features.VIEW + 1)
    after = cached(spec, 24)
    assert not after.equal(before) and after.equal(fresh(spec, home, 24))


@pytest.mark.parametrize("change", ["mean", "arch"])
def test_other_statistics_or_heads_have_features_of_their_own(home, tmp_path, change):
    data = open_split(f"folder:{bmp_folder(tmp_path / 'set')}", "val")
    one, other = (open_subject("untrained:vit_mini4", 0, 32) for _ in range(2))
    if change == "mean":
        other.mean = (0.1, 0.2, 0.3)
    else:  # heads do not show in the weights
        other.arch = "vit_other"
        for block in other.encoder.blocks:
            block.attn.num_heads, block.attn.head_dim = 1, other.encoder.arch.dim
            block.attn.scale = other.encoder.arch.dim**-0.5
    a, b = (extract(s, data, torch.device("cpu"), 0, "mean") for s in (one, other))
    assert not a.equal(b)


def test_a_damaged_cache_is_made_again(home, tmp_path):
    spec = f"folder:{bmp_folder(tmp_path / 'set')}"
    before = cached(spec)
    (file,) = (home / "runs/.features").glob("*_mean.npy")
    for place in (-3, 200):  # of the checksum, of a row
        flip(file, place)
        assert cached(spec).equal(before)
    file.write_bytes(file.read_bytes()[:100])
    assert cached(spec).equal(before)


def test_of_a_large_set_only_the_pool_that_is_asked_for_is_kept_and_numbers_are_the_same(home, tmp_path, monkeypatch):
    spec = f"folder:{bmp_folder(tmp_path / 'set')}"
    before = cached(spec)
    assert {p.name.rpartition("_")[2] for p in (home / "runs/.features").iterdir()} == {
        "all.npy",
        "cls.npy",
        "mean.npy",
    }
    monkeypatch.setattr(features, "SMALL", 0)
    assert fresh(spec, home).equal(before)
    (file,) = (home / "runs/.features").iterdir()
    assert file.name.endswith("_mean.npy") and np.load(file).dtype == np.float32


def test_cached_features_keep_within_their_limit_the_oldest_leaving_and_clean_removes_all(
    home, tmp_path, monkeypatch, invoke
):
    specs = [f"folder:{bmp_folder(tmp_path / f'set{i}', noise=i)}" for i in range(3)]
    cached(specs[0])
    (folder,) = (home / "runs").glob(".features")
    each = sum(p.stat().st_size for p in folder.iterdir())
    monkeypatch.setenv("SSLBENCH_CACHE_GIB", str(2.5 * each / 2**30))
    first = set(folder.iterdir())
    cached(specs[1])
    second = set(folder.iterdir()) - first
    for path in second:
        os.utime(path, (1, 1))
    cached(specs[0])  # read again: the other is now the older
    cached(specs[2])
    assert first < set(folder.iterdir()) and len(second & set(folder.iterdir())) == 1  # 7 of 9 files
    facts = json.loads(invoke("doctor", "--json").stdout.splitlines()[-1])
    assert facts["features_limit_gib"] == pytest.approx(2.5 * each / 2**30)
    (folder / ".x.npy.1.part").write_bytes(b"left by a process that was killed")
    done = invoke("clean", "--json")
    assert json.loads(done.stdout.splitlines()[-1])["removed_files"] == 8 and not [*folder.iterdir()]
    monkeypatch.setenv("SSLBENCH_CACHE_GIB", "much")
    with pytest.raises(UserError, match="SSLBENCH_CACHE_GIB=much"):
        cached(specs[0])
    assert not [*folder.iterdir()]


def test_an_image_that_cannot_be_read_is_content_as_any_other(tmp_path):
    root = bmp_folder(tmp_path / "set")
    before = open_split(f"folder:{root}", "val")
    digest = contents(before)
    (root / "val/a/0.bmp").unlink()  # after the set was opened
    assert before.fingerprint and contents(before) != digest


def test_a_finished_fine_tuning_scores_images_again_that_changed_in_place(run_here, tmp_path):
    bmp_folder(tmp_path / "set")
    command = ["eval", "finetune", "untrained:vit_mini4@16", "--data", f"folder:{tmp_path}/set", *TUNE[:-2], "--json",
               "--set", "science.batch_size=8"]  # fmt: skip
    first = last_json(run_here(*command, home=tmp_path))
    assert last_json(run_here(*command, home=tmp_path)) == first
    for path in (tmp_path / "set/val").rglob("*.bmp"):
        shutil.copy(tmp_path / "set/train/a/0.bmp", path)
    again = last_json(run_here(*command, home=tmp_path))
    assert again["id"] != first["id"] and again["value"] == 50
