"""Encoders that others published: `timm:NAME`, and weights files as their authors write them (see translate.py)."""

from __future__ import annotations

import argparse
import contextlib
import json
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..errors import UserError, nearest
from ..views import IMAGENET_MEAN, IMAGENET_STD
from ..vit import ARCHS, VisionTransformer, parts_of, sincos_positions
from .translate import family, lay_out_positions, translate

MARKER = "patch_embed.proj.weight"  # every ViT here has one, or transformers' name of it
MARKERS = (MARKER, "embeddings.patch_embeddings.projection.weight")
# In the dotted name of where a file keeps weights, such as `model.teacher.backbone.`
AVERAGE = re.compile(r"(?:^|[._])(?:ema|teacher|target)(?:[._]|$)")
LEARNER = re.compile(r"(?:^|[._])(?:student|momentum|encoder_k)(?:[._]|$)")
SETTINGS = ("args", "config", "cfg", "hyper_parameters", "model_args", "model_kwargs", "opt", "pretrained_cfg")
SIZES = ("img_size", "image_size", "input_size", "grid_size")
HEADS = ("num_heads", "num_attention_heads")
CAE = "pretext_neck."  # only its files have one; its ViT-S has 12 heads
LM_HEAD = "lm_head.weight"  # of pre-training by BEiT's code: BEiT, BEiT v2, data2vec, ConMIM


def read_file(path: Path) -> Any:
    """What a weights file holds: tensors and plain data, nested as whoever wrote it liked. Runs no code of the file.

    transformers keeps the number of heads in config.json beside the weights, so that this is read too, as `config`.
    """
    tree = _read(path)
    if not any(name.endswith(MARKERS[1]) for name in names_in(tree)):
        return tree
    with contextlib.suppress(OSError, ValueError):
        return {**tree, "config": json.loads((path.parent / "config.json").read_text())}
    return tree


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        # MAE's and DINO's checkpoints keep their command line beside the weights; SimMIM's a dict of yacs, read as one.
        with torch.serialization.safe_globals([argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]):
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
        globals_named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # a file of torch's older format
        return ""
    return ", ".join(sorted(globals_named)[:5])


def places(tree: Any, where: str = "") -> dict[str, dict[str, Tensor]]:
    """{place: tensors} of every Vision Transformer in a file. A place is a dotted name such as `state_dict.module.`"""
    encoders: dict[str, dict[str, Tensor]] = {}
    if not isinstance(tree, dict):
        return encoders
    tensors = {k: v for k, v in tree.items() if isinstance(k, str) and isinstance(v, Tensor)}
    for prefix in (k.removesuffix(m) for m in MARKERS for k in tensors if k.endswith(m)):
        encoders[where + prefix] = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    for key, inner in tree.items():
        if isinstance(key, str):
            encoders |= places(inner, f"{where}{key}.")
    return encoders


def names_in(tree: Any, where: str = "") -> list[str]:
    """The dotted name of everything in a file."""
    if not isinstance(tree, dict):
        return []
    here = {f"{where}{key}": inner for key, inner in tree.items() if isinstance(key, str)}
    return [*here, *(name for at, inner in here.items() for name in names_in(inner, f"{at}."))]


