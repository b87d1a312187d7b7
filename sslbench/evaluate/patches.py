"""Patch tokens of a frozen encoder under pixel labels: what dense probes learn from, and are scored by.

A photograph is squeezed to a square of `crop` pixels, for which the encoder's positions are resampled. Scores of
classes at the grid of patches are enlarged bilinearly (align_corners False) to the label map as it is stored, and there
every pixel that counts is answered by the class of the highest score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from ..data.label_maps import IGNORED, read_pair
from ..data.labelled import Labelled
from ..data.loader import decoders, to_tensor
from ..views import normalise
from .features import Subject
from .finetune import resized

BATCH = 8  # images that the encoder takes at once
FEW = 200  # images that are decoded before processes that would do it have started
BLOCK = 2**26  # class scores of pixels that are held at once: 256 MiB

Scores = Callable[[Tensor], list[Tensor]]  # tokens (D, h, w) of an image -> class scores (K, h, w) of each head


class Views(Dataset[tuple[Tensor, Tensor]]):
    """index -> (a photograph, uint8 (3, crop, crop); its classes, uint8 (H, W), as stored)."""

    def __init__(self, split: Labelled, index: list[int], crop: int) -> None:
        self.split, self.index, self.crop = split, index, crop

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, at: int) -> tuple[Tensor, Tensor]:
        picture, classes = read_pair(self.split, self.index[at])
        square = picture.resize((self.crop, self.crop), Image.Resampling.BICUBIC)
        return to_tensor(square), torch.from_numpy(classes)


class Frozen:
    """The subject's encoder at a size of image. UserError: the size is no multiple of its patch, or its positions are
    for another."""

    def __init__(self, subject: Subject, crop: int, device: torch.device, workers: int) -> None:
        self.encoder = resized(subject.encoder, crop, "science.crop").to(device).eval()
        self.mean, self.std = subject.mean, subject.std
        self.crop, self.device, self.workers = crop, device, workers

    @torch.inference_mode()
    def tokens(self, split: Labelled, index: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """(patch tokens behind the last norm, float32 (D, h, w); classes, uint8 (H, W) on the CPU) of those images."""
        workers = self.workers if len(index) > FEW else 0
        loader = DataLoader(Views(split, index, self.crop), BATCH, collate_fn=list, **decoders(workers, self.device))
        for batch in loader:
            images = torch.stack([image for image, _ in batch]).to(self.device)
            x = self.encoder(normalise(images, self.mean, self.std))[:, 1:].float()
            for one, (_, classes) in zip(x.transpose(1, 2).unflatten(2, self.encoder.grid), batch, strict=True):
                yield one, classes

    def count(self, split: Labelled, index: list[int], scores: Scores) -> list[Counts]:
        """What pixels of those images are answered right, by each head."""
        of_images: list[list[np.ndarray]] = []
        for tokens, truth in self.tokens(split, index):
            answers = [answer(s, (truth.shape[0], truth.shape[1])) for s in scores(tokens)]
            of_images.append([count_pixels(a, truth, len(split.classes)) for a in answers])
        return [Counts(*np.stack(head).swapaxes(0, 1)) for head in zip(*of_images, strict=True)]


# ----------------------------------------------------------------------------------------------------- pixels and maps


def at_pixels(maps: Tensor, rows: Tensor, columns: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (D, h, w) -> (P, D): their bilinear enlargement to `size` (H, W), at those pixels alone."""
    x, y = (2 * (at + 0.5) / n - 1 for at, n in ((columns, size[1]), (rows, size[0])))
    grid = torch.stack([x, y], -1)[None, None].to(maps)
    return F.grid_sample(maps[None], grid, padding_mode="border", align_corners=False)[0, :, 0].T


def answer(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Class scores (K, h, w) -> the class of each pixel of their bilinear enlargement, int64 (H, W) on the CPU."""
    down, across = (
        F.interpolate(torch.eye(n, device=scores.device)[None], new, mode="linear")[0].T
        for n, new in zip(scores.shape[1:], size, strict=True)
    )
    wide = scores @ across.T  # (K, h, W)
    rows = max(1, BLOCK // (len(scores) * size[1]))
    return torch.cat([torch.einsum("rh,khw->krw", part, wide).max(0).indices.cpu() for part in down.split(rows)])


def drawn_pixels(classes: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(rows, columns) of n of the pixels that count, drawn with replacement; none where there are none."""
    counted = (classes != IGNORED).flatten().nonzero()[:, 0]
    if not len(counted):
        return counted, counted
    at = counted[torch.randint(len(counted), (n,), generator=generator)]
    return at // classes.shape[1], at % classes.shape[1]


def patch_labels(classes: Tensor, grid: tuple[int, int], k: int) -> Tensor:
    """Classes (H, W) -> (rows * columns, K): the share of each class in the pixels of a patch that count.

    A pixel belongs to the patch that its centre is in. Zero where a patch has no pixel that counts.
    """
    down, across = (torch.arange(n) * cells // n for n, cells in zip(classes.shape, grid, strict=True))
    counts = torch.bincount(
        ((down[:, None] * grid[1] + across) * (IGNORED + 1) + classes.long()).flatten(),
        minlength=grid[0] * grid[1] * (IGNORED + 1),
    ).view(-1, IGNORED + 1)[:, :k]
    return counts / counts.sum(1, keepdim=True).clamp_min(1)


# ------------------------------------------------------------------------------------------------------------- numbers


@dataclass
class Counts:
    """Pixels of each image and class, int64 (N, K): answered rightly, answered or true, true."""

    both: np.ndarray
    either: np.ndarray
    truth: np.ndarray


def count_pixels(answered: Tensor, truth: Tensor, k: int) -> np.ndarray:
    """int64 (3, K), a row each as in `Counts`, of the pixels that count."""
    counted = truth != IGNORED
    a, t = answered[counted].long(), truth[counted].long()
    both, answers, true = (torch.bincount(x, minlength=k) for x in (a[a == t], a, t))
    return torch.stack([both, answers + true - both, true]).numpy()


def mean_iou(both: np.ndarray, either: np.ndarray) -> np.ndarray:
    """Sums over images (..., K) -> the mean of intersection over union in percent (...), as mmseg has it: a class that
    neither truth nor answers have counts nowhere."""
    with np.errstate(invalid="ignore"):
        return 100 * np.nanmean(both / either, axis=-1)


def pixel_accuracy(both: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Sums over images (..., K) -> the percentage of pixels that are right (...)."""
    return 100 * (both.sum(-1) / truth.sum(-1))
