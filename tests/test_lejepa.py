"""LeJEPA: against its released code's numbers, of which no code is here; SIGReg, and the directions it shares."""

import math
import sys

import pytest
import torch
from tiny import METHODS, REFERENCE, generator, gradient_norm, gradients, images, make, step, thousandths

from sslbench.draws import Draws, rand, rand_together
from sslbench.views import Crop

MODULE = sys.modules[METHODS["lejepa"].__module__]
OFFICIAL = METHODS["lejepa"].presets["official"]


def test_it_gives_the_loss_and_gradient_of_the_released_codes_example():
    """rbalestr-lab/lejepa eddffdd, MINIMAL.md: its encoder (timm's ViT with these positions), MLP and SIGReg, on these
    weights and views and along these directions, gave .26751471 (.22664084 the invariance, 2.27033377 SIGReg) and
    gradients within 3e-7."""
    method = make("lejepa", REFERENCE, **OFFICIAL)
    thousandths(method)
    g = generator(1)
    views = {f"x{i}": torch.randn(8, 3, 64, 64, generator=g) for i in (1, 2, 3, 4)}
    views["slices"] = rand_together((256, 16), generator(2)).expand(8, -1, -1)
    losses = method.loss(method(views))
    losses["loss"].backward()
    assert losses["loss"].item() == pytest.approx(0.26751471, abs=1e-6)
    assert losses["prediction"].item() == pytest.approx(0.22664084, abs=1e-6)
    assert losses["sigreg"].item() == pytest.approx(2.27033377, abs=5e-6)
    assert gradient_norm(method) == pytest.approx(1.2730250, rel=1e-5)


def test_it_gives_the_loss_and_gradient_of_the_released_codes_library():
    """rbalestr-lab/lejepa eddffdd: SlicingUnivariateTest(EppsPulley(t_max=5, n_points=9)) along these directions, over
    timm's ViT, positions of small views resampled as here, with Algorithm 2's prediction and the example's MLP, gave
    .45225954 (.34010977; 2.58310509) and gradients within 3e-7."""
    method = make("lejepa", REFERENCE, small_size=32)
    thousandths(method)
    g = generator(1)
    views = {f"x{i}": torch.randn(8, 3, 64, 64, generator=g) for i in (1, 2)}
    views["small"] = torch.randn(8, 2, 3, 32, 32, generator=g)
    views["slices"] = rand_together((64, 16), generator(2)).expand(8, -1, -1)
    losses = method.loss(method(views))
    losses["loss"].backward()
    assert losses["loss"].item() == pytest.approx(0.45225954, abs=1e-6)
    assert losses["prediction"].item() == pytest.approx(0.34010977, abs=1e-6)
    assert losses["sigreg"].item() == pytest.approx(2.58310509, abs=5e-6)
    assert gradient_norm(method) == pytest.approx(1.9355023, rel=1e-5)


def test_nine_knots_of_one_half_are_the_papers_seventeen_of_both():
    """Algorithm 1 in its own words: complex exponentials and the trapezoidal rule on [-5, 5]."""
    z = torch.randn(12, 3, 6, generator=generator(), dtype=torch.float64)
    along = MODULE.directions(torch.rand(7, 6, generator=generator(1), dtype=torch.float64))
    t = torch.linspace(-5, 5, 17, dtype=torch.float64)
    gaussian = torch.exp(-(t**2) / 2)
    found = []
    for view in z.unbind(1):
        phi = torch.exp(1j * (view @ along.T)[..., None] * t).mean(0)
        found.append(12 * torch.trapezoid((phi - gaussian).abs() ** 2 * gaussian, t).mean())
    torch.testing.assert_close(MODULE.epps_pulley(z, along, 5.0, 9), sum(found) / 3)


def test_sigreg_of_gaussian_features_is_its_expectation_and_of_collapsed_ones_grows_with_the_batch():
    """Of N(0, 1): the integral of (1 - exp(-t^2)) exp(-t^2 / 2); of N zeros: N times that of (1 - exp(-t^2 / 2))^2
    exp(-t^2 / 2)."""
    along = MODULE.directions(torch.rand(200, 64, generator=generator()))
    z = torch.randn(256, 8, 64, generator=generator(1))
    gaussian = math.sqrt(2 * math.pi) - math.sqrt(2 * math.pi / 3)
    assert MODULE.epps_pulley(z, along, 5.0, 9).item() == pytest.approx(gaussian, rel=0.05)
    zeros = math.sqrt(2 * math.pi) - 2 * math.sqrt(math.pi) + math.sqrt(2 * math.pi / 3)
    assert MODULE.epps_pulley(0 * z, along, 5.0, 17).item() == pytest.approx(256 * zeros, rel=1e-3)
    assert MODULE.epps_pulley(2 * z, along, 5.0, 9) > 5 * gaussian  # the scale counts, too


