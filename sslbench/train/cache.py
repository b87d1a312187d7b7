"""Gradient caching (Gao et al. 2021): the loss of a large contrastive batch on a small device, exactly.

(1) All micro-batches are embedded without a graph. (2) The loss of all their features gives its gradient on each of
them. (3) Each micro-batch is embedded again, from the same draws, with a graph, and takes its gradients further back.
Memory is set by the micro-batch; the cost is one more forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from torch import Tensor

from ..method import Method


def cached_backward(
    method: Method, views: Callable[[int], dict[str, Tensor]], pieces: int, fabric: Fabric, accumulation: int = 1
) -> dict[str, Tensor]:
    """Add the gradients of loss / accumulation, of `pieces` micro-batches as one batch, and return the losses.

    views(i): of micro-batch i, as many images each; it seeds whatever the model draws too, so that a second call
    replays the first. Over several devices, follow the step's last call by `average_gradients`.
    """
    with fabric.autocast(), torch.no_grad():
        parts = [_of(method.embed(views(i)), method.compared) for i in range(pieces)]
    features = [torch.cat(x).requires_grad_() for x in zip(*parts, strict=True)]
    with fabric.autocast():
        losses = method.loss(method.compare(dict(zip(method.compared, features, strict=True))))
    fabric.backward(losses["loss"] / accumulation)

    scaler: Any = getattr(fabric.strategy.precision, "scaler", None)  # fp16: the features' gradients are scaled already
    share = (scaler.get_scale() if scaler is not None else 1.0) / (accumulation * pieces)
    total = {name: x.detach() for name, x in losses.items()}
    for i in range(pieces):
        with fabric.autocast():
            embedded = method.embed(views(i))
            per_image = {k: x for k, x in embedded.items() if k not in method.compared}
            terms = method.loss(per_image) if per_image else {}
        ends, gradients = ([terms["loss"]], [torch.full_like(terms["loss"], share)]) if per_image else ([], [])
        for x, whole in zip(_of(embedded, method.compared), features, strict=True):
            if whole.grad is not None:  # keys have none
                ends.append(x)
                gradients.append(whole.grad.chunk(pieces)[i])
        torch.autograd.backward(ends, gradients)
        for name, x in terms.items():
            total[name] = total.get(name, 0.0) + x.detach() / pieces
    return total


def _of(embedded: dict[str, Tensor], names: tuple[str, ...]) -> list[Tensor]:
    return [embedded[k] for k in names if k in embedded]


def average_gradients(method: Method) -> None:
    """What data parallelism does in the backward pass, which is in pieces here."""
    for p in method.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()
