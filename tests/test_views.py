"""Batched views equal torchvision's on the same boxes, and draw from their generator alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.stats import ks_2samp, kstest, uniform
from torchvision.transforms import CenterCrop, Compose, RandomResizedCrop, Resize
from torchvision.transforms import functional as tv
from torchvision.transforms.functional import InterpolationMode

from sslbench.data import open_split
from sslbench.recipe import Augment, find_recipe, read_tree, resolve
from sslbench.train.job import Pretraining
from sslbench.views import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    TwoViews,
    blur,
    crop_boxes,
    denormalise,
    distort,
    jitter,
    luma,
    normalise,
    one_view,
    random_resized_crop,
    resample,
    resize_centre,
    resize_weights,
    solarise,
    two_views,
)


def photographs(n=8, size=64):
    """Real pictures, larger than CIFAR's, from four built-in ones each."""
    x = open_split("builtin", "val").images[: 4 * n].reshape(n, 2, 2, 3, 32, 32)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(n, 3, size, size).contiguous()


@pytest.mark.parametrize("kernel", ["bicubic", "bilinear"])
def test_a_crop_is_torchvisions_resized_crop_to_the_rounding(kernel):
    images = photographs()
    boxes = [(0, 0, 64, 64), (5, 7, 20, 30), (30, 1, 33, 60), (10, 10, 8, 8), (1, 40, 50, 24), (0, 0, 63, 64),
             (32, 32, 32, 32), (3, 3, 57, 41)]  # fmt: skip
    top, left, h, w = (torch.tensor(column).float() for column in zip(*boxes, strict=True))
    flip = torch.arange(8) % 2 == 1
    rows = resize_weights(top, h, 64, 24, interpolation=kernel)
    got = resample(images, rows, resize_weights(left, w, 64, 24, flip, interpolation=kernel))
    for i, (y, x, bh, bw) in enumerate(boxes):
        picture = Image.fromarray(images[i].permute(1, 2, 0).numpy())
        cut = tv.resized_crop(picture, y, x, bh, bw, [24, 24], InterpolationMode(kernel))
        expected = tv.pil_to_tensor(tv.hflip(cut) if flip[i] else cut).float()
        assert (got[i] - expected).abs().max() <= 1, i


def test_a_recipes_interpolation_is_that_of_its_views_wherever_they_are_cut():
    images = photographs()
    cut = [one_view(images, 24, Augment(interpolation=kernel), torch.Generator().manual_seed(0))
           for kernel in ("bicubic", "bilinear")]  # fmt: skip
    assert 0.01 < (cut[0] - cut[1]).abs().mean() < 0.5
    recipe = resolve(read_tree(find_recipe("mocov3/vit_b16_imagenet")), "mocov3/vit_b16_imagenet")
    assert recipe.science.augment.interpolation == Pretraining(recipe).interpolation == "bilinear"


