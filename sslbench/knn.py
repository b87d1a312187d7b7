"""Weighted k-nearest neighbours, as DINO runs it (Caron et al. 2021, eval_knn.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

SIMILARITIES = 2**28  # of one block of test images: 1 GiB


def knn_top1(*args: Any, **kwargs: Any) -> dict[int, float]:
    """{k: top-1 in percent}; see `knn_right`."""
    return {k: 100 * right.double().mean().item() for k, right in knn_right(*args, **kwargs).items()}


def knn_right(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    ks: list[int],
    temperature: float = 0.07,
    chunk: int | None = None,
    device: torch.device | None = None,
) -> dict[int, Tensor]:
    """{k: which of the test images are right, booleans (M,) on the CPU}.

    Features (N, D) and (M, D), labels (N,) and (M,).

    Features are L2-normalised; the k nearest by cosine vote with weight exp(cosine / temperature). On `device` lie the
    train features and the similarities of `chunk` test images; by default as many as take 1 GiB, so that ImageNet
    (1.28M x 768) takes 5 GiB there.
    """
    chunk = chunk or max(1, min(1024, SIMILARITIES // len(train)))
    device = device or torch.device("cpu")
    train = F.normalize(train.to(device, torch.float32), dim=1)
    train_labels, test_labels = train_labels.to(device), test_labels.to(device)
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    largest = min(max(ks), len(train))
    right: dict[int, list[Tensor]] = {k: [] for k in ks}
    for start in range(0, len(test), chunk):
        block = F.normalize(test[start : start + chunk].to(device, torch.float32), dim=1)
        similarity, index = (block @ train.T).topk(largest, dim=1)
        weight, label = (similarity / temperature).exp(), train_labels[index]
        for k in ks:
            votes = torch.zeros(len(block), classes, device=device)
            predicted = votes.scatter_add_(1, label[:, :k], weight[:, :k]).argmax(1)
            right[k].append((predicted == test_labels[start : start + chunk]).cpu())
    return {k: torch.cat(parts) for k, parts in right.items()}
