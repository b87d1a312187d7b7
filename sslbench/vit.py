"""The one Vision Transformer, under timm's parameter names.

Layout and initialisation are MAE's (He et al. 2022): fixed 2-D sin-cos positions whose first half of the
channels encodes x, pre-norm blocks with LayerNorm eps 1e-6, qkv bias, exact GELU, no dropout.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import UserError, nearest


@dataclass(frozen=True)
class Arch:
    patch: int
    dim: int
    depth: int
    heads: int
    image: int  # the resolution it is pre-trained at unless the recipe says otherwise
    timm: str = "vit_base_patch16_224"  # the timm model that `timm_kwargs` turns into this one

    def timm_kwargs(self, image: int) -> dict[str, Any]:
        """Keyword arguments for `timm.create_model(self.timm, ...)` that build this very architecture."""
        return {
            "img_size": image,
            "patch_size": self.patch,
            "embed_dim": self.dim,
            "depth": self.depth,
            "num_heads": self.heads,
            "num_classes": 0,
        }


ARCHS: dict[str, Arch] = {
    "vit_ti16": Arch(16, 192, 12, 3, 224, "vit_tiny_patch16_224"),
    "vit_s16": Arch(16, 384, 12, 6, 224, "vit_small_patch16_224"),
    "vit_s16_h12": Arch(16, 384, 12, 12, 224, "vit_small_patch16_224"),  # MoCo v3's ViT-S: heads half as wide
    "vit_b16": Arch(16, 768, 12, 12, 224, "vit_base_patch16_224"),
    "vit_l16": Arch(16, 1024, 24, 16, 224, "vit_large_patch16_224"),
    "vit_h14": Arch(14, 1280, 32, 16, 224, "vit_huge_patch14_224"),
    "vit_h16": Arch(16, 1280, 32, 16, 224, "vit_huge_patch14_224"),  # OCL Table 1 prints patch 16 for H
    "vit_ti4": Arch(4, 192, 12, 3, 32, "vit_tiny_patch16_224"),
    "vit_s4": Arch(4, 384, 12, 6, 32, "vit_small_patch16_224"),
    "vit_b4": Arch(4, 768, 12, 12, 32, "vit_base_patch16_224"),
    "vit_mini4": Arch(4, 192, 6, 3, 32, "vit_tiny_patch16_224"),  # half of vit_ti4, for minutes on two CPU cores
    "vit_micro4": Arch(4, 96, 3, 3, 24, "vit_tiny_patch16_224"),  # quickstart's: for a minute on one
    "vit_micro6": Arch(6, 96, 3, 3, 24, "vit_tiny_patch16_224"),  # and at half the cost, for studies
    "vit_micro8": Arch(8, 96, 3, 3, 64, "vit_tiny_patch16_224"),  # the same for 64 pixels
    "vit_s8": Arch(8, 384, 12, 6, 224, "vit_small_patch8_224"),  # DINO's
    "vit_b8": Arch(8, 768, 12, 12, 224, "vit_base_patch8_224"),
    "vit_s14": Arch(14, 384, 12, 6, 224, "vit_small_patch14_dinov2"),  # DINOv2's
    "vit_b14": Arch(14, 768, 12, 12, 224, "vit_base_patch14_dinov2"),
    "vit_l14": Arch(14, 1024, 24, 16, 224, "vit_large_patch14_dinov2"),
    "macrl12": Arch(4, 512, 12, 4, 32),  # MACRL section 4.1
    "macrl12_p8": Arch(8, 512, 12, 4, 64),  # the same on Tiny-ImageNet (section 4.2)
    "macrl4": Arch(16, 512, 4, 4, 224),  # MACRL section 4.2
}


@dataclass(frozen=True)
class Parts:
    """What a published ViT has beyond the plain one, or lacks of it."""

    cls: bool = True
    registers: int = 0  # tokens beside CLS and patches, without a place in the grid
    relative: bool = False  # a table of relative positions in each block
    absolute: bool = True  # positions that are added to tokens; without them `pos_embed` is zero
    pooled_norm: bool = False  # the last norm follows the mean of patches; tokens have none

    def __str__(self) -> str:
        """`no CLS, 4 registers`; '' of a plain one."""
        named = {
            "no CLS": not self.cls,
            f"{self.registers} token(s) beside CLS and patches": self.registers,
            "relative positions": self.relative,
            "no absolute positions": not self.absolute,
            "a norm behind the mean of patches": self.pooled_norm,
        }
        return ", ".join(name for name, has in named.items() if has)


PLAIN = Parts()


def parts_of(state: Mapping[str, Tensor]) -> Parts:
    """The parts of the encoder whose state dict that is."""
    registers = state["registers"].shape[1] if "registers" in state else 0
    relative, pooled = "blocks.0.relative.table" in state, "pooled_norm.weight" in state
    absolute = not relative or bool(state["pos_embed"].any())
    return Parts("cls_token" in state, registers, relative, absolute, pooled)


OWN = re.compile(r"vit_(\d+)x(\d+)_h(\d+)_p(\d+)_im(\d+)")  # width x depth, heads, patch, image


def arch_name(patch: int, dim: int, depth: int, heads: int, image: int | None = None) -> str:
    """The name of that ViT, which `get_arch` understands: vit_b16, or vit_384x12_h6_p8_im224. `sslbench list archs`.

    image: 32 for patches of up to 4 pixels, else 224. ValueError: it cannot be built.
    """
    image = image or (32 if patch <= 4 else 224)
    if min(patch, dim, depth, heads, image) <= 0:
        raise ValueError("patch, dim, depth, heads and image are numbers above 0")
    if dim % heads or dim % 4:
        raise ValueError(f"dim={dim} must divide by heads={heads}, and by 4 for the sin-cos positions")
    if image % patch:
        raise ValueError(f"image={image} is not a multiple of patch={patch}: say for which image it is")
    sizes = (patch, dim, depth, heads, image)
    known = (n for n, a in ARCHS.items() if (a.patch, a.dim, a.depth, a.heads, a.image) == sizes)
    return next(known, f"vit_{dim}x{depth}_h{heads}_p{patch}_im{image}")


def find_arch(name: str) -> Arch | None:
    """The ViT of that name: one of ARCHS, or one that says its sizes. None: there is none."""
    if sizes := OWN.fullmatch(name):
        dim, depth, heads, patch, image = map(int, sizes.groups())
        with contextlib.suppress(ValueError):
            arch_name(patch, dim, depth, heads, image)
            return Arch(patch, dim, depth, heads, image)
    return ARCHS.get(name)


def get_arch(name: str) -> Arch:
    if arch := find_arch(name):
        return arch
    raise UserError(f"unknown arch '{name}'{nearest(name, ARCHS)}; one of your own is vit_384x12_h6_p8_im224, say")


def sincos_positions(dim: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D sin-cos table in MAE's layout, shape (1, 1 + rows * columns, dim), float32; row 0 (CLS) is zero.

    The first half of the channels encodes the column (x), the second the row (y); each half is [sin | cos] with
    omega_k = 10000^(-k / (dim / 4)). MoCo v3 has the two halves the other way round: never mix the two.
    """
    if dim % 4:
        raise ValueError(f"sin-cos positions need a width divisible by 4, not {dim}")
    rows, columns = grid
    omega = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    y, x = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    halves = [torch.outer(axis.reshape(-1), omega) for axis in (x, y)]
    table = torch.cat([f(h) for h in halves for f in (torch.sin, torch.cos)], dim=1)
    return torch.cat([torch.zeros(1, dim, dtype=torch.float64), table])[None].float()


