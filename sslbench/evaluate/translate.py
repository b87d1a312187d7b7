"""Published ViTs under this suite's names: the same function of an image, in the layers that vit.py has.

Names are those of the authors' files: BEiT, BEiT v2, data2vec, ConMIM, SimMIM and CAE (q and v bias without k, layer
scale, relative positions), DeiT and DeiT III, DINOv2, I-JEPA, SiameseIM, timm's of all of these, and transformers' ViT,
DeiT and ViTMAE.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import UserError

Tensors = dict[str, Tensor]

# Regular expressions of names in a file that no ViT has.
FAMILIES = {
    "a Swin Transformer": r"(^|\.)(layers\.0\.blocks\.0\.|features\.1\.0\.attn\.relative_position)",
    "a ConvNeXt": r"(^|\.)(stages\.0\.((blocks|layers)\.)?0\.(dwconv|conv_dw)\.|features\.1\.0\.block\.0\.weight)",
    "a ResNet": r"(^|\.)(layer1\.0\.conv1\.weight|stages\.0\.layers\.0\.layer\.0\.convolution)",
}
# Parts that no encoder here has: without them the features would be others.
FOREIGN = ("norm_pre.", "rope", "storage_tokens", "attn_pool.", "embeddings.", "encoder.layer.", "pos_drop.")
HUGGING_FACE = {
    r"^embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
    r"^embeddings\.cls_token$": "cls_token",
    r"^embeddings\.distillation_token$": "dist_token",
    r"^embeddings\.position_embeddings$": "pos_embed",
    r"^embeddings\.mask_token$": "mask_token",
    r"^layernorm\.": "norm.",
    r"^encoder\.layer\.(\d+)\.layernorm_before\.": r"blocks.\1.norm1.",
    r"^encoder\.layer\.(\d+)\.layernorm_after\.": r"blocks.\1.norm2.",
    r"^encoder\.layer\.(\d+)\.attention\.output\.dense\.": r"blocks.\1.attn.proj.",
    r"^encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.": r"blocks.\1.attn.\2.",
    r"^encoder\.layer\.(\d+)\.intermediate\.dense\.": r"blocks.\1.mlp.fc1.",
    r"^encoder\.layer\.(\d+)\.output\.dense\.": r"blocks.\1.mlp.fc2.",
}
OURS = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.", "pooled_norm.", "registers")


@dataclass
class Translated:
    """The tensors of one encoder under the names of vit.py, but for positions, which `positions.py` lays out."""

    tensors: Tensors
    heads: int | None  # where they show
    beside: Tensors  # what is no part of the encoder: a decoder, a head
    notes: list[str] = field(default_factory=list)  # what a reader should know


def family(names: list[str]) -> str | None:
    """`a Swin Transformer`: what a file with these names holds that is no ViT; None: nothing of that kind."""
    return next((what for what, pattern in FAMILIES.items() if any(re.search(pattern, n) for n in names)), None)


def translate(found: Tensors, where: str) -> Translated:
    """UserError: it has parts that are not known, so that its features would be others."""
    t = {_renamed(k): v.float() if v.is_floating_point() else v for k, v in found.items()}
    if odd := [k for k in t if k.startswith(FOREIGN)]:
        raise UserError(f"{where} is not a plain ViT: it has {', '.join(odd[:3])}")
    blocks = sorted({m[1] for k in t if (m := re.match(r"(blocks\.\d+\.)", k))})
    notes = []
    for block in blocks:
        _join_qkv(t, block)
    folded = [_fold_layer_scale(t, block) for block in blocks]
    if any(folded):
        notes.append("its layer scale is folded into attn.proj and mlp.fc2: the same function, but fine-tuning then "
                     "trains their product")  # fmt: skip
    heads = _relative_tables(t, blocks, where)
    registers = [t.pop(k) for k in ("dist_token", "reg_token", "register_tokens") if k in t]
    if registers:
        t["registers"] = torch.cat(registers, 1)
    if "norm.weight" not in t:
        t |= {k.replace("fc_norm", "pooled_norm"): t[k] for k in ("fc_norm.weight", "fc_norm.bias") if k in t}
    elif "fc_norm.weight" in t:
        raise UserError(f"{where} is not a plain ViT: it has both norm and fc_norm")
    if "decoder_pos_mlp.weight" in t and "norm.weight" not in t:  # SiameseIM's encoder ends with its last block
        dim = t["patch_embed.proj.weight"].shape[0]
        t |= {"pooled_norm.weight": torch.ones(dim), "pooled_norm.bias": torch.zeros(dim)}
        notes.append("SiameseIM has no norm behind its blocks: the feature is the mean of patches, normalised, as its "
                     "own linear probe takes it")  # fmt: skip
    mine = {k: v for k, v in t.items() if k.startswith(OURS)}
    return Translated(mine, heads, {k: v for k, v in t.items() if k not in mine}, notes)


def _renamed(name: str) -> str:
    for pattern, ours in HUGGING_FACE.items():
        name = re.sub(pattern, ours, name)
    return re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name)  # DINOv2's chunks of blocks


def _join_qkv(t: Tensors, block: str) -> None:
    """One `qkv` of transformers' three; BEiT's q and v bias as one bias, whose part of k is zero."""
    attn = f"{block}attn."
    for kind in ("weight", "bias"):
        if f"{attn}query.{kind}" in t:
            t[f"{attn}qkv.{kind}"] = torch.cat([t.pop(f"{attn}{part}.{kind}") for part in ("query", "key", "value")])
    if f"{attn}q_bias" in t:
        q, v = t.pop(f"{attn}q_bias"), t.pop(f"{attn}v_bias")
        t[f"{attn}qkv.bias"] = torch.cat([q, t.pop(f"{attn}k_bias", torch.zeros_like(q)), v])


def _fold_layer_scale(t: Tensors, block: str) -> bool:
    """gamma * (W x + b) = (gamma W) x + gamma b, of attention and MLP. Whether the block had any."""
    folded = False
    for names, layer in ((("gamma_1", "ls1.gamma"), "attn.proj"), (("gamma_2", "ls2.gamma"), "mlp.fc2")):
        for gamma in (t.pop(block + name) for name in names if block + name in t):
            t[f"{block}{layer}.weight"] = gamma[:, None] * t[f"{block}{layer}.weight"]
            t[f"{block}{layer}.bias"] = gamma * t[f"{block}{layer}.bias"]
            folded = True
    return folded


def _relative_tables(t: Tensors, blocks: list[str], where: str) -> int | None:
    """BEiT's table of each block, and the one that all share, as `RelativeTable` has them; the number of heads.

    A file has ((2 s - 1)^2 + 3, heads): query minus key, by row and column; then CLS as query, as key, with itself.
    """
    for k in [k for k in t if k.endswith("relative_position_index")]:  # a function of the grid alone
        del t[k]
    shared, heads = t.get("rel_pos_bias.relative_position_bias_table"), None
    for block in blocks:
        own = t.pop(f"{block}attn.relative_position_bias_table", None)
        if (table := own if shared is None else shared if own is None else own + shared) is None:
            continue
        side, heads = math.isqrt(max(0, len(table) - 3)), table.shape[1]
        if side**2 != len(table) - 3 or side % 2 == 0:
            raise UserError(f"{where}: {len(table)} relative positions are not those of a square grid and CLS")
        t[f"{block}relative.table"] = table[:-3].T.reshape(heads, side, side).contiguous()
        t[f"{block}relative.cls"] = table[-3:].clone()
    return heads


def lay_out_positions(t: Tensors, where: str) -> int:
    """Make `pos_embed` a row of CLS and those of a square grid, (1, 1 + side x side, D); return side.

    The row that CLS has not is zero; so is all of it where positions are relative alone. Rows of registers are added to
    these. UserError: the table is of no square grid.
    """
    dim = t["patch_embed.proj.weight"].shape[0]
    if "pos_embed" not in t and "blocks.0.relative.table" in t:
        side = (t["blocks.0.relative.table"].shape[-1] + 1) // 2
        t["pos_embed"] = torch.zeros(1, 1 + side * side, dim)
        return side
    table = t.get("pos_embed", torch.empty(0, 0, 0))
    cls = int("cls_token" in t)
    registers = t["registers"].shape[1] if "registers" in t else 0
    for rows in (cls + registers, cls, 0):  # in front of the grid's
        side = math.isqrt(max(0, table.shape[1] - rows))
        if side and table.shape == (1, rows + side * side, dim):
            first = table[:, :1] if cls and rows else torch.zeros(1, 1, dim)
            if rows > cls:
                t["registers"] = t["registers"] + table[:, cls:rows]
            t["pos_embed"] = torch.cat([first, table[:, rows:]], 1)
            return side
    shape = " x ".join(map(str, table.shape))
    raise UserError(f"{where}: expected positions 1 x (1 + side x side) x {dim}, a square grid, found {shape}")
