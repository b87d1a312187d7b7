"""DINO (Caron et al. 2021), a control: a student of any crop agrees with a momentum teacher of the large ones.

Both give each crop a distribution over K prototypes. The teacher's is centred by the running mean of its outputs and
sharpened by a lower temperature (Eq. 4); the student's cross-entropy to it is the mean over all pairs of a large crop
and another crop (Eq. 3). Paper and released code agree; one preset, `paper`, whose numbers are the code's for ViT-S/16.

What differs from the released code, for a shared ViT and trainer: positions are fixed sin-cos and the initialisation
is MAE's, and those of small crops are resampled to their grid (the code's scale is a tenth of a patch off); no drop
path; the teacher's temperature rises step by step and not epoch by epoch; the gradient is clipped by
the norm of all of it, and not tensor by tensor; while prototypes are frozen AdamW still decays them, which does not
show, since only their direction counts.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from sslbench.losses import crop_agreement
from sslbench.method import Method, MethodConfig
from sslbench.pictures import Canvas
from sslbench.recipe import Augment
from sslbench.siamese import Centre, PrototypeHead, cosine_momentum, ema_, momentum_copy, warmed
from sslbench.views import Crop, CropScale, TwoViews, small_views, two_views
from sslbench.vit import VisionTransformer, initialise


class DINOConfig(MethodConfig):
    prototypes: int = Field(65536, gt=1)
    hidden_dim: int = Field(2048, gt=0)
    bottleneck_dim: int = Field(256, gt=0)
    unit_prototypes: bool = True  # False, the code's norm_last_layer, for ViT-S: each has a length that is learned
    frozen_prototypes: float = Field(0.01, ge=0, le=1)  # share of the run in which they stay: 1 of 100 epochs
    momentum: float = Field(0.996, ge=0, le=1)  # of the first step; goes to 1 along half a cosine
    centre_momentum: float = Field(0.9, ge=0, le=1)
    tau: float = Field(0.1, gt=0)  # the student's
    teacher_tau: tuple[float, float] = (0.04, 0.07)  # rises from the first to the second ...
    teacher_tau_warmup: float = Field(0.1, ge=0, le=1)  # ... in that share of the run: 30 of 300 epochs
    small_crops: int = Field(8, ge=0)
    small_size: int = Field(96, gt=0)
    small_scale: CropScale = (0.05, 0.4)  # of the image's area; of the large crops: augment.crop_scale
    views: TwoViews = TwoViews()
    small_views: TwoViews = TwoViews(blur_p=(0.5, 0.5), solarise_p=(0.0, 0.0))


class DINO(Method):
    Config = DINOConfig
    crops = 2
    pool = "cls"
    momentum_progress: Tensor

    def __init__(self, config: DINOConfig, encoder: VisionTransformer, augment: Augment) -> None:
        super().__init__(config, encoder, augment)
        if config.small_crops and config.small_size % encoder.arch.patch:
            raise ValueError(f"small_size={config.small_size} is not a multiple of the patch, {encoder.arch.patch}")
        sizes = config.hidden_dim, config.bottleneck_dim, config.prototypes
        self.head = PrototypeHead(encoder.arch.dim, *sizes, config.unit_prototypes)
        initialise(self)
        self.momentum_encoder, self.momentum_head = momentum_copy(encoder), momentum_copy(self.head)
        self.momentum_centre = Centre(config.prototypes)
        self.register_buffer("momentum_progress", torch.zeros(()))  # how much of the run is done

    def crop_list(self) -> list[Crop]:
        return [Crop()] * 2 + [Crop(self.config.small_size, self.config.small_scale)] * self.config.small_crops

    def build_views(self, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Large views x1, x2 (B, 3, S, S), and small ones (B, V, 3, s, s)."""
        c = self.config
        x1, x2 = two_views(images, self.encoder.image[0], self.augment, c.views, generator)
        if not c.small_crops:
            return {"x1": x1, "x2": x2}
        augment = self.augment.model_copy(update={"crop_scale": c.small_scale})
        small = small_views(images, c.small_crops, c.small_size, augment, c.small_views, generator, first=2)
        return {"x1": x1, "x2": x2, "small": small}

    def forward(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return each image's logits by the student, (B, 2 + V, K), and distributions by the teacher, (B, 2, K)."""
        large = torch.stack([views["x1"], views["x2"]], 1)
        crops = [large, views["small"]] if "small" in views else [large]
        frozen = self.momentum_progress < self.config.frozen_prototypes
        student = torch.cat([self._cls(self.encoder, x) for x in crops], 1)
        with torch.no_grad():
            teacher = self.momentum_head(self._cls(self.momentum_encoder, large))
            target = (self.momentum_centre(teacher) / self.teacher_tau()).softmax(-1)
        return {"student": self.head(student, frozen), "teacher": target}

    def _cls(self, encoder: VisionTransformer, crops: Tensor) -> Tensor:
        """(B, V, 3, S, S) -> (B, V, D)."""
        cls = encoder.encode(encoder.tokens(crops.flatten(0, 1)), cls_only=True)[:, 0]
        return cls.unflatten(0, crops.shape[:2])

    def teacher_tau(self) -> Tensor:
        return warmed(self.config.teacher_tau, self.config.teacher_tau_warmup, self.momentum_progress)

    def loss(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        cross_entropy = crop_agreement(outputs["student"], outputs["teacher"], self.config.tau)
        return {"loss": cross_entropy, "dino": cross_entropy}

    def after_step(self, progress: float) -> None:
        m = cosine_momentum(self.config.momentum, progress)
        ema_(self.momentum_encoder, self.encoder, m)
        ema_(self.momentum_head, self.head, m)
        self.momentum_centre.update(self.config.centre_momentum)
        self.momentum_progress.fill_(progress)

    def tokens_per_image(self) -> int:
        small = (self.config.small_size // self.encoder.arch.patch) ** 2 + 1
        return 4 * (self.encoder.n_patches + 1) + self.config.small_crops * small

    def pictures(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"view {i}": Canvas(self, views[f"x{i}"]).whole() for i in (1, 2)}
