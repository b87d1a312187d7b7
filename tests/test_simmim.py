"""SimMIM: against its released code's numbers, of which no code is here; its masks, and what the encoder may see."""

import pytest
import torch
from tiny import REFERENCE, generator, gradient_norm, images, make, reference_images, thousandths

from sslbench.draws import Draws
from sslbench.vit import Arch, patchify

GRID = Arch(patch=4, dim=12, depth=1, heads=3, image=56)  # 14 x 14 patches, as at 224 pixels


def test_it_gives_the_released_codes_loss_and_gradient():
    """microsoft/SimMIM d3e29bc: its ViT without what this one has not, and its head, on these weights gave 1.01535285
    and gradients within 2e-6; the norm is of all but its learned positions'."""
    method = make("simmim", REFERENCE, mask_size=32)
    thousandths(method)
    loss = method.loss(method({"images": reference_images(), "order": method.unit_order(8, generator(2))}))["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(1.01535285, abs=2e-6)
    assert gradient_norm(method) == pytest.approx(0.31421616, rel=1e-5)


@pytest.mark.parametrize(("arch", "size", "masked"), [(GRID, 8, 120), (GRID, 4, 118), (REFERENCE, 32, 12)])
def test_as_many_patches_are_masked_as_in_the_released_code_and_in_whole_units(arch, size, masked):
    method = make("simmim", arch, mask_size=size)
    rows, columns = method.encoder.grid
    order = method.unit_order(2000, generator())
    assert order.sort(1).values.eq(torch.arange(rows * columns)).all()
    hidden = torch.zeros(2000, rows * columns).scatter(1, order[:, method.n_visible :], 1)
    assert hidden.sum(1).eq(masked).all()
    side = size // arch.patch
    units = hidden.view(2000, rows // side, side, columns // side, side).transpose(2, 3).flatten(3)
    assert units.amin(-1).equal(units.amax(-1))
    share = hidden.mean(0)
    assert (share - masked / (rows * columns)).abs().max() < 0.06  # any unit is as likely


def test_the_order_is_the_same_however_a_batch_is_divided():
    method = make("simmim", GRID, mask_size=8)
    draws, found = Draws(torch.device("cpu")), {}
    for size in (8, 2):
        parts = []
        for first in range(0, 8, size):
            draws.seek(5, first, 8, first)
            parts.append(method.unit_order(size, draws))
        found[size] = torch.cat(parts)
    assert found[8].equal(found[2])


def test_the_encoder_sees_a_mask_token_with_its_position_in_place_of_what_it_predicts():
    method = make("simmim", GRID, mask_size=8)
    views = method.build_views(images(), generator())
    seen = []
    method.encoder.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    outputs = method(views)
    hidden = views["order"][:, method.n_visible :]
    place = torch.zeros(8, 196, dtype=torch.bool).scatter(1, hidden, True)
    positions = method.encoder.pos_embed[:, 1:].expand(8, -1, -1)
    torch.testing.assert_close(seen[0][:, 1:][place], (method.mask_token + positions)[place])
    plain = method.encoder.tokens(views["images"])
    torch.testing.assert_close(seen[0][:, 1:][~place], plain[:, 1:][~place])
    torch.testing.assert_close(seen[0][:, 0], plain[:, 0])
    where = place.view(8, 1, 14, 14).repeat_interleave(4, 2).repeat_interleave(4, 3)
    other = method({**views, "images": torch.where(where, -views["images"], views["images"])})
    assert other["prediction"].equal(outputs["prediction"]) and other["target"].equal(-outputs["target"])
    blind = method({**views, "images": torch.where(where, views["images"], -views["images"])})
    assert not blind["prediction"].allclose(outputs["prediction"])


def test_the_target_is_the_masked_patches_pixels_as_they_are():
    method = make("simmim", GRID, mask_size=8)
    views = method.build_views(images(), generator())
    outputs = method(views)
    patches = patchify(views["images"], 4)
    for i, target in enumerate(outputs["target"]):
        assert target.equal(patches[i, views["order"][i, method.n_visible :]])
    expected = (outputs["prediction"] - outputs["target"]).abs().mean()
    torch.testing.assert_close(method.loss(outputs)["loss"], expected)


@pytest.mark.parametrize("size", [6, 16, 64])
def test_a_unit_that_patches_or_images_do_not_fit_is_refused(size):
    with pytest.raises(
        ValueError, match=f"mask_size={size} has to be a multiple of the patch, 4, and to divide the image, 56"
    ):
        make("simmim", GRID, mask_size=size)
