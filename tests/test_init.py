"""Pre-training from weights: `--init` is what loading by hand gives, counts in the hash and the cost, and is exact."""

import argparse
import json
import re

import pytest
import torch
from safetensors.torch import load_file
from tiny import TINY

from sslbench import ledger
from sslbench.evaluate.start import read_start, settle
from sslbench.recipe import compose
from sslbench.train.build import build
from sslbench.vit import ARCHS, VisionTransformer, initialise, resample_positions

QUICK = ["--data", "builtin", "--batch-size", "64"]
QUICK += ["--set", "machine.watch=false", "--set", "machine.tensorboard=false"]


@pytest.fixture
def trained(invoke, tiny_arch, few_images, tmp_path):
    """run(method, out, *flags): a short pre-training of the tiny arch, and its run.json."""

    def run(method, out, *flags, epochs=0.5, status=0):
        done = invoke("pretrain", method, *QUICK, *tiny_arch, "--epochs", epochs, "--out", tmp_path / out, *flags)
        assert done.exit_code == status, done.output
        path = tmp_path / out / "run.json"
        return (json.loads(path.read_text()) if path.is_file() else {}), done.output

    return run


def test_a_hybrid_goes_on_from_a_run_of_mae(trained, invoke, tmp_path):
    before, _ = trained("mae", "first")
    after, said = trained("mocov3", "second", "--init", tmp_path / "first", "--epochs", "0")
    assert f"init        {tmp_path}/first: mae tiny, 0.5 epochs of builtin" in said
    assert "new: momentum_projector, predictor, projector" in said
    # No step was made: the encoder is the first run's.
    first, second = (load_file(tmp_path / name / "weights.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys() and all(first[k].equal(second[k]) for k in first)
    # So is the copy that follows it.
    science = {"init": str(tmp_path / "first"), "arch": "tiny", "data": {"spec": "builtin", "image_size": TINY.image}}
    recipe = compose("mocov3", science=science)
    method = build(recipe)
    read_start(recipe).apply(method)
    for encoder in (method.encoder, method.momentum_encoder):
        assert all(x.equal(first[k]) for k, x in encoder.state_dict().items())
    # The hash of the weights counts, the folder that they lie in does not.
    assert after["init"]["sha256"] == before["weights_sha256"] and "init=first" in after["preset"]
    (tmp_path / "first").rename(tmp_path / "moved")
    moved, _ = trained("mocov3", "third", "--init", tmp_path / "moved", "--epochs", "0")
    fresh, _ = trained("mocov3", "fourth", "--epochs", "0")
    assert moved["recipe_hash"] == after["recipe_hash"] != fresh["recipe_hash"] and "init" not in fresh


def test_cost_and_provenance_have_both(trained, invoke, tmp_path):
    before, _ = trained("mae", "first")
    after, _ = trained("ocl", "second", "--init", tmp_path / "first")
    done = invoke("eval", "knn", tmp_path / "second", "--json")
    assert done.exit_code == 0, done.output
    record = next(r for r in ledger.read(tmp_path / "results/ledger") if r.metric == "knn_top1")
    assert record.pretrain.init["method"] == "mae" and record.pretrain.init["epochs"] == 0.5
    assert record.pretrain.cost.flops == pytest.approx(before["cost"]["flops"] + after["cost"]["flops"])
    assert record.pretrain.cost.wall_s == pytest.approx(before["cost"]["wall_s"] + after["cost"]["wall_s"])


def test_a_run_from_weights_resumes_bit_for_bit(trained, tmp_path):
    trained("mae", "first")
    flags = ["--init", tmp_path / "first", "--set", "machine.save_every=1"]
    trained("ocl", "whole", *flags)
    trained("ocl", "cut", *flags)
    whole, cut = tmp_path / "whole/weights.safetensors", tmp_path / "cut/weights.safetensors"
    wanted = whole.read_bytes()
    assert cut.read_bytes() == wanted
    sorted((tmp_path / "cut/checkpoints").glob("*.pt"))[-1].unlink()
    run = json.loads((tmp_path / "cut/run.json").read_text())
    (tmp_path / "cut/run.json").write_text(json.dumps({**run, "status": "interrupted"}))
    cut.unlink()
    again, _ = trained("ocl", "cut", *flags)
    assert again["resumed"] == 1 and cut.read_bytes() == wanted


def test_positions_are_resampled_and_a_published_decoder_is_taken(tiny_arch, few_images, tmp_path):
    torch.manual_seed(3)
    encoder = VisionTransformer(TINY, 48)
    initialise(encoder)
    science = {"data": {"spec": "builtin"}, "method": {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}}
    sets = [flag for flag in tiny_arch if flag != "--set"]
    donor = build(compose("mae", recipe="mae_smoke", science=science, sets=sets)).decoder.state_dict()
    names = {k: k if k == "mask_token" else f"decoder_{k}" for k in donor}
    tree = {**encoder.state_dict(), **{names[k]: x for k, x in donor.items()}, "head.weight": torch.zeros(2, TINY.dim)}
    torch.save({"model": tree, "args": argparse.Namespace(lr=1.0)}, tmp_path / "mae.pth")
    recipe = compose("mae", recipe="mae_smoke", science={**science, "init": str(tmp_path / "mae.pth")}, sets=sets)
    settled = settle(recipe)
    assert settled.science.init.sha256 and recipe.science.init.sha256 is None
    said = "\n".join(settled.notes)
    assert "positions of 6 x 6 patches resampled to 4 x 4" in said and "not used: head.weight" in said
    assert "it is not known what they saw, a cost that is not known" in said and "new:" not in said
    method = build(settled)
    new, unused = read_start(settled).apply(method)
    assert (new, unused) == ([], ["head.weight"])
    wanted = {**encoder.state_dict(), "pos_embed": resample_positions(encoder.pos_embed, (6, 6), (4, 4))}
    assert all(x.equal(wanted[k]) for k, x in method.encoder.state_dict().items())
    assert all(x.equal(donor[k]) for k, x in method.decoder.state_dict().items())
    # A decoder of another shape starts new, and the file's is named.
    science["method"]["decoder_depth"] = 2
    other = settle(
        compose("mae", recipe="mae_smoke", science={**science, "init": str(tmp_path / "mae.pth")}, sets=sets)
    )
    assert "new: decoder" in "\n".join(other.notes) and "not used: decoder." in "\n".join(other.notes)


def test_what_a_published_file_has_beside_its_encoder_is_named_and_its_encoder_is_not(tiny_arch, few_images, tmp_path):
    torch.manual_seed(4)
    encoder = VisionTransformer(TINY)
    initialise(encoder)
    state = {k: x for k, x in encoder.state_dict().items() if "qkv" not in k}
    for i in range(TINY.depth):
        for kind in ("weight", "bias"):
            parts = encoder.state_dict()[f"blocks.{i}.attn.qkv.{kind}"].chunk(3)
            state |= {f"blocks.{i}.attn.{n}.{kind}": x for n, x in zip(("query", "key", "value"), parts, strict=True)}
    tree = {f"vit.{transformers_name(k)}": x for k, x in state.items()}
    tree |= {"vit.pooler.dense.weight": torch.zeros(2, 2), "decoder.mask_token": torch.zeros(1)}
    torch.save(tree, tmp_path / "vitmae.bin")
    sets = [flag for flag in tiny_arch if flag != "--set"]
    recipe = compose("ocl", recipe="ocl_smoke", science={"init": str(tmp_path / "vitmae.bin")}, sets=sets)
    new, unused = read_start(recipe).apply(method := build(recipe))
    assert unused == ["pooler.dense.weight", "decoder.mask_token"] and "encoder" not in new
    assert all(x.equal(encoder.state_dict()[k]) for k, x in method.encoder.state_dict().items())


def transformers_name(ours):
    """As transformers' ViTMAE names it."""
    name = ours.replace("cls_token", "embeddings.cls_token").replace("pos_embed", "embeddings.position_embeddings")
    name = name.replace("patch_embed.proj", "embeddings.patch_embeddings.projection").replace(
        "blocks.", "encoder.layer."
    )
    name = re.sub(r"attn\.(query|key|value)", r"attention.attention.\1", name).replace(
        "attn.proj", "attention.output.dense"
    )
    name = name.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")
    name = name.replace("norm1", "layernorm_before").replace("norm2", "layernorm_after")
    return re.sub(r"^norm", "layernorm", name)


def test_bad_weights_are_one_message_before_anything_runs(trained, invoke, monkeypatch, tmp_path):
    trained("mae", "first")
    _, said = trained("ocl", "second", "--init", "untrained:tiny", status=2)
    assert "leave it out" in said
    _, said = trained("ocl", "second", "--init", tmp_path / "nowhere", status=2)
    assert "no run folder and no weights file" in said
    _, said = trained("ocl", "second", "--init", tmp_path / "first", "--set", "science.init.sha256=0123", status=2)
    assert "science.init" in said
    monkeypatch.setitem(ARCHS, "wide", TINY.__class__(8, 96, 2, 3, 32))
    done = invoke("pretrain", "ocl", *QUICK, "--set", "science.arch=wide", "--init", tmp_path / "first")
    assert (
        done.exit_code == 2
        and "patch 8, width 48, 2 blocks and 3 heads" in done.stderr
        and "wide one of" in done.stderr
    )
    assert not (tmp_path / "second").exists() and not (tmp_path / "runs").exists()


def test_a_row_of_a_study_may_start_from_weights(trained, invoke, tiny_arch, tmp_path):
    trained("mae", "first")
    science = f"{{arch: tiny, data: {{spec: builtin, image_size: {TINY.image}}}, batch_size: 64}}"
    (tmp_path / "continued.yaml").write_text(
        f"rows:\n  scratch: {{method: ocl, recipe: ocl_smoke}}\n"
        f"  after_mae: {{method: ocl, recipe: ocl_smoke, science: {{init: {tmp_path}/first}}}}\n"
        f"science: {science}\nbudgets: [128images]\nevaluations: [{{protocol: knn}}]\n"
    )
    done = invoke("study", tmp_path / "continued.yaml", "--json")
    assert done.exit_code == 0, done.output
    cells = json.loads(done.stdout.splitlines()[-1])["cells"]
    assert {c["row"]: c["status"] for c in cells} == {"scratch": "done", "after_mae": "done"}
    assert len({c["run"] for c in cells}) == 2
