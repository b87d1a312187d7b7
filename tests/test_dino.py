"""DINO: against its released code's numbers, of which no code is here; its centre, temperature and prototypes."""

import pytest
import torch
from tiny import REFERENCE, generator, gradient_norm, images, make, step, thousandths

from sslbench.siamese import Centre, PrototypeHead


def test_it_gives_the_released_codes_loss_gradient_and_centre():
    """facebookresearch/dino 7c446df: its ViT, head and loss on these weights gave 5.960249; gradients within 3e-6."""
    method = make("dino", REFERENCE, small_size=32, unit_prototypes=False)
    dice = thousandths(method)
    method.momentum_centre.mean.copy_(torch.randint(-200, 201, (32,), generator=dice).float() / 1000)
    g = generator(1)
    x1, x2 = (torch.randn(8, 3, 64, 64, generator=g) for _ in range(2))
    loss = method.loss(method({"x1": x1, "x2": x2, "small": torch.randn(8, 2, 3, 32, 32, generator=g)}))["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(5.960249, abs=5e-6)
    assert gradient_norm(method) == pytest.approx(35.310028, rel=1e-5)


def test_the_centre_is_the_same_however_a_batch_is_divided():
    x = torch.randn(8, 2, 5, generator=generator())
    whole, parts = Centre(5), Centre(5)
    whole(x)
    for part in x.split(2):
        assert parts(part).equal(part)  # what a step adds counts from the next step on
    for centre in (whole, parts):
        centre.update(0.9)
    torch.testing.assert_close(parts.mean, whole.mean)
    torch.testing.assert_close(whole.mean, 0.1 * x.mean((0, 1)))
    before = whole.mean.clone()
    whole.eval()(x)
    whole.update(0.9)
    assert whole.mean.equal(before)  # nothing was added


def test_the_teachers_temperature_rises_and_then_stays():
    method = make("dino", teacher_tau=(0.04, 0.08), teacher_tau_warmup=0.5)
    found = []
    for progress in (0.0, 0.25, 0.5, 0.9):
        method.after_step(progress)
        found.append(method.teacher_tau().item())
    assert found == pytest.approx([0.04, 0.06, 0.08, 0.08])


def test_frozen_prototypes_have_a_gradient_of_zero_and_then_one():
    method = make("dino", frozen_prototypes=0.1)
    step(method)["loss"].backward()
    assert not method.head.prototypes.grad.any() and method.head.mlp[0].weight.grad.any()
    method.after_step(0.1)
    step(method)["loss"].backward()
    assert method.head.prototypes.grad.any()


def test_prototypes_are_unit_vectors_times_their_gain():
    head = PrototypeHead(6, 8, 4, 5, unit=False)
    head.gain.data.copy_(torch.arange(5)[:, None])
    angle = head(torch.randn(3, 6, generator=generator())) / torch.arange(5).clamp_min(1)
    assert angle.abs().max() <= 1 + 1e-6 and not angle[:, 0].any()


def test_small_crops_are_small_views_of_the_same_images():
    method = make("dino")
    views = method.build_views(images(), generator())
    assert views["x1"].shape == (8, 3, 32, 32) and views["small"].shape == (8, 2, 3, 16, 16)
    assert [(c.size, c.scale) for c in method.crop_list()] == [(None, None)] * 2 + [(16, (0.05, 0.4))] * 2
    alone = make("dino", small_crops=0)
    assert "small" not in alone.build_views(images(), generator()) and step(alone)["loss"].isfinite()


def test_a_small_crop_that_patches_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="small_size=20 is not a multiple of the patch, 8"):
        make("dino", small_size=20)
