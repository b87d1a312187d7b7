"""Linear probe on cached features: several learning rates side by side, the best chosen on a split of train."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.loader import seed_of


def linear_right(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    lrs: list[float],
    epochs: int,
    batch_size: int,
    momentum: float,
    weight_decay: float,
    seed: int,
    selection: float = 0.1,
) -> tuple[Tensor, float]:
    """(which of the test images are right, booleans (M,); the learning rate chosen).

    Features are standardised by the training set (a BatchNorm without affine, in full batch). A tenth of train
    selects the learning rate; the chosen one is trained again on all of train, and val is read once.
    """
    mean, std = train.mean(0), train.std(0).clamp_min(1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    order = torch.randperm(len(train), generator=_generator(seed, "split"))
    held = max(1, round(len(train) * selection))
    fit, select = order[held:], order[:held]

    def heads(index: Tensor, rates: list[float]) -> tuple[Tensor, Tensor]:
        x, y = train[index], train_labels[index]
        return train_heads(x, y, classes, rates, epochs, batch_size, momentum, weight_decay, seed)

    weight, bias = heads(fit, lrs)
    logits = torch.einsum("nd,ldk->lnk", train[select], weight) + bias
    right = (logits.argmax(-1) == train_labels[select]).sum(1)
    best = lrs[int(right.argmax())]
    weight, bias = heads(order, [best])
    predicted = (test @ weight[0] + bias[0]).argmax(1)
    return predicted == test_labels, best


def _generator(seed: int, what: str) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of("linprobe", what, seed))


def train_heads(
    x: Tensor,
    y: Tensor,
    classes: int,
    lrs: list[float],
    epochs: int,
    batch_size: int,
    momentum: float,
    weight_decay: float,
    seed: int,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Momentum SGD with a cosine, one head a learning rate (lr x batch / 256): weights (L, D, K), biases (L, 1, K).

    x (N, D), y (N,) in 0..K-1. Computes in float32 on `device`, where batches are sent; None: x's.
    """
    device = device or x.device
    generator = _generator(seed, "order")
    weight = 0.01 * torch.randn(x.shape[1], classes, generator=_generator(seed, "init")).repeat(len(lrs), 1, 1)
    weight, bias = weight.to(device), torch.zeros(len(lrs), 1, classes, device=device)
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    batch_size = min(batch_size, len(x))
    rate = torch.tensor(lrs, device=device).view(-1, 1, 1) * batch_size / 256
    steps = epochs * (len(x) // batch_size)
    order = torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if len(order) < batch_size:
            order = torch.randperm(len(x), generator=generator)
        index, order = order[:batch_size], order[batch_size:]
        xb, target = x[index].to(weight), F.one_hot(y[index].to(device), classes)
        # The gradient of mean cross-entropy in closed form: (softmax - target) / B.
        error = torch.softmax(torch.einsum("nd,ldk->lnk", xb, weight) + bias, -1)
        error = (error - target) / batch_size
        gradients = [torch.einsum("nd,lnk->ldk", xb, error) + weight_decay * weight, error.sum(1, keepdim=True)]
        lr = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        for p, v, g in zip((weight, bias), velocity, gradients, strict=True):
            v.mul_(momentum).add_(g)
            p.sub_(lr * v)
    return weight, bias