def test_directions_are_unit_vectors_without_a_preferred_one():
    along = MODULE.directions(torch.rand(40_000, 8, generator=generator()))
    torch.testing.assert_close(along.norm(dim=1), torch.ones(40_000))
    assert along.mean(0).abs().max() < 0.01
    torch.testing.assert_close(along.T @ along / 40_000, torch.eye(8) / 8, atol=0.005, rtol=0)
    least, most = torch.zeros(1, 8), torch.full((1, 8), 1 - 2**-24)
    for extreme in (least, most):
        assert MODULE.directions(extreme).isfinite().all()


def test_in_tiles_sigreg_has_the_same_value_and_gradients(monkeypatch):
    method = make("lejepa")
    views = method.build_views(images(), generator())

    def found():
        loss = method.loss(method(views))["loss"]
        return loss.detach(), gradients(method, loss)

    whole = found()
    monkeypatch.setattr(MODULE, "TILE", 8 * 4 * 9 * 10)  # ten directions; four of the 64 are left over
    tiled = found()
    torch.testing.assert_close(tiled[0], whole[0])
    for key, g in whole[1].items():
        torch.testing.assert_close(tiled[1][key], g, rtol=1e-4, atol=1e-7, msg=lambda m, key=key: f"{key}: {m}")


def test_all_images_of_a_step_share_the_directions_however_a_batch_is_divided():
    method = make("lejepa")
    maker, found = Draws(torch.device("cpu")), {}
    for size in (8, 2):
        for first in range(0, 8, size):
            maker.seek(5, first, 8, first)
            slices = method.build_views(images()[first : first + size], maker)["slices"]
            assert slices.shape == (size, 64, 16) and slices.stride(0) == 0  # the memory of one
            found[size, first] = slices[0]
    assert all(x.equal(found[8, 0]) for x in found.values())
    maker.seek(6, 0, 8, 0)
    assert not method.build_views(images(), maker)["slices"][0].equal(found[8, 0])
    maker.seek(5, 0, 8, 0)
    assert not rand_together((3,), maker).equal(rand_together((3,), maker))
    rows = rand((8,), maker)
    maker.seek(5, 0, 8, 4)
    rand_together((3,), maker), rand_together((3,), maker)
    assert rand((4,), maker).equal(rows[4:])  # what images draw for themselves after it stays in step


def test_the_centre_is_that_of_the_large_views_and_is_trained_too():
    z = torch.randn(5, 4, 3, generator=generator(), requires_grad=True)
    centre = (z[:, 0] + z[:, 1]) / 2
    expected = sum((z[:, v] - centre).square().mean() for v in range(4)) / 4
    distance = MODULE.distance_to_centre(z, 2)
    torch.testing.assert_close(distance, expected)
    (g,) = torch.autograd.grad(distance, z)
    small = 2 * (z - centre[:, None])[:, 2:] / z.numel()
    torch.testing.assert_close(g[:, 2:], small)
    # Through the centre the large views' own terms add nothing: they lie as far to one side of it as to the other.
    torch.testing.assert_close(g[:, :2], 2 * (z - centre[:, None])[:, :2] / z.numel() - small.sum(1, keepdim=True) / 2)


def test_the_loss_weighs_both_terms_by_lambda():
    losses = step(make("lejepa", weight=0.3))
    torch.testing.assert_close(losses["loss"], 0.7 * losses["prediction"] + 0.3 * losses["sigreg"])


def test_views_are_large_and_small_ones_of_the_same_images():
    method = make("lejepa", large_views=3)
    views = method.build_views(images(), generator())
    assert [views[f"x{i}"].shape for i in (1, 2, 3)] == [(8, 3, 32, 32)] * 3
    assert views["small"].shape == (8, 2, 3, 16, 16)
    assert method.crop_list() == [Crop()] * 3 + [Crop(16, (0.05, 0.3))] * 2
    assert not views["x1"].allclose(views["x2"])
    assert method.embed(views)["features"].shape == (8, 5, 48)
    assert method.tokens_per_image() == 3 * 17 + 2 * 5
    alone = make("lejepa", small_crops=0)
    assert "small" not in alone.build_views(images(), generator()) and step(alone)["loss"].isfinite()


def test_a_small_crop_that_patches_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="small_size=20 is not a multiple of the patch, 8"):
        make("lejepa", small_size=20)
