"""Two dense probes of frozen patch tokens, by pixel labels: a linear head, and a memory bank of neighbours.

Linear, as DINOv2's segmentation with a linear layer (Oquab et al. 2023, section 7.4): BatchNorm and a 1 x 1 convolution
on patch tokens, enlarged bilinearly, cross-entropy of pixels. BatchNorm standardises by all that is learnt from, as in
the suite's linear probe; it has no affine, for a linear layer follows. Enlarging and a linear layer commute, since the
weights of the four patches around a pixel sum to 1: the head learns from tokens interpolated at pixels, some of each
image, drawn once. That is the same loss on a sample of its pixels.

Neighbours, as Hummingbird (Balazevic et al. 2023, "Towards In-Context Scene Understanding", section 3; Pariza et al.
2025 evaluate so): patches of train are keys, the shares of the classes in their pixels are values; a patch q of val has

    softmax over its k nearest of (cos(q, key) / temperature), times their values,

which is enlarged bilinearly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from ..data.labelled import Labelled
from ..data.loader import held_out, seed_of
from ..errors import UserError
from ..strict import Strict
from .linprobe import train_heads
from .patches import Frozen, Scores, at_pixels, drawn_pixels, mean_iou, patch_labels
from .probe import Rate

CHUNK = 2**16  # pixels that are standardised at once
LARGEST = torch.finfo(torch.float16).max  # a few channels of some encoders are in the thousands


class Segprobe(Strict):
    """A linear head. lr: several are trained side by side, one is chosen by mIoU on a tenth of train's images."""

    protocol: Literal["segprobe"]
    crop: int = Field(448, gt=0)  # pixels a side of the square that the encoder is given
    pixels: int = Field(512, gt=0)  # drawn from each image of train, to learn from
    lr: list[Rate] = Field([0.003, 0.01, 0.03, 0.1, 0.3], min_length=1)  # x batch_size / 256
    epochs: int = Field(20, gt=0)  # over the pixels that were drawn
    batch_size: int = Field(1024, gt=0)  # pixels
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    pool: Literal["patches"] = "patches"  # what is read: each of them


class Segknn(Strict):
    """Neighbours in a memory bank. Nothing is chosen."""

    protocol: Literal["segknn"]
    crop: int = Field(448, gt=0)  # as Segprobe's
    k: int = Field(30, gt=0)
    temperature: float = Field(0.02, gt=0)
    bank: int = Field(102_400, gt=0)  # patches of train, at most
    pool: Literal["patches"] = "patches"


