"""CMAE: against its released code's numbers, of which no code is here; its shifts, masks and heads."""

import sys

import pytest
import torch
from tiny import METHODS, REFERENCE, generator, gradient_norm, images, make, step, thousandths
from torch.nn import functional as F

from sslbench.views import Crop, TwoViews
from sslbench.vit import Arch

MODULE = sys.modules[METHODS["cmae"].__module__]
OFFICIAL = METHODS["cmae"].presets["official"]
PLAIN = TwoViews(jitter_p=0, gray_p=0, blur_p=(0, 0), solarise_p=(0, 0))


def test_it_gives_the_released_codes_loss_and_gradient():
    """ZhichengHuang/CMAE e786a52: on these weights, in float64, its model and head gave 2.217754347 (.791754629 the
    contrast, 1.425999718 the reconstruction) and the gradients to 1e-13."""
    method = make("cmae", REFERENCE, **OFFICIAL)
    thousandths(method)
    method.double()
    g = generator(1)
    views = {name: torch.randn(8, 3, 64, 64, generator=g).double() for name in ("images", "target")}
    squares = torch.tensor([[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]])
    views["order"] = squares[torch.rand(8, 4, generator=g).argsort(1)].flatten(1)
    losses = method.loss(method(views))
    losses["loss"].backward()
    assert losses["loss"].item() == pytest.approx(2.217754347, abs=1e-8)
    assert losses["nce"].item() == pytest.approx(0.791754629, abs=1e-8)
    assert losses["recon"].item() == pytest.approx(1.425999718, abs=1e-8)
    assert gradient_norm(method) == pytest.approx(7.002908298, rel=1e-8)


def test_the_target_is_the_same_crop_moved_by_up_to_the_shift():
    method = make("cmae", shift=3, target_view=PLAIN)
    views = method.build_views(images(64), generator())
    assert method.crop_list() == [Crop(36)]
    found = []
    for online, target in zip(views["images"], views["target"], strict=True):
        at = [(y, x) for y in range(5) for x in range(5)
              if online[:, y:, x:].equal(target[:, : 32 - y, : 32 - x])]  # fmt: skip
        assert len(at) == 1
        found += at
    assert {y for y, _ in found} == {x for _, x in found} == {0, 1, 2, 3} and len(set(found)) > 8


def test_a_window_is_cut_at_each_images_own_offsets():
    x = torch.arange(2 * 3 * 6 * 6).view(2, 3, 6, 6).float()
    got = MODULE.shifted(x, torch.tensor([[0, 2], [1, 0]]), 4)
    assert got[0].equal(x[0, :, :4, 2:]) and got[1].equal(x[1, :, 1:5, :4])


def test_colours_change_in_the_target_alone():
    """Where nothing is moved, what differs is the colour."""
    method = make("cmae", shift=0, target_view=TwoViews(jitter_p=0, gray_p=1, blur_p=(0, 0)))
    views = method.build_views(images(), generator())
    online, target = views["images"], views["target"]
    assert not online.equal(target)
    a = method.augment
    grey = target * torch.tensor(a.std)[:, None, None] + torch.tensor(a.mean)[:, None, None]
    torch.testing.assert_close(grey[:, 0], grey[:, 1])
    assert (online[:, 0] - online[:, 1]).abs().max() > 0.1


@pytest.mark.parametrize(("preset", "kept"), [("paper", 49), ("official", 68)])
def test_visible_patches_of_196(preset, kept):
    """The code's: 17 of 49 squares of 2 x 2 patches."""
    method = make("cmae", Arch(patch=4, dim=8, depth=1, heads=2, image=56), **METHODS["cmae"].presets[preset])
    assert method.n_kept == kept
    order = method.build_views(images(), generator())["order"]
    assert all(sorted(row) == list(range(196)) for row in order.tolist())
    seen = torch.zeros(8, 196).scatter(1, order[:, :kept], 1.0).view(8, 7, 2, 7, 2)
    of_square = set(seen.sum((2, 4)).flatten().tolist())
    assert of_square == {0.0, 4.0} if preset == "official" else of_square > {0.0, 1.0, 2.0}


@pytest.mark.parametrize(
    ("config", "message"),
    [({"mask_unit": 3}, "mask_unit=3 does not divide the grid of 4 x 4"), ({"mask_ratio": 0.99}, "leaves none of 16")],
)
def test_a_mask_that_does_not_fit_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        make("cmae", **config)


def test_the_reconstruction_is_maes():
    cmae, mae = make("cmae"), make("mae")
    names = mae.state_dict().keys()
    mae.load_state_dict({k: v for k, v in cmae.state_dict().items() if k in names})
    views = cmae.build_views(images(), generator())
    with torch.no_grad():
        losses = cmae.loss(cmae(views))
        torch.testing.assert_close(losses["recon"], mae.loss(mae(views))["loss"])
    torch.testing.assert_close(losses["loss"], losses["recon"] + losses["nce"])


def test_the_contrast_is_over_the_keys_of_the_batch_and_the_codes_times_two_tau():
    method, code = make("cmae"), make("cmae", two_tau=True)
    outputs = method(method.build_views(images(), generator()))
    q, k = F.normalize(outputs["q"]), F.normalize(outputs["k"])
    nce = F.cross_entropy(q @ k.T / 0.07, torch.arange(8))
    torch.testing.assert_close(method.loss(outputs)["nce"], nce)
    torch.testing.assert_close(code.loss(outputs)["nce"], 0.14 * nce)


def test_the_targets_feature_is_the_mean_patch_of_the_momentum_encoders_last_block():
    method = make("cmae")
    views = method.build_views(images(), generator())
    x = method.momentum_encoder.tokens(views["target"])
    for block in method.momentum_encoder.blocks:
        x = block(x)
    torch.testing.assert_close(method.embed(views)["target_feature"], x[:, 1:].mean(1))


def test_momentum_stays_the_same_and_the_heads_follow():
    method = make("cmae")
    step(method)["loss"].backward()
    before = method.momentum_projector[0].weight.clone()
    with torch.no_grad():
        method.projector[0].weight += 1
    method.after_step(1.0)
    torch.testing.assert_close(method.momentum_projector[0].weight, before + 0.004)
