"""What methods draw with for `sslbench inspect`: normalised images in 0..255, whole, in part, or predicted."""

from __future__ import annotations

import torch
from torch import Tensor

from .method import Method
from .views import denormalise
from .vit import patchify, take, unpatchify

GREY = 200.0


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
