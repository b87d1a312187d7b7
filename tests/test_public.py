"""Public checkpoints under the suite's protocols: files made here as timm, MAE, MoCo v3 and DINO write them."""

import argparse
import json
import re
import warnings

import pytest
import timm
import torch
from safetensors.torch import save_file

from sslbench.errors import UserError
from sslbench.evaluate.evaluation import eval_recipe, evaluate
from sslbench.evaluate.features import open_subject
from sslbench.evaluate.public import to_encoder
from sslbench.vit import ARCHS, VisionTransformer, get_arch, initialise

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
        (lambda s: {**s, "blocks.0.attn.q_norm.weight": s["norm.weight"]}, "has blocks.0.attn.q_norm.weight"),
        (lambda s: {k: v for k, v in s.items() if not k.startswith("norm.")}, "lacks norm.bias"),
        (lambda s: {k: v for k, v in s.items() if not k.startswith("blocks.11.")}, "depth 11 is none of the archs"),
        (lambda s: {**s, "pos_embed": s["pos_embed"][:, :-2]}, "expected positions"),
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


def vit(seed=0, image=32):
    """A whole state dict of a small ViT, its positions by MAE's formula."""
    torch.manual_seed(seed)
    encoder = VisionTransformer(get_arch("vit_mini4"), image)
    initialise(encoder)
    return encoder.state_dict()


def under(prefix, state):
    return {prefix + k: v for k, v in state.items()}


RIGHT, WRONG = vit(0), vit(1)


@pytest.mark.parametrize(
    ("tree", "taken"),
    [
        ({"state_dict": WRONG, "state_dict_ema": RIGHT, "epoch": 3}, "state_dict_ema"),
        ({"model": WRONG, "model_ema": RIGHT}, "model_ema"),
        ({"student": WRONG, "teacher": RIGHT}, "teacher"),
        ({"state_dict": {**under("student.", WRONG), **under("teacher.", RIGHT)}}, "state_dict.teacher"),
        ({"model": {**under("student.net.", WRONG), **under("teacher.net.", RIGHT)}}, "model.teacher.net"),
        ({**under("model.", WRONG), **under("ema_model.module.", RIGHT)}, "ema_model.module"),
        ({"state_dict": {**under("module.momentum_encoder.", WRONG), **under("module.base_encoder.", RIGHT)}},
         "state_dict.module.base_encoder"),
        ({"state_dict": RIGHT, "loss": torch.zeros(())}, None),
        ({"net": RIGHT, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}}, None),
        ({"student": RIGHT}, "student"),
    ],
)  # fmt: skip
def test_of_several_weights_the_average_is_taken_and_said(tree, taken, tmp_path, recwarn):
    torch.save(tree, tmp_path / "w.pth")
    state = open_subject(str(tmp_path / "w.pth")).encoder.state_dict()
    assert all(state[k].equal(v) for k, v in RIGHT.items())
    said = [str(w.message) for w in recwarn if "w.pth" in str(w.message)]
    assert len(said) == (taken is not None) and all(f"the weights of {taken} are taken, not " in s for s in said)


def other(**model):
    return timm.create_model(NAME, img_size=SIZE, num_classes=0, **model).state_dict()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: other(mlp_ratio=3), "is not a vit_ti16: blocks.0.mlp.fc1.weight is 576 x 192, expected 768 x 192"),
        (lambda: other(in_chans=1), "patch_embed.proj.weight is 192 x 1 x 16 x 16; expected 192 x 3 x P x P"),
        (lambda: {**RIGHT, "blocks.0.attn.qkv.weight": torch.zeros(288, 192)}, "qkv.weight is 288 x 192, expected"),
        (lambda: {"model": other(), "args": argparse.Namespace(num_heads=12)}, "says that it has 12 heads; vit_ti16"),
        (lambda: {"model": vit(0, (16, 64)), "img_size": (16, 64)}, "says that its images are 16 x 64"),
        (lambda: {"model": other(), "config": {"input_size": [3, 32, 128]}}, "says that its images are 3 x 32 x 128"),
        (lambda: vit(0, (16, 64)), "its positions are a grid of 4 x 16; only square ones"),
        (lambda: under("embeddings.", {"cls": torch.zeros(1)}), "no 'patch_embed.proj.weight'; found embeddings.cls"),
        (lambda: {"model": RIGHT, "best": torch.nn.Linear(2, 2)}, r"plain data (torch.nn.modules.linear.Linear"),
    ],
)  # fmt: skip
def test_a_file_of_another_shape_is_refused_by_what_was_found(make, says, tmp_path):
    torch.save(make(), tmp_path / "w.pth")
    with pytest.raises(UserError, match=re.escape(says)):
        open_subject(str(tmp_path / "w.pth"))


def test_what_a_file_says_beside_its_weights_is_heeded(tmp_path):
    """Neither heads nor a grid of learned positions show in shapes: where nothing is said, a warning does."""
    small = timm.create_model("vit_small_patch16_224", img_size=SIZE, num_heads=12, num_classes=0).state_dict()
    torch.save({"model": small, "args": argparse.Namespace(num_heads=12, img_size=SIZE)}, tmp_path / "w.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_subject(str(tmp_path / "w.pth")).arch == "vit_s16_h12"
    torch.save(small, tmp_path / "w.pth")
    with pytest.warns(UserWarning, match="its 16 positions are learned ones, taken for a grid of 4 x 4"):
        assert open_subject(str(tmp_path / "w.pth")).arch == "vit_s16"
