"""The suite's ViT as a backbone of mmdet and mmseg: windows, relative positions, taps."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.registry import MODELS
from timm.layers import DropPath, LayerScale
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..errors import UserError
from ..vit import RelativeTable, VisionTransformer, rebuilt_positions, resample_positions, split_heads
from .protocol import Encoder, check_encoder

Grid = tuple[int, int]


def backbone_config(subject: Any, s: Any, grid: Grid, machine: Any) -> dict[str, Any]:
    """The backbone in mmdet's and mmseg's words."""
    return {
        "type": "SslbenchViT",
        "encoder": subject.encoder,
        "config": s.encoder,
        "grid": grid,
        "checkpointing": machine.activation_checkpointing,
    }


def pixels(subject: Any) -> dict[str, Any]:
    """What a data preprocessor is told of the encoder's images."""
    return {"mean": [255 * m for m in subject.mean], "std": [255 * d for d in subject.std], "bgr_to_rgb": True}


def scaled(blocks: list[int], depth: int) -> list[int]:
    """Block indices of a ViT of 12 blocks, in one of `depth`: [2, 5, 8, 11] -> [5, 11, 17, 23] for 24."""
    return [max(0, (b + 1) * depth // 12 - 1) for b in blocks]


@MODELS.register_module(name="SslbenchViT")
class Backbone(nn.Module):
    """Images (B, 3, H, W) -> maps (B, D, H / patch, W / patch), one for each tap. No norm follows the last block.

    encoder: whose weights it starts from; they are copied. grid: rows and columns of tokens that relative positions
    of global blocks are for; without them, any size of image will do.
    """

    def __init__(self, encoder: VisionTransformer, config: Encoder, grid: Grid, checkpointing: bool = False) -> None:
        super().__init__()
        arch = encoder.arch
        check_encoder(encoder, config)
        start = VisionTransformer(arch, encoder.image, encoder.parts)
        start.load_state_dict(encoder.state_dict())
        start.requires_grad_(True)
        self.config, self.patch, self.checkpointing = config, arch.patch, checkpointing
        self.patch_embed, self.blocks = start.patch_embed, start.blocks
        self.cls_token = start.cls_token if config.keep_cls else None
        self.grid = config.position_grid or encoder.grid
        table = start.pos_embed.detach()
        if config.rebuild_positions:
            table = rebuilt_positions(table, encoder.grid, self.grid)
        else:
            table = resample_positions(table, encoder.grid, self.grid)
        self.pos_embed = nn.Parameter(table, requires_grad=config.train_positions)
        self.taps = scaled(config.taps, arch.depth)
        everywhere = range(arch.depth) if config.window is None else scaled(config.global_blocks, arch.depth)
        self.windows = [None if i in everywhere else config.window for i in range(arch.depth)]
        self._relative(arch.heads, arch.dim // arch.heads, grid)
        blocks: Any = self.blocks
        for i, block in enumerate(blocks):
            rate = config.drop_path * i / max(1, arch.depth - 1)
            block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)
            block.ls1, block.ls2 = (_layer_scale(arch.dim, config.layer_scale) for _ in range(2))

    def _relative(self, heads: int, head_dim: int, grid: Grid) -> None:
        kind, blocks = self.config.relative_positions, list(self.blocks)
        shapes = [(w, w) if w else grid for w in self.windows]
        self.shared = nn.ModuleDict()
        if kind == "shared":
            names = {w: "windowed" if w else "global" for w in self.windows}
            self.shared.update({name: RelativeTable((w, w) if w else grid, heads) for w, name in names.items()})
        elif kind:
            for block, shape in zip(blocks, shapes, strict=True):
                table = RelativeTable(shape, heads, self.config.keep_cls) if kind == "table" else None
                block.relative = table or Decomposed(shape, head_dim)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """H and W are multiples of the patch: the data preprocessor pads to them."""
        x = self.patch_embed.proj(images)
        grid = (x.shape[2], x.shape[3])
        positions = resample_positions(self.pos_embed, self.grid, grid)
        x = x.flatten(2).transpose(1, 2) + positions[:, 1:]
        if self.cls_token is not None:
            cls = (self.cls_token + positions[:, :1]).expand(x.shape[0], -1, -1)
            x = torch.cat([cls.to(x.dtype), x], dim=1)
        biases = {name: table() for name, table in self.shared.items()}
        maps = {}
        for i, (block, window) in enumerate(zip(self.blocks, self.windows, strict=True)):
            bias = biases.get("windowed" if window else "global")
            if self.checkpointing and self.training:
                x = checkpoint(run_block, block, x, grid, window, bias, use_reentrant=False)
            else:
                x = run_block(block, x, grid, window, bias)
            if i in self.taps:
                patches = x if self.cls_token is None else x[:, 1:]
                maps[i] = patches.transpose(1, 2).unflatten(2, grid).contiguous()
        return tuple(maps[i] for i in self.taps)


def _layer_scale(dim: int, start: float | None) -> nn.Module:
    return nn.Identity() if start is None else LayerScale(dim, start)


def run_block(block: Any, x: Tensor, grid: Grid, window: int | None, bias: Tensor | None) -> Tensor:
    """One pre-norm block on tokens (B, T, D); bias (1, heads, T, T), or of a window's tokens, or None."""
    y = block.norm1(x)
    if window:
        tiles, tiled = to_windows(y, grid, window)
        y = from_windows(attend(block, tiles, bias), tiled, grid, window)
    else:
        y = attend(block, y, bias)
    x = x + block.drop_path1(block.ls1(y))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def attend(block: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Self-attention among tokens (B, T, D), with what relative positions the block has, or with `bias`."""
    attn, relative = block.attn, getattr(block, "relative", None)
    q, k, v = (split_heads(t, attn.num_heads) for t in attn.qkv(x).chunk(3, dim=-1))
    scale = q.shape[-1] ** -0.5
    if isinstance(relative, Decomposed):
        q, k = relative(q, k, scale)
    elif relative is not None:
        bias = relative()
    if bias is not None:
        bias = bias.to(q.dtype)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return attn.proj(y.transpose(1, 2).flatten(2))


def to_windows(x: Tensor, grid: Grid, window: int) -> tuple[Tensor, Grid]:
    """(B, rows * columns, D) -> (B * windows, window^2, D), zeros where the last overhang; windows down and across."""
    x = x.unflatten(1, grid)
    x = F.pad(x, (0, 0, 0, -grid[1] % window, 0, -grid[0] % window))
    down, across = x.shape[1] // window, x.shape[2] // window
    x = x.unflatten(2, (across, window)).unflatten(1, (down, window)).transpose(2, 3)
    return x.reshape(-1, window * window, x.shape[-1]), (down, across)


def from_windows(x: Tensor, tiled: Grid, grid: Grid, window: int) -> Tensor:
    """The inverse of `to_windows`, without the overhang."""
    x = x.reshape(-1, *tiled, window, window, x.shape[-1]).transpose(2, 3)
    x = x.reshape(x.shape[0], tiled[0] * window, tiled[1] * window, -1)
    return x[:, : grid[0], : grid[1]].flatten(1, 2)


class Decomposed(nn.Module):
    """ViTDet's relative positions: the query times a vector for the row offset, and one for the column offset.

    Exact with no bias of tokens x tokens in memory: the query's products with all rows and columns become channels
    of the query, and a key has ones at its own row and column, so that attention's own product adds the two.
    """

    def __init__(self, grid: Grid, head_dim: int) -> None:
        super().__init__()
        self.grid = grid
        self.rows = nn.Parameter(torch.zeros(2 * grid[0] - 1, head_dim))
        self.columns = nn.Parameter(torch.zeros(2 * grid[1] - 1, head_dim))
        place = torch.cat(
            [torch.eye(grid[0]).repeat_interleave(grid[1], dim=0), torch.eye(grid[1]).repeat(grid[0], 1)], dim=1
        )
        self.place: Tensor
        self.register_buffer("place", place, persistent=False)  # (T, rows + columns)

    def forward(self, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """q, k (B, heads, T, C) -> the two with more channels, for attention whose scores are `scale` x product."""
        if q.shape[2] != self.grid[0] * self.grid[1]:
            raise UserError(
                f"relative positions are for {self.grid[0]} x {self.grid[1]} tokens, and an image gave {q.shape[2]}"
            )
        at = q.unflatten(2, self.grid) / scale
        down = torch.einsum("bnhwc,hkc->bnhwk", at, toeplitz(self.rows.to(q.dtype)))
        across = torch.einsum("bnhwc,wkc->bnhwk", at, toeplitz(self.columns.to(q.dtype)))
        extra = torch.cat([down, across], dim=-1).flatten(2, 3)
        place = self.place.to(k.dtype).expand(*k.shape[:2], -1, -1)
        # The fast kernels want a multiple of 8 channels.
        fill = -(q.shape[-1] + extra.shape[-1]) % 8
        return F.pad(torch.cat([q, extra], -1), (0, fill)), F.pad(torch.cat([k, place], -1), (0, fill))


def toeplitz(table: Tensor) -> Tensor:
    """(2 n - 1, C) -> (n, n, C) whose row q, column k is the table's at offset q - k."""
    n = (len(table) + 1) // 2
    return table.unfold(0, n, 1).flip(-1).transpose(1, 2)
