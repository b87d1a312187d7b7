"""iBOT (Zhou et al. 2022), a control: DINO, whose student also names the patches that are hidden from it.

Blocks of patches of the large crops are replaced by a token before the student sees them; for each, its distribution
over K prototypes is to be that of the momentum teacher, which sees the whole crop (Eq. 1-3, L_MIM), beside DINO's
agreement of CLS across crops (L_[CLS]). One head names CLS and patches. The share that is hidden is drawn for each
crop: 0, or around .3 (section 4.1). Paper and released code agree; one preset, `paper`, whose numbers are the code's
for ViT-S/16.

What differs from the released code, for a shared ViT and trainer: positions are fixed sin-cos and the initialisation is
MAE's; no drop path; temperatures rise step by step and not epoch by epoch; the gradient is clipped by the norm of all
of it, and not tensor by tensor; a crop's blocks end after 64 tries.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from sslbench.draws import rand
from sslbench.losses import crop_agreement, float32
from sslbench.masking import blocks
from sslbench.method import Method, MethodConfig
from sslbench.pictures import Canvas
from sslbench.recipe import Augment
from sslbench.siamese import Centre, PrototypeHead, cosine_momentum, ema_, momentum_copy, warmed
from sslbench.views import Crop, CropScale, TwoViews, small_views, two_views
from sslbench.vit import VisionTransformer, initialise


class IBOTConfig(MethodConfig):
    prototypes: int = Field(8192, gt=1)
    hidden_dim: int = Field(2048, gt=0)
    bottleneck_dim: int = Field(256, gt=0)
    unit_prototypes: bool = False  # True, the code's norm_last_layer, for ViT-B and larger
    frozen_prototypes: float = Field(0.00125, ge=0, le=1)  # share of the run in which they stay: 1 of 800 epochs
    momentum: float = Field(0.996, ge=0, le=1)  # of the first step; goes to 1 along half a cosine
    centre_momentum: float = Field(0.9, ge=0, le=1)
    tau: float = Field(0.1, gt=0)  # the student's
    teacher_tau: tuple[float, float] = (0.04, 0.07)  # of CLS and of patches; rises from the first to the second ...
    teacher_tau_warmup: float = Field(0.0375, ge=0, le=1)  # ... in that share of the run: 30 of 800 epochs
    masked: tuple[float, float] = (0.1, 0.5)  # the share of a crop's patches that is hidden, uniform in it ...
    unmasked: float = Field(0.5, ge=0, le=1)  # ... or none, with that probability
    mask_weight: float = Field(1.0, ge=0)  # of L_MIM beside L_[CLS]
    small_crops: int = Field(10, ge=0)
    small_size: int = Field(96, gt=0)
    small_scale: CropScale = (0.05, 0.25)  # of the image's area; of the large crops: augment.crop_scale
    views: TwoViews = TwoViews()
    small_views: TwoViews = TwoViews(blur_p=(0.5, 0.5), solarise_p=(0.0, 0.0))


class IBOT(Method):
    Config = IBOTConfig
    crops = 2
    pool = "cls"
    momentum_progress: Tensor

    def __init__(self, config: IBOTConfig, encoder: VisionTransformer, augment: Augment) -> None:
        super().__init__(config, encoder, augment)
        if config.small_crops and config.small_size % encoder.arch.patch:
            raise ValueError(f"small_size={config.small_size} is not a multiple of the patch, {encoder.arch.patch}")
        sizes = config.hidden_dim, config.bottleneck_dim, config.prototypes
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.arch.dim))
        self.head = PrototypeHead(encoder.arch.dim, *sizes, config.unit_prototypes)
        initialise(self)
        self.momentum_encoder, self.momentum_head = momentum_copy(encoder), momentum_copy(self.head)
        self.momentum_centre, self.momentum_patch_centre = Centre(config.prototypes), Centre(config.prototypes)
        self.register_buffer("momentum_progress", torch.zeros(()))  # how much of the run is done

    def crop_list(self) -> list[Crop]:
        return [Crop()] * 2 + [Crop(self.config.small_size, self.config.small_scale)] * self.config.small_crops

    def build_views(self, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Large views x1, x2 (B, 3, S, S), which of their patches are hidden, (B, 2, N), and small ones
        (B, V, 3, s, s)."""
        c = self.config
        x1, x2 = two_views(images, self.encoder.image[0], self.augment, c.views, generator)
        hidden = torch.stack([self._hidden(len(images), generator) for _ in range(2)], 1)
        views = {"x1": x1, "x2": x2, "hidden": hidden.to(images.device)}
        if c.small_crops:
            augment = self.augment.model_copy(update={"crop_scale": c.small_scale})
            views["small"] = small_views(images, c.small_crops, c.small_size, augment, c.small_views, generator, 2)
        return views

    def _hidden(self, batch: int, generator: torch.Generator) -> Tensor:
        grid, (low, high) = self.encoder.grid, self.config.masked
        draw = rand((batch, 2), generator)
        share = torch.where(draw[:, 0] < self.config.unmasked, 0.0, low + (high - low) * draw[:, 1])
        return blocks(batch, grid, share * self.encoder.n_patches, generator, smallest=(min(grid) // 3) ** 2)

    def forward(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return CLS's logits by the student, (B, 2 + V, K), and distributions by the teacher, (B, 2, K); the same of
        the large crops' patches, (B, 2, N, K) both; and which of these are hidden, (B, 2, N)."""
        large, hidden = torch.stack([views["x1"], views["x2"]], 1), views["hidden"]
        frozen = self.momentum_progress < self.config.frozen_prototypes
        named = self.head(self._encode(self.encoder, large, hidden), frozen)
        student = [named[:, :, 0]]
        if "small" in views:
            student.append(self.head(self._encode(self.encoder, views["small"], cls_only=True)[:, :, 0], frozen))
        with torch.no_grad():
            target, tau = self.momentum_head(self._encode(self.momentum_encoder, large)), self.teacher_tau()
            teacher = (self.momentum_centre(target[:, :, 0]) / tau).softmax(-1)
            patches = (self.momentum_patch_centre(target[:, :, 1:]) / tau).softmax(-1)
        return {"student": torch.cat(student, 1), "teacher": teacher, "student_patches": named[:, :, 1:],
                "teacher_patches": patches, "hidden": hidden}  # fmt: skip

    def _encode(
        self, encoder: VisionTransformer, crops: Tensor, hidden: Tensor | None = None, cls_only: bool = False
    ) -> Tensor:
        """(B, V, 3, S, S) -> (B, V, 1 + N, D), or CLS alone, (B, V, 1, D). hidden: patches to put the token for."""
        images = crops.flatten(0, 1)
        if hidden is None:
            tokens = encoder.tokens(images)
        else:
            seen = 1 - hidden.flatten(0, 1)[..., None].to(images.dtype)
            tokens = encoder.tokens(images, gain=seen)
            tokens = torch.cat([tokens[:, :1], tokens[:, 1:] + self.mask_token * (1 - seen)], 1)
        return encoder.encode(tokens, cls_only).unflatten(0, crops.shape[:2])

    def teacher_tau(self) -> Tensor:
        return warmed(self.config.teacher_tau, self.config.teacher_tau_warmup, self.momentum_progress)

    def loss(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        tau = self.config.tau
        cls = crop_agreement(outputs["student"], outputs["teacher"], tau)
        patches = patch_agreement(outputs["student_patches"], outputs["teacher_patches"], outputs["hidden"], tau)
        return {"loss": cls + self.config.mask_weight * patches, "cls": cls, "patches": patches}

    def after_step(self, progress: float) -> None:
        m = cosine_momentum(self.config.momentum, progress)
        ema_(self.momentum_encoder, self.encoder, m)
        ema_(self.momentum_head, self.head, m)
        for centre in (self.momentum_centre, self.momentum_patch_centre):
            centre.update(self.config.centre_momentum)
        self.momentum_progress.fill_(progress)

    def tokens_per_image(self) -> int:
        small = (self.config.small_size // self.encoder.arch.patch) ** 2 + 1
        return 4 * (self.encoder.n_patches + 1) + self.config.small_crops * small

    def pictures(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for i in (1, 2):
            canvas, hidden = Canvas(self, views[f"x{i}"]), views["hidden"][:, i - 1]
            out |= {f"view {i}": canvas.whole(), f"masked {i}": canvas.without(hidden)}
        return out


@float32
def patch_agreement(student: Tensor, teacher: Tensor, hidden: Tensor, tau: float) -> Tensor:
    """Cross-entropy of the student's patches, logits (B, C, N, K), to the teacher's distributions: the mean over the
    hidden ones (B, C, N) of a crop, then over crops; a crop with none counts as 0 (L_MIM, as the code has it)."""
    each = -(teacher * F.log_softmax(student / tau, -1)).sum(-1)
    return ((each * hidden).sum(-1) / hidden.sum(-1).clamp_min(1)).mean()
