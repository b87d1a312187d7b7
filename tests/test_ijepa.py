"""I-JEPA: against its released code's numbers, of which no code is here; its blocks, and what each part may see."""

import pytest
import torch
from tiny import METHODS, REFERENCE, generator, gradient_norm, images, make, reference_images, step, thousandths

from sslbench.draws import Draws
from sslbench.recipe import Augment
from sslbench.vit import Arch, Parts, VisionTransformer

GRID = Arch(patch=4, dim=12, depth=1, heads=3, image=56)  # 14 x 14 patches, as at 224 pixels
OFFICIAL = METHODS["ijepa"].presets["official"]


@pytest.mark.parametrize(
    ("preset", "expected", "norm"), [("official", 0.51747456, 0.46413311), ("paper", 1.24338434, 1.30177513)]
)
def test_it_gives_the_released_codes_loss_and_gradient(preset, expected, norm):
    """facebookresearch/ijepa 52c1ae9: its encoders and predictor on these weights gave them, image by image, for its
    targets have one size; gradients within 2e-6. It has no CLS token, and for `paper` its loss is torch's mse_loss."""
    torch.manual_seed(0)
    cls = METHODS["ijepa"]
    config = {**cls.presets[preset], "predictor_dim": 24, "predictor_depth": 2, "target_scale": (0.1, 0.4)}
    method = cls(cls.Config(**config), VisionTransformer(REFERENCE, parts=Parts(cls=False)), Augment())
    thousandths(method)
    masks = method.masks(8, generator(2))
    assert len(masks["count"].unique()) > 1  # some are filled up
    loss = method.loss(method({"images": reference_images(), **masks}))["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=2e-6)
    assert gradient_norm(method) == pytest.approx(norm, rel=1e-5)


def blocks(method, n=2000):
    """Of `method.masks`: the parts as boolean maps, context (B, N), targets (B, M, N); and the masks."""
    masks = method.masks(n, generator())
    maps = torch.zeros(n, 1 + masks["targets"].shape[1], method.encoder.n_patches, dtype=torch.bool)
    maps[:, 0].scatter_(1, masks["context"], True)
    maps[:, 1:].scatter_(2, masks["targets"], True)
    return maps[:, 0], maps[:, 1:], masks


def extent(maps, grid):
    """Rows and columns from the first to the last patch of each map (..., N)."""
    maps = maps.unflatten(-1, grid)
    found = []
    for axis in (-1, -2):
        some = maps.any(axis).long()
        found.append(some.shape[-1] - some.argmax(-1) - some.flip(-1).argmax(-1))
    return found


@pytest.mark.parametrize("preset", [{}, OFFICIAL])
def test_targets_are_four_blocks_of_one_size_and_the_context_has_none_of_them(preset):
    method = make("ijepa", GRID, **preset)
    context, targets, masks = blocks(method)
    count = masks["count"]
    rows, columns = extent(targets, (14, 14))
    assert targets.sum(2).eq(count[:, None]).all() and (rows * columns).eq(count[:, None]).all()  # whole rectangles
    assert targets.shape[1] == 4 and rows.eq(rows[:, :1]).all() and columns.eq(columns[:, :1]).all()
    assert masks["targets"].shape[2] == count.max()  # no wider than it has to be
    height, width = rows[:, 0], columns[:, 0]
    assert count.min() >= 0.75 * 0.15 * 196 and count.max() <= 1.1 * 0.2 * 196  # sides are rounded
    assert (height / width).min() >= 0.66 and (height / width).max() <= 1.76
    assert not (context[:, None] & targets).any()
    assert masks["context"].shape[1] == 49 and (context.sum(1) < 49).float().mean() < 0.015
    edges = [part.unflatten(-1, (14, 14)) for part in (context, targets)]
    assert [bool(x[..., 13, :].any() or x[..., 13].any()) for x in edges] == [not preset] * 2
    if preset:  # large ones are tall
        assert (count[height > width].double().mean() > count[height < width].double().mean() + 4).item()
    else:  # any patch may be in either
        assert context.any(0).all() and targets.any((0, 1)).all()


@pytest.mark.parametrize(("dropped", "ordered"), [("last", 1.0), ("random", 0.0)])
def test_a_context_that_is_too_large_loses_patches_at_random_or_the_last(dropped, ordered):
    method = make("ijepa", GRID, context_scale=(1, 1), dropped=dropped)
    context, targets, _ = blocks(method)
    free = ~targets.any(1)
    first = free & (free.cumsum(1) <= 49)
    assert context.eq(first).all(1)[free.sum(1) >= 49].float().mean() == ordered


@pytest.mark.parametrize("preset", [{}, OFFICIAL])
def test_a_context_with_too_few_patches_repeats_them_and_one_without_any_takes_others_of_no_target(preset):
    small = Arch(patch=8, dim=12, depth=1, heads=3, image=32)
    method = make("ijepa", small, **preset, context_share=0.5)
    context, targets, masks = blocks(method)
    assert masks["context"].shape[1] == 8 and (context.sum(1) < 8).any() and (context.sum(1) > 0).all()
    assert not (context[:, None] & targets).any()
    assert step(make("ijepa", small, **preset))["loss"].isfinite()


def test_masks_are_the_same_however_a_batch_is_divided():
    method = make("ijepa")

    def parts(size):
        draws, found = Draws(torch.device("cpu")), []
        for first in range(0, 8, size):
            draws.seek(5, first, 8, first)
            found.append(method.masks(size, draws))
        return {k: torch.cat([part[k] for part in found]) for k in found[0]}

    whole, halves, single = parts(8), parts(4), parts(1)
    assert all(whole[k].equal(halves[k]) and whole[k].equal(single[k]) for k in whole)


def test_no_prediction_sees_its_target():
    method = make("ijepa", GRID)
    views = method.build_views(images(), generator())
    outputs = method(views)
    context, *_ = torch.zeros(8, 1, 196).scatter(2, views["context"][:, None], 1).split(1, 1)
    hole = context.reshape(8, 1, 14, 14).repeat_interleave(4, 2).repeat_interleave(4, 3)
    other = method({**views, "images": torch.where(hole > 0, views["images"], -views["images"])})
    assert other["prediction"].equal(outputs["prediction"])
    assert (other["target"] - outputs["target"]).abs().mean() > 0.1
    assert not outputs["target"].requires_grad
    torch.testing.assert_close(
        outputs["target"].var(-1, correction=0), torch.ones(outputs["target"].shape[:-1]), rtol=0.01, atol=0
    )


def test_what_fills_a_target_up_changes_nothing():
    method = make("ijepa", GRID)
    views = method.build_views(images(), generator())
    outputs = method(views)
    filled = torch.cat([views["targets"], views["targets"][:, :, :7].flip(2)], 2)
    more = method({**views, "targets": filled})
    n = views["targets"].shape[2]
    valid = outputs["valid"][:, None, :, None]
    torch.testing.assert_close(more["prediction"][:, :, :n] * valid, outputs["prediction"] * valid)
    torch.testing.assert_close(method.loss(more)["loss"], method.loss(outputs)["loss"])
    assert outputs["valid"].sum(1).equal(views["count"]) and not more["valid"][:, n:].any()


@pytest.mark.parametrize(("loss", "expected"), [("l2", (1 + 9) / 2), ("smooth_l1", (0.5 + 2.5) / 2)])
def test_the_loss_is_the_mean_over_channels_patches_that_count_and_images(loss, expected):
    method = make("ijepa", loss=loss)
    prediction = torch.tensor([[[[1.0], [99.0]]], [[[3.0], [3.0]]]])
    outputs = {"prediction": prediction, "target": torch.zeros(2, 1, 2, 1)}
    outputs["valid"] = torch.tensor([[True, False], [True, True]])
    assert method.loss(outputs)["loss"].item() == pytest.approx(expected)


def test_momentum_rises_to_one_in_a_straight_line():
    method = make("ijepa", momentum=0.9)
    weight, copy = method.encoder.norm.weight, method.momentum_encoder.norm.weight
    for progress, momentum in ((0.0, 0.9), (0.25, 0.925), (1.0, 1.0)):
        with torch.no_grad():
            weight.fill_(2), copy.fill_(1)
        method.after_step(progress)
        torch.testing.assert_close(copy, torch.full_like(copy, 2 - momentum))


def test_the_predictor_has_the_encoders_heads_unless_told():
    heads = [make("ijepa", GRID, predictor_heads=n).predictor.blocks[0].attn.num_heads for n in (None, 2)]
    assert heads == [3, 2]
