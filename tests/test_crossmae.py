"""CrossMAE: against its released code's numbers, of which no code is here; what is predicted, and from what."""

import pytest
import torch
from tiny import METHODS, REFERENCE, generator, gradient_norm, images, make, reference_images, thousandths

from sslbench.masking import random_order
from sslbench.vit import Arch, patchify

GRID = Arch(patch=4, dim=12, depth=1, heads=3, image=56)  # 14 x 14 patches, as at 224 pixels


@pytest.mark.parametrize(
    ("ratio", "expected", "norm"), [(0.25, 1.40794086, 0.41675606), (0.75, 1.41679287, 0.41722846)]
)
def test_it_gives_the_released_codes_loss_and_gradient(ratio, expected, norm):
    """TonyLianLong/CrossMAE ed0677a, models_cross.py with weight_fm and use_input: on these weights and masks it gave
    these losses, and gradients within 2e-7 (3e-6 of each tensor's norm)."""
    method = make("crossmae", REFERENCE, prediction_ratio=ratio)
    thousandths(method)
    order = random_order(8, 16, generator(2))
    loss = method.loss(method({"images": reference_images(), "order": order}))["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=2e-6)
    assert gradient_norm(method) == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize(
    ("mask", "ratio", "visible", "predicted"),
    [(0.75, 0.75, 49, 147), (0.75, 0.25, 49, 49), (0.75, 0.15, 49, 30), (0.65, 0.25, 68, 50)],
)
def test_as_many_patches_are_predicted_as_in_the_released_code(mask, ratio, visible, predicted):
    method = make("crossmae", GRID, mask_ratio=mask, prediction_ratio=ratio)
    assert (method.n_kept, method.n_predicted) == (visible, predicted)
    views = method.build_views(images(), generator())
    outputs = method(views)
    assert outputs["prediction"].shape == outputs["target"].shape == (8, predicted, 48)
    patches = patchify(views["images"], 4)
    for i, target in enumerate(outputs["target"]):
        assert target.equal(patches[i, views["order"][i, 196 - predicted :]])


def test_a_patch_is_predicted_the_same_whichever_others_are():
    method = make("crossmae", GRID)
    views = method.build_views(images(), generator())
    maps = method.feature_maps(views["images"], views["order"][:, : method.n_kept])
    places = views["order"][:, 100:]
    alone = method.decoder(maps, places[:, 7:8])
    torch.testing.assert_close(method.decoder(maps, places)[:, 7:8], alone, rtol=1e-5, atol=1e-6)
    assert not alone.allclose(method.decoder(maps, places[:, 8:9]))


def test_a_block_reads_its_own_normalised_sum_of_the_input_and_of_all_blocks():
    method = make("crossmae")
    keep = random_order(8, 16, generator())[:, :4]
    x = torch.randn(8, 3, 32, 32, generator=generator(1))
    maps = method.feature_maps(x, keep)
    assert maps.shape == (3, 8, 5, 48)
    assert maps[0].equal(method.encoder.tokens(x, keep))
    torch.testing.assert_close(method.encoder.norm(maps[-1]), method.encoder(x, keep))
    read = []
    for block in method.decoder.blocks:
        block.register_forward_pre_hook(lambda _, args: read.append(args[1]))
    method.decoder(maps, keep)
    for tokens, row, norm in zip(read, method.decoder.weights.weight, method.decoder.norms, strict=True):
        torch.testing.assert_close(tokens, norm(sum(w * f for w, f in zip(row, maps, strict=True))))
    assert not read[0].allclose(read[1])


def test_without_inter_block_attention_all_blocks_read_the_encoders_output():
    method = make("crossmae", maps="last")
    views = method.build_views(images(), generator())
    read = []
    for block in method.decoder.blocks:
        block.register_forward_pre_hook(lambda _, args: read.append(args[1]))
    method.loss(method(views))["loss"].backward()
    expected = method.encoder(views["images"], views["order"][:, :4])
    assert len(read) == 2 and all(tokens.equal(expected) for tokens in read)
    assert method.encoder.norm.weight.grad.any() and method.decoder.weights is None


def test_the_sums_weights_are_drawn_as_the_presets_say():
    deep = Arch(patch=8, dim=12, depth=63, heads=3, image=32)  # 64 maps
    found = {}
    for preset, config in METHODS["crossmae"].presets.items():
        method = make("crossmae", deep, decoder_depth=48, **config)
        found[preset] = method.decoder.weights.weight
        assert not any(p.requires_grad for p in method.encoder.norm.parameters())
    assert found["paper"].std().item() == pytest.approx(1 / 8, rel=0.05)
    assert found["official"].abs().max() <= (6 / (64 + 48)) ** 0.5 < found["paper"].abs().max()


def test_no_more_is_predicted_than_masked():
    with pytest.raises(ValueError, match=r"prediction_ratio=0.8 is above mask_ratio=0.75"):
        make("crossmae", prediction_ratio=0.8)
