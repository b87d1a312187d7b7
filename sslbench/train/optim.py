"""AdamW as MAE runs it, layer-wise decay of the learning rate, LARS, and the schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..recipe import Optim

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: with decay, and without (biases, and tensors of at most one dimension). Frozen tensors: neither."""
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, p in module.named_parameters():
        if p.requires_grad:
            (plain if p.ndim <= 1 or name.endswith(".bias") else decay).append(p)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def layer_groups(
    module: nn.Module,
    depth: int,
    weight_decay: float,
    layer_decay: float,
    prefix: str = "encoder.",
    decay_biases: bool = False,
    plain: frozenset[nn.Parameter] = frozenset(),
) -> list[dict[str, Any]]:
    """Groups by layer and by decay or none, each with its `lr_scale` = layer_decay^(depth + 1 - layer).

    Layer 0: CLS, positions, patch embedding; block b of what lies under `prefix` is layer b + 1; all else, such as the
    head, is depth + 1, whose scale is 1. No weight decay on tensors of one dimension, CLS and positions (MAE
    util/lr_decay.py). decay_biases: on biases too, but those of norms, as detectron2 has it. plain: others that get
    none.
    """
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    norms = {id(p) for m in module.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)}
    for name, p in module.named_parameters():
        if not p.requires_grad:
            continue
        inside = name.startswith(prefix)
        part, _, rest = name.removeprefix(prefix).partition(".")
        if inside and part in ("cls_token", "pos_embed", "patch_embed", "registers"):
            layer = 0
        else:
            layer = int(rest.split(".")[0]) + 1 if inside and part == "blocks" else depth + 1
        long = p.ndim > 1 or (decay_biases and name.endswith(".bias") and id(p) not in norms)
        decays = long and p not in plain and not (inside and part in ("cls_token", "pos_embed", "registers"))
        new = {
            "params": [],
            "weight_decay": weight_decay if decays else 0.0,
            "lr_scale": layer_decay ** (depth + 1 - layer),
        }
        groups.setdefault((layer, decays), new)["params"].append(p)
    return list(groups.values())


def adamw(module: nn.Module, config: Optim, groups: list[dict[str, Any]] | None = None) -> torch.optim.AdamW:
    groups = groups or parameter_groups(module, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


class Lars(torch.optim.Optimizer):
    """SGD whose step is, tensor by tensor, a share `trust` of the weights' norm (You et al. 2017; MAE util/lars.py).

    Tensors of one dimension get plain SGD without decay. Leaves all alone where `found_inf` is set (see guard.py).
    """

    found_inf: Tensor | None = None

    def __init__(self, params: Any, lr: float, momentum: float, weight_decay: float, trust: float = 0.001) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                if p.ndim > 1:
                    update = update + group["weight_decay"] * p
                    w, u = p.norm(), update.norm()
                    update = update * torch.where((w > 0) & (u > 0), group["trust"] * w / u, 1.0)
                state = self.state[p]
                moved = group["momentum"] * state.get("velocity", torch.zeros_like(p)) + update
                if self.found_inf is not None:
                    still = state.get("velocity", torch.zeros_like(p))
                    stop = self.found_inf > 0
                    state["velocity"] = torch.where(stop, still, moved)
                    p.copy_(torch.where(stop, p, p - group["lr"] * moved))
                else:
                    state["velocity"] = moved
                    p.sub_(group["lr"] * moved)


def weight_decay(config: Optim, epoch: float, epochs: float) -> float:
    """At a fractional epoch: from `weight_decay` along half a cosine to `weight_decay_end`, where there is one."""
    if config.weight_decay_end is None:
        return config.weight_decay
    share = 0.5 * (1 + math.cos(math.pi * min(epoch / max(epochs, 1e-9), 1.0)))
    return config.weight_decay_end + (config.weight_decay - config.weight_decay_end) * share


def learning_rate(config: Optim, batch_size: int, epoch: float, epochs: float) -> float:
    """The actual lr at a fractional epoch: base lr x batch / 256, linear warm-up, then half a cosine to min_lr."""
    peak = config.lr * batch_size / 256
    if epoch < config.warmup_epochs:
        return peak * epoch / config.warmup_epochs
    done = (epoch - config.warmup_epochs) / max(epochs - config.warmup_epochs, 1e-9)
    return config.min_lr + (peak - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
