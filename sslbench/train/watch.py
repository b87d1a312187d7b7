"""k-NN accuracy while a run goes on: part of train against another part of train, so that val is not read.

The training is the same with and without: nothing is drawn, no weight is touched.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data.images import ImageSet, subset
from ..data.loader import evaluation_sample, held_out
from ..knn import knn_top1
from ..method import Method
from ..views import normalise
from ..vit import pool_tokens

if TYPE_CHECKING:
    from lightning_fabric import Fabric

BANK, QUERIES = 1000, 250  # images: of nine tenths of train, and of the tenth that tuning selects by
K = 20
LOOKS = 10  # a run, at most
SHARE = 0.02  # of the run's time, at most


class Watch:
    """Looks about ten times a run, where that costs at most 2 % of the time so far; less often in a short run."""

    def __init__(self, data: ImageSet, method: Method, limit: int) -> None:
        """limit: images that the encoder takes at once."""
        self.data, self.method, self.limit = data, method, limit
        self.parts: list[tuple[Tensor, Tensor]] | None = None  # (views, labels) of the bank and of the queries
        self.spent_s = self.look_s = 0.0
        self.last = 0  # tenths of the run; a start is no look
        self.top1: float | None = None

    def due(self, share: float, wall_s: float, images_per_s: float) -> bool:
        """Whether to look now. images_per_s: of training, whose images cost more than those of a look."""
        if self.data.labels is None or int(share * LOOKS) <= self.last:
            return False
        cost = self.look_s or (BANK + QUERIES) / max(images_per_s, 1e-9)
        if self.spent_s + cost > SHARE * wall_s:
            return False
        self.last = int(share * LOOKS)
        return True

    @torch.no_grad()
    def look(self, fabric: Fabric) -> float:
        """Top-1 in percent of the queries by the 20 nearest of the bank, on the feature that the method is read by."""
        began, method = time.perf_counter(), self.method
        if self.parts is None:
            rest, tenth = held_out(len(self.data))
            self.parts = [self._views(rest, BANK, method), self._views(tenth, QUERIES, method)]
        training = method.training
        method.eval()
        features = []
        for views, _ in self.parts:
            parts = []
            for part in views.split(self.limit):
                x = normalise(part.to(fabric.device).float(), method.augment.mean, method.augment.std)
                with fabric.autocast():
                    parts.append(pool_tokens(method.encoder(x), method.pool).float())
            features.append(torch.cat(parts))
        method.train(training)
        (bank, queries), (labels, wanted) = features, [labels for _, labels in self.parts]
        top1 = knn_top1(bank, labels, queries, wanted, [K], device=fabric.device)[K]
        self.look_s = time.perf_counter() - began
        self.spent_s += self.look_s
        self.top1 = top1
        return top1

    def _views(self, index: Tensor, n: int, method: Method) -> tuple[Tensor, Tensor]:
        part = subset(self.data, index[:n].sort().values)
        assert part.labels is not None
        return evaluation_sample(part, n, method.encoder.image[0]).round().to(torch.uint8), part.labels
