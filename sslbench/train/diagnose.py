"""Is a run healthy? How each loss term pulls at the encoder, and whether features collapse; rarely, so cheaply.

Every `machine.meters_every` steps and after the last one; the training itself is the same with and without.
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data import ImageSet
from ..data.loader import evaluation_sample
from ..geometry import effective_rank, spread, uniformity
from ..method import Method
from ..views import normalise
from ..vit import pool_tokens

if TYPE_CHECKING:
    from lightning_fabric import Fabric

IMAGES = 256  # that the collapse meters look at


def term_gradients(losses: dict[str, Tensor], encoder: nn.Module, fabric: Fabric) -> dict[str, float]:
    """Measure how the loss terms, as weighted in the total, pull at the encoder: norms of gradients, cosines of pairs.

    The terms are the entries of `losses` but "loss" that need grad; without any, "loss" is the only one. One backward
    pass a term over the graph of this step, which stays: {"grad_norm_recon": ..., "grad_norm_nce": ...,
    "grad_cos_recon_nce": ...}. Cosine 1: they agree; below 0: they fight. Averaged over devices before norms are taken;
    of the first micro-batch of a step. Not under a gradient cache, whose graphs are of parts of a loss.
    """
    terms = {k: v for k, v in losses.items() if k != "loss" and v.requires_grad} or {"loss": losses["loss"]}
    scaler: Any = getattr(fabric.strategy.precision, "scaler", None)
    scale = scaler.get_scale() if scaler is not None else 1.0  # fp16: without it small gradients are lost
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    if not parameters:  # a probe's encoder is frozen
        return {}
    vectors = {}
    for name, term in terms.items():
        weight = torch.autograd.grad(losses["loss"], term, retain_graph=True)[0]
        pulled = torch.autograd.grad(term, parameters, weight * scale, retain_graph=True, allow_unused=True)
        flat = [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, pulled, strict=True)]
        vector = torch.cat(flat).float() / scale
        vectors[name] = fabric.all_reduce(vector, reduce_op="mean") if fabric.world_size > 1 else vector
    norms = {name: v.norm() for name, v in vectors.items()}  # type: ignore[union-attr]
    out = {f"grad_norm_{name}": norm for name, norm in norms.items()}
    for a, b in combinations(vectors, 2):
        cosine = vectors[a] @ vectors[b] / (norms[a] * norms[b]).clamp_min(1e-30)  # type: ignore[operator]
        out[f"grad_cos_{a}_{b}"] = cosine
    return {k: v.item() for k, v in out.items()}


class CollapseMeters:
    """Feature statistics of the same images at every reading, as evaluations see them: whole, not augmented."""

    def __init__(self, data: ImageSet, method: Method, device: torch.device, limit: int) -> None:
        views = evaluation_sample(data, min(IMAGES, limit), method.encoder.image[0])
        self.method, self.images = method, normalise(views.to(device), method.augment.mean, method.augment.std)

    @torch.no_grad()
    def read(self, fabric: Fabric) -> dict[str, float]:
        encoder, training = self.method.encoder, self.method.encoder.training
        encoder.eval()  # an evaluation drops no path
        with fabric.autocast():
            features = pool_tokens(encoder(self.images), self.method.pool)
        encoder.train(training)
        return {k: v.item() for k, v in collapse(features.float()).items()}


def collapse(features: Tensor) -> dict[str, Tensor]:
    """Return three numbers of features (N, D) that fall, or for uniformity rise to 0, as all images come to look the
    same (geometry.py)."""
    return {
        "feature_std": spread(features),
        "effective_rank": effective_rank(features - features.mean(0)),
        "uniformity": uniformity(features)[0],
    }
