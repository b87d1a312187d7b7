"""What methods draw with for `sslbench inspect`: normalised images in 0..255, whole, in part, or predicted; and label
maps beside each other."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .method import Method
from .views import denormalise
from .vit import patchify, take, unpatchify

GREY = 200.0


def palette(n: int) -> list[tuple[int, int, int]]:
    """n colours, (red, green, blue) in 0..255, of classes 0 on: PASCAL VOC's without its first, black; at most 255.

    Bits 0, 3, 6 of a number make the highest bits of red, bits 1, 4, 7 of green, bits 2, 5 of blue.
    """

    def channel(number: int, first: int) -> int:
        return sum((number >> (first + 3 * j) & 1) << (7 - j) for j in range(3))

    return [(channel(i, 0), channel(i, 1), channel(i, 2)) for i in range(1, n + 1)]


UNCOUNTED = (255, 255, 255)  # of pixels that do not count
PANEL, LINE, GAP = 384, 22, 8  # pixels: an image's longer side, a line of text, between two of anything
SHARE = 0.002  # of a map's pixels, that a class is in the legend for


def beside(image: Image.Image, truth: np.ndarray, predicted: np.ndarray, classes: list[str]) -> Image.Image:
    """A photograph, what is true of it and what was predicted, left to right, over its colours' numbers and names.

    truth, predicted: classes, uint8 (H, W); 255 in truth does not count.
    """
    colours = np.full((256, 3), UNCOUNTED, np.uint8)
    colours[: len(classes)] = palette(len(classes))
    counted = truth < len(classes)
    share = (predicted == truth)[counted].mean() if counted.any() else float("nan")
    panels = {
        "image": image,
        "truth, white where it does not count": Image.fromarray(colours[truth]),
        f"prediction, {share:.0%} of pixels right": Image.fromarray(colours[predicted]),
    }
    scale = PANEL / max(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    shares = sum(np.bincount(x[counted], minlength=256) for x in (truth, predicted)) / max(1, counted.sum())
    named = [at for at in np.argsort(-shares) if shares[at] >= SHARE]
    columns = max(1, 3 * (size[0] + GAP) // 200)
    height = GAP + LINE + size[1] + GAP + LINE * -(-len(named) // columns) + GAP
    sheet = Image.new("RGB", (GAP + 3 * (size[0] + GAP), height), "white")
    pen, font = ImageDraw.Draw(sheet), _font()
    for i, (caption, panel) in enumerate(panels.items()):
        left = GAP + i * (size[0] + GAP)
        pen.text((left, GAP), caption, "black", font)
        kind = Image.Resampling.BICUBIC if i == 0 else Image.Resampling.NEAREST
        sheet.paste(panel.resize(size, kind), (left, GAP + LINE))
        pen.rectangle((left - 1, GAP + LINE - 1, left + size[0], GAP + LINE + size[1]), outline="black")
    for i, at in enumerate(named):
        left, top = GAP + i % columns * 200, 2 * GAP + LINE + size[1] + i // columns * LINE
        pen.rectangle((left, top + 3, left + 14, top + 17), tuple(colours[at]), "black")
        pen.text((left + GAP + 14, top + 2), f"{at} {classes[at]}"[:24], "black", font)
    return sheet


def _font() -> ImageFont.FreeTypeFont:
    """matplotlib's own, which has Latin, Greek and Cyrillic letters on every machine."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), 13)


class Canvas:
    """A batch of normalised images (B, 3, H, W) of a method's view. Every picture is (B, 3, H, W) in 0..255."""

    def __init__(self, method: Method, images: Tensor) -> None:
        self.patch, self.grid = method.encoder.arch.patch, method.encoder.grid
        self.augment, self.images = method.augment, images.float()

    def whole(self) -> Tensor:
        return denormalise(self.images, self.augment.mean, self.augment.std)

    def only(self, keep: Tensor) -> Tensor:
        """The patches `keep` (B, K), grey elsewhere."""
        patches = patchify(self.whole(), self.patch)
        index = keep[..., None].expand(-1, -1, patches.shape[-1])
        blank = torch.full_like(patches, GREY).scatter(1, index, patches.gather(1, index))
        return unpatchify(blank, self.patch, self.grid)

    def without(self, hidden: Tensor) -> Tensor:
        """Grey where patches are `hidden`, booleans (B, N)."""
        patches = patchify(self.whole(), self.patch)
        return unpatchify(patches.masked_fill(hidden[..., None], GREY), self.patch, self.grid)

    def filled(self, prediction: Tensor, place: Tensor, norm_pix: bool) -> Tensor:
        """The images with `prediction` (B, M, P) at patches `place` (B, M).

        norm_pix: it predicts normalised patches, and is shown with the true patches' mean and deviation, as MAE does.
        """
        patches = patchify(self.images, self.patch)
        prediction = prediction.float()
        if norm_pix:
            var, mean = torch.var_mean(take(patches, place), dim=-1, keepdim=True)
            prediction = prediction * (var + 1e-6).sqrt() + mean
        filled = patches.scatter(1, place[..., None].expand_as(prediction), prediction)
        return denormalise(unpatchify(filled, self.patch, self.grid), self.augment.mean, self.augment.std)

    def heat(self, values: Tensor) -> Tensor:
        """A value a patch (B, N), as a map (B, 1, rows, columns): drawn in colours, not as an image."""
        return values.float().unflatten(1, self.grid)[:, None]