@dataclass
class Linear:
    """A head behind the standardisation of its input: weight (D, K), bias (K,), mean and std (D,)."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor

    def __call__(self, tokens: Tensor) -> Tensor:
        """Tokens (D, h, w) -> logits (K, h, w)."""
        x = (tokens.flatten(1).T - self.mean) / self.std
        return (x @ self.weight + self.bias).T.unflatten(1, tokens.shape[1:])


def learn(frozen: Frozen, train: Labelled, s: Segprobe, seed: int) -> tuple[Scores, dict[str, Any]]:
    """The head, trained on all of train with the learning rate that was chosen on a tenth of it; and which that is.

    UserError: one image alone, of which no tenth can be held out, or no pixel that counts on either side.
    """
    if len(train) < 2:
        raise UserError(f"{train.images} has one image; to choose a learning rate takes two or more")
    rest, tenth = (index.tolist() for index in held_out(len(train)))
    x, y, n = sample(frozen, train, rest, tenth, s.pixels, seed)
    if not 0 < n < len(x):
        which = f"the tenth that is held out, {len(tenth)}" if n else f"those to learn from, {len(rest)}"
        raise UserError(f"{train.source}: no pixel counts in {which} images; label more of train's")
    mean, std = standardise(x)
    mean, std = mean.to(frozen.device), std.to(frozen.device)

    def heads(fit: slice, rates: list[float]) -> list[Linear]:
        weight, bias = train_heads(x[fit], y[fit], len(train.classes), rates, s.epochs, s.batch_size, s.momentum,
                                   s.weight_decay, seed, frozen.device)  # fmt: skip
        return [Linear(w, b[0], mean, std) for w, b in zip(weight, bias, strict=True)]

    best = s.lr[0]
    if len(s.lr) > 1:
        each = heads(slice(n), s.lr)
        counts = frozen.count(train, tenth, lambda tokens: [head(tokens) for head in each])
        mious = [float(mean_iou(c.both.sum(0), c.either.sum(0))) for c in counts]
        best = s.lr[mious.index(max(mious))]
    (head,) = heads(slice(None), [best])
    return lambda tokens: [head(tokens)], {"lr": best, "pixels": len(x)}


def sample(
    frozen: Frozen, train: Labelled, rest: list[int], tenth: list[int], pixels: int, seed: int
) -> tuple[Tensor, Tensor, int]:
    """(tokens at pixels (M, D) float16, their classes (M,), how many of them are of `rest`, which come first).

    float16, since ADE20K's 20,210 images of ViT-B take 16 GB so.
    """
    generator = torch.Generator().manual_seed(seed_of("segprobe", seed))
    features, labels, n = [], [], 0
    for at, (tokens, classes) in enumerate(frozen.tokens(train, rest + tenth)):
        rows, columns = drawn_pixels(classes, pixels, generator)
        size = (classes.shape[0], classes.shape[1])
        x = at_pixels(tokens, rows.to(tokens.device), columns.to(tokens.device), size)
        features.append(x.clamp(-LARGEST, LARGEST).half().cpu())
        labels.append(classes[rows, columns].long())
        n += len(rows) if at < len(rest) else 0
    return torch.cat(features), torch.cat(labels), n


def standardise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Make the features (M, D) of zero mean and unit variance, in place; returns (mean, std) that they had, (D,)."""
    total, square = (torch.zeros(x.shape[1], dtype=torch.float64) for _ in range(2))
    for part in x.split(CHUNK):
        total += part.double().sum(0)
        square += part.double().square().sum(0)
    mean = total / len(x)
    std = (square / len(x) - mean.square()).clamp_min(0).sqrt()
    std = torch.maximum(std, 1e-3 * mean.abs() + 1e-6)  # below which a channel's spread is float16's rounding
    for part in x.split(CHUNK):
        part.copy_((part.double() - mean) / std)
    return mean.float(), std.float()


def remember(frozen: Frozen, train: Labelled, s: Segknn, seed: int) -> tuple[Scores, dict[str, Any]]:
    """The answers by train's patches, or by `bank` of them, drawn by the seed; and how many they are."""
    h, w = frozen.encoder.grid
    order = torch.randperm(len(train) * h * w, generator=torch.Generator().manual_seed(seed_of("segknn", seed)))
    chosen = order[: s.bank].sort().values
    keys, values = [], []
    for i, (tokens, classes) in enumerate(frozen.tokens(train, [*range(len(train))])):
        its = chosen[(chosen >= i * h * w) & (chosen < (i + 1) * h * w)] - i * h * w
        labels = patch_labels(classes, (h, w), len(train.classes))[its]
        its, labels = its[labels.any(1)], labels[labels.any(1)]  # the others have no pixel that counts
        keys.append(tokens.flatten(1).T[its.to(tokens.device)])
        values.append(labels.to(tokens.device))
    bank, shares = F.normalize(torch.cat(keys), dim=1), torch.cat(values)
    return lambda tokens: [vote(tokens, bank, shares, s.k, s.temperature)], {"k": s.k, "bank": len(bank)}


def vote(tokens: Tensor, bank: Tensor, shares: Tensor, k: int, temperature: float) -> Tensor:
    """Tokens (D, h, w), a bank of unit keys (M, D) with shares of classes (M, K) -> shares (K, h, w)."""
    similarity, index = (F.normalize(tokens.flatten(1).T, dim=1) @ bank.T).topk(min(k, len(bank)), dim=1)
    weight = (similarity / temperature).softmax(1)
    return torch.einsum("nk,nkc->cn", weight, shares[index]).unflatten(1, tokens.shape[1:])
