"""Encoders that others published: `timm:NAME`, and weights files as timm, MAE, MoCo v3 and DINO write them."""

from __future__ import annotations

import argparse
import math
import pickle
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..errors import UserError, nearest
from ..views import IMAGENET_MEAN, IMAGENET_STD
from ..vit import ARCHS, VisionTransformer, sincos_positions

MARKER = "patch_embed.proj.weight"  # every ViT here has one
# In the dotted name of where a file keeps weights, such as `model.teacher.backbone.`
AVERAGE = re.compile(r"(?:^|[._])(?:ema|teacher)(?:[._]|$)")
LEARNER = re.compile(r"(?:^|[._])(?:student|momentum|encoder_k)(?:[._]|$)")
OURS = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")
SETTINGS = ("args", "config", "cfg", "hyper_parameters", "model_args", "model_kwargs", "opt", "pretrained_cfg")
SIZES = ("img_size", "image_size", "input_size", "grid_size")
HEADS = ("num_heads", "num_attention_heads")
# Parts that a plain ViT lacks: without them the features would be others.
FOREIGN = ("norm_pre.", "fc_norm.", "reg_token", "register_tokens", "dist_token", "rel_pos", "pos_drop.")


def read_file(path: Path) -> Any:
    """What a weights file holds: tensors and plain data, nested as whoever wrote it liked. Runs no code of the file."""
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        # MAE's and DINO's checkpoints keep their command line beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise UserError(
            f"{path} holds more than tensors and plain data ({_objects(path) or str(e).splitlines()[0]}), so loading "
            f"it could run code; refused. Load it where you trust it, and save its state dict alone"
        ) from None
    except Exception as e:  # what a file of another kind makes torch.load raise is anything
        raise UserError(f"{path} is not a weights file ({' '.join(str(e).split())[:200]})") from None


def _objects(path: Path) -> str:
    """The classes and functions that the file names, found without loading it; '' where that cannot be told."""
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # a file of torch's older format
        return ""
    return ", ".join(sorted(found)[:5])


def places(tree: Any, where: str = "") -> dict[str, dict[str, Tensor]]:
    """{place: tensors} of every Vision Transformer in a file. A place is a dotted name such as `state_dict.module.`"""
    found: dict[str, dict[str, Tensor]] = {}
    if not isinstance(tree, dict):
        return found
    tensors = {k: v for k, v in tree.items() if isinstance(k, str) and isinstance(v, Tensor)}
    for prefix in (k.removesuffix(MARKER) for k in tensors if k.endswith(MARKER)):
        found[where + prefix] = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    for key, inner in tree.items():
        if isinstance(key, str):
            found |= places(inner, f"{where}{key}.")
    return found


def preferred(names: Iterable[str]) -> str:
    """Of several places the one that is evaluated: an average (timm's EMA, a teacher) before what it averages.

    Of a student and its teacher the teacher; of MoCo's two the base encoder, as its own code does; else what is nested
    least.
    """
    return min(names, key=lambda p: (bool(LEARNER.search(p)), not AVERAGE.search(p), p.count("."), len(p)))