def rebuilt_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """The fixed sin-cos table of a `new` grid, (1, 1 + N, D), in the layout that `table` has at `old`.

    MAE's or MoCo v3's: in the other layout than the encoder was trained with, rows and columns would trade places.
    UserError: the table is neither, so its positions were learned and no formula gives them at another size.
    """
    dim = table.shape[-1]
    of_formula = sincos_positions(dim, old).to(table.device)
    for shift in (0, dim // 2):  # MAE's layout, MoCo v3's
        if torch.allclose(table[:, 1:].float(), of_formula[:, 1:].roll(shift, -1), atol=1e-3):
            return sincos_positions(dim, new).roll(shift, -1)
    raise UserError(
        "positions cannot be rebuilt at another size: the encoder's are not sin-cos, in MAE's layout or MoCo v3's, but "
        "learned; resample them instead (--set science.encoder.rebuild_positions=false)"
    )


def resample_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resample a position table (1, 1 + old rows * columns, D) to a `new` grid of (rows, columns), CLS row kept.

    Bicubic, align_corners False, as MAE's fine-tuning does. The suite's one resampler.
    """
    if table.shape[1] != 1 + old[0] * old[1]:
        raise ValueError(f"a table of {table.shape[1]} rows is not CLS + a {old[0]} x {old[1]} grid")
    if old == new:
        return table
    cls, grid = table[:, :1], table[:, 1:]
    grid = grid.reshape(1, *old, -1).permute(0, 3, 1, 2).float()
    grid = F.interpolate(grid, size=new, mode="bicubic", align_corners=False)
    return torch.cat([cls, grid.flatten(2).transpose(1, 2).to(cls.dtype)], dim=1)


def patchify(images: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, N, patch * patch * C), pixels in (row, column, channel) order, patches row by row."""
    b, c, h, w = images.shape
    x = images.reshape(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(patches: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`: (B, rows * columns, patch * patch * C) -> (B, C, H, W)."""
    b = patches.shape[0]
    x = patches.reshape(b, *grid, patch, patch, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, grid[0] * patch, grid[1] * patch)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (B, K) of `x` (B, N, D) -> (B, K, D)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v: (B, heads, T, d) and (B, heads, S, d) twice -> (B, heads, T, d).

    bias: of relative positions, (1, heads, T, S); None: none.

    By torch's fused kernel, but for bf16 on a CPU, whose backward pass takes ten times as long there as that of the
    matrix products it is made of (vit_b16 at 224 px on two cores: 5.7 -> 14.8 images/s). Without gradients too,
    though the kernel is quicker then: features are to be the same in both.
    """
    bias = None if bias is None else bias.to(q.dtype)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return (scores if bias is None else scores + bias).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class RelativeTable(nn.Module):
    """A learned bias for each head and each offset between two tokens of a grid, and, with `cls`, three for CLS."""

    def __init__(self, grid: tuple[int, int], heads: int, cls: bool = False) -> None:
        super().__init__()
        self.grid = grid
        self.table = nn.Parameter(torch.zeros(heads, 2 * grid[0] - 1, 2 * grid[1] - 1))
        # CLS as query, CLS as key, CLS with itself.
        self.cls = nn.Parameter(torch.zeros(3, heads)) if cls else None

    def forward(self) -> Tensor:
        """(1, heads, T, T), query by key."""
        rows, columns = self.grid
        # [h, a, b, i, j] = table[h, a + i, b + j]; key (c, d) is i = rows - 1 - c, j = columns - 1 - d: offset a - c.
        bias = self.table.unfold(1, rows, 1).unfold(2, columns, 1).flip(-1, -2)
        bias = bias.reshape(1, -1, rows * columns, rows * columns)
        if self.cls is None:
            return bias
        query, key, both = (c.view(1, -1, 1, 1) for c in self.cls)
        n = rows * columns
        top = torch.cat([both, query.expand(-1, -1, 1, n)], dim=3)
        return torch.cat([top, torch.cat([key.expand(-1, -1, n, 1), bias], dim=3)], dim=2)


class Attention(nn.Module):
    """The parameters of multi-head self-attention, D = `heads` x the width of one; `Block` does the arithmetic."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class PatchEmbed(nn.Module):
    """The convolution that embeds patches, which `VisionTransformer.tokens` computes as a matrix product."""

    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch, stride=patch)


class Block(nn.Module):
    """timm's pre-norm block, parameter for parameter: LayerNorm eps 1e-6, qkv bias, an MLP four times as wide.

    Not timm's class: to import that takes as long as to import torch, at every start of every command.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path1: nn.Module = nn.Identity()  # stochastic depth's place, in fine-tuning
        self.drop_path2: nn.Module = nn.Identity()
        self.relative: RelativeTable | None = None

    def position_bias(self, rows: slice | None = None) -> Tensor | None:
        """Return the scores' bias (1, heads, T, T), or its `rows`; None where the block has no relative positions."""
        return None if self.relative is None else self.relative()[:, :, rows or slice(None)]

    def forward(self, x: Tensor, rows: slice | None = None, bias: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D), or its `rows` at the cost of those: only they are queries and see the MLP.

        For a last block of which few rows are read: with CLS alone, five sixths of the block's work is saved.
        bias: of the scores, (B, 1, 1, T), -inf where a token is not to be seen; of a block without relative positions.
        """
        attn, d = self.attn, x.shape[-1]
        y = self.norm1(x)
        if rows is None:
            q, k, v = attn.qkv(y).chunk(3, dim=-1)
        else:
            q = F.linear(y[:, rows], attn.qkv.weight[:d], attn.qkv.bias[:d])
            k, v = F.linear(y, attn.qkv.weight[d:], attn.qkv.bias[d:]).chunk(2, dim=-1)
            x = x[:, rows]
        q, k, v = (split_heads(t, attn.num_heads) for t in (q, k, v))
        y = attention(q, k, v, self.position_bias(rows) if bias is None else bias)
        x = x + self.drop_path1(attn.proj(y.transpose(1, 2).flatten(2)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, D) -> (B, heads, T, D / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class VisionTransformer(nn.Module):
    """A plain ViT whose state dict is timm's, key for key. Call `initialise` on it, or on what contains it.

    parts: what one that others trained has besides. Whatever they are, `forward` gives CLS and the patches.
    """

    def __init__(self, arch: Arch, image: int | tuple[int, int] | None = None, parts: Parts = PLAIN) -> None:
        super().__init__()
        image = image or arch.image
        size = (image, image) if isinstance(image, int) else image
        if size[0] % arch.patch or size[1] % arch.patch:
            raise UserError(f"an image of {size[0]} x {size[1]} pixels is not a multiple of the patch, {arch.patch}")
        self.arch, self.image, self.parts = arch, size, parts
        self.grid = (size[0] // arch.patch, size[1] // arch.patch)
        self.n_patches = self.grid[0] * self.grid[1]
        self.patch_embed = PatchEmbed(arch.patch, arch.dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, arch.dim))
        self.pos_embed = nn.Parameter(sincos_positions(arch.dim, self.grid), requires_grad=False)
        self.blocks = nn.ModuleList(Block(arch.dim, arch.heads) for _ in range(arch.depth))
        self.norm: nn.Module = nn.LayerNorm(arch.dim, eps=1e-6)
        if parts != PLAIN:
            self._add(parts)

    def _add(self, parts: Parts) -> None:
        if not parts.cls:
            del self.cls_token
        if parts.registers:
            self.registers = nn.Parameter(torch.zeros(1, parts.registers, self.arch.dim))
        if parts.relative:
            blocks: Any = self.blocks
            for block in blocks:
                block.relative = RelativeTable(self.grid, self.arch.heads, cls=True)
        if parts.pooled_norm:
            self.pooled_norm, self.norm = self.norm, nn.Identity()

    @property
    def pools(self) -> tuple[str, ...]:
        """The features that it has: see `pool_tokens`."""
        whole = self.parts.cls and not self.parts.pooled_norm
        return ("cls", "mean", "mean_all") if whole else ("mean",)

    def feature(self, tokens: Tensor, pool: str) -> Tensor:
        """One feature an image: what `forward` gave, (B, 1 + N, D) -> (B, D), for one of `pools`."""
        pooled = pool_tokens(tokens, pool)
        return self.pooled_norm(pooled) if self.parts.pooled_norm else pooled

    def freeze_patch_embed(self) -> None:
        """Keep the projection at its random values (OCL section 2.1, after MoCo v3)."""
        self.patch_embed.requires_grad_(False)

    def tokens(self, images: Tensor, keep: Tensor | None = None, gain: Tensor | None = None) -> Tensor:
        """Embed images (B, 3, H, W), with CLS in front and positions added; behind the patches, what registers it has.

        Images of another size than the encoder's have its positions resampled, as DINO's small crops have.

        keep: patch indices to embed, all others cost nothing. None -> (B, 1 + N, D); (B, K) -> (B, 1 + K, D);
        (B, G, K), G groups of the same image -> (B * G, 1 + K, D), row b * G + g being group g of image b.
        gain: factors on the projected patches before positions are added, such as a dropout's, (B, K, D).
        """
        patches = patchify(images, self.arch.patch)
        b = patches.shape[0]
        grid = (images.shape[-2] // self.arch.patch, images.shape[-1] // self.arch.patch)
        table = resample_positions(self.pos_embed, self.grid, grid)
        positions = table[:, 1:].expand(b, -1, -1)
        groups = 1
        if keep is not None:
            if keep.ndim == 3:
                groups, keep = keep.shape[1], keep.flatten(1)
            patches, positions = take(patches, keep), take(positions, keep)
        # PatchEmbed's convolution, as the matrix product it is: (D, C, p, p) -> (D, p * p * C).
        conv = self.patch_embed.proj
        x = F.linear(patches, conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)
        x = (x if gain is None else x * gain) + positions
        x = x.reshape(b * groups, -1, x.shape[-1])
        rows = [x]
        if self.parts.cls:
            rows = [(self.cls_token + self.pos_embed[:, :1]).expand(b * groups, -1, -1).to(x.dtype), x]
        if self.parts.registers:
            rows.append(self.registers.expand(b * groups, -1, -1).to(x.dtype))
        return torch.cat(rows, dim=1)

    def encode(self, tokens: Tensor, cls_only: bool = False) -> Tensor:
        """All blocks and the final LayerNorm: (B, T, D) -> (B, 1 + K, D), or -> (B, 1, D) where only CLS is read."""
        *body, last = self.blocks
        for block in body:
            tokens = block(tokens)
        x = self.norm(last(tokens, slice(0, 1) if cls_only else None))
        return x if cls_only else self.in_place(x)

    def in_place(self, tokens: Tensor) -> Tensor:
        """Rows of all tokens (B, T, D) -> of CLS and patches, (B, 1 + K, D). A CLS that it has not is NaN."""
        tokens = tokens[:, : tokens.shape[1] - self.parts.registers]
        return tokens if self.parts.cls else F.pad(tokens, (0, 0, 1, 0), value=float("nan"))

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        return self.encode(self.tokens(images, keep))

    def cls_attention(self, tokens: Tensor, layers: list[int], softmax: bool = True, scale: float = 1.0) -> Tensor:
        """What CLS attends to: the head-mean attention of CLS to each patch in blocks `layers`, (B, L, N).

        tokens: embedded, (B, 1 + N, D), and what registers there are. softmax False: the scaled scores, before the
        softmax over all keys. scale: a factor on the scores beside the usual 1 / sqrt(D / heads). Runs no further than
        the last block named, and in that block no further than its scores.
        """
        rows = []
        blocks: Any = self.blocks[: max(layers) + 1]
        for i, block in enumerate(blocks):
            attn: Any = block.attn
            q, k, v = (split_heads(t, attn.num_heads) for t in attn.qkv(block.norm1(tokens)).chunk(3, dim=-1))
            if i in layers:
                scores = (q[:, :, :1] * (attn.scale * scale)) @ k.transpose(-2, -1)
                if (bias := block.position_bias(slice(0, 1))) is not None:
                    scores = scores + scale * bias
                scores = scores.softmax(-1) if softmax else scores
                rows.append(scores.mean(1)[:, 0, 1 : scores.shape[-1] - self.parts.registers].float())
            if i < max(layers):
                tokens = tokens + attn.proj(attention(q, k, v, block.position_bias()).transpose(1, 2).flatten(2))
                tokens = tokens + block.mlp(block.norm2(tokens))
        return torch.stack(rows, 1)


def pool_tokens(tokens: Tensor, pool: str) -> Tensor:
    """One feature an image: (B, 1 + N, D) -> (B, D). pool: `cls`, `mean` (of patches) or `mean_all` (CLS too)."""
    if pool == "cls":
        return tokens[:, 0]
    return tokens[:, 1:].mean(1) if pool == "mean" else tokens.mean(1)


def initialise(root: nn.Module) -> None:
    """MAE's initialisation of everything in `root`, drawn in MAE's order from torch's global generator.

    Patch embedding Xavier uniform on its matrix view (its bias keeps the convolution's default), CLS and mask
    tokens normal with std 0.02, Linear Xavier uniform with zero bias, LayerNorm 1 and 0. A seed thus gives the
    weights that MAE's code gives: the goldens need no reference code.
    """
    for module in root.modules():
        if isinstance(module, PatchEmbed):
            weight = module.proj.weight
            nn.init.xavier_uniform_(weight.data.view(weight.shape[0], -1))
    for name, parameter in root.named_parameters():
        if name.rsplit(".", 1)[-1] in ("cls_token", "mask_token"):
            nn.init.normal_(parameter, std=0.02)
    for module in root.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def parameters_of(arch: str) -> int:
    """How many parameters an encoder of that arch has, with its positions. Counted and not built: lists ask of all."""
    a = get_arch(arch)
    block = 12 * a.dim**2 + 13 * a.dim  # qkv 3, proj 1, mlp 8; their biases 9, two norms 4
    patches = (a.image // a.patch) ** 2
    return a.depth * block + a.dim * (3 * a.patch**2 + 1 + 1 + (1 + patches) + 2)  # patch embed, CLS, positions, norm
