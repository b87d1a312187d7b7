"""What methods with two branches share: MLP heads, BatchNorm over all devices, momentum copies and their memory."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .losses import float32, gather

T = TypeVar("T", bound=nn.Module)


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm over (B, C), in float32; where `everywhere`, with the statistics of all devices' batches.

    Two devices then normalise, and differentiate, as one does with the whole batch (torch's SyncBatchNorm needs a GPU).
    """

    def __init__(self, width: int, affine: bool = True, everywhere: bool = False, eps: float = 1e-5) -> None:
        super().__init__(width, eps=eps, affine=affine)
        self.everywhere = everywhere

    def forward(self, input: Tensor) -> Tensor:
        return self._normalise(input) if self.everywhere and self.training else super().forward(input)

    @float32
    def _normalise(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, dim=0, correction=0)
        parts, _ = gather(torch.stack([mean, var])[None])  # (devices, 2, C); every device has as many rows
        mean = parts[:, 0].mean(0)
        var = (parts[:, 1] + (parts[:, 0] - mean) ** 2).mean(0)
        n = len(x) * len(parts)
        with torch.no_grad():
            momentum = self.momentum or 0.0
            self.running_mean.lerp_(mean.to(self.running_mean), momentum)  # type: ignore[union-attr, arg-type]
            self.running_var.lerp_((var * n / max(n - 1, 1)).to(self.running_var), momentum)  # type: ignore[union-attr, arg-type]
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        x = (x - mean) * (var + self.eps).rsqrt()
        return x if self.weight is None else x * self.weight + self.bias


def mlp(
    widths: list[int],
    norm: Literal["bn", "ln"],
    activation: type[nn.Module] = nn.ReLU,
    last_norm: bool = True,
    everywhere: bool = False,
) -> nn.Sequential:
    """Linear layers from widths[0] to widths[-1], each but the last with a norm and an activation.

    Linear layers have no bias where a norm follows; the last one's norm, if any, has no affine (MoCo v3's heads).
    """
    layers: list[Any] = []
    for i, (a, b) in enumerate(pairwise(widths)):
        last = i == len(widths) - 2
        normed = last_norm or not last
        layers.append(nn.Linear(a, b, bias=not normed))
        if normed:
            layers.append(
                BatchNorm(b, affine=not last, everywhere=everywhere)
                if norm == "bn"
                else nn.LayerNorm(b, eps=1e-6, elementwise_affine=not last)
            )
        if not last:
            layers.append(activation())
    return nn.Sequential(*layers)


def momentum_copy(module: T) -> T:
    """A copy that follows `module` by `ema_` and gets no gradient."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def ema_(target: nn.Module, source: nn.Module, momentum: float) -> None:
    """target <- momentum x target + (1 - momentum) x source, each parameter of the target, which may lack some."""
    theirs = dict(source.named_parameters())
    mine = {name: p.detach() for name, p in target.named_parameters()}
    torch._foreach_lerp_(list(mine.values()), [theirs[name].detach() for name in mine], 1 - momentum)


def cosine_momentum(base: float, progress: float) -> float:
    """The momentum, which rises from `base` to 1 along half a cosine (MoCo v3's moco-m-cos, BYOL)."""
    return 1 - 0.5 * (1 + math.cos(math.pi * progress)) * (1 - base)


class MemoryBank(nn.Module):
    """The newest `size` keys, a ring of unit vectors (He et al. 2020); random ones until it has filled."""

    keys: Tensor
    next: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("keys", F.normalize(nn.init.normal_(torch.empty(size, dim)), dim=1))
        self.register_buffer("next", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Lay keys (M, D) over the oldest ones, wrapping around. Of more than fit, the last stay."""
        size = len(self.keys)
        keys = keys[-size:].to(self.keys.dtype)
        place = (self.next + torch.arange(len(keys), device=self.next.device)) % size
        self.keys[place] = keys
        self.next.copy_((self.next + len(keys)) % size)


class PrototypeHead(nn.Module):
    """DINO's head (Caron et al. 2021, section 3.1): an MLP to a unit vector, and its products with K prototypes.

    The prototypes are unit vectors too, each times a gain that is learned where not `unit` (weight normalisation).
    """

    def __init__(self, dim: int, hidden: int, bottleneck: int, prototypes: int, unit: bool = True) -> None:
        super().__init__()
        widths = [dim, hidden, hidden, bottleneck]
        layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.GELU())]
        self.mlp = nn.Sequential(*layers[:-1])
        self.prototypes = nn.Parameter(nn.init.xavier_uniform_(torch.empty(prototypes, bottleneck)))
        self.gain = None if unit else nn.Parameter(torch.ones(prototypes, 1))

    def forward(self, x: Tensor, frozen: Tensor | None = None) -> Tensor:
        """(..., D) -> (..., K). frozen: a boolean; where true, the prototypes' gradient is zero."""
        weight = F.normalize(self.prototypes, dim=-1)
        if self.gain is not None:
            weight = weight * self.gain
        if frozen is not None:
            weight = torch.where(frozen, weight.detach(), weight)
        return F.linear(F.normalize(self.mlp(x), dim=-1), weight)


def warmed(pair: tuple[float, float], share: float, progress: Tensor) -> Tensor:
    """A value that rises from the first of a pair to the second while `progress` goes from 0 to `share`."""
    return pair[0] + (pair[1] - pair[0]) * (progress / max(share, 1e-9)).clamp(max=1)


class Centre(nn.Module):
    """The running mean of a teacher's outputs, which is taken off them so that no one prototype wins all (DINO, Eq. 4).

    What a step adds counts from the next step on, and is the mean of its whole batch, however that is divided.
    """

    mean: Tensor
    total: Tensor
    count: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("total", torch.zeros(width))
        self.register_buffer("count", torch.zeros(()))

    @float32
    def forward(self, x: Tensor) -> Tensor:
        """(..., K), without gradient -> the same, centred."""
        if self.training:
            self.total += x.detach().flatten(0, -2).sum(0)
            self.count += x[..., 0].numel()
        return x - self.mean

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """Move the mean towards that of what was centred since the last step, over all devices."""
        parts, _ = gather(torch.cat([self.total, self.count[None]])[None])
        *total, count = parts.sum(0).split([len(self.total), 1])
        mean = torch.where(count > 0, total[0] / count.clamp_min(1), self.mean)
        self.mean.lerp_(mean, 1 - momentum)
        self.total.zero_()
        self.count.zero_()
