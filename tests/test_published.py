"""Files of published ViTs, made here with their authors' names: what is loaded is the authors' function of an image.

Names, and what is kept beside the encoder, are those that the authors' code writes: unilm/beit and beit2,
data2vec_vision, CAE, ConMIM, SimMIM, ijepa, msn, dinov2, deit, Siamese-Image-Modeling, transformers' conversions.
"""

import argparse
import re
import sys
import types

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from sslbench.attention import last_block_attention, relevance
from sslbench.errors import UserError
from sslbench.evaluate.features import open_subject
from sslbench.evaluate.public import to_encoder
from sslbench.evaluate.told import Told
from sslbench.vit import ARCHS, Arch, Parts, VisionTransformer, initialise, parts_of

PATCH, DIM, DEPTH, HEADS, IMAGE = 8, 48, 2, 3, 32
GRID = IMAGE // PATCH
MLP = 4 * DIM


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(ARCHS, "small", Arch(PATCH, DIM, DEPTH, HEADS, IMAGE))


def draw(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape, scale=0.3: scale * torch.randn(*shape, generator=generator)


IMAGES = draw(1)(3, 3, IMAGE, IMAGE, scale=1.0)


# ------------------------------------------------------------------------------------------------------- authors' files


def a_block(r, qkv_bias="qkv", scale=None, table=False):
    """The tensors of a block. qkv_bias: `qkv`, or BEiT's `q_bias` and `v_bias`; scale: names of its two factors."""
    t = {"norm1.weight": 1 + r(DIM), "norm1.bias": r(DIM), "norm2.weight": 1 + r(DIM), "norm2.bias": r(DIM),
         "attn.qkv.weight": r(3 * DIM, DIM), "attn.proj.weight": r(DIM, DIM), "attn.proj.bias": r(DIM),
         "mlp.fc1.weight": r(MLP, DIM), "mlp.fc1.bias": r(MLP), "mlp.fc2.weight": r(DIM, MLP),
         "mlp.fc2.bias": r(DIM)}  # fmt: skip
    t |= {"attn.qkv.bias": r(3 * DIM)} if qkv_bias == "qkv" else {"attn.q_bias": r(DIM), "attn.v_bias": r(DIM)}
    t |= {name: r(DIM) for name in scale or ()}
    return t | ({"attn.relative_position_bias_table": r((2 * GRID - 1) ** 2 + 3, HEADS, scale=1.0)} if table else {})


def a_vit(seed=0, cls=True, positions=1 + GRID**2, norm="norm", **block):
    """A whole ViT. positions: rows of its table, None: none; norm: the name of its last."""
    r = draw(seed)
    t = {"patch_embed.proj.weight": r(DIM, 3, PATCH, PATCH), "patch_embed.proj.bias": r(DIM)}
    t |= {"cls_token": r(1, 1, DIM, scale=1.0)} if cls else {}
    t |= {"pos_embed": r(1, positions, DIM, scale=1.0)} if positions else {}
    t |= {f"{norm}.weight": 1 + r(DIM), f"{norm}.bias": r(DIM)} if norm else {}
    return t | {f"blocks.{i}.{k}": v for i in range(DEPTH) for k, v in a_block(r, **block).items()}


GAMMAS = ("gamma_1", "gamma_2")
INDEX = torch.zeros(GRID**2 + 1, GRID**2 + 1, dtype=torch.long)  # what a file says of it is not needed


def beit(seed=0, **more):
    """As BEiT pre-trains: one table of relative positions for all blocks, none of absolute ones."""
    shared = {"rel_pos_bias.relative_position_bias_table": draw(seed + 9)((2 * GRID - 1) ** 2 + 3, HEADS, scale=1.0),
              "rel_pos_bias.relative_position_index": INDEX}  # fmt: skip
    return {**a_vit(seed, positions=None, qkv_bias="q and v", **{"scale": GAMMAS, **more}), **shared}


def under(prefix, state):
    return {prefix + k: v for k, v in state.items()}


def zeros(state):
    return {k: torch.zeros_like(v) for k, v in state.items()}


LM = {"mask_token": torch.zeros(1, 1, DIM), "lm_head.weight": torch.zeros(7, DIM), "lm_head.bias": torch.zeros(7)}


def hugging_face(state):
    """transformers' names of a ViT's tensors."""
    names = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "cls_token": "embeddings.cls_token",
             "pos_embed": "embeddings.position_embeddings", "norm1": "layernorm_before", "norm2": "layernorm_after",
             "attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
             "blocks.": "encoder.layer."}  # fmt: skip
    out = {}
    for key, value in state.items():
        if key.startswith("norm."):
            out["layernorm" + key.removeprefix("norm")] = value
        elif ".attn.qkv." in key:
            for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                out[key.replace("blocks.", "encoder.layer.").replace("attn.qkv", f"attention.attention.{part}")] = third
        else:
            for old, new in names.items():
                key = key.replace(old, new)
            out[key] = value
    return out