@given(st.integers(4, 300), st.integers(4, 300), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_boxes_lie_inside_the_image_and_within_scale_and_aspect(h, w, seed):
    top, left, bh, bw = crop_boxes(64, (h, w), (0.2, 1.0), torch.Generator().manual_seed(seed))
    assert (top >= 0).all() and (left >= 0).all() and (bh >= 1).all() and (bw >= 1).all()
    assert (top + bh <= h).all() and (left + bw <= w).all()
    assert all(x.equal(x.round()) for x in (top, left, bh, bw))
    # A side is rounded by half a pixel at most; the fallback, too, keeps to the aspects.
    assert ((bw + 0.5) / (bh - 0.5) >= 3 / 4 - 1e-4).all() and ((bw - 0.5) / (bh + 0.5) <= 4 / 3 + 1e-4).all()
    if max(h, w) <= 4 / 3 * min(h, w):  # a box of any area fits, so that nothing falls back
        assert ((bw + 0.5) * (bh + 0.5) >= 0.2 * h * w - 1e-2).all()


@pytest.mark.parametrize("size", [(64, 64), (40, 100), (300, 200)])
def test_boxes_are_distributed_as_torchvisions(size):
    ours = torch.stack(crop_boxes(2000, size, (0.2, 1.0), torch.Generator().manual_seed(0)), 1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blank, law = torch.zeros(3, *size), ((0.2, 1.0), (3 / 4, 4 / 3))
        theirs = torch.tensor([RandomResizedCrop.get_params(blank, *law) for _ in range(2000)]).float()
    for what in (lambda b: b[:, 0], lambda b: b[:, 1], lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2]):
        assert ks_2samp(what(ours), what(theirs)).pvalue > 1e-3


@pytest.mark.parametrize("size", [(64, 64), (40, 100), (300, 200)])
def test_boxes_of_one_try_are_maes_one_shot_crops(size):
    """Sides that exceed the image are cut to it: no second draw, and the whole image more often."""
    h, w = size
    draw = np.random.default_rng(0)
    area = h * w * draw.uniform(0.08, 1, 4000)
    aspect = np.exp(draw.uniform(np.log(3 / 4), np.log(4 / 3), 4000))
    theirs = np.stack([np.sqrt(area / aspect).round().clip(1, h), np.sqrt(area * aspect).round().clip(1, w)])
    _, _, bh, bw = ours = crop_boxes(4000, size, (0.08, 1.0), torch.Generator().manual_seed(0), tries=1)
    for mine, yours in ((bh, theirs[0]), (bw, theirs[1]), (bh * bw, theirs.prod(0))):
        assert ks_2samp(mine, yours).pvalue > 1e-3
    assert (ours[0] + bh <= h).all() and (ours[1] + bw <= w).all() and all((x >= 0).all() for x in ours)
    ten = crop_boxes(4000, size, (0.08, 1.0), torch.Generator().manual_seed(0))
    assert (bh * bw).mean() > (ten[2] * ten[3]).mean() + 0.03 * h * w


def test_an_image_too_long_for_any_box_falls_back_to_the_centre():
    top, left, bh, bw = crop_boxes(50, (10, 1000), (0.9, 1.0), torch.Generator().manual_seed(0))
    assert (bh == 10).all() and (bw == 13).all() and (top == 0).all() and (left == 493).all()


def maes_view(picture, size):
    """MAE's util/datasets.py, in torchvision's words."""
    resize = int(size / (224 / 256 if size <= 224 else 1.0))
    return tv.pil_to_tensor(Compose([Resize(resize, InterpolationMode.BICUBIC), CenterCrop(size)])(picture)).float()


def test_the_evaluation_view_is_maes_at_two_hundred_sizes():
    """Smaller than the view, larger, tall, wide; views of CIFAR's to ImageNet's size, at 224 pixels and beyond."""
    draw, pictures = np.random.default_rng(0), photographs(40)
    sizes = [*draw.integers(6, 400, (190, 2)).tolist(), [224, 224], [32, 20], [20, 32], [30, 30], [384, 384], [1, 50],
             [224, 180], [100, 224], [256, 256], [500, 375]]  # fmt: skip
    for i, (h, w) in enumerate(sizes):
        picture = tv.to_pil_image(pictures[i % 40]).resize((w, h), Image.Resampling.BICUBIC)
        size = (32, 64, 96, 224, 256, 384)[i % 6]
        if i >= 190:
            size = 384 if h == 384 else 224 if max(h, w) > 50 else 32
        got = resize_centre(tv.pil_to_tensor(picture)[None], size)[0]
        assert got.equal(maes_view(picture, size)), (h, w, size)


@pytest.mark.parametrize("size", [32, 64])
def test_a_small_image_that_is_the_view_already_is_seen_as_it_is(size):
    same = photographs(2)[:, :, :size, :size]
    assert resize_centre(same, size).equal(same.float())


def test_views_are_a_function_of_the_generator():
    images = photographs()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    draw = lambda seed: random_resized_crop(images, 16, (0.2, 1), True, torch.Generator().manual_seed(seed))  # noqa: E731
    assert draw(1).equal(draw(1)) and not draw(1).equal(draw(2))
    assert torch.get_rng_state().equal(before)


def test_crops_made_by_workers_pass_through():
    crops = torch.stack([photographs(4, 64), photographs(4, 64).flip(-1)], 1)
    got = random_resized_crop(crops, 64, (0.2, 1), False, torch.Generator().manual_seed(0), view=1)
    assert got.equal(crops[:, 1].float())
    mirrored = random_resized_crop(crops, 64, (0.2, 1), True, torch.Generator().manual_seed(1), view=1)
    either = [[y.equal(x), y.equal(x.flip(-1))] for x, y in zip(crops[:, 1].float(), mirrored, strict=True)]
    assert all(map(any, either)) and {tuple(e) for e in either} == {(True, False), (False, True)}


def test_normalise_is_torchvisions_and_denormalise_its_inverse():
    x = photographs()
    torch.testing.assert_close(normalise(x), tv.normalize(x / 255, IMAGENET_MEAN, IMAGENET_STD), atol=1e-5, rtol=0)
    torch.testing.assert_close(denormalise(normalise(x)), x.float(), atol=1e-3, rtol=0)


# -------------------------------------------------------------------------------- the two views of contrastive methods


def test_each_step_of_the_jitter_is_torchvisions_in_whatever_order():
    x = photographs(6).float()
    factors = torch.tensor(
        [[0.6, 1.4, 0.8], [1.3, 0.7, 1.2], [1, 1, 1], [0.9, 1.1, 0.85], [1.4, 0.6, 1.2], [0.7, 1, 1]]
    )
    hue = torch.tensor([0.1, -0.1, 0.05, 0, -0.03, 0.08])
    order = torch.tensor([[0, 1, 2], [2, 1, 0], [1, 2, 0], [0, 2, 1], [2, 0, 1], [1, 0, 2]])
    hue_at = torch.tensor([0, 1, 2, 3, 0, 2])
    got = jitter(x, factors, hue, order, hue_at)
    steps = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)
    for i in range(6):
        expected = x[i] / 255
        todo = [(steps[k], factors[i, k].item()) for k in order[i].tolist()]
        todo.insert(int(hue_at[i]), (tv.adjust_hue, hue[i].item()))
        for function, amount in todo:
            expected = function(expected, amount)
        assert (got[i] / 255 - expected).abs().max() < 2e-4, i