def preferred(names: Iterable[str], average: bool = True) -> str:
    """Choose the place that is evaluated: an average (timm's EMA, a teacher) before what it averages, or not.

    Of a student and its teacher the teacher; of MoCo's two the base encoder, as its own code does; else what is nested
    least.
    """
    return min(
        names,
        key=lambda p: (bool(LEARNER.search(p)), bool(AVERAGE.search(p)) != average, p.count("."), len(p)),
    )


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

    A warning says what was taken where the file has several, what its layers became, or that it does not show what its
    grid of positions is. UserError: it is no ViT, or has parts that are not known.
    """
    if not isinstance(tree, dict):
        raise UserError(f"{where} holds a {type(tree).__name__}, expected a state dict")
    names = names_in(tree)
    if what := family(names):
        raise UserError(f"{where}: this is {what}; only Vision Transformers of one width and grid are evaluated")
    encoders = places(tree)
    if not encoders:
        has = ", ".join(map(str, tree))[:200]
        raise UserError(f"{where}: no weights in it of a Vision Transformer known here, no '{MARKER}'; found {has}")
    cae = any(CAE in name for name in names)
    place = _taken(encoders, names)
    if len(encoders) > 1 or LEARNER.search(place):
        others = ", ".join(p.rstrip(".") or "the top" for p in encoders if p != place) or "a teacher's: it has none"
        warnings.warn(f"{where}: the weights of {place.rstrip('.') or 'the top'} are taken, not {others}", stacklevel=2)
    translated = translate(encoders[place], where)
    for note in translated.notes:
        warnings.warn(f"{where}: {note}", stacklevel=2)
    mine = translated.tensors
    heads = translated.heads or stated(tree, HEADS)
    name = _arch(mine, heads, cae or "base_encoder" in place or "momentum_encoder" in place, where)
    side = lay_out_positions(mine, where)
    _check_grid(mine["pos_embed"], stated(tree, SIZES), where)
    encoder = VisionTransformer(ARCHS[name], side * ARCHS[name].patch, parts_of(mine))
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


def _taken(found: Iterable[str], names: list[str]) -> str:
    """The place whose weights are taken. CAE and who pre-trains by BEiT's code evaluate what learned, and keep its
    average beside."""
    return preferred(found, average=not any(CAE in name or name.endswith(LM_HEAD) for name in names))


def beside_encoder(tree: Any, where: str) -> tuple[dict[str, Tensor], list[str]]:
    """Return what a file that `to_encoder` takes has besides: (tensors in the encoder's place, names around it)."""
    encoders = places(tree)
    place = _taken(encoders, names_in(tree))
    holder, prefix = tree, place
    while key := next((k for k, v in holder.items() if isinstance(v, dict) and prefix.startswith(f"{k}.")), None):
        holder, prefix = holder[key], prefix.removeprefix(f"{key}.")
    around = [k for k, v in holder.items() if isinstance(v, Tensor) and not k.startswith(prefix)]
    return translate(encoders[place], where).beside, around


def _arch(tensors: dict[str, Tensor], heads: Any, many_heads: bool, where: str) -> str:
    """The arch of that patch, width and depth. heads: as the file tells or shows them, or None: they hardly ever show.
    many_heads: of two archs that differ in nothing else, whose file it is has the one with more, 12."""
    projection = tensors[MARKER]
    dim, patch = projection.shape[0], projection.shape[-1]
    if projection.shape != (dim, 3, patch, patch):
        raise UserError(
            f"{where}: {MARKER} is {shape(projection)}; expected {dim} x 3 x P x P, square patches of three channels"
        )
    depth = 1 + max((int(m[1]) for k in tensors if (m := re.match(r"blocks\.(\d+)\.", k))), default=-1)
    names = [n for n, a in ARCHS.items() if (a.patch, a.dim, a.depth) == (patch, dim, depth)]
    if not names:
        raise UserError(
            f"{where}: patch {patch}, width {dim}, depth {depth} is none of the archs; `sslbench list archs` shows them"
        )
    name = names[-1 if many_heads else 0]
    if isinstance(heads, int) and heads != ARCHS[name].heads:
        known = {ARCHS[n].heads: n for n in names}
        if heads not in known:
            raise UserError(f"{where} says that it has {heads} heads; {name} has {ARCHS[name].heads}")
        name = known[heads]
    return name


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


def _check_grid(table: Tensor, said: Any, where: str) -> None:
    """UserError where what looks like a square grid, positions (1, 1 + side x side, D), is told or seen to be none."""
    n, dim = table.shape[1] - 1, table.shape[2]
    if isinstance(said, list | tuple) and len({*said[-2:]}) > 1:
        raise UserError(
            f"{where} says that its images are {' x '.join(map(str, said))}; its positions must be a square grid here"
        )
    grids = [(h, n // h) for h in range(1, n + 1) if n % h == 0]
    layouts = [t[:, 1:] for t in (table, table.roll(dim // 2, -1))]  # MAE's and MoCo v3's
    of_formula = [
        g for g in grids if any(torch.allclose(x, sincos_positions(dim, g)[:, 1:], atol=1e-3) for x in layouts)
    ]
    square = any(h == w for h, w in of_formula)
    if of_formula and not square:
        h, w = of_formula[0]
        raise UserError(f"{where}: its positions are a grid of {h} x {w}; only square ones are evaluated")
    if not of_formula and said is None and len(grids) > 1 and table.any():
        side = round(n**0.5)
        warnings.warn(f"{where}: its {n} positions are learned ones, taken for a grid of {side} x {side}", stacklevel=3)


Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of a channel, of values in 0..1
HALF: Statistics = ((0.5,) * 3, (0.5,) * 3)


def statistics(config: dict[str, Any]) -> Statistics:
    """Return the mean and deviation that a timm model's `config` states; ImageNet's where it states none."""
    return tuple(config.get("mean", IMAGENET_MEAN)), tuple(config.get("std", IMAGENET_STD))


def statistics_of_file(tree: Any, path: Path, method: str | None) -> Statistics:
    """Return the mean and deviation by which a file's model takes its images: ImageNet's, unless something says others.

    transformers keeps them in preprocessor_config.json beside the weights. BEiT's code takes 0.5 unless its command
    line says imagenet_default_mean_and_std, and keeps that in its checkpoints; of those without, BEiT itself has 0.5,
    who builds on its code ImageNet's. A warning says where this is a guess.
    """
    names = names_in(tree)
    if any(name.endswith(MARKERS[1]) for name in names):
        beside = path.parent / "preprocessor_config.json"
        try:
            config = json.loads(beside.read_text())
            return tuple(config["image_mean"]), tuple(config["image_std"])
        except (OSError, ValueError, KeyError, TypeError):
            warnings.warn(f"{path}: no {beside.name} beside it says by which mean and deviation it takes its images; "
                          "ImageNet's are taken", stacklevel=2)  # fmt: skip
    elif any(name.endswith("attn.q_bias") for name in names):
        imagenets = stated(tree, ("imagenet_default_mean_and_std",))
        if imagenets is None and method is None:
            warnings.warn(f"{path}: it does not say by which mean and deviation it takes its images; ImageNet's are "
                          "taken, --as BEiT takes 0.5", stacklevel=2)  # fmt: skip
        if imagenets is False or (imagenets is None and (method or "").casefold() == "beit"):
            return HALF
    return IMAGENET_MEAN, IMAGENET_STD
