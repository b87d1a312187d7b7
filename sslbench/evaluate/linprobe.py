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

    def heads(index: Tensor, rates: list[float]) -> Heads:
        heads = Heads(train.shape[1], classes, rates, seed).to(train.device)
        heads.fit(train[index], train_labels[index], epochs, batch_size, momentum, weight_decay, seed)
        return heads

    right = (heads(fit, lrs)(train[select]).argmax(-1) == train_labels[select]).sum(1)
    best = lrs[int(right.argmax())]
    predicted = heads(order, [best])(test)[0].argmax(1)
    return (predicted == test_labels).cpu(), best


def _generator(seed: int, what: str) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of("linprobe", what, seed))


class Heads(nn.Module):
    """Linear classifiers from one start, one a learning rate."""

    def __init__(self, dim: int, classes: int, rates: list[float], seed: int) -> None:
        super().__init__()
        start = 0.01 * torch.randn(dim, classes, generator=_generator(seed, "init")).T
        self.rates = rates
        self.weights = nn.ParameterList(start.clone() for _ in rates)
        self.biases = nn.ParameterList(torch.zeros(classes) for _ in rates)

    def forward(self, x: Tensor) -> Tensor:
        """(N, D) -> logits (heads, N, classes); one product for all heads."""
        logits = F.linear(x, torch.cat(list(self.weights)), torch.cat(list(self.biases)))
        return logits.view(len(x), len(self.rates), -1).transpose(0, 1)

    @torch.enable_grad()
    def fit(
        self, x: Tensor, y: Tensor, epochs: int, batch_size: int, momentum: float, weight_decay: float, seed: int
    ) -> None:
        """Momentum SGD with a cosine to zero, each head's lr its rate x batch / 256; no weight decay on biases."""
        generator = _generator(seed, "order")
        batch_size = min(batch_size, len(x))
        steps = epochs * (len(x) // batch_size)
        groups = [
            {"params": [p], "lr": rate * batch_size / 256, "weight_decay": decay}
            for parameters, decay in ((self.weights, weight_decay), (self.biases, 0.0))
            for p, rate in zip(parameters, self.rates, strict=True)
        ]
        optimizer = torch.optim.SGD(groups, momentum=momentum)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5 * (1 + math.cos(math.pi * i / steps)))
        order = torch.empty(0, dtype=torch.long, device=x.device)
        for _ in range(steps):
            if len(order) < batch_size:
                order = torch.randperm(len(x), generator=generator).to(x.device)
            index, order = order[:batch_size], order[batch_size:]
            # A head's loss is the mean over its images; since heads share nothing, their sum trains each alone.
            loss = F.cross_entropy(self(x[index]).flatten(0, 1), y[index].repeat(len(self.rates)), reduction="sum")
            optimizer.zero_grad()
            (loss / batch_size).backward()
            optimizer.step()
            schedule.step()