def test_blur_is_a_gaussian_of_the_asked_sigma_with_repeated_edges():
    x = photographs(3, 64).float()
    sigma = torch.tensor([0.1, 1.0, 2.0])
    got = blur(x, sigma)
    assert (got[0] - x[0]).abs().max() < 1e-3  # so small a sigma changes nothing
    for i in (1, 2):
        expected = gaussian_filter(
            x[i].numpy(), (0, sigma[i].item(), sigma[i].item()), mode="nearest", radius=(0, 8, 8)
        )
        assert abs(got[i].numpy() - expected).max() < 1e-2


def test_solarise_and_grey_are_torchvisions():
    x = photographs(2)
    assert solarise(x.float()).equal(tv.solarize(x, 128).float())
    assert (luma(x.float()) - tv.rgb_to_grayscale(x).float()).abs().max() < 1.1  # torchvision truncates


def test_two_views_are_drawn_by_their_shares_from_the_generator_alone():
    x = photographs(64)
    before = torch.get_rng_state()
    law = TwoViews(jitter_p=0, gray_p=0.3, blur_p=(0, 0), solarise_p=(0, 1))
    plain = Augment(crop_scale=(1, 1), flip=False, mean=(0, 0, 0), std=(1, 1, 1))
    a, b = (two_views(x, 64, plain, law, torch.Generator().manual_seed(s)) for s in (1, 1))
    assert a[0].equal(b[0]) and a[1].equal(b[1]) and torch.get_rng_state().equal(before)
    grey = (a[0].std(1) < 1e-4).flatten(1).all(1).float().mean()
    assert 0.1 < grey < 0.5  # 64 draws at .3
    assert (a[1] * 255 < 128.5).all() and (a[0] * 255 > 128.5).any()  # every second view is solarised, no first one


def test_the_strengths_of_the_jitter_are_uniform_in_their_ranges():
    flat = torch.full((2000, 3, 2, 2), 100.0)
    law = TwoViews(jitter=(0.4, 0, 0, 0), jitter_p=0.8, gray_p=0, blur_p=(0, 0))
    out = distort(flat, law, 0, torch.Generator().manual_seed(0))[:, 0, 0, 0] / 100
    changed = out[(out - 1).abs() > 1e-6]
    assert abs(len(changed) / 2000 - 0.8) < 0.03
    assert changed.min() >= 0.6 and changed.max() <= 1.4 and kstest(changed, uniform(0.6, 0.8).cdf).pvalue > 1e-3
