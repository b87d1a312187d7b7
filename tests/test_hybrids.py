"""ASL, ccMIM, MACRL and MoCo v3: the properties of each, and the facts their files state."""

import math
import random

import pytest
import torch
from pydantic import ValidationError
from tiny import METHODS, REFERENCE, generator, gradient_norm, gradients, images, make, reference_images, step
from torch.nn import functional as F

from sslbench.masking import blockwise_order
from sslbench.recipe import compose
from sslbench.train.build import build, flops_per_image
from sslbench.views import TwoViews


def views_of(method, n=8, seed=0):
    return method.build_views(images(n), generator(seed))


def module_of(name):
    import sys

    return sys.modules[METHODS[name].__module__]


# ------------------------------------------------------------------------------------------------------------------ ASL


@pytest.mark.parametrize("loss", ["l1", "cosine"])
def test_asls_stop_gradients_change_the_value_and_no_gradient(loss):
    torch.manual_seed(0)
    a, b = (torch.randn(2, 3, 12, requires_grad=True) for _ in range(2))
    align = module_of("asl").align
    value = align(a, b, loss, "mean")
    got = torch.autograd.grad(value, (a, b))
    plain = (a - b).abs().mean() if loss == "l1" else (1 - torch.cosine_similarity(a, b, dim=-1)).mean()
    torch.testing.assert_close(value, 2 * plain)
    torch.testing.assert_close(got, torch.autograd.grad(plain, (a, b)))


def test_asl_without_augmentation_is_mae():
    asl, mae = make("asl", augmentation="none", align=False), make("mae")
    assert step(asl)["loss"].equal(step(mae)["loss"])


def test_asls_terms_are_mae_on_the_encoders_branch_and_twice_the_gap_on_masked_patches():
    method = make("asl")
    outputs = method(views_of(method))
    losses = method.loss(outputs)
    k = method.n_kept
    assert outputs["ori"].shape == outputs["aug"].shape == (8, 16 - k, 192) and not outputs["ori"].equal(outputs["aug"])
    torch.testing.assert_close(losses["align"], 2 * (outputs["ori"] - outputs["aug"]).abs().mean())
    mae = make("mae")
    mae.load_state_dict({k: v for k, v in method.state_dict().items() if not k.startswith("aee")})
    torch.testing.assert_close(losses["recon"], step(mae)["loss"])
    torch.testing.assert_close(losses["loss"], losses["recon"] + losses["align"])


@pytest.mark.parametrize(
    "config",
    [
        {"recon_on": "aug"},
        {"recon_on": "both_mean", "align": False},
        {"recon_on": "both_sum", "align_tokens": "all", "l1_reduction": "sum"},
        {"align_loss": "cosine", "cls_align": "decoder"},
        {"cls_align": "encoder", "aee_cls": False, "aee_norm": "none"},
        {"augmentation": "dle"},
        {"augmentation": "dle", "dle_place": "positions", "align": False, "recon_on": "both_mean"},
        {"augmentation": "dle", "dle_on": "aug", "norm_pix_loss": False},
    ],
    ids=str,
)
def test_every_switch_of_asl_trains_all_that_is_trainable(config):
    method = make("asl", **config)
    losses = step(method)
    found = gradients(method, losses["loss"])
    assert set(found) == {k for k, p in method.named_parameters() if p.requires_grad}
    assert losses.keys() == {"loss", "recon"} | ({"align"} if config.get("align", True) else set()) | (
        {"cls_align"} if "cls_align" in config else set()
    )


def test_dle_drops_projected_values_of_both_passes_independently_and_keeps_their_mean():
    method = make("asl", augmentation="dle", dle_p=0.3)
    views = views_of(method, 64)  # 12,288 values each: a deviation of .004
    a, b = views["kept_ori"].float(), views["kept_aug"].float()
    assert abs(a.mean() - 0.7) < 0.02 and not a.equal(b) and abs((a * b).mean() - 0.49) < 0.02
    keep = views["order"][:, : method.n_kept]
    plain = method.encoder.tokens(views["images"], keep)
    dropped = method.encoder.tokens(views["images"], keep, a / 0.7)
    positions = method.encoder.pos_embed[:, 1:].expand(64, -1, -1).gather(1, keep[..., None].expand(-1, -1, 48))
    torch.testing.assert_close(dropped[:, 1:] - positions, (plain[:, 1:] - positions) * a / 0.7)
    assert dropped[:, 0].equal(plain[:, 0])


