"""The light decoder that the masked-image methods share (MAE: He et al. 2022, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .vit import Block, VisionTransformer, sincos_positions, take


class Decoder(nn.Module):
    """Visible tokens -> pixels of the masked patches, or `out` values of each."""

    def __init__(
        self, encoder: VisionTransformer, dim: int = 512, depth: int = 8, heads: int = 16, out: int | None = None
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder.arch.dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_positions(dim, encoder.grid), requires_grad=False)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pred = nn.Linear(dim, out or encoder.arch.patch**2 * 3)

    def forward(self, tokens: Tensor, order: Tensor, rows: slice | None = None) -> Tensor:
        """tokens (B, 1 + K, D) of the visible patches order[:, :K] -> pixels of the masked ones, (B, N - K, P).

        Row j of the answer is patch order[:, K + j]. Attention does not care for the order of its tokens, so none
        is restored: positions are shuffled instead, one gather where MAE's code has two. `rows`: which rows of
        [CLS, order[:, 0], ..., order[:, N - 1]] to predict instead, such as slice(1, None), every patch.
        """
        x = self.embed(tokens)
        b, t = x.shape[:2]
        masked = self.mask_token.expand(b, order.shape[1] + 1 - t, -1).to(x.dtype)
        positions = take(self.pos_embed[:, 1:].expand(b, -1, -1), order)
        x = torch.cat([x[:, :1], torch.cat([x[:, 1:], masked], dim=1) + positions], dim=1)
        *body, last = self.blocks
        for block in body:
            x = block(x)
        x = last(x, rows or slice(t, None))
        return self.pred(self.norm(x))
