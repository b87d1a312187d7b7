"""Encoders that others published: `timm:NAME`, and weights files as timm, MAE, MoCo v3 and DINO write them."""

from __future__ import annotations

import argparse
import math
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from ..errors import UserError, nearest
from ..views import IMAGENET_MEAN, IMAGENET_STD
from ..vit import ARCHS, VisionTransformer

# What a checkpoint keeps its weights under; of a teacher and a student the teacher is the one that is evaluated.
NESTS = ("teacher", "state_dict", "model", "model_state_dict", "module")
OURS = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")
# Parts that a plain ViT lacks: without them the features would be others.
FOREIGN = ("norm_pre.", "fc_norm.", "reg_token", "register_tokens", "dist_token", "rel_pos", "pos_drop.")


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file, out of whatever they are nested in. Runs no code of the file."""
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        # MAE's and DINO's checkpoints keep their command line beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            tree: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise UserError(
            f"{path} holds more than tensors and plain data, so loading it could run code; refused "
            f"({str(e).splitlines()[0]})"
        ) from None
    except Exception as e:  # what a file of another kind makes torch.load raise is anything
        raise UserError(f"{path} is not a weights file ({' '.join(str(e).split())[:200]})") from None
    while isinstance(tree, dict) and not any(isinstance(v, Tensor) for v in tree.values()):
        inner = next((tree[k] for k in NESTS if isinstance(tree.get(k), dict)), None)
        if inner is None:
            raise UserError(f"{path}: no weights in it; looked under {', '.join(NESTS)}, found {', '.join(tree)[:200]}")
        tree = inner
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds a {type(tree).__name__}, expected a state dict")
    return {k: v for k, v in tree.items() if isinstance(v, Tensor)}


def read_timm(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The pre-trained weights of a timm model and its pretrained_cfg; downloads what is not in the cache."""
    import timm

    try:
        model: Any = timm.create_model(name, pretrained=True)
    except Exception as e:  # timm and its hub raise many kinds
        known = timm.list_models(pretrained=True)
        why = nearest(name, known) if name not in known and ":" not in name else f" ({' '.join(str(e).split())[:160]})"
        raise UserError(f"timm:{name} could not be loaded{why}; timm.list_models(pretrained=True) lists them") from None
    return model.state_dict(), dict(model.pretrained_cfg)


def to_encoder(state: dict[str, Tensor], where: str) -> tuple[VisionTransformer, str]:
    """The state dict as one of our encoders at the size of its position table, and the name of its arch."""
    marker = "patch_embed.proj.weight"
    prefixes = [k.removesuffix(marker) for k in state if k.endswith(marker)]
    if not prefixes:
        raise UserError(f"{where} is no Vision Transformer that is known here: it has no '{marker}'")
    prefix = min(prefixes, key=lambda p: ("momentum" in p, len(p)))
    mine = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if odd := [k for k in mine if k.startswith(FOREIGN)]:
        raise UserError(f"{where} is not a plain ViT: it has {', '.join(odd[:3])}")
    mine = {k: v.float() for k, v in mine.items() if k.startswith(OURS)}
    projection, table = mine[marker], mine.get("pos_embed", torch.empty(0, 0))
    depth = 1 + max((int(m[1]) for k in mine if (m := re.match(r"blocks\.(\d+)\.", k))), default=-1)
    patch, dim = projection.shape[-1], projection.shape[0]
    names = [n for n, a in ARCHS.items() if (a.patch, a.dim, a.depth) == (patch, dim, depth)]
    if not names:
        raise UserError(
            f"{where}: patch {patch}, width {dim}, depth {depth} is none of the archs; `sslbench list archs` shows them"
        )
    side = math.isqrt(max(0, table.shape[1] - 1))
    if not side or 1 + side * side != table.shape[1]:
        raise UserError(f"{where}: expected positions (1, 1 + side x side, {dim}), found {tuple(table.shape)}")
    # Heads do not show in a file. Where two archs differ in nothing else, MoCo v3's files have the one with 12.
    name = names[-1 if "base_encoder" in prefix or "momentum_encoder" in prefix else 0]
    encoder = VisionTransformer(ARCHS[name], side * patch)
    wanted = encoder.state_dict()
    missing, extra = sorted(wanted.keys() - mine.keys()), sorted(mine.keys() - wanted.keys())
    if missing or extra:
        lacks = f"lacks {', '.join(missing[:3])}" if missing else ""
        has = f"has {', '.join(extra[:3])}" if extra else ""
        raise UserError(f"{where} is not a plain ViT: it {' and '.join(filter(None, (lacks, has)))}")
    encoder.load_state_dict(mine)
    return encoder, name


def statistics(config: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(config.get("mean", IMAGENET_MEAN)), tuple(config.get("std", IMAGENET_STD))


def tensors_bytes(encoder: VisionTransformer) -> bytes:
    return safetensors_bytes({k: v.contiguous() for k, v in encoder.state_dict().items()})
