"""MAE: masked autoencoders (He et al. 2022), the control that every other method here builds on.

A random quarter of the patches is encoded; a light decoder predicts the pixels of the rest (section 3).
Paper and released code agree; preset `paper` is both.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from sslbench.decoder import Decoder
from sslbench.losses import normalise_patches, patch_mse
from sslbench.masking import n_kept, random_order
from sslbench.method import Method, MethodConfig
from sslbench.pictures import Canvas
from sslbench.recipe import Augment
from sslbench.views import one_view
from sslbench.vit import VisionTransformer, initialise, patchify, take


class MAEConfig(MethodConfig):
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    norm_pix_loss: bool = True
    decoder_dim: int = Field(512, gt=0, multiple_of=4)
    decoder_depth: int = Field(8, gt=0)
    decoder_heads: int = Field(16, gt=0)


class MAE(Method):
    Config = MAEConfig
    pool = "cls"

    def __init__(self, config: MAEConfig, encoder: VisionTransformer, augment: Augment) -> None:
        super().__init__(config, encoder, augment)
        self.n_kept = n_kept(encoder.n_patches, config.mask_ratio)
        self.decoder = Decoder(encoder, config.decoder_dim, config.decoder_depth, config.decoder_heads)
        initialise(self)

    def build_views(self, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        x = one_view(images, self.encoder.image[0], self.augment, generator)
        order = random_order(len(images), self.encoder.n_patches, generator)
        return {"images": x, "order": order.to(images.device)}

    def forward(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Prediction and target of the masked patches, (B, N - K, P) each."""
        order = views["order"]
        tokens = self.encoder(views["images"], order[:, : self.n_kept])
        prediction = self.decoder(tokens, order)
        target = take(patchify(views["images"], self.encoder.arch.patch), order[:, self.n_kept :])
        return {"prediction": prediction, "target": target}

    def loss(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        target = outputs["target"]
        if self.config.norm_pix_loss:
            target = normalise_patches(target)
        recon = patch_mse(outputs["prediction"], target)
        return {"loss": recon, "recon": recon}

    def tokens_per_image(self) -> int:
        return self.n_kept + 1

    def pictures(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        order, canvas = views["order"], Canvas(self, views["images"])
        hidden = order[:, self.n_kept :]
        return {
            "visible": canvas.only(order[:, : self.n_kept]),
            "reconstruction": canvas.filled(self(views)["prediction"], hidden, self.config.norm_pix_loss),
        }
