"""Losses and similarities. All in float32 whatever the autocast: T-SP's slope near cos = 1 is 64.5."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

TILE = 2**25  # logits that a loss over pairs of images holds at once: 128 MiB in float32


def float32(f: Callable[..., Any]) -> Callable[..., Any]:
    """Run `f` outside autocast, its floating-point tensors as float32."""

    @functools.wraps(f)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        def up(x: Any) -> Any:
            return x.float() if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x

        device = next(x.device.type for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        # The meta device (shapes alone, for counting) knows no autocast.
        with contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
            return f(*map(up, args), **{k: up(v) for k, v in kwargs.items()})

    return wrapped


@float32
def normalise_patches(patches: Tensor) -> Tensor:
    """MAE's norm_pix target: each patch centred and divided by sqrt(unbiased variance + 1e-6)."""
    var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (var + 1e-6).sqrt()


@float32
def patch_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """MAE's loss over the patches given, (B, M, P) both: squared error, mean over pixels, then over patches."""
    return F.mse_loss(prediction, target)


@float32
def patch_l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Absolute difference over the patches given, (B, M, P) both: mean over pixels and patches."""
    return F.l1_loss(prediction, target)


@float32
def tsp(cosine: Tensor, kappa: float, form: str = "multiply") -> Tensor:
    """T-SP similarity (OCL Eq. 2): 0.5 (1 + cos) / (1 + (1 - cos) k), in [0, 1].

    form `multiply`: k = kappa, the equation. form `divide`: k = 1 / kappa, the released code (its constructor's
    kappa is 1/64). The two are very different functions: at cos = .9 and kappa 64 they give .128 and .949.
    """
    k = kappa if form == "multiply" else 1.0 / kappa
    return 0.5 * (1 + cosine) / (1 + (1 - cosine) * k)


@float32
def cosine_matrix(a: Tensor, b: Tensor) -> Tensor:
    """(B, D), (C, D) -> (B, C). The norm has no epsilon, as in the papers' code: a zero feature is a bug to see."""
    a = a / a.norm(dim=-1, keepdim=True)
    b = b / b.norm(dim=-1, keepdim=True)
    return a @ b.T


@float32
def cross_entropy_to(logits: Tensor, offset: int = 0) -> Tensor:
    """Cross-entropy of (B, C) logits whose row i has its positive in column offset + i."""
    target = torch.arange(offset, offset + logits.shape[0], device=logits.device)
    return F.cross_entropy(logits, target)


def over_rows(loss: Callable[[Tensor, int], Tensor], anchors: Tensor, columns: int, first: int = 0) -> Tensor:
    """`loss(anchors, first)`, a mean over anchors (B, D) with logits (B, columns), in memory for TILE logits.

    Of a larger loss, tiles of anchors are computed one after the other, and again in the backward pass: O(B D) memory.
    loss: of some anchors and the column that the first of them has its positive in.
    """
    rows = max(1, TILE // columns)
    if len(anchors) <= rows:
        return loss(anchors, first)
    total = anchors.new_zeros((), dtype=torch.float32)
    for i, part in zip(range(0, len(anchors), rows), anchors.split(rows), strict=True):
        total = total + len(part) * checkpoint(loss, part, first + i, use_reentrant=False, preserve_rng_state=False)
    return total / len(anchors)


@float32
def info_nce(a: Tensor, b: Tensor, tau: float, first: int = 0) -> Tensor:
    """InfoNCE of anchors (B, D) among keys (C, D): row i of a has its positive in row first + i of b."""
    return over_rows(lambda part, i: cross_entropy_to(cosine_matrix(part, b) / tau, i), a, len(b), first)


@float32
def info_nce_with_bank(q: Tensor, k: Tensor, bank: Tensor, tau: float) -> Tensor:
    """InfoNCE of queries (B, D) with one positive each, k (B, D), and a bank of unit negatives (K, D).

    The logits are [positive, negatives] / tau: the positive has index 0 (MACRL Eq. 2, after MoCo).
    """
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    logits = torch.cat([(q * k).sum(-1, keepdim=True), q @ bank.T], dim=1) / tau
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


@float32
def crop_agreement(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """Cross-entropy of the student's crops, logits (B, V, K), to the teacher's distributions of the first crops,
    (B, T, K): the mean over images and pairs, of which none is a crop with itself (DINO, Caron et al. 2021, Eq. 3)."""
    pairs = -torch.einsum("btk,bvk->tv", teacher, F.log_softmax(student / tau, -1)) / len(student)
    other = ~torch.eye(*pairs.shape, dtype=torch.bool, device=pairs.device)
    return (pairs * other).sum() / (pairs.numel() - len(pairs))


class _Gather(torch.autograd.Function):
    """all_gather along dim 0; the gradient of each rank's part is summed over ranks and comes back to it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        grad = grad_outputs[0].contiguous()
        dist.all_reduce(grad)
        size = grad.shape[0] // dist.get_world_size()
        return grad[dist.get_rank() * size :][:size]


_gathers: list[tuple[int, int]] | None = None  # a list while `recorded_gathers` takes note


@contextlib.contextmanager
def recorded_gathers() -> Iterator[list[tuple[int, int]]]:
    """(rows, bytes) of each tensor that is given to `gather` meanwhile, whether there are other devices or not."""
    global _gathers
    _gathers = []
    try:
        yield _gathers
    finally:
        _gathers = None


def gather(x: Tensor) -> tuple[Tensor, int]:
    """All devices' rows of `x`, in rank order, and the index of this device's first row among them.

    Differentiable: with the mean over devices that data parallelism takes of the gradients, a loss averaged over
    local rows against gathered columns has the gradient of the whole batch's loss. One process: `x, 0`.
    """
    if _gathers is not None:
        _gathers.append((len(x), x.nbytes))
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return x, 0
    return _Gather.apply(x), dist.get_rank() * x.shape[0]


def gather_batch(parts: list[Tensor]) -> Tensor:
    """Rows of a step's micro-batches, (M, ...) each, over all devices, in the order of the global batch.

    Micro-batch j of a step belongs to device j % devices: the answer is the same however a batch was divided.
    """
    everyone, _ = gather(torch.stack(parts))
    return everyone.unflatten(0, (-1, len(parts))).transpose(0, 1).flatten(0, 2)
