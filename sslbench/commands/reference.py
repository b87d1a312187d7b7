"""MAE's published code (github.com/facebookresearch/mae), timed alone: `python -m sslbench.commands.reference --help`.

For `sslbench bench --against`. Its model and its step (loss read by the host, backward pass, norm of the gradient,
AdamW without options), at the shape and batch of our recipe, on images that are ready. Two names that its code uses are
gone from today's numpy and timm and are given back here; nothing else of it changes.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..device import default_device, synchronize
from ..train.build import build
from ..train.optim import adamw
from .bench import recipe_of


def model_of(clone: Path, recipe: Any) -> nn.Module:
    """The published model in the shape of an MAE recipe. Raises ImportError where `clone` does not hold it."""
    sys.path.insert(0, str(clone))
    np.float = float  # type: ignore[attr-defined]
    code: Any = importlib.import_module("models_mae")
    block = code.Block
    code.Block = lambda *args, qk_scale=None, **more: block(*args, **more)
    ours = build(recipe)
    arch, method = ours.encoder.arch, recipe.science.method
    return code.MaskedAutoencoderViT(
        img_size=recipe.science.data.image_size,
        patch_size=arch.patch,
        embed_dim=arch.dim,
        depth=arch.depth,
        num_heads=arch.heads,
        decoder_embed_dim=method["decoder_dim"],
        decoder_depth=method["decoder_depth"],
        decoder_num_heads=method["decoder_heads"],
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
        norm_pix_loss=method["norm_pix_loss"],
    )


def images_per_s(model: nn.Module, recipe: Any, seconds: float) -> float:
    """Time training steps in bf16 autocast; the median counts, after two to warm up."""
    s = recipe.science
    device = default_device()
    model.to(device)
    groups = [{k: g[k] for k in ("params", "weight_decay")} for g in adamw(model, s.optim).param_groups]
    optimizer = torch.optim.AdamW(groups, lr=s.optim.lr, betas=s.optim.betas)
    images = torch.randn(s.batch_size, 3, s.data.image_size, s.data.image_size, device=device)
    times: list[float] = []
    end = float("inf")
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(images, mask_ratio=s.method["mask_ratio"])[0]
        loss.item()
        loss.backward()
        nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        times.append(time.perf_counter() - start)
        if len(times) == 2:
            end = time.perf_counter() + seconds
    return s.batch_size / statistics.median(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sslbench.commands.reference", description=__doc__)
    parser.add_argument("clone", type=Path, help="a clone of github.com/facebookresearch/mae")
    parser.add_argument("arch")
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--seconds", type=float, default=10.0)
    args = parser.parse_args()
    recipe = recipe_of("mae", args.arch, args.batch_size, "bf16", False, [])
    torch.manual_seed(0)
    print(f"images/s {images_per_s(model_of(args.clone, recipe), recipe, args.seconds):.4f}")


if __name__ == "__main__":
    main()