# ---------------------------------------------------------------------------------------------- the authors' functions


def offsets():
    """BEiT's index into its table: query minus key, by row and column; then CLS as query, as key, with itself."""
    at = [(i // GRID, i % GRID) for i in range(GRID**2)]
    side = 2 * GRID - 1
    index = torch.empty(GRID**2 + 1, GRID**2 + 1, dtype=torch.long)
    for q, (a, b) in enumerate(at):
        for k, (c, d) in enumerate(at):
            index[1 + q, 1 + k] = (a - c + GRID - 1) * side + b - d + GRID - 1
    index[0], index[:, 0], index[0, 0] = side**2, side**2 + 1, side**2 + 2
    return index


def forward(t, images=IMAGES, registers=None):
    """The tokens of a file's encoder, by its tensors, as the papers define it: CLS if it has one, patches in order."""
    x = F.conv2d(images, t["patch_embed.proj.weight"], t["patch_embed.proj.bias"], stride=PATCH).flatten(2).mT
    table = t.get("pos_embed", torch.zeros(1, 1, DIM))
    if "cls_token" in t:
        x = torch.cat([t["cls_token"].expand(len(x), -1, -1), x], 1)
        if table.shape[1] == GRID**2:  # DeiT III: CLS has no position
            table = F.pad(table, (0, 0, 1, 0))
    x = x + table
    if registers is not None:  # DINOv2: between CLS and patches
        x = torch.cat([x[:, :1], registers.expand(len(x), -1, -1), x[:, 1:]], 1)
    for i in range(DEPTH):
        b = {k.removeprefix(f"blocks.{i}."): v for k, v in t.items() if k.startswith(f"blocks.{i}.")}
        y = F.layer_norm(x, (DIM,), b["norm1.weight"], b["norm1.bias"], 1e-6)
        bias = (
            b["attn.qkv.bias"]
            if "attn.qkv.bias" in b
            else torch.cat([b["attn.q_bias"], torch.zeros(DIM), b["attn.v_bias"]])
        )
        q, k, v = F.linear(y, b["attn.qkv.weight"], bias).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT * (DIM / HEADS) ** -0.5
        for name in ("rel_pos_bias.relative_position_bias_table", f"blocks.{i}.attn.relative_position_bias_table"):
            if name in t:
                scores = scores + t[name][offsets()].permute(2, 0, 1)
        y = F.linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), b["attn.proj.weight"], b["attn.proj.bias"])
        x = x + b.get("gamma_1", b.get("ls1.gamma", 1)) * y
        y = F.layer_norm(x, (DIM,), b["norm2.weight"], b["norm2.bias"], 1e-6)
        y = F.linear(
            F.gelu(F.linear(y, b["mlp.fc1.weight"], b["mlp.fc1.bias"])), b["mlp.fc2.weight"], b["mlp.fc2.bias"]
        )
        x = x + b.get("gamma_2", b.get("ls2.gamma", 1)) * y
    if registers is not None:
        x = torch.cat([x[:, :1], x[:, 1 + registers.shape[1] :]], 1)
    return F.layer_norm(x, (DIM,), t["norm.weight"], t["norm.bias"], 1e-6) if "norm.weight" in t else x


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def load(tree, tmp_path, name="w.pth"):
    torch.save(tree, tmp_path / name)
    subject = open_subject(str(tmp_path / name))
    assert subject.arch == "small"
    return subject


