"""An encoder as a folder that transformers loads: its ViTModel under its own names, and what takes the images."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..files import write_json
from ..recipe.settings import look
from ..views import centre_window
from ..vit import PLAIN, VisionTransformer
from ..weights import write_weights
from .features import Subject

WEIGHTS, CONFIG, PROCESSOR, CARD = "model.safetensors", "config.json", "preprocessor_config.json", "README.md"
FILES = (WEIGHTS, CONFIG, PROCESSOR, CARD)
# Ours and transformers', which keeps these in files whatever its modules are called; translate.py has the reverse.
NAMES = {
    r"^patch_embed\.proj\.": "embeddings.patch_embeddings.projection.",
    r"^cls_token$": "embeddings.cls_token",
    r"^pos_embed$": "embeddings.position_embeddings",
    r"^norm\.": "layernorm.",
    r"^blocks\.(\d+)\.norm1\.": r"encoder.layer.\1.layernorm_before.",
    r"^blocks\.(\d+)\.norm2\.": r"encoder.layer.\1.layernorm_after.",
    r"^blocks\.(\d+)\.attn\.proj\.": r"encoder.layer.\1.attention.output.dense.",
    r"^blocks\.(\d+)\.mlp\.fc1\.": r"encoder.layer.\1.intermediate.dense.",
    r"^blocks\.(\d+)\.mlp\.fc2\.": r"encoder.layer.\1.output.dense.",
}
QKV = re.compile(r"^blocks\.(\d+)\.attn\.qkv\.(weight|bias)$")


def write_folder(subject: Subject, folder: Path) -> None:
    """Write the weights, config.json and preprocessor_config.json. UserError: it is no plain ViT."""
    if subject.encoder.parts != PLAIN:
        raise UserError(
            f"'{subject.name}' has {subject.encoder.parts}, which transformers' ViTModel has not: its features would "
            f"be others. Give others its own file"
        )
    write_weights(folder / WEIGHTS, tensors(subject.encoder), {"format": "pt"})
    write_json(folder / CONFIG, config(subject.encoder))
    write_json(folder / PROCESSOR, processor(subject))


def tensors(encoder: VisionTransformer) -> dict[str, Tensor]:
    """The state of a plain ViT under transformers' names; qkv (3 D, D) as three, fixed positions as their values.

    ViTModel has a pooler, random where a file has none: here it gives CLS as it is, (B, D).
    """
    dim = encoder.arch.dim
    out = {"pooler.dense.weight": torch.eye(dim), "pooler.dense.bias": torch.zeros(dim)}
    for name, x in encoder.state_dict().items():
        if fused := QKV.match(name):
            for part, third in zip(("query", "key", "value"), x.chunk(3), strict=True):
                out[f"encoder.layer.{fused[1]}.attention.attention.{part}.{fused[2]}"] = third
        else:
            out[_theirs(name)] = x
    return out


def _theirs(name: str) -> str:
    for pattern, theirs in NAMES.items():
        name, replaced = re.subn(pattern, theirs, name)
        if replaced:
            return name
    raise ValueError(f"transformers' ViT has no name for {name}")


def config(encoder: VisionTransformer) -> dict[str, Any]:
    """A ViTConfig: that of vit.py's blocks, where transformers' own defaults part from it in the norms' eps, 1e-12."""
    arch = encoder.arch
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": arch.dim,
        "num_hidden_layers": arch.depth,
        "num_attention_heads": arch.heads,
        "intermediate_size": 4 * arch.dim,
        "hidden_act": "gelu",  # the exact one
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "pooler_act": "linear",  # see `tensors`
        "pooler_output_size": arch.dim,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "image_size": encoder.image[0],
        "patch_size": arch.patch,
        "num_channels": 3,
        "encoder_stride": arch.patch,
        "dtype": "float32",
        "torch_dtype": "float32",  # as it was called before transformers 4.56
    }


def processor(subject: Subject) -> dict[str, Any]:
    """What makes an image the evaluation's view: resized by its short side, cropped in the middle, normalised."""
    crop = subject.encoder.image[0]
    return {
        "image_processor_type": "BitImageProcessor",  # of transformers' own the one that resizes, then crops
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": short_side(subject)},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": crop, "width": crop},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(subject.mean),
        "image_std": list(subject.std),
    }


def short_side(subject: Subject) -> int:
    """Pixels that the evaluation's view makes of the short side of the images that the encoder was trained on."""
    crop = subject.encoder.image[0]
    try:
        pixels = look(subject.data)[1] if subject.data else 2 * crop
    except UserError:  # a set that is not on this machine, of which only its photographs' views are known
        pixels = 2 * crop if crop >= 224 else crop
    return min(centre_window((pixels, pixels), crop)[0])