@pytest.mark.parametrize("config", [{"align": False}, {"augmentation": "none"}])
def test_asl_refuses_a_branch_that_nothing_trains(config):
    with pytest.raises(ValidationError, match="recon_on"):
        METHODS["asl"].Config(**config)


def test_asls_variants_cost_what_table_7_prints():
    """1x, about 2x and about 1.5x of MAE, ViT-B/16 at 224, by counting."""
    cost = lambda *sets: flops_per_image(compose("asl", recipe="asl/vit_b16_coco", sets=list(sets)))  # noqa: E731
    mae = cost("science.method.augmentation=none", "science.method.align=false")
    assert cost("science.method.augmentation=dle") / mae == pytest.approx(2, abs=0.05)
    assert cost() / mae == pytest.approx(1.5, abs=0.1)


# ---------------------------------------------------------------------------------------------------------------- ccMIM


@pytest.mark.parametrize(
    ("divide", "align", "recon", "norm"),
    [("importance_sampling", 2.30246878, 1.07178593, 0.636410), ("random", 2.17428541, 1.07131469, 1.314154)],
)
def test_ccmim_official_gives_the_reference_losses_and_gradient(divide, align, recon, norm):
    preset = METHODS["ccmim"].presets["official"]
    method = make("ccmim", REFERENCE, **{**preset, "divide": divide, "decoder_dim": 32, "decoder_depth": 2,
                                         "decoder_heads": 4})  # fmt: skip
    noise = torch.rand(8, 16, generator=generator(2))
    division = {"order": noise.argsort(1)} if divide == "random" else {"noise": noise}
    losses = method.loss(method({"images": reference_images(), **division}))
    losses["loss"].backward()
    assert losses["official"].item() == pytest.approx(align, abs=2e-6)
    assert losses["recon"].item() == pytest.approx(recon, abs=2e-6)
    assert losses["loss"].item() == pytest.approx(0.1 * align + recon, abs=2e-6)
    assert gradient_norm(method) == pytest.approx(norm, rel=1e-4)


def test_ccmims_order_is_that_of_the_codes_ratio_of_softmaxes():
    method = make("ccmim")
    views = views_of(method, 32)
    scores, u = method.importance(views["images"]), views["noise"]
    assert method.divide(views).equal((scores.softmax(1) / u.softmax(1)).argsort(1))
    assert method.divide(views).equal((scores - u).argsort(1))
    exact = make("ccmim", divide="importance")
    assert exact.divide({"images": views["images"]}).equal(scores.argsort(1))


def test_ccmims_scores_are_the_attention_of_cls_summed_over_blocks():
    method = make("ccmim")
    x = views_of(method)["images"]
    expected, tokens = torch.zeros(8, 16), method.encoder.tokens(x)
    for block in method.encoder.blocks:
        attn, y = block.attn, block.norm1(tokens)
        q, k, _ = attn.qkv(y).reshape(8, 17, 3, 3, 16).permute(2, 0, 3, 1, 4)
        expected += (q @ k.transpose(-2, -1) / 4).softmax(-1).mean(1)[:, 0, 1:]
        tokens = block(tokens)
    torch.testing.assert_close(method.importance(x), expected)
    first = make("ccmim", score_layers="first", score_stage="pre_softmax", score_scale="dim")  # Eq. 4 to the letter
    q, k, _ = first.encoder.blocks[0].attn.qkv(first.encoder.blocks[0].norm1(first.encoder.tokens(x))).reshape(
        8, 17, 3, 3, 16).permute(2, 0, 3, 1, 4)  # fmt: skip
    torch.testing.assert_close(first.importance(x), (q @ k.transpose(-2, -1)).mean(1)[:, 0, 1:] / 48**0.5)


