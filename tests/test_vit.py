"""The one ViT: timm's weights, MAE's positions, and tokens that are embedded only where they are kept."""

from functools import partial

import numpy as np
import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models import vision_transformer as timm_vit
from torch.nn import functional as F

from sslbench.vit import (
    ARCHS,
    VisionTransformer,
    attention,
    count_parameters,
    get_arch,
    initialise,
    parameters_of,
    patchify,
    resample_positions,
    sincos_positions,
    unpatchify,
)


def small(name="vit_mini4", image=16):
    torch.manual_seed(0)
    vit = VisionTransformer(get_arch(name), image)
    initialise(vit)
    return vit.eval()


def sincos_1d(dim, positions):
    angles = np.outer(positions, 1 / 10000 ** (np.arange(dim // 2) / (dim / 2)))
    return np.concatenate([np.sin(angles), np.cos(angles)], 1)


def test_positions_have_maes_layout_column_first_and_a_zero_row_for_cls():
    table = sincos_positions(48, (3, 5))[0].numpy()
    y, x = np.divmod(np.arange(15), 5)
    expected = np.concatenate([sincos_1d(24, x), sincos_1d(24, y)], 1)
    assert (table[0] == 0).all()
    np.testing.assert_allclose(table[1:], expected, atol=1e-6)


def test_moco_v3s_layout_is_the_transposed_grid_and_not_ours():
    ours = sincos_positions(48, (14, 14))[0, 1:]
    row_first = torch.cat(ours.chunk(2, dim=1)[::-1], dim=1)
    assert (ours - row_first).abs().max() > 1.9
    transposed = ours.reshape(14, 14, 48).transpose(0, 1).reshape(196, 48)
    torch.testing.assert_close(transposed, row_first, atol=1e-6, rtol=0)


@pytest.mark.parametrize("new", [(14, 14), (16, 16), (7, 9), (32, 20)])
def test_resampling_positions_is_bicubic_and_keeps_cls(new):
    table = torch.randn(1, 1 + 14 * 14, 8)
    got = resample_positions(table, (14, 14), new)
    assert got.shape == (1, 1 + new[0] * new[1], 8) and got[:, 0].equal(table[:, 0])
    if new == (14, 14):
        assert got.equal(table)
    grid = table[:, 1:].reshape(1, 14, 14, 8).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=new, mode="bicubic", align_corners=False).permute(0, 2, 3, 1).reshape(1, -1, 8)
    torch.testing.assert_close(got[:, 1:], expected)
    with pytest.raises(ValueError, match="not CLS"):
        resample_positions(table[:, 1:], (14, 14), new)


def test_a_kept_token_is_the_token_of_the_whole_image():
    vit, images = small(), torch.randn(3, 3, 16, 16)
    whole = vit.tokens(images)
    conv = vit.patch_embed.proj(images).flatten(2).mT + vit.pos_embed[:, 1:]
    torch.testing.assert_close(whole[:, 1:], conv, atol=1e-5, rtol=1e-5)
    keep = torch.stack([torch.randperm(16)[:6] for _ in range(3)])
    some = vit.tokens(images, keep)
    for i in range(3):
        torch.testing.assert_close(some[i, 1:], whole[i, 1:][keep[i]])
    groups = vit.tokens(images, keep.reshape(3, 2, 3))
    assert groups.shape == (6, 4, 192)
    torch.testing.assert_close(groups[:, 1:].reshape(3, 6, 192), some[:, 1:])
    torch.testing.assert_close(groups[:, 0], whole[:1, 0].expand(6, -1))


def same_gradients(a: torch.Tensor, b: torch.Tensor, of: list[torch.Tensor], of_b=None, **tolerance: float):
    mine, theirs = (torch.autograd.grad(x.square().sum(), o) for x, o in ((a, of), (b, of_b or of)))
    for g, h in zip(mine, theirs, strict=True):
        torch.testing.assert_close(g, h, **tolerance)


def test_a_block_is_timms_and_its_rows_are_the_blocks_rows_in_value_and_gradient():
    block = small().blocks[0].train()
    theirs = timm_vit.Block(192, 3, qkv_bias=True, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6)).train()
    theirs.load_state_dict(block.state_dict())
    for b in (block, theirs):
        b.drop_path1, b.drop_path2 = DropPath(0.5), DropPath(0.2)
    x = torch.randn(8, 9, 192, requires_grad=True)
    for rows in (None, slice(0, 1), slice(4, None)):
        torch.manual_seed(1)
        a = theirs(x)[:, rows or slice(None)]
        torch.manual_seed(1)
        b = block(x, rows)
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        named = dict(theirs.named_parameters())
        of_a, of_b = ([x, *(p[name] for name in named)] for p in (named, dict(block.named_parameters())))
        same_gradients(a, b, of_a, of_b, atol=1e-3, rtol=1e-4)


def test_attention_in_bf16_is_the_fused_kernels_to_the_rounding_in_value_and_gradient():
    torch.manual_seed(0)
    q, k, v = (torch.randn(4, 3, t, 64, dtype=torch.bfloat16, requires_grad=True) for t in (5, 17, 17))
    a, b = attention(q, k, v), F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(a, b, atol=0.02, rtol=0.02)
    same_gradients(a, b, [q, k, v], atol=0.05, rtol=0.05)
    with torch.no_grad():
        assert attention(q, k, v).equal(a)


def test_patchify_is_row_column_channel_and_unpatchify_inverts_it():
    images = torch.arange(2 * 3 * 8 * 12.0).reshape(2, 3, 8, 12)
    patches = patchify(images, 4)
    assert patches.shape == (2, 6, 48)
    assert patches[1, 4, (2 * 4 + 3) * 3 + 1] == images[1, 1, 4 + 2, 4 + 3]
    assert unpatchify(patches, 4, (2, 3)).equal(images)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("vit_s16", 22), ("vit_b16", 86), ("vit_l16", 303), ("vit_h16", 631), ("macrl12", 38), ("macrl4", 13)],
)
def test_parameter_counts_are_those_of_the_papers(name, millions):
    with torch.device("meta"):
        n = count_parameters(VisionTransformer(ARCHS[name]))
    assert round(n / 1e6) == millions and n == parameters_of(name)
    assert name != "vit_b16" or n == 85_798_656


@pytest.mark.parametrize(("name", "image"), [("vit_ti4", 32), ("vit_s16", 64), ("macrl12", 32)])
def test_timm_builds_the_same_encoder_from_the_same_weights(name, image):
    arch = get_arch(name)
    vit = small(name, image)
    model = timm.create_model(arch.timm, **arch.timm_kwargs(image)).eval()
    model.load_state_dict(vit.state_dict())  # strict: no missing, no unexpected key
    x = torch.randn(2, 3, image, image)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(x), vit(x), atol=1e-5, rtol=0)


def test_a_frozen_patch_embedding_gets_no_gradient():
    vit = small()
    vit.freeze_patch_embed()
    vit(torch.randn(1, 3, 16, 16)).sum().backward()
    assert all(p.grad is None for p in vit.patch_embed.parameters()) and vit.cls_token.grad is not None
