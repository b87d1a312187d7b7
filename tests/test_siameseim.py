"""SiameseIM: against its released code's numbers, of which no code is here; where a view lies in another's frame."""

import sys

import pytest
import torch
from tiny import METHODS, REFERENCE, generator, gradient_norm, images, make, step, thousandths

from sslbench.views import Crop, TwoViews, denormalise
from sslbench.vit import sincos_positions

MODULE = sys.modules[METHODS["siameseim"].__module__]
PLAIN = TwoViews(jitter_p=0, gray_p=0, blur_p=(0, 0), solarise_p=(0, 0))


def test_it_gives_the_released_codes_loss_and_gradient():
    """OpenGVLab/Siamese-Image-Modeling bbdec30: on these weights its model gave 1.2075115 and gradients within 2e-6.

    Its tables of positions have y first; the columns of `decoder.place` were moved to it accordingly.
    """
    method = make("siameseim", REFERENCE)
    thousandths(method)
    g = generator(1)
    views = {f"x{i}": torch.randn(8, 3, 64, 64, generator=g) for i in (1, 2)}
    places = torch.randint(10, 90, (8, 2, 4), generator=g).float() / 100
    mirrored = torch.randint(0, 2, (8, 2), generator=g).bool()
    places[..., 3] = torch.where(mirrored, -places[..., 3], places[..., 3])
    order = torch.rand(8, 16, generator=g).argsort(1)
    loss = method.loss(method({**views, "places": places, "order": order}))["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(1.2075115, abs=2e-6)
    assert gradient_norm(method) == pytest.approx(0.9326522, rel=1e-5)


def places(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def where(first, second, grid=(3, 4)):
    """Columns, rows (n,) of the second view's patches in the first one's frame, and the sides' ratios, from the sines
    and cosines of width 4, whose one frequency is 1."""
    table = MODULE.relative_positions(4, grid, places(first), places(second))[0].view(*grid, 4, 2)
    x, y, width, height = torch.atan2(table[..., 0], table[..., 1]).unbind(-1)
    return x[0].tolist(), y[:, 0].tolist(), (width[0, 0] / 10).exp().item(), (height[0, 0] / 10).exp().item()


@pytest.mark.parametrize("place", [(0.1, 0.2, 0.5, 0.25), (0.3, 0.9, 0.6, -0.7)])
def test_of_the_same_crop_the_places_are_the_encoders_positions_and_the_sizes_nothing(place):
    """A mirrored one too."""
    table = MODULE.relative_positions(16, (3, 4), places(place), places(place))[0]
    torch.testing.assert_close(table[:, :16], sincos_positions(16, (3, 4))[0, 1:].double())
    torch.testing.assert_close(table[:, 16:], torch.tensor([0.0, 1.0] * 2).double().repeat_interleave(4).expand(12, -1))


@pytest.mark.parametrize(
    ("first", "second", "columns", "rows", "width", "height"),
    [
        # Half a view to the right, and a third down.
        ((0, 0, 0.6, 0.4), (0.2, 0.2, 0.6, 0.4), [2, 3, 4, 5], [1, 2, 3], 1, 1),
        # Half as wide: the centres of two patches in one.
        ((0, 0, 1, 0.8), (0, 0, 1, 0.4), [-0.25, 0.25, 0.75, 1.25], [0, 1, 2], 0.5, 1),
        # One mirrored, the other not; then both, the second half a view to the left in the image: to the right here.
        ((0, 0.8, 1, -0.8), (0, 0, 1, 0.8), [3, 2, 1, 0], [0, 1, 2], 1, 1),
        ((0, 0, 1, 0.8), (0, 0.8, 1, -0.8), [3, 2, 1, 0], [0, 1, 2], 1, 1),
        ((0, 1, 1, -0.8), (0, 0.6, 1, -0.8), [2, 3, 4, 5], [0, 1, 2], 1, 1),
    ],
)
def test_places_by_hand(first, second, columns, rows, width, height):
    x, y, *sizes = where(first, second)
    for got, want in ((x, columns), (y, rows)):
        got, want = torch.tensor(got), torch.tensor(want, dtype=torch.float32)
        torch.testing.assert_close(got.sin(), want.sin(), atol=1e-5, rtol=0)
        torch.testing.assert_close(got.cos(), want.cos(), atol=1e-5, rtol=0)
    turned = torch.tensor(sizes).log() * 10 - torch.tensor([width, height], dtype=torch.float32).log() * 10
    torch.testing.assert_close((turned / 2).sin(), torch.zeros(2), atol=1e-5, rtol=0)  # an angle, but for whole turns


def test_the_places_of_views_are_where_their_pixels_come_from():
    """Of images that brighten evenly to the right (red) and to the bottom (green)."""
    method = make("siameseim", views=PLAIN)
    ramp = torch.arange(64, dtype=torch.uint8) * 4
    grey = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), torch.zeros(64, 64, dtype=torch.uint8)])
    views = method.build_views(grey.expand(32, -1, -1, -1), generator())
    assert views["places"].shape == (32, 2, 4) and (views["places"][..., 3] < 0).any(1).sum() > 8
    one, two = (denormalise(views[k], method.augment.mean, method.augment.std) for k in ("x1", "x2"))
    table = MODULE.relative_positions(4, (4, 4), *views["places"].unbind(1)).view(32, 4, 4, 4, 2)
    angles = torch.atan2(*table.unbind(-1))
    for channel in (0, 1):
        a, b = (x[:, channel].mean(1 + channel).unflatten(1, (4, 8)).mean(2) for x in (one, two))
        expected = 1 + (b - a[:, 1:2]) / (a[:, 2:3] - a[:, 1:2])  # in patches of view 1
        got = angles[:, :, :, channel].select(1 + channel, 0)
        assert (((got - expected) / 2).sin()[:, 1:3].abs() < 0.08).all()  # at the edges the kernel sees half