FILES = {  # name: (what the authors save, the tensors that they evaluate)
    "BEiT": lambda t: ({"model": {**t, **LM}, "optimizer": {}, "epoch": 799, "args": argparse.Namespace(lr=1.0)}, t),
    "BEiT, a table by block": lambda t: ({"module": {k: v for k, v in t.items() if "rel_pos_bias" not in k}},
                                         {k: v for k, v in t.items() if "rel_pos_bias" not in k}),
    "BEiT v2": lambda t: ({"model": {**t, **LM, **under("cls_pt_layers.0.", a_block(draw(5), "q and v", GAMMAS))}}, t),
    "data2vec": lambda t: ({"model": {**t, **LM}, "model_ema": {**zeros(t), **LM}}, t),
    "ConMIM": lambda t: ({"model": {**t, **LM, "projectors.0.weight": torch.zeros(4, DIM)}, "epoch": 799}, t),
    "SimMIM": lambda t: ({"model": {**under("encoder.", {**t, "mask_token": torch.zeros(1, 1, DIM)}),
                                    "decoder.0.weight": torch.zeros(9, DIM, 1, 1)}, "epoch": 799}, t),
}  # fmt: skip


@pytest.mark.parametrize("family", FILES)
def test_beits_and_who_builds_on_its_code_give_the_authors_features(family, tmp_path, recwarn):
    t = beit(scale=None) if family == "SimMIM" else beit(table=family.endswith("by block"))
    tree, own = FILES[family](t)
    subject = load(tree, tmp_path)
    assert subject.encoder.parts == Parts(relative=True, absolute=False) and subject.pool == "cls"
    close(subject.encoder(IMAGES), forward(own))
    said = [str(w.message) for w in recwarn if "layer scale" in str(w.message)]
    assert len(said) == (family != "SimMIM") and all("fine-tuning then trains their product" in s for s in said)


def test_simmims_configuration_is_read_as_plain_data(tmp_path, monkeypatch):
    """Its checkpoints hold a CfgNode of yacs, a dict with attributes, which is not installed here."""
    yacs = types.ModuleType("yacs.config")
    yacs.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    config = yacs.CfgNode(DATA=yacs.CfgNode(IMG_SIZE=IMAGE))
    config.__dict__["__immutable__"] = True
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", yacs)
    t = beit(scale=None)
    torch.save({"model": under("encoder.", t), "config": config}, tmp_path / "w.pth")
    monkeypatch.delitem(sys.modules, "yacs.config")
    monkeypatch.delitem(sys.modules, "yacs")
    close(open_subject(str(tmp_path / "w.pth")).encoder(IMAGES), forward(t))


@pytest.mark.parametrize(
    ("args", "method", "mean"),
    [({}, "BEiT", 0.5), ({}, "data2vec", 0.485), ({"imagenet_default_mean_and_std": True}, "BEiT", 0.485),
     ({"imagenet_default_mean_and_std": False}, "CAE", 0.5), ({"imagenet_default_mean_and_std": False}, None, 0.5)],
)  # fmt: skip
def test_images_are_taken_by_the_statistics_that_the_authors_took(args, method, mean, tmp_path, recwarn):
    torch.save({"model": {**beit(), **LM}, "args": argparse.Namespace(**args)}, tmp_path / "w.pth")
    subject = open_subject(str(tmp_path / "w.pth"), told=Told(method))
    assert subject.mean[0] == mean and not any("mean and deviation" in str(w.message) for w in recwarn)


def test_of_images_statistics_a_guess_is_said_and_transformers_own_are_read(tmp_path):
    torch.save({"model": beit()}, tmp_path / "w.pth")
    with pytest.warns(UserWarning, match="does not say by which mean and deviation"):
        assert open_subject(str(tmp_path / "w.pth")).mean[0] == 0.485
    torch.save(hugging_face(a_vit()), tmp_path / "hf.bin")
    with pytest.warns(UserWarning, match=r"no preprocessor_config\.json beside it"):
        assert open_subject(str(tmp_path / "hf.bin")).std[0] == 0.229
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5]}')
    subject = open_subject(str(tmp_path / "hf.bin"))
    assert subject.mean == (0.1, 0.2, 0.3) and subject.std == (0.5, 0.5, 0.5)


