"""SimMIM (Xie et al. 2022), a control: a ViT sees mask tokens in place of masked patches; a linear layer draws them.

Units of 32 x 32 pixels are masked at random, 60 % of them: a mask token takes the place of each of their patches before
positions are added, so that the encoder sees all places (section 3). Its output at masked patches gives their pixels,
normalised by the data's mean and deviation and no further; the loss is L1. Paper and released code agree; one preset,
`paper`, whose numbers are the code's for ViT-B at 224 pixels.

What differs from the released code, for a shared ViT and trainer: its ViT has relative positions, one table for all
blocks, and no absolute ones, LayerScale (0.1), drop path 0.1 and no bias of keys, where this one has fixed sin-cos
positions and none of these; the initialisation is MAE's; the number of masked pixels has no 1e-5 added; the learning
rate, which the code cuts to a tenth at epoch 700, falls along a cosine (the recipes' part).
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from sslbench.losses import patch_l1
from sslbench.masking import random_order
from sslbench.method import Method, MethodConfig
from sslbench.pictures import Canvas
from sslbench.recipe import Augment
from sslbench.views import one_view
from sslbench.vit import VisionTransformer, initialise, patchify, take


class SimMIMConfig(MethodConfig):
    mask_ratio: float = Field(0.6, gt=0, lt=1)  # of units; their number rounds up
    mask_size: int = Field(32, gt=0)  # pixels a side of a unit: a multiple of the patch that divides the image


class SimMIM(Method):
    Config = SimMIMConfig
    pool = "mean"  # of patches: what the paper fine-tunes (the code's use_mean_pooling)

    def __init__(self, config: SimMIMConfig, encoder: VisionTransformer, augment: Augment) -> None:
        super().__init__(config, encoder, augment)
        self.side, rest = divmod(config.mask_size, encoder.arch.patch)  # of a unit, in patches
        if rest or any(pixels % config.mask_size for pixels in encoder.image):
            raise ValueError(
                f"mask_size={config.mask_size} has to be a multiple of the patch, {encoder.arch.patch}, and to divide "
                f"the image, {encoder.image[0]}"
            )
        units = encoder.n_patches // self.side**2
        self.n_visible = encoder.n_patches - min(math.ceil(units * config.mask_ratio), units) * self.side**2
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.arch.dim))
        self.head = nn.Linear(encoder.arch.dim, encoder.arch.patch**2 * 3)
        initialise(self)

    def unit_order(self, batch: int, generator: torch.Generator) -> Tensor:
        """(B, N): of each image's patches, an order in which those of a unit, of which a random order is drawn, are
        neighbours."""
        rows, columns = (n // self.side for n in self.encoder.grid)
        rank = random_order(batch, rows * columns, generator).unflatten(1, (rows, columns))
        rank = rank.repeat_interleave(self.side, 1).repeat_interleave(self.side, 2)
        return rank.flatten(1).argsort(stable=True, dim=1)

    def build_views(self, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        x = one_view(images, self.encoder.image[0], self.augment, generator)
        return {"images": x, "order": self.unit_order(len(images), generator).to(images.device)}

    def forward(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Prediction and target of the masked patches, (B, M, P) each."""
        masked = views["order"][:, self.n_visible :]
        patches = patchify(views["images"], self.encoder.arch.patch)
        mask = patches.new_zeros(*patches.shape[:2], 1).scatter(1, masked[..., None], 1.0)
        tokens = self.encoder.tokens(views["images"], gain=1 - mask) + F.pad(mask, (0, 0, 1, 0)) * self.mask_token
        features = self.encoder.encode(tokens)[:, 1:]
        return {"prediction": self.head(take(features, masked)), "target": take(patches, masked)}

    def loss(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        recon = patch_l1(outputs["prediction"], outputs["target"])
        return {"loss": recon, "recon": recon}

    def pictures(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        order, canvas = views["order"], Canvas(self, views["images"])
        hidden = order[:, self.n_visible :]
        return {
            "visible": canvas.only(order[:, : self.n_visible]),
            "reconstruction": canvas.filled(self(views)["prediction"], hidden, False),
        }
