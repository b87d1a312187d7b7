"""MoCo v3 (Chen et al. 2021), the contrastive control: two augmented views, a momentum encoder, in-batch InfoNCE.

q = predictor(projector(CLS of the encoder)), k = the momentum copy's projection; the loss is symmetric over the two
views, each a cross-entropy over the keys of the whole batch, times 2 tau (Algorithm 1). Paper and released code agree
but for names; one preset, `paper`.

What differs from the released code, for a shared ViT and trainer: positions and initialisation are MAE's (the code
lays its position table out transposed, and initialises q, k and v apart); biases and norms get no weight decay. Crops
are bilinear, as the code's are, in the recipes for ImageNet; the suite's own comparisons crop all methods bicubic.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from sslbench.losses import gather, info_nce
from sslbench.method import Method, MethodConfig
from sslbench.pictures import Canvas
from sslbench.recipe import Augment
from sslbench.siamese import cosine_momentum, ema_, mlp, momentum_copy
from sslbench.views import TwoViews, two_views
from sslbench.vit import VisionTransformer, initialise


class MoCoV3Config(MethodConfig):
    tau: float = Field(0.2, gt=0)
    momentum: float = Field(0.99, ge=0, le=1)  # of the first step; goes to 1 along half a cosine
    hidden_dim: int = Field(4096, gt=0)
    projector_dim: int = Field(256, gt=0)
    freeze_patch_embed: bool = True  # section 4, the trick that keeps ViTs stable
    gather_negatives: bool = True
    views: TwoViews = TwoViews()


class MoCoV3(Method):
    Config = MoCoV3Config
    crops = 2
    couples_batch = True
    compared = ("x1", "x2", "y1", "y2")
    pool = "cls"

    def __init__(self, config: MoCoV3Config, encoder: VisionTransformer, augment: Augment) -> None:
        super().__init__(config, encoder, augment)
        hidden, out, everywhere = config.hidden_dim, config.projector_dim, config.gather_negatives
        self.projector = mlp([encoder.arch.dim, hidden, hidden, out], "bn", everywhere=everywhere)
        self.predictor = mlp([out, hidden, out], "bn", everywhere=everywhere)
        initialise(self)
        if config.freeze_patch_embed:
            encoder.freeze_patch_embed()
        self.momentum_encoder, self.momentum_projector = momentum_copy(encoder), momentum_copy(self.projector)

    def build_views(self, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        x1, x2 = two_views(images, self.encoder.image[0], self.augment, self.config.views, generator)
        return {"x1": x1, "x2": x2}

    def embed(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return for view i the encoder's CLS (B, D), xi, and its momentum copy's, yi, which has no gradient."""
        embedded = {f"x{i}": self._cls(self.encoder, views[f"x{i}"]) for i in (1, 2)}
        with torch.no_grad():
            return embedded | {f"y{i}": self._cls(self.momentum_encoder, views[f"x{i}"]) for i in (1, 2)}

    def compare(self, embedded: dict[str, Tensor]) -> dict[str, Tensor]:
        """q1, q2 and, without gradient, k1, k2: (B, 256) each, not yet normalised."""
        outputs = {f"q{i}": self.predictor(self.projector(embedded[f"x{i}"])) for i in (1, 2)}
        with torch.no_grad():
            return outputs | {f"k{i}": self.momentum_projector(embedded[f"y{i}"]) for i in (1, 2)}

    def _cls(self, encoder: VisionTransformer, images: Tensor) -> Tensor:
        return encoder.encode(encoder.tokens(images), cls_only=True)[:, 0]

    def loss(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        nce = self._contrast(outputs["q1"], outputs["k2"]) + self._contrast(outputs["q2"], outputs["k1"])
        return {"loss": nce, "nce": nce}

    def _contrast(self, q: Tensor, k: Tensor) -> Tensor:
        keys, first = gather(k) if self.config.gather_negatives else (k, 0)
        return 2 * self.config.tau * info_nce(q, keys, self.config.tau, first)

    def after_step(self, progress: float) -> None:
        m = cosine_momentum(self.config.momentum, progress)
        ema_(self.momentum_encoder, self.encoder, m)
        ema_(self.momentum_projector, self.projector, m)

    def tokens_per_image(self) -> int:
        return 4 * (self.encoder.n_patches + 1)

    def pictures(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"view {i}": Canvas(self, views[f"x{i}"]).whole() for i in (1, 2)}
