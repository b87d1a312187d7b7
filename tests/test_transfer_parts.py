"""The parts that `sslbench transfer` is built of: operators, backbone, necks, layer decay, schedule, recipes."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sslbench.errors import UserError
from sslbench.files import digest
from sslbench.paths import recipe_files
from sslbench.train.build import CPU_ATTENTION
from sslbench.transfer.protocol import Encoder, TransferMachine, transfer_recipe
from sslbench.transfer.transfer import require
from sslbench.vit import Arch, VisionTransformer, initialise, resample_positions

for module in ("mmengine", "mmcv", "mmdet", "mmseg"):
    pytest.importorskip(module, reason="needs the extra `transfer`", exc_type=ImportError)
require()

from sslbench.transfer import backbone as vit  # noqa: E402
from sslbench.transfer import necks, ops  # noqa: E402
from sslbench.transfer.feed import Order  # noqa: E402
from sslbench.transfer.job import adamw, learning_rate  # noqa: E402

SMALL = Arch(patch=8, dim=48, depth=12, heads=3, image=32)  # 4 x 4 tokens


def encoder(arch=SMALL, seed=0):
    torch.manual_seed(seed)
    model = VisionTransformer(arch)
    initialise(model)
    return model.eval()


def backbone(grid=(4, 4), **config):
    return vit.Backbone(encoder(), Encoder(**{"drop_path": 0.0, **config}), grid).eval()


def boxes(n, size, seed=0):
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=g) * size * 0.7
    return torch.cat([corner, corner + 2 + torch.rand(n, 2, generator=g) * size * 0.3], 1)


# ------------------------------------------------------------------------------------------------------------ operators


@pytest.mark.parametrize("offset", [0, 1])
def test_nms_through_mmcv_is_torchvisions(offset):
    from mmcv.ops import nms

    b, scores = boxes(200, 40), torch.rand(200, generator=torch.Generator().manual_seed(1))
    found, index = nms(b, scores, 0.5, offset=offset)
    wider = b + torch.tensor([0, 0, offset, offset])
    assert index.tolist() == torchvision.ops.nms(wider, scores, 0.5).tolist() and len(index) < 150
    torch.testing.assert_close(found, torch.cat([b, scores[:, None]], 1)[index])


def test_batched_nms_through_mmcv_is_torchvisions():
    from mmcv.ops import batched_nms

    g = torch.Generator().manual_seed(1)
    b, scores, kinds = boxes(200, 40), torch.rand(200, generator=g), torch.randint(0, 4, (200,), generator=g)
    _, index = batched_nms(b, scores, kinds, {"type": "nms", "iou_threshold": 0.5})
    assert index.tolist() == torchvision.ops.batched_nms(b, scores, kinds, 0.5).tolist()


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling", [0, 2])
def test_roi_align_through_mmcv_is_torchvisions_forward_and_backward(aligned, sampling):
    from mmcv.ops import RoIAlign

    x = torch.randn(2, 5, 16, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rois = torch.cat([torch.tensor([[0.0]] * 6 + [[1.0]] * 6), boxes(12, 64)], 1).double()
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    a = RoIAlign((7, 5), 0.25, sampling, "avg", aligned)(ours, rois)
    b = torchvision.ops.roi_align(theirs, rois, (7, 5), 0.25, sampling, aligned)
    torch.testing.assert_close(a, b, atol=0, rtol=0)
    weight = torch.randn(b.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=0, rtol=0)


def test_nms_and_roi_align_give_what_mmcvs_compiled_operators_gave():
    """mmcv_operators.npz: results of the CPU sources of onedl-mmcv 2.3.6, compiled, and what they were given."""
    from mmcv.ops import RoIAlign, nms

    with np.load(Path(__file__).parent / "mmcv_operators.npz") as file:
        golden = {name: torch.from_numpy(values) for name, values in file.items()}
    for offset in (0, 1):
        _, index = nms(golden["boxes"], golden["scores"], 0.5, offset=offset)
        assert index.tolist() == golden[f"nms_{offset}"].tolist()
    for aligned, sampling in ((a, s) for a in (0, 1) for s in (0, 2)):
        maps = golden["maps"].clone().requires_grad_()
        found = RoIAlign((3, 4), 0.25, sampling, "avg", bool(aligned))(maps, golden["rois"])
        torch.testing.assert_close(found, golden[f"roi_align_{aligned}_{sampling}"], atol=1e-12, rtol=0)
        (found * golden["weight"]).sum().backward()
        torch.testing.assert_close(maps.grad, golden[f"gradient_{aligned}_{sampling}"], atol=1e-12, rtol=0)


def test_the_stand_in_raises_for_what_it_has_not_and_leaves_a_compiled_extension_alone(monkeypatch):
    extension = ops.StandIn(ops.EXTENSION)
    with pytest.raises(NotImplementedError, match="'deform_conv_forward' is not compiled"):
        extension.deform_conv_forward(1, 2)
    compiled = type(ops)("mmcv._ext")
    compiled.__spec__ = ops.ModuleSpec("mmcv._ext", None)
    monkeypatch.setitem(ops.sys.modules, ops.EXTENSION, compiled)
    assert ops.install() == "mmcv" and ops.sys.modules[ops.EXTENSION] is compiled
    monkeypatch.delitem(ops.sys.modules, ops.EXTENSION)
    monkeypatch.setattr(ops.importlib.util, "find_spec", lambda name: None)
    assert ops.install() == "torchvision" and isinstance(ops.sys.modules[ops.EXTENSION], ops.StandIn)


# ------------------------------------------------------------------------------------------------------------- backbone


def plain_taps(model, images, taps):
    """Patch tokens behind blocks `taps` of the plain ViT at the size of the images, as maps."""
    grid = images.shape[2] // model.arch.patch, images.shape[3] // model.arch.patch
    other = VisionTransformer(model.arch, (images.shape[2], images.shape[3])).eval()
    table = resample_positions(model.pos_embed, model.grid, grid)
    other.load_state_dict({**model.state_dict(), "pos_embed": table})
    x, out = other.tokens(images), []
    for i, block in enumerate(other.blocks):
        x = block(x)
        if i in taps:
            out.append(x[:, 1:].transpose(1, 2).unflatten(2, grid))
    return out


@pytest.mark.parametrize("size", [(32, 32), (48, 64)])
@torch.no_grad()
def test_features_are_the_plain_vits_at_the_size_of_pre_training_and_at_another(size):
    images = torch.randn(2, 3, *size)
    maps = backbone(keep_cls=True)(images)
    for found, expected in zip(maps, plain_taps(encoder(), images, [3, 5, 7, 11]), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_window_of_all_tokens_is_global_attention_and_a_smaller_one_is_not():
    images = torch.randn(2, 3, 32, 32)
    (everywhere,) = backbone(taps=[11])(images)
    (one,) = backbone(taps=[11], window=4, global_blocks=[])(images)
    (four,) = backbone(taps=[11], window=2, global_blocks=[])(images)
    torch.testing.assert_close(one, everywhere, atol=1e-5, rtol=1e-5)
    assert (four - everywhere).abs().max() > 1e-3
    # No window sees another: what changes in one corner stays there.
    images[:, :, :16, :16] = 0
    moved = (backbone(taps=[11], window=2, global_blocks=[])(images)[0] - four).abs().amax((0, 1))
    assert moved[:2, :2].min() > 0 and moved[2:].max() == 0 and moved[:, 2:].max() == 0


@pytest.mark.parametrize("grid", [(4, 4), (5, 7), (3, 9)])
def test_windows_that_overhang_are_filled_with_zeros_and_cut_off_again(grid):
    x = torch.randn(2, grid[0] * grid[1], 6)
    tiles, tiled = vit.to_windows(x, grid, 3)
    assert tiles.shape == (2 * tiled[0] * tiled[1], 9, 6) and tiled == (-(-grid[0] // 3), -(-grid[1] // 3))
    assert tiles.sum().item() == pytest.approx(x.sum().item(), abs=1e-4)
    assert vit.from_windows(tiles, tiled, grid, 3).equal(x)
    torch.testing.assert_close(tiles[0].view(3, 3, 6), x.unflatten(1, grid)[0, :3, :3])


def test_relative_positions_add_what_their_tables_say():
    heads, c, grid = 3, 16, (3, 4)
    table, parts = vit.RelativeTable(grid, heads, cls=True), vit.Decomposed(grid, c)
    for p in (*table.parameters(), *parts.parameters()):
        nn.init.normal_(p)
    bias, q, k = table(), torch.randn(1, heads, 12, c), torch.randn(1, heads, 12, c)
    scale = c**-0.5
    more_q, more_k = parts(q, k, scale)
    scores = scale * more_q @ more_k.transpose(-2, -1)
    assert bias.shape == (1, heads, 13, 13) and more_q.shape[-1] % 8 == 0
    for i in range(12):
        for j in range(12):
            down, across = i // 4 - j // 4, i % 4 - j % 4
            torch.testing.assert_close(bias[0, :, 1 + i, 1 + j], table.table[:, down + 2, across + 3])
            offset = parts.rows[down + 2] + parts.columns[across + 3]
            expected = scale * (q[0, :, i] * k[0, :, j]).sum(-1) + (q[0, :, i] * offset).sum(-1)
            torch.testing.assert_close(scores[0, :, i, j], expected, atol=1e-5, rtol=1e-5)
    assert bias[0, :, 0, 0].equal(table.cls[2]) and bias[0, :, 0, 5].equal(table.cls[0])
    assert bias[0, :, 5, 0].equal(table.cls[1])


@pytest.mark.parametrize("kind", ["table", "decomposed", "shared"])
def test_relative_positions_start_at_zero_and_learn_with_checkpointing_too(kind):
    images, windows = torch.randn(2, 3, 32, 32), {"window": 3, "taps": [11]}
    gradients = []
    for checkpointing in (False, True):
        model = backbone(relative_positions=kind, **windows)
        with torch.no_grad():
            torch.testing.assert_close(model(images), backbone(**windows)(images), atol=1e-5, rtol=1e-5)
        model.checkpointing = checkpointing
        model.train()(images)[0].square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    assert all(g is not None for g in gradients[0].values())
    for name, g in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], g, msg=name)
    tables = [n for n in gradients[0] if ("relative" in n or "shared" in n)]
    assert len(tables) == {"table": 12, "decomposed": 24, "shared": 2}[kind]
    assert all(gradients[0][n].abs().max() > 0 for n in tables)


def test_positions_are_rebuilt_or_frozen_where_the_protocol_says_so_and_blocks_scale_with_depth():
    rebuilt = backbone(rebuild_positions=True, position_grid=(6, 5), train_positions=False)
    assert rebuilt.pos_embed.shape == (1, 31, 48) and not rebuilt.pos_embed.requires_grad
    assert backbone(position_grid=(8, 8)).pos_embed.shape == (1, 65, 48)
    assert vit.scaled([2, 5, 8, 11], 24) == [5, 11, 17, 23] and vit.scaled([3, 5, 7, 11], 24) == [7, 11, 15, 23]
    assert vit.scaled([2, 5, 8, 11], 12) == [2, 5, 8, 11] and vit.scaled([2, 5, 8, 11], 32) == [7, 15, 23, 31]
    rates = [b.drop_path1.drop_prob for b in backbone(drop_path=0.11).blocks]
    assert rates == pytest.approx([0.01 * i for i in range(12)])


def test_flops_of_attention_count_on_a_cpu_too():
    q = torch.randn(2, 3, 10, 16, requires_grad=True)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        y = nn.functional.scaled_dot_product_attention(q, q, q)
        forward = counter.get_total_flops()
        y.sum().backward()
    matmul = 2 * 2 * 3 * 10 * 10 * 16
    assert forward == 2 * matmul and counter.get_total_flops() == (2 + 5) * matmul  # backward computes one again


# -------------------------------------------------------------------------------------------- necks, optimiser, recipes


def test_pyramids_have_five_levels_of_strides_a_quarter_to_four_patches():
    maps = tuple(torch.randn(1, 48, 8, 6) for _ in range(4))
    norm = {n: necks.norm_cfg(n, synchronised=False) for n in ("LN", "GN", "SyncBN")}
    norm["GN"]["num_groups"] = 4
    for neck in (
        necks.SimplePyramid(48, norm["LN"], out=16),
        necks.TapPyramid(48, norm["GN"], norm["SyncBN"], out=16),
        necks.TapPyramid(48, norm["SyncBN"], None, out=16),
    ):
        shapes = [tuple(x.shape) for x in neck(maps)]
        assert shapes == [(1, 16, 32, 24), (1, 16, 16, 12), (1, 16, 8, 6), (1, 16, 4, 3), (1, 16, 2, 2)]
        with torch.autocast("cpu", torch.bfloat16):
            assert all(x.dtype == torch.float32 for x in neck(maps))
    four = [tuple(x.shape[2:]) for x in necks.Rescale(48, norm["SyncBN"])(maps)]
    assert four == [(32, 24), (16, 12), (8, 6), (4, 3)]


def test_layer_decay_has_vitdets_scales_and_no_weight_decay_on_norms_and_positions():
    optim = transfer_recipe("coco", "coco_vitdet").science.optim
    model = nn.Module()
    model.backbone = backbone(relative_positions="decomposed", taps=[11])
    model.head = nn.Sequential(nn.Linear(48, 4), nn.LayerNorm(4))
    groups = {id(p): g for g in adamw(model, 12, optim).param_groups for p in g["params"]}
    assert len(groups) == sum(p.requires_grad for p in model.parameters())
    scale = lambda p: round(groups[id(p)]["lr_scale"], 7)  # noqa: E731
    decay = lambda p: groups[id(p)]["weight_decay"]  # noqa: E731
    b = model.backbone
    assert scale(b.patch_embed.proj.weight) == scale(b.pos_embed) == 0.0096889
    assert scale(b.blocks[0].attn.qkv.weight) == scale(b.blocks[0].relative.rows) == 0.0138413
    assert scale(b.blocks[11].mlp.fc2.weight) == 0.7 and scale(model.head[0].weight) == 1
    assert decay(b.pos_embed) == decay(b.blocks[3].norm1.weight) == decay(b.blocks[3].norm1.bias) == 0
    assert decay(model.head[1].weight) == decay(model.head[1].bias) == 0
    assert decay(b.blocks[3].attn.qkv.bias) == decay(model.head[0].bias) == decay(model.head[0].weight) == 0.1


def test_the_tables_that_blocks_share_have_no_weight_decay_in_mimdets_protocol_and_are_as_others_elsewhere():
    model = nn.Module()
    model.backbone = backbone(relative_positions="shared", window=2)
    tables = {id(t.table) for t in model.backbone.shared.values()}
    assert len(tables) == 2
    for name, expected in (("coco_asl", {0.0}), ("coco_vitdet", {0.1})):
        optim = transfer_recipe("coco", name).science.optim
        groups = adamw(model, 12, optim).param_groups
        assert {g["weight_decay"] for g in groups for p in g["params"] if id(p) in tables} == expected
        assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_caes_crops_and_matches_are_its_codes_and_vitdets_are_not():
    from sslbench.data.labelled import Labelled
    from sslbench.transfer import coco

    cae, vitdet = (transfer_recipe("coco", name).science for name in ("coco_ccmim", "coco_vitdet"))
    found = Labelled(Path(), Path(), [])
    (plain,), (first, crop, again) = coco._train_pipeline(cae, found)[3]["transforms"]
    assert first["scales"] == [(400, 1333), (500, 1333), (600, 1333)] and plain == again
    assert {long for _, long in plain["scales"]} == {1333} and crop["recompute_bbox"] is False
    assert next(t for t in coco._train_pipeline(vitdet, found) if t["type"] == "RandomCrop")["recompute_bbox"] is True
    subject = SimpleNamespace(encoder=encoder(), arch="small", mean=(0.5,) * 3, std=(0.5,) * 3)
    for s, expected in ((cae, True), (vitdet, False)):
        config = coco.model(s, subject, TransferMachine(), synchronised=False, classes=80)["train_cfg"]
        assert config["rpn"]["assigner"]["match_low_quality"] is True
        assert config["rcnn"]["assigner"]["match_low_quality"] is expected


def test_ocls_segmentation_has_windows_of_16_and_four_global_blocks():
    s = transfer_recipe("ade20k", "ade20k_ocl").science
    windows = vit.Backbone(encoder(), s.encoder, (32, 32)).windows
    assert [i for i, w in enumerate(windows) if w is None] == [2, 5, 8, 11] and set(windows) == {16, None}
    plain = transfer_recipe("ade20k", "ade20k_mae").science
    assert s.model_copy(update={"encoder": plain.encoder}) == plain


@pytest.mark.parametrize(
    ("name", "hash"),
    [("coco_vitdet", "e49ee28029f5"), ("coco_ocl", "1120566dacaf"), ("ade20k_mae", "51faed0862f4"),
     ("ade20k_ccmim", "b92ffaec67aa"), ("coco_smoke", "c55baefa17bf")],
)  # fmt: skip
def test_keys_that_came_later_leave_the_hash_of_other_protocols_alone(name, hash):
    science = transfer_recipe(name.split("_")[0], name).science.model_dump(mode="json")
    assert digest({k: v for k, v in science.items() if k != "seed"}) == hash


@pytest.mark.parametrize(
    ("kind", "name", "at"),
    [
        ("coco", "coco_vitdet", {0: 1e-7, 10: 1e-4, 8888: 1e-4, 8889: 1e-5, 9630: 1e-6}),
        ("coco", "coco_asl", {0: 8e-8, 10: 8e-5, 5005: 4e-5, 9999: 0}),
        ("coco", "coco_ccmim", {0: 3e-7, 10: 3e-4, 7499: 3e-4, 7500: 3e-5, 9167: 3e-6}),
        ("ade20k", "ade20k_mae", {0: 1e-10, 10: 1e-4, 5005: 5e-5, 9999: 0}),
    ],
)
def test_the_lr_follows_the_papers_schedule(kind, name, at):
    """At 10,000 iterations, 10 of them warm-up."""
    short = transfer_recipe(kind, name).science.optim.model_copy(update={"warmup": 10})
    for step, lr in at.items():
        assert learning_rate(short, step, 10_000) == pytest.approx(lr, rel=1e-3, abs=1e-7), step


AFTER_WARMUP = {
    "steps": lambda o, total: {"type": "MultiStepLR", "milestones": [round(m * total) for m in o.milestones]},
    "cosine": lambda o, total: {"type": "CosineAnnealingLR", "T_max": total - o.warmup, "begin": o.warmup},
    "linear": lambda o, total: {"type": "PolyLR", "power": 1.0, "eta_min": 0.0, "begin": o.warmup},
}


@pytest.mark.parametrize("warmup", [0, 2, 30])
@pytest.mark.parametrize("name", ["coco_vitdet", "coco_asl", "ade20k_mae"])
def test_the_lr_is_mmengines_at_every_step(name, warmup):
    from mmengine.registry import PARAM_SCHEDULERS

    total = 200
    o = transfer_recipe(name.split("_")[0], name).science.optim.model_copy(update={"warmup": warmup})
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=o.lr)
    linear = {"type": "LinearLR", "start_factor": o.warmup_factor, "begin": 0, "end": warmup}
    configs = [linear] * (warmup > 0) + [{**AFTER_WARMUP[o.decay](o, total), "end": total}]
    schedulers = [PARAM_SCHEDULERS.build({**c, "by_epoch": False, "optimizer": optimizer}) for c in configs]
    for step in range(total):
        assert learning_rate(o, step, total) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-15)
        optimizer.step()
        for s in schedulers:
            s.step()


def test_milestones_are_vitdets_and_caes():
    vitdet, cae = (transfer_recipe("coco", n).science for n in ("coco_vitdet", "coco_ccmim"))
    for o, total, milestones in (
        (vitdet.optim, vitdet.iterations, [163889, 177546]),
        (cae.optim, 12 * 3665, [9 * 3665, 11 * 3665]),
    ):
        falls = [s for s in range(o.warmup + 1, total) if learning_rate(o, s, total) < learning_rate(o, s - 1, total)]
        assert falls == milestones


def test_every_rank_reads_its_part_of_one_order_from_any_step_on():
    from sslbench.recipe import Batch

    batch = Batch(total=8, micro=2, world=2, accumulation=2)
    whole = [[key for part in zip(*(Order(30, 0, batch, r, s, s + 1) for r in (0, 1)), strict=True) for k in part
              for key in k] for s in range(6)]  # fmt: skip
    assert all(len(step) == 8 for step in whole) and [step[0][0] for step in whole] == [0, 0, 0, 1, 1, 1]
    for epoch in (0, 3):
        assert len({i for step in whole[epoch : epoch + 3] for _, i in step}) == 24
    resumed = list(Order(30, 0, batch, 0, 4, 6))
    assert resumed == list(Order(30, 0, batch, 0, 0, 6))[-len(resumed) :] and len(resumed) == 4


@pytest.mark.parametrize("name", recipe_files("transfer"))
def test_every_recipe_resolves_and_opens_with_its_command(name):
    kind = name.split("_")[0]
    assert transfer_recipe(kind, name).science.protocol == kind
    text = recipe_files("transfer")[name].read_text()
    assert text.startswith(f"# sslbench transfer {kind} [RUN] --recipe {name}")


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("science.encoder.keep_cls=true", "no room for CLS"),
        ("science.neck=taps", "its neck_norm is GN or SyncBN"),
        ("science.epochs=3", "give iterations or epochs"),
        ("science.encoder.windows=14", "did you mean 'window'"),
        ("machine.compile=true", "compile"),
        ("science.encoder.taps=[12]", "not of a ViT of 12 blocks"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_and_says_why(setting, says):
    with pytest.raises(UserError, match=says):
        transfer_recipe("coco", None, [setting])