def test_cae_is_its_encoder_and_not_the_teacher_with_the_layer_scale_and_fixed_positions(tmp_path):
    t = a_vit(qkv_bias="q and v", scale=GAMMAS)
    beside = {**under("teacher.", zeros(t)), "mask_token": torch.zeros(1, 1, DIM),
              **under("pretext_neck.regressor_blocks.0.", {"norm1_q.weight": torch.ones(DIM)})}  # fmt: skip
    with pytest.warns(UserWarning, match=re.escape("the weights of model.encoder are taken, not model.teacher")):
        subject = load({"model": {**under("encoder.", t), **beside}, "epoch": 799}, tmp_path)
    close(subject.encoder(IMAGES), forward(t))


def test_caes_vit_s_has_twelve_heads(monkeypatch, tmp_path):
    monkeypatch.setitem(ARCHS, "small_h12", Arch(PATCH, DIM, DEPTH, 12, IMAGE))
    tree = {**under("encoder.", a_vit()), "pretext_neck.norm.weight": torch.ones(DIM)}
    torch.save({"model": tree}, tmp_path / "w.pth")
    assert open_subject(str(tmp_path / "w.pth")).arch == "small_h12"


def test_ijepa_is_its_target_encoder_which_has_no_cls(tmp_path):
    t = a_vit(cls=False, positions=GRID**2)
    tree = {"encoder": under("module.", zeros(t)), "target_encoder": under("module.", t), "opt": {}, "scaler": None,
            "predictor": {"module.predictor_embed.weight": torch.zeros(4, DIM)}, "epoch": 300}  # fmt: skip
    with pytest.warns(UserWarning, match="the weights of target_encoder.module are taken"):
        subject = load(tree, tmp_path)
    tokens = subject.encoder(IMAGES)
    assert subject.encoder.parts == Parts(cls=False) and subject.pool == "mean" and subject.encoder.pools == ("mean",)
    close(tokens[:, 1:], forward(t))
    close(subject.encoder.feature(tokens, "mean"), forward(t).mean(1))
    assert tokens[:, 0].isnan().all()  # nobody reads a CLS that there is not without seeing it


def test_msn_is_its_target_encoder(tmp_path):
    t, head = a_vit(), {"fc.fc1.weight": torch.zeros(4, DIM)}
    tree = {"target_encoder": under("module.", {**t, **head}), "encoder": under("module.", zeros(t)), "epoch": 600,
            "prototypes": torch.zeros(4, 4)}  # fmt: skip
    close(load(tree, tmp_path).encoder(IMAGES), forward(t))


@pytest.mark.parametrize("chunked", [False, True])
def test_dinov2_keeps_its_registers_out_of_what_is_pooled(chunked, tmp_path):
    t, registers = a_vit(scale=("ls1.gamma", "ls2.gamma")), draw(7)(1, 4, DIM, scale=1.0)
    state = {**t, "register_tokens": registers, "mask_token": torch.zeros(1, DIM)}
    if chunked:  # as its training writes them
        state = {re.sub(r"^blocks\.", "blocks.0.", k): v for k, v in state.items()}
        state = {"teacher": under("backbone.", state)}
    subject = load(state, tmp_path)
    assert subject.encoder.parts == Parts(registers=4) and subject.encoder(IMAGES).shape == (3, 1 + GRID**2, DIM)
    close(subject.encoder(IMAGES), forward(t, registers=registers))


def test_siameseim_ends_with_its_last_block_and_its_feature_is_the_mean_normalised(tmp_path):
    t = a_vit(norm=None)
    beside = {**under("mm_", zeros({k: v for k, v in t.items() if k != "pos_embed"})),
              "decoder_pos_mlp.weight": torch.zeros(4, 4)}  # fmt: skip
    subject = load({"model": {**t, **beside}, "epoch": 1599}, tmp_path)
    assert subject.pool == "mean"
    close(subject.encoder.feature(subject.encoder(IMAGES), "mean"),
          F.layer_norm(forward(t)[:, 1:].mean(1), (DIM,), eps=1e-6))  # fmt: skip


def test_deit_iii_adds_no_position_to_cls(tmp_path):
    t = a_vit(positions=GRID**2, scale=GAMMAS)
    close(load({"model": t}, tmp_path).encoder(IMAGES), forward(t))