def test_gumbel_noise_samples_masked_patches_without_replacement_by_their_weight():
    method = make("ccmim", divide="importance_sampling", noise="gumbel", mask_ratio=0.9)  # one patch stays visible
    scores = torch.linspace(0, 2, 16)
    method.importance = lambda images: scores.expand(len(images), -1)
    u = torch.rand(40000, 16, generator=generator())
    last = method.divide({"images": torch.zeros(40000, 1), "noise": u})[:, -1]  # the first one that is drawn
    torch.testing.assert_close(last.bincount(minlength=16) / 40000, scores.softmax(0), atol=0.01, rtol=0)


def test_ccmims_masked_and_scoring_passes_store_nothing_and_change_no_gradient(monkeypatch):
    method = make("ccmim")
    passes = []
    method.encoder.blocks[0].register_forward_hook(lambda m, a, out: passes.append((a[0].shape[1], out.requires_grad)))
    views = views_of(method)
    losses = method.loss(method(views))
    assert (5, True) in passes and (13, False) in passes  # 4 visible and 12 masked patches, each with CLS
    got = gradients(method, losses["loss"])

    class Storing:  # the same with a graph, its end cut
        def __enter__(self):
            self.grad = torch.is_grad_enabled()

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(module_of("ccmim").torch, "no_grad", lambda *a: Storing())
    outputs = method(views)
    assert outputs["h_m"].requires_grad
    outputs["h_m"] = outputs["h_m"].detach()
    monkeypatch.undo()
    stored = gradients(method, method.loss(outputs)["loss"])
    assert got.keys() == stored.keys()
    for key, value in got.items():
        torch.testing.assert_close(value, stored[key], atol=1e-7, rtol=1e-5)


def test_ccmims_eq_7_against_its_sums():
    torch.manual_seed(0)
    v, m = (torch.nn.functional.normalize(torch.randn(5, 6), dim=1) for _ in range(2))
    e = lambda a, b: torch.exp(a @ b / 0.5)  # noqa: E731
    expected = 0.0
    for i in range(5):
        below = sum(e(v[i], v[j]) for j in range(5) if j != i) + sum(e(m[i], v[j]) for j in range(5))
        expected -= torch.log(e(m[i], v[i]) / below) / 5
    torch.testing.assert_close(module_of("ccmim").nce(v, m, 0.5, True, True), expected)


@pytest.mark.parametrize("contrast", ["nce", "official", "align", "none"])
@pytest.mark.parametrize("divide", ["importance_sampling", "importance", "random", "blockwise"])
def test_every_division_and_contrast_of_ccmim_trains_all_that_is_trainable(divide, contrast):
    method = make("ccmim", divide=divide, contrast=contrast)
    losses = step(method)
    found = gradients(method, losses["loss"])
    assert set(found) == {k for k, p in method.named_parameters() if p.requires_grad}
    order = method.divide(views_of(method))
    assert order.sort(1).values.equal(torch.arange(16).expand(8, -1))
    assert METHODS["ccmim"].compares_batch(method.config.model_dump()) == (contrast != "none")


def test_blockwise_masks_are_beits_of_exactly_the_asked_size():
    order = blockwise_order(2000, (14, 14), 147, generator())
    assert order.sort(1).values.equal(torch.arange(196).expand(2000, -1))
    masks = torch.ones(2000, 196).scatter(1, order[:, :49], 0.0).view(-1, 14, 14)
    assert (masks.sum((1, 2)) == 147).all()
    draw = random.Random(0)
    one_by_one = torch.stack([beit_mask(draw) for _ in range(2000)])
    for share in (alike, at_the_border, alone):
        assert share(masks) == pytest.approx(share(one_by_one), rel=0.03, abs=0.001), share.__name__
    noise = torch.rand(2000, 196, generator=generator()).view(-1, 14, 14).gt(0.25).float()
    assert alike(masks) > alike(noise) + 0.2  # blocks have short borders
    assert len({tuple(o.tolist()) for o in order}) == 2000


