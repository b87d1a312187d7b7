"""Public checkpoints under the suite's protocols: files made here as timm, MAE, MoCo v3 and DINO write them."""

import argparse
import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from sslbench.errors import UserError
from sslbench.evaluate.features import open_subject
from sslbench.evaluate.public import to_encoder
from sslbench.evaluate.run import eval_recipe, evaluate
from sslbench.vit import ARCHS

NAME, ARCH = "vit_tiny_patch16_224", "vit_ti16"
SIZE = 64  # of the position table: another than the arch's own


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model(NAME, img_size=SIZE, num_classes=7).eval()


def nest(style, state):
    prefixed = lambda p: {p + k: v for k, v in state.items()}  # noqa: E731
    if style == "mae":
        extra = {"mask_token": torch.zeros(1, 1, 192), "decoder_embed.weight": torch.zeros(8, 192)}
        return {"model": {**state, **extra}, "epoch": 3, "args": argparse.Namespace(lr=1.0)}
    if style == "dino":
        head = {"head.mlp.0.weight": torch.zeros(4, 192)}
        student = {"module.backbone." + k: torch.zeros_like(v) for k, v in state.items()}
        return {"student": student, "teacher": {**prefixed("backbone."), **head}, "epoch": 3}
    if style == "mocov3":
        momentum = {"module.momentum_encoder." + k: torch.zeros_like(v) for k, v in state.items()}
        return {"state_dict": {**momentum, **prefixed("module.base_encoder.")}, "arch": "vit_base"}
    return state


@pytest.mark.parametrize("style", ["timm", "mae", "dino", "mocov3"])
def test_a_file_gives_timms_features(model, style, tmp_path):
    path = tmp_path / f"{style}.pth"
    torch.save(nest(style, model.state_dict()), path)
    subject = open_subject(str(path))
    assert (subject.arch, subject.encoder.image, subject.method) == (ARCH, (SIZE, SIZE), style)
    x = torch.randn(2, 3, SIZE, SIZE)
    torch.testing.assert_close(subject.encoder.eval()(x), model.forward_features(x))


def test_safetensors_without_our_metadata_are_timms(model, tmp_path):
    save_file(dict(model.state_dict()), tmp_path / "w.safetensors")
    assert open_subject(str(tmp_path / "w.safetensors")).arch == ARCH


def test_timm_by_name_is_measured_and_says_so(model, few_images, home, tmp_path):
    """`local-dir:` is timm's own way to a model that needs no download."""
    folder = tmp_path / "hub"
    folder.mkdir()
    config = {"architecture": NAME, "num_classes": 7, "model_args": {"img_size": SIZE},
              "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "num_classes": 7,
                                 "input_size": [3, SIZE, SIZE]}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(model.state_dict()), folder / "model.safetensors")
    subject = open_subject(f"timm:local-dir:{folder}")
    assert subject.mean == (0.5, 0.5, 0.5) and subject.encoder.norm.weight.equal(model.norm.weight)
    assert subject.encoder.blocks[3].attn.qkv.weight.equal(model.blocks[3].attn.qkv.weight)
    record = evaluate(eval_recipe("knn"), f"timm:local-dir:{folder}", "builtin")[0]
    assert record.arch == ARCH and record.method.startswith("timm-local-dir") and record.pretrain.recipe_hash is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: {**s, "norm_pre.weight": s["norm.weight"]}, "not a plain ViT: it has norm_pre.weight"),
        (lambda s: {**s, "blocks.0.ls1.gamma": s["norm.weight"]}, "has blocks.0.ls1.gamma"),
        (lambda s: {k: v for k, v in s.items() if not k.startswith("norm.")}, "lacks norm.bias"),
        (lambda s: {k: v for k, v in s.items() if not k.startswith("blocks.11.")}, "depth 11 is none of the archs"),
        (lambda s: {**s, "pos_embed": s["pos_embed"][:, :-1]}, "expected positions"),
        (lambda s: {"conv1.weight": torch.zeros(1)}, "no 'patch_embed.proj.weight'"),
        (lambda s: {"weights": 3}, "no weights in it"),
        (lambda s: [1, 2], "expected a state dict"),
        (lambda s: {"model": s, "hook": print}, "could run code; refused"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_the_reason(model, change, says, tmp_path):
    torch.save(change(model.state_dict()), tmp_path / "w.pth")
    with pytest.raises(UserError, match=says.replace(".", r"\.")):
        open_subject(str(tmp_path / "w.pth"))


def test_an_unknown_timm_model_is_named():
    with pytest.raises(UserError, match="timm:vit_tiny_patch16_225 could not be loaded; did you mean"):
        open_subject("timm:vit_tiny_patch16_225")


def test_no_two_archs_share_what_a_file_shows_but_for_moco_v3s_vit_s():
    """Heads cannot be read off a state dict: patch, width and depth must tell the arch."""
    shapes = {}
    for name, a in ARCHS.items():
        shapes.setdefault((a.patch, a.dim, a.depth), []).append(name)
    assert [names for names in shapes.values() if len(names) > 1] == [["vit_s16", "vit_s16_h12"]]


def test_moco_v3s_vit_s_has_twelve_heads():
    small = timm.create_model("vit_small_patch16_224", img_size=SIZE, num_heads=12, num_classes=0).eval()
    x = torch.randn(2, 3, SIZE, SIZE)
    for style, arch in (("mocov3", "vit_s16_h12"), ("timm", "vit_s16")):
        state = nest(style, small.state_dict())
        encoder, name = to_encoder(state.get("state_dict", state), "a file")
        assert name == arch
        assert torch.allclose(encoder.eval()(x), small.forward_features(x), atol=1e-5) == (style == "mocov3")