@pytest.mark.parametrize("prefix", ["", "vit.", "deit."])
def test_transformers_names_are_those_of_a_vit(prefix, tmp_path):
    t = a_vit()
    state = under(prefix, hugging_face(t))
    if prefix == "vit.":  # ViTMAE
        state |= {"decoder.decoder_embed.weight": torch.zeros(4, DIM), "decoder.mask_token": torch.zeros(1, 1, 4)}
    else:
        state |= {"pooler.dense.weight": torch.zeros(DIM, DIM), "classifier.weight": torch.zeros(7, DIM)}
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "model.safetensors")
    close(open_subject(str(tmp_path / "model.safetensors")).encoder(IMAGES), forward(t))


@pytest.mark.parametrize(
    "nest",
    [
        lambda t: under("module.", t),
        lambda t: under("_orig_mod.", t),
        lambda t: {"state_dict": under("_orig_mod.module.backbone.", t)},
        lambda t: {"state_dict": under("backbone.", t), "meta": {}},
        lambda t: {"state_dict": zeros(t), "state_dict_ema": t},
        lambda t: {"model": zeros(t), "model_ema": under("module.", t)},
    ],
)
def test_what_a_file_is_nested_in_is_taken_off(nest, tmp_path):
    t = a_vit()
    close(load(nest(t), tmp_path).encoder(IMAGES), forward(t))


# -------------------------------------------------------------------------------------------------------- timm's models

TIMM = {
    "beit_base_patch16_224": {},
    "beitv2_base_patch16_224": {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False, "use_abs_pos_emb": True},
    "deit_base_distilled_patch16_224": {},
    "deit3_base_patch16_224": {},
    "vit_base_patch14_reg4_dinov2": {},
    "vit_base_patch16_224": {"global_pool": "avg", "class_token": True},  # fc_norm
    "vit_base_patch16_gap_224": {},  # no CLS
}


@pytest.mark.parametrize("name", TIMM)
def test_the_feature_is_timms_own(name, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=IMAGE, patch_size=PATCH, embed_dim=DIM, depth=DEPTH, num_heads=HEADS,
                              num_classes=5, **TIMM[name]).eval()  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p + 0.2 * torch.randn_like(p))
    subject = load(model.state_dict(), tmp_path)
    tokens, theirs = subject.encoder(IMAGES), model.forward_features(IMAGES)
    first = subject.encoder.parts.cls
    close(tokens[:, 1:], theirs[:, model.num_prefix_tokens :])
    if first:
        close(tokens[:, 0], theirs[:, 0])
    if name != "deit_base_distilled_patch16_224":  # whose pooling averages CLS and the distillation token
        close(subject.encoder.feature(tokens, subject.pool), model.forward_head(theirs, pre_logits=True))


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"model": {"patch_embed.proj.weight": torch.zeros(8, 3, 4, 4),
                    "layers.0.blocks.0.attn.relative_position_bias_table": torch.zeros(9, 2)}}, "a Swin Transformer"),
        (under("encoder.", {"patch_embed.proj.weight": torch.zeros(8, 3, 4, 4),
                            "layers.0.blocks.0.norm1.weight": torch.zeros(8)}), "a Swin Transformer"),
        ({"state_dict": under("module.encoder_q.", {"conv1.weight": torch.zeros(1),
                                                   "layer1.0.conv1.weight": torch.zeros(1)})}, "a ResNet"),
        ({"downsample_layers.0.0.weight": torch.zeros(1), "stages.0.0.dwconv.weight": torch.zeros(1)}, "a ConvNeXt"),
        ({"stem.0.weight": torch.zeros(1), "stages.0.blocks.0.conv_dw.weight": torch.zeros(1)}, "a ConvNeXt"),
    ],
)  # fmt: skip
def test_what_is_no_vit_is_refused_by_its_name(tree, says, tmp_path):
    torch.save(tree, tmp_path / "w.pth")
    with pytest.raises(UserError, match=f"this is {says}; only Vision Transformers"):
        open_subject(str(tmp_path / "w.pth"))


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "resnet18", "convnext_atto"])
def test_timms_models_of_these_families_are_refused_by_name_too(name, tmp_path):
    torch.save(timm.create_model(name).state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match="this is a "):
        open_subject(str(tmp_path / "w.pth"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: {**t, "fc_norm.weight": t["norm.weight"]}, "it has both norm and fc_norm"),
        (lambda t: {**t, "blocks.0.attn.q_norm.weight": torch.ones(16)}, "it has blocks.0.attn.q_norm.weight"),
        (lambda t: {**t, "blocks.1.gamma_3": torch.ones(DIM)}, "it has blocks.1.gamma_3"),
        (lambda t: {**t, "rope_embed.periods": torch.ones(4)}, "it has rope_embed.periods"),
        (lambda t: {k: v for k, v in t.items() if "norm." not in k}, "lacks"),
        (lambda t: {**t, "pos_embed": t["pos_embed"][:, :-2]}, "expected positions 1 x (1 + side x side) x 48"),
        (lambda t: {k: v for k, v in t.items() if k != "pos_embed"}, "expected positions"),
        (lambda t: {**t, "blocks.0.attn.relative_position_bias_table": torch.zeros(52, 3)}, "lacks blocks.1.relative"),
        (lambda t: {**t, "rel_pos_bias.relative_position_bias_table": torch.zeros(28, 3)},
         "blocks.0.relative.table is 3 x 5 x 5, expected 3 x 7 x 7"),
        (lambda t: {**t, "rel_pos_bias.relative_position_bias_table": torch.zeros(40, 3)}, "40 relative positions"),
        (lambda t: under("vit.", {**hugging_face(t), "encoder.layer.0.layer_scale1.lambda1": torch.ones(DIM)}),
         "it has encoder.layer.0.layer_scale1.lambda1"),
    ],
)  # fmt: skip
def test_a_part_that_is_not_known_is_named_and_never_left_out(change, says, tmp_path):
    torch.save(change(a_vit()), tmp_path / "w.pth")
    with pytest.raises(UserError, match=re.escape(says)):
        open_subject(str(tmp_path / "w.pth"))


