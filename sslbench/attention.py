"""What an encoder looks at: its attention, the relevance of each patch to its feature, how alike its tokens are."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .vit import VisionTransformer, pool_tokens, split_heads


def last_block_attention(encoder: VisionTransformer, images: Tensor) -> Tensor:
    """Head-mean attention of CLS to each patch in the last block: normalised images (B, 3, H, W) -> (B, N)."""
    return encoder.cls_attention(encoder.tokens(images), [len(encoder.blocks) - 1])[:, 0]


def token_similarity(tokens: Tensor) -> Tensor:
    """Mean cosine over all pairs of different tokens of an image, (B, N, D) -> (B,): the quantity of ASL's Figure 1.

    The paper gives no formula. Meant for the patch tokens after the final norm: 1 where all of them look alike.
    """
    n = tokens.shape[1]
    total = F.normalize(tokens.float(), dim=-1).sum(1)
    return (total.square().sum(-1) - n) / max(n * (n - 1), 1)


def relevance(encoder: VisionTransformer, images: Tensor, pool: str, mean: Tensor) -> Tensor:
    """How much each patch speaks for what sets an image's feature apart: images (B, 3, H, W) -> (B, N), at least 0.

    Chefer, Gur, Wolf, "Transformer Interpretability Beyond Attention Visualization" (CVPR 2021), which MACRL's Figure 3
    uses. A relevance of sum 1 goes back through every layer by the rules below (sections 3.1 and 3.2); in block b,
    A_b = I + the mean over heads of (gradient x relevance of the attention)^+, and the product of all A_b has a row for
    what each token draws on (section 3.3).

    The paper explains a class logit. An encoder without classes has none; our choice is f . (f - mean), the second
    factor a constant, where f is the pooled feature (B, D) and `mean` (D,) that of many images: a linear head which
    tells this image from the others, as its logit in contrastive learning does. |f|^2 / 2, the same with mean 0, will
    not do: where f is one token after LayerNorm its length hardly varies, and its gradient is nothing but rounding.
    The row is that of CLS, or where f is a mean of tokens the mean of theirs; I, the skip path, is taken off.
    Relative positions take no share of the relevance, as biases take none; registers have no place in the picture.
    A picture, not a measurement: the rules divide by scores near 0, so now and then a map moves with noise of 1e-4.
    """
    with torch.enable_grad():
        # Float64: the rules divide by values of any size, and what they blow up has to cancel.
        encoder = copy.deepcopy(encoder).double()
        seen, tokens = watch(encoder, images.double())
        f = pool_tokens(encoder.in_place(tokens), pool)
        logit = (f * (f - mean).detach()).sum()
        toward, *gradients = torch.autograd.grad(logit, [tokens, *(s.attention for s in seen)])
    with torch.no_grad():
        r = (tokens * toward).clamp_min(0)  # the head is a linear layer too
        r = r / r.sum((1, 2), keepdim=True).clamp_min(1e-30)
        eye = torch.eye(tokens.shape[1], dtype=r.dtype, device=r.device)
        product = eye.expand(len(r), -1, -1)
        for i in reversed(range(len(seen))):
            r, of_attention = through_block(encoder.blocks[i], seen[i], r)
            product = product @ (eye + (gradients[i] * of_attention).clamp_min(0).mean(1))
        first = int(encoder.parts.cls)
        return pool_tokens(encoder.in_place(product - eye), pool)[:, first : first + encoder.n_patches].float()


class Seen(NamedTuple):
    """Inputs and outputs of a block's layers: (B, T, D) each; q, k, v (B, h, T, D / h), attention (B, h, T, T)."""

    x: Tensor
    x_normed: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    attention: Tensor
    mixed: Tensor  # attention @ v, the heads side by side
    attended: Tensor  # what is added to x
    middle: Tensor  # their sum
    middle_normed: Tensor
    hidden: Tensor  # (B, T, 4 D), after GELU
    mlp: Tensor  # what is added to `middle`


def watch(encoder: VisionTransformer, images: Tensor) -> tuple[list[Seen], Tensor]:
    """What every block saw, and what the last norm gives: `encoder(images)`, with the registers that it may have."""
    seen: list[Seen] = []
    x = encoder.tokens(images).detach().requires_grad_()
    for module in encoder.blocks:
        block: Any = module
        x_normed = block.norm1(x)
        q, k, v = (split_heads(t, block.attn.num_heads) for t in block.attn.qkv(x_normed).chunk(3, dim=-1))
        scores = q @ k.transpose(-2, -1) * block.attn.scale
        attention = (scores if (bias := block.position_bias()) is None else scores + bias).softmax(-1)
        mixed = merge_heads(attention @ v)
        attended = block.attn.proj(mixed)
        middle = x + attended
        middle_normed = block.norm2(middle)
        hidden = F.gelu(block.mlp.fc1(middle_normed))
        mlp = block.mlp.fc2(hidden)
        seen.append(Seen(x, x_normed, q, k, v, attention, mixed, attended, middle, middle_normed, hidden, mlp))
        x = middle + mlp
    return seen, encoder.norm(x)


def through_block(block: Any, s: Seen, r: Tensor) -> tuple[Tensor, Tensor]:
    """Relevance of a block's output (B, T, D) -> of its input (B, T, D), and of its attention (B, h, T, T).

    Norms, GELU, softmax and the scale have one operand and let it pass; where a tensor goes two ways, both add up.
    """
    skip, branch = through_sum(s.middle, s.mlp, r)
    branch = through_linear(s.hidden, block.mlp.fc2.weight, branch)
    r = skip + through_linear(s.middle_normed, block.mlp.fc1.weight, branch)
    skip, branch = through_sum(s.x, s.attended, r)
    of_mixed = split_heads(through_linear(s.mixed, block.attn.proj.weight, branch), block.attn.num_heads)
    of_attention, of_v = through_product(s.attention, s.v, of_mixed)
    of_q, of_k = through_product(s.q, s.k.transpose(-2, -1), of_attention)
    branch = torch.cat([merge_heads(t) for t in (of_q, of_k.transpose(-2, -1), of_v)], dim=-1)
    return skip + through_linear(s.x_normed, block.attn.qkv.weight, branch), of_attention


def through_linear(x: Tensor, weight: Tensor, r: Tensor) -> Tensor:
    """x (..., I), weight (O, I), r (..., O) -> (..., I): to inputs by their positive contributions x w; no bias."""
    positive, negative = (x.clamp_min(0), weight.clamp_min(0)), (x.clamp_max(0), weight.clamp_max(0))
    share = divide(r, F.linear(*positive) + F.linear(*negative))
    return positive[0] * (share @ positive[1]) + negative[0] * (share @ negative[1])


def through_product(a: Tensor, b: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Pass relevance through a @ b: gradient x input to both. Either sums to all of r, so the paper's normalisation
    halves them."""
    share = divide(r, a @ b) / 2
    return a * (share @ b.transpose(-2, -1)), b * (a.transpose(-2, -1) @ share)


def through_sum(a: Tensor, b: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Pass relevance through a + b, (B, T, D): gradient x input to both, then rescaled to two positive sums that make
    up r's, by image."""
    share = divide(r, a + b)
    of_a, of_b = a * share, b * share
    sum_a, sum_b, total = (t.sum((1, 2), keepdim=True) for t in (of_a, of_b, r))
    scale = divide(total, sum_a.abs() + sum_b.abs())
    return of_a * sum_a.sign() * scale, of_b * sum_b.sign() * scale


def divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0."""
    return torch.where(b == 0, 0.0, a / b)


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, T, D / heads) -> (B, T, D)."""
    return x.transpose(1, 2).flatten(2)
