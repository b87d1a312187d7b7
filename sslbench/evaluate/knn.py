"""Weighted k-nearest neighbours, as DINO runs it (Caron et al. 2021, eval_knn.py)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def knn_top1(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    ks: list[int],
    temperature: float = 0.07,
    chunk: int = 1024,
) -> dict[int, float]:
    """{k: top-1 in percent}. Features (N, D) and (M, D), labels (N,) and (M,).

    Features are L2-normalised; the k nearest by cosine vote with weight exp(cosine / temperature). Memory is
    chunk x N for one block of test images.
    """
    train, test = F.normalize(train.float(), dim=1), F.normalize(test.float(), dim=1)
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    largest = min(max(ks), len(train))
    hits = dict.fromkeys(ks, 0)
    for start in range(0, len(test), chunk):
        similarity, index = (test[start : start + chunk] @ train.T).topk(largest, dim=1)
        votes = F.one_hot(train_labels[index], classes) * (similarity / temperature).exp()[..., None]
        for k in ks:
            predicted = votes[:, :k].sum(1).argmax(1)
            hits[k] += int((predicted == test_labels[start : start + chunk]).sum())
    return {k: 100 * hits[k] / len(test) for k in ks}