def beit_mask(draw, n=14, n_masked=147):
    """BEiT's Algorithm 1 on an n x n grid, block by block; what ten draws do not fill is filled at random."""
    mask, refused = torch.zeros(n, n), 0
    while (left := n_masked - int(mask.sum())) and refused < 10:
        area, ratio = draw.uniform(16, left), math.exp(draw.uniform(math.log(0.3), -math.log(0.3)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        refused += 1
        if h < n and w < n:
            a, b = draw.randint(0, n - h), draw.randint(0, n - w)
            new = h * w - int(mask[a : a + h, b : b + w].sum())
            if 0 < new <= left:
                mask[a : a + h, b : b + w] = 1
                refused = 0
    rest = draw.sample([i for i, m in enumerate(mask.flatten().tolist()) if not m], left)
    mask.view(-1)[rest] = 1
    return mask


def alike(masks):
    """The share of neighbours that are both masked or both visible."""
    return 1 - (masks.diff(dim=1).abs().mean().item() + masks.diff(dim=2).abs().mean().item()) / 2


def at_the_border(masks):
    """The share of the outermost patches that are masked."""
    return torch.stack([masks[:, 0], masks[:, -1], masks[:, :, 0], masks[:, :, -1]]).mean().item()


def alone(masks):
    """The share of the visible patches that have no visible neighbour."""
    visible = F.pad(1 - masks, (1, 1, 1, 1))
    beside = visible[:, :-2, 1:-1] + visible[:, 2:, 1:-1] + visible[:, 1:-1, :-2] + visible[:, 1:-1, 2:]
    return ((beside == 0) & (masks == 0)).sum().item() / (masks == 0).sum().item()


def test_ccmims_parameters_are_as_many_as_the_references():
    with torch.device("meta"):
        method = build(compose("ccmim", recipe="ccmim/vit_b16_imagenet", preset="official"))
    assert sum(p.numel() for p in method.parameters()) == 112_695_808


# ---------------------------------------------------------------------------------------------------------------- MACRL


@pytest.mark.parametrize(("on", "patches"), [("visible", slice(0, 4)), ("masked", slice(4, 16)), ("all", slice(0, 16))])
def test_macrl_reconstructs_the_patches_it_is_told_to(on, patches):
    method = make("macrl", recon_on=on)
    views = views_of(method)
    outputs = method(views)
    whole = make("macrl", recon_on="all")
    everything = whole(views)
    for i in "12":
        torch.testing.assert_close(outputs["predict" + i], everything["predict" + i][:, patches])
        torch.testing.assert_close(outputs["target" + i], everything["target" + i][:, patches])


def test_macrls_total_is_alpha_times_contrast_plus_reconstruction_and_its_bank_is_that_before_the_step():
    method = make("macrl")
    before = method.bank.keys.clone()
    outputs = method(views_of(method))
    losses = method.loss(outputs)
    torch.testing.assert_close(losses["loss"], 0.1 * losses["nce"] + losses["recon"])
    unit = {k: torch.nn.functional.normalize(v, dim=1) for k, v in outputs.items() if k[0] in "qk"}
    expected = 0.0
    for q, k in (("q1", "k2"), ("q2", "k1")):
        logits = torch.cat([(unit[q] * unit[k]).sum(1, keepdim=True), unit[q] @ before.T], 1) / 0.2
        expected -= logits.log_softmax(1)[:, 0].mean()
    torch.testing.assert_close(losses["nce"], expected)
    assert method.bank.keys.equal(before) and not outputs["k1"].requires_grad
    method.after_step(0.1)
    torch.testing.assert_close(method.bank.keys[:16], torch.cat([unit["k1"], unit["k2"]]))
    assert method.bank.keys[16:].equal(before[16:]) and not method.fresh


def test_macrls_loss_and_bank_do_not_depend_on_how_a_batch_is_divided():
    whole, parts = make("macrl"), make("macrl")
    views = views_of(whole)
    expected = gradients(whole, whole.loss(whole(views))["loss"])
    losses = [parts.loss(parts({k: v[p] for k, v in views.items()}))["loss"] / 2 for p in (slice(0, 4), slice(4, 8))]
    got = gradients(parts, sum(losses))
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, atol=1e-6, rtol=1e-4)
    for method in (whole, parts):
        method.after_step(0.1)
    torch.testing.assert_close(parts.bank.keys, whole.bank.keys, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "config",
    [
        {"memory_bank": False},
        {"memory_bank": False, "gather_negatives": False, "proj_norm": "bn", "two_tau": True},
        {"proj_norm": "bn", "token_mean": "mean", "bank_keys": "second"},
        {"token_mean": "cls", "recon_loss": "l2", "norm_pix_loss": True, "recon_on": "masked"},
        {"freeze_patch_embed": True, "momentum_schedule": "constant", "momentum": 0.5},
    ],
    ids=str,
)
def test_every_switch_of_macrl_trains_all_that_is_trainable(config):
    method = make("macrl", **config)
    losses = step(method)
    assert set(gradients(method, losses["loss"])) == {k for k, p in method.named_parameters() if p.requires_grad}
    method.after_step(0.5)
    assert (method.bank is None) == (config.get("memory_bank") is False)
    coupled = config.get("memory_bank") is False or config.get("proj_norm") == "bn"
    assert METHODS["macrl"].compares_batch(method.config.model_dump()) == coupled


def test_macrls_momentum_branch_sees_whole_views_without_a_graph():
    method = make("macrl")
    seen = []
    for encoder in (method.encoder, method.momentum_encoder):
        encoder.blocks[0].register_forward_hook(lambda m, a, out: seen.append((a[0].shape[1], out.requires_grad)))
    method(views_of(method))
    assert sorted(seen) == [(5, True), (5, True), (17, False), (17, False)]


# -------------------------------------------------------------------------------------------------------------- MoCo v3


def test_mocov3s_loss_is_symmetric_and_scaled_by_two_tau():
    method = make("mocov3")
    outputs = method(views_of(method))
    expected = 0.0
    for q, k in (("q1", "k2"), ("q2", "k1")):
        q, k = (torch.nn.functional.normalize(outputs[x], dim=1) for x in (q, k))
        expected -= 0.4 * (q @ k.T / 0.2).log_softmax(1).diagonal().mean()
    torch.testing.assert_close(method.loss(outputs)["loss"], expected)
    assert not outputs["k1"].requires_grad


def test_mocov3s_heads_and_momentum_are_the_public_recipes():
    with torch.device("meta"):
        method = build(compose("mocov3", recipe="mocov3/vit_b16_imagenet"))
    widths = [[m.weight.shape for m in head if isinstance(m, torch.nn.Linear)]
              for head in (method.projector, method.predictor)]  # fmt: skip
    assert widths == [[(4096, 768), (4096, 4096), (256, 4096)], [(4096, 256), (256, 4096)]]
    for head in (method.projector, method.predictor):
        assert head[-1].weight is None and head[1].weight is not None  # the last BatchNorm alone has no affine
        assert all(m.bias is None for m in head if isinstance(m, torch.nn.Linear))
    assert not any(p.requires_grad for p in method.encoder.patch_embed.parameters())
    s = compose("mocov3", recipe="mocov3/vit_b16_imagenet").science
    assert (s.optim.lr, s.optim.weight_decay, s.batch_size, s.epochs, s.optim.warmup_epochs) == (
        1.5e-4,
        0.1,
        4096,
        300,
        40,
    )
    assert TwoViews() == method.config.views and TwoViews().solarise_p == (0.0, 0.2) and TwoViews().blur_p == (1.0, 0.1)


@pytest.mark.parametrize("name", ["mocov3", "macrl"])
def test_the_momentum_encoder_starts_as_the_encoder_and_follows_it_after_each_step(name):
    method = make(name, momentum=0.9)
    for a, b in zip(method.encoder.parameters(), method.momentum_encoder.parameters(), strict=True):
        assert a.equal(b) and a is not b and not b.requires_grad
    old = [p.clone() for p in method.momentum_encoder.parameters()]
    with torch.no_grad():
        for p in method.encoder.parameters():
            p.add_(torch.randn_like(p))
    method.after_step(0.0)
    for new, before, target in zip(method.momentum_encoder.parameters(), old, method.encoder.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * before + 0.1 * target)