def test_its_crops_come_with_their_places():
    """One that asked as all do would get crops of workers without."""
    assert make("siameseim").crop_list() == [Crop(32), Crop(32)] and Crop(32) != Crop()


def test_blocks_hide_118_of_196_patches():
    from sslbench.vit import Arch

    method = make("siameseim", Arch(patch=4, dim=8, depth=1, heads=2, image=56), smallest_block=16)
    assert 196 - method.n_kept == 118
    views = method.build_views(images(), generator())
    seen = method.embed(views)["seen"].long()
    assert seen.shape == (8, 78) and all(len(set(row)) == 78 for row in seen.tolist())
    hidden = torch.ones(8, 196, dtype=torch.bool).scatter(1, seen, False).view(8, 14, 14)
    assert (hidden[:, 1:] == hidden[:, :-1]).float().mean() > 0.7  # at random: .52


def test_the_loss_is_the_squared_error_and_the_mean_square_of_all_products():
    p, z = torch.randn(3, 4, 6, generator=generator(1)), torch.randn(3, 4, 6, generator=generator(2))
    match, negatives = MODULE.unigrad(p, z, everywhere=True)
    z = (z - z.mean(-1, keepdim=True)) / (z.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(match, (p - z).square().mean())
    products = p.flatten(0, 1) @ z.flatten(0, 1).T
    torch.testing.assert_close(negatives, products.square().mean() / 6)


def test_the_encoders_norm_is_no_part_of_it():
    method = make("siameseim")
    step(method)["loss"].backward()
    assert method.encoder.norm.weight.grad is None and method.encoder.blocks[0].norm1.weight.grad.any()
    assert "norm.weight" not in dict(method.momentum_encoder.named_parameters())
    before = method.momentum_encoder.cls_token.clone()
    with torch.no_grad():
        method.encoder.cls_token += 1
    method.after_step(0.0)
    torch.testing.assert_close(method.momentum_encoder.cls_token, before + 0.005)


def test_its_norms_are_over_all_tokens_of_the_batch():
    x = 3 + 2 * torch.randn(4, 5, 6, generator=generator())
    got = MODULE.TokenNorm(6)(x)
    torch.testing.assert_close(got.mean((0, 1)), torch.zeros(6), atol=1e-6, rtol=0)
    torch.testing.assert_close(got.var((0, 1), correction=0), torch.ones(6), atol=1e-4, rtol=0)