@pytest.mark.parametrize("name", ["vit_s8", "vit_s14"])
def test_dinos_patch_8_and_dinov2s_patch_14_are_archs(name):
    encoder = VisionTransformer(ARCHS[name], 2 * ARCHS[name].patch)
    assert to_encoder({"teacher": under("backbone.", encoder.state_dict())}, "a file")[1] == name


# ------------------------------------------------------------------------------------- pictures, and the parts of a ViT

ALL_PARTS = [Parts(), Parts(registers=2), Parts(relative=True), Parts(cls=False), Parts(cls=False, registers=1)]


def with_parts(parts, seed=0):
    torch.manual_seed(seed)
    encoder = VisionTransformer(ARCHS["small"], parts=parts).eval()
    initialise(encoder)
    for p in encoder.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return encoder


@pytest.mark.parametrize("parts", [*ALL_PARTS, Parts(pooled_norm=True)])
def test_a_state_dict_tells_its_parts(parts):
    assert parts_of(with_parts(parts).state_dict()) == parts


@pytest.mark.parametrize("parts", [p for p in ALL_PARTS if p.cls])
def test_attention_of_cls_is_the_softmax_with_relative_positions_over_registers_too(parts):
    encoder = with_parts(parts)
    x = encoder.tokens(IMAGES)
    x = encoder.blocks[0](x)
    last = encoder.blocks[1]
    q, k, _ = last.attn.qkv(last.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT * (DIM / HEADS) ** -0.5
    if parts.relative:
        scores = scores + last.relative()
    weights = scores.softmax(-1)[:, :, 0].mean(1)
    assert weights.shape[1] == 1 + GRID**2 + parts.registers
    close(last_block_attention(encoder, IMAGES), weights[:, 1 : 1 + GRID**2])


@pytest.mark.parametrize("parts", ALL_PARTS)
def test_relevance_is_of_the_patches_alone(parts):
    encoder = with_parts(parts)
    pool = encoder.pools[0]
    found = relevance(encoder, IMAGES, pool, torch.zeros(DIM))
    assert found.shape == (3, GRID**2) and found.isfinite().all() and (found > 0).any(1).all()


def test_one_table_for_all_and_one_a_block_are_added_up(tmp_path):
    t = beit(table=True)
    close(load({"model": t}, tmp_path).encoder(IMAGES), forward(t))
