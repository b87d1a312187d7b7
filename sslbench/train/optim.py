"""AdamW as MAE runs it, and its schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..recipe import Optim


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: with decay, and without (biases, and tensors of at most one dimension). Frozen tensors: neither."""
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, p in module.named_parameters():
        if p.requires_grad:
            (plain if p.ndim <= 1 or name.endswith(".bias") else decay).append(p)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def adamw(module: nn.Module, config: Optim) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameter_groups(module, config.weight_decay), lr=config.lr, betas=config.betas, fused=True
    )


def learning_rate(config: Optim, batch_size: int, epoch: float, epochs: float) -> float:
    """The actual lr at a fractional epoch: base lr x batch / 256, linear warm-up, then half a cosine to min_lr."""
    peak = config.lr * batch_size / 256
    if epoch < config.warmup_epochs:
        return peak * epoch / config.warmup_epochs
    done = (epoch - config.warmup_epochs) / max(epochs - config.warmup_epochs, 1e-9)
    return config.min_lr + (peak - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