def read_timm(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pre-trained weights of a timm model, with what they do not show, and its pretrained_cfg; downloads what is
    not in the cache."""
    import timm

    try:
        model: Any = timm.create_model(name, pretrained=True)
    except Exception as e:  # timm and its hub raise many kinds
        known = timm.list_models(pretrained=True)
        why = nearest(name, known) if name not in known and ":" not in name else f" ({' '.join(str(e).split())[:160]})"
        raise UserError(f"timm:{name} could not be loaded{why}; timm.list_models(pretrained=True) lists them") from None
    beside = {"img_size": getattr(getattr(model, "patch_embed", None), "img_size", None)}
    if attention := next((m for name, m in model.named_modules() if name == "blocks.0.attn"), None):
        beside["num_heads"] = getattr(attention, "num_heads", None)
    return {**model.state_dict(), **beside}, dict(model.pretrained_cfg)


def to_encoder(tree: Any, where: str) -> tuple[VisionTransformer, str]:
    """The Vision Transformer of a file as one of our encoders at the size of its positions, and its arch's name.

    A warning says what was taken where the file has several, or does not show what its grid of positions is.
    """
    if not isinstance(tree, dict):
        raise UserError(f"{where} holds a {type(tree).__name__}, expected a state dict")
    found = places(tree)
    if not found:
        has = ", ".join(map(str, tree))[:200]
        raise UserError(f"{where}: no weights in it of a Vision Transformer known here, no '{MARKER}'; found {has}")
    place = preferred(found)
    if len(found) > 1 or LEARNER.search(place):
        others = ", ".join(p.rstrip(".") or "the top" for p in found if p != place) or "a teacher's: it has none"
        warnings.warn(f"{where}: the weights of {place.rstrip('.') or 'the top'} are taken, not {others}", stacklevel=2)
    if odd := [k for k in found[place] if k.startswith(FOREIGN)]:
        raise UserError(f"{where} is not a plain ViT: it has {', '.join(odd[:3])}")
    mine = {k: v.float() for k, v in found[place].items() if k.startswith(OURS)}
    projection, table = mine[MARKER], mine.get("pos_embed", torch.empty(0, 0, 0))
    dim, patch = projection.shape[0], projection.shape[-1]
    if projection.shape != (dim, 3, patch, patch):
        raise UserError(
            f"{where}: {MARKER} is {shape(projection)}; expected {dim} x 3 x P x P, square patches of three channels"
        )
    depth = 1 + max((int(m[1]) for k in mine if (m := re.match(r"blocks\.(\d+)\.", k))), default=-1)
    names = [n for n, a in ARCHS.items() if (a.patch, a.dim, a.depth) == (patch, dim, depth)]
    if not names:
        raise UserError(
            f"{where}: patch {patch}, width {dim}, depth {depth} is none of the archs; `sslbench list archs` shows them"
        )
    # Heads do not show in a file. Where two archs differ in nothing else, MoCo v3's files have the one with 12.
    name = names[-1 if "base_encoder" in place or "momentum_encoder" in place else 0]
    heads = stated(tree, HEADS)
    if isinstance(heads, int) and heads != ARCHS[name].heads:
        known = {ARCHS[n].heads: n for n in names}
        if heads not in known:
            raise UserError(f"{where} says that it has {heads} heads; {name} has {ARCHS[name].heads}")
        name = known[heads]
    encoder = VisionTransformer(ARCHS[name], _side(table, dim, patch, stated(tree, SIZES), where) * patch)
    wanted = encoder.state_dict()
    missing, extra = sorted(wanted.keys() - mine.keys()), sorted(mine.keys() - wanted.keys())
    if missing or extra:
        lacks = f"lacks {', '.join(missing[:3])}" if missing else ""
        has = f"has {', '.join(extra[:3])}" if extra else ""
        raise UserError(f"{where} is not a plain ViT: it {' and '.join(filter(None, (lacks, has)))}")
    if wrong := next((k for k in wanted if mine[k].shape != wanted[k].shape), None):
        raise UserError(f"{where} is not a {name}: {wrong} is {shape(mine[wrong])}, expected {shape(wanted[wrong])}")
    encoder.load_state_dict(mine)
    return encoder, name


def shape(x: Tensor) -> str:
    return " x ".join(map(str, x.shape))


def stated(tree: Any, names: tuple[str, ...]) -> Any:
    """What a file says beside its weights under one of these names, in it or in the settings that it holds; or None."""
    if isinstance(tree, argparse.Namespace):
        tree = vars(tree)
    if not isinstance(tree, dict):
        return None
    if (said := next((tree[n] for n in names if isinstance(tree.get(n), int | list | tuple)), None)) is not None:
        return said
    return next((said for key in SETTINGS if (said := stated(tree.get(key), names)) is not None), None)


def _side(table: Tensor, dim: int, patch: int, said: Any, where: str) -> int:
    """Positions a side of the square grid that (1, 1 + side x side, dim) is; UserError: it is none."""
    side = math.isqrt(max(0, table.shape[1] - 1))
    if table.shape != (1, 1 + side * side, dim) or not side:
        raise UserError(
            f"{where}: expected positions 1 x (1 + side x side) x {dim}, a square grid, found {shape(table)}"
        )
    if isinstance(said, list | tuple) and len({*said[-2:]}) > 1:
        raise UserError(
            f"{where} says that its images are {' x '.join(map(str, said))}; its positions must be a square grid here"
        )
    n = side * side
    grids = [(h, n // h) for h in range(1, n + 1) if n % h == 0]
    layouts = table, table.roll(dim // 2, -1)  # MAE's and MoCo v3's
    of_formula = [g for g in grids if any(torch.allclose(x, sincos_positions(dim, g), atol=1e-3) for x in layouts)]
    if of_formula and (side, side) not in of_formula:
        h, w = of_formula[0]
        raise UserError(f"{where}: its positions are a grid of {h} x {w}; only square ones are evaluated")
    if not of_formula and said is None and len(grids) > 1:
        warnings.warn(f"{where}: its {n} positions are learned ones, taken for a grid of {side} x {side}", stacklevel=3)
    return side


def statistics(config: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(config.get("mean", IMAGENET_MEAN)), tuple(config.get("std", IMAGENET_STD))
