"""Linear probe on cached features: several learning rates side by side, the best chosen on a split of train."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
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
    device: torch.device | None = None,
) -> tuple[Tensor, float]:
    """(which of the test images are right, booleans (M,) on the CPU; the learning rate chosen).

    Features are standardised by the training set (a BatchNorm without affine, in full batch). A tenth of train
    selects the learning rate; the chosen one is trained again on all of train, and val is read once.
    """
    train, train_labels, test, test_labels = (x.to(device) for x in (train, train_labels, test, test_labels))
    mean, std = train.mean(0), train.std(0).clamp_min(1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    order = torch.randperm(len(train), generator=_generator(seed, "split")).to(train.device)
    held = max(1, round(len(train) * selection))
    fit, select = order[held:], order[:held]

    def heads(index: Tensor, rates: list[float]) -> tuple[Tensor, Tensor]:
        x, y = train[index], train_labels[index]
        return train_heads(x, y, classes, rates, epochs, batch_size, momentum, weight_decay, seed)

    weight, bias = heads(fit, lrs)
    right = ((train[select] @ weight + bias).argmax(-1) == train_labels[select]).sum(1)
    best = lrs[int(right.argmax())]
    weight, bias = heads(order, [best])
    predicted = (test @ weight[0] + bias[0]).argmax(1)
    return (predicted == test_labels).cpu(), best


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
    """Linear heads from one start, one a learning rate: weights (L, D, K), biases (L, 1, K).

    x (N, D), y (N,) in 0..K-1. Momentum SGD with a cosine to zero, the lr being the rate x batch / 256; no weight decay
    on biases. Computes in float32 on `device`, where batches are sent; None: x's.
    """
    device = device or x.device
    generator = _generator(seed, "order")
    start = 0.01 * torch.randn(x.shape[1], classes, generator=_generator(seed, "init")).T
    weights: list[Tensor] = [nn.Parameter(start.to(device, copy=True)) for _ in lrs]
    biases: list[Tensor] = [nn.Parameter(torch.zeros(classes, device=device)) for _ in lrs]
    batch_size = min(batch_size, len(x))
    steps = epochs * (len(x) // batch_size)
    groups = [
        {"params": [p], "lr": rate * batch_size / 256, "weight_decay": decay}
        for parameters, decay in ((weights, weight_decay), (biases, 0.0))
        for p, rate in zip(parameters, lrs, strict=True)
    ]
    optimizer = torch.optim.SGD(groups, momentum=momentum)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5 * (1 + math.cos(math.pi * i / steps)))
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < batch_size:
            order = torch.randperm(len(x), generator=generator)
        index, order = order[:batch_size].to(x.device), order[batch_size:]
        target = y[index].to(device)
        with torch.enable_grad():
            # One product for all heads. A head's loss is the mean over its rows; since heads share nothing, the sum of
            # their losses trains each alone.
            logits = F.linear(x[index].to(device, torch.float32), torch.cat(weights), torch.cat(biases))
            each = logits.view(len(index) * len(lrs), classes)
            loss = F.cross_entropy(each, target.repeat_interleave(len(lrs)), reduction="sum") / len(index)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        schedule.step()
    return torch.stack([w.detach().T for w in weights]), torch.stack([b.detach()[None] for b in biases])
