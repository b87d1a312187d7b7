"""LeJEPA (Balestriero & LeCun 2025), a control: views of an image agree, and features are made Gaussian, nothing more.

No momentum encoder, no stopped gradient, no predictor: an encoder and a projector embed every view of an image, and
  prediction  each view's embedding is drawn to the mean of those of the image's large views (Algorithm 2);
  SIGReg      of each view, the embeddings of the batch are compared with a standard Gaussian along random directions,
              drawn anew in every step, by the Epps-Pulley statistic: N times the integral of the squared distance of
              their characteristic function to exp(-t^2 / 2), weighted by the latter (Algorithm 1).
The loss is (1 - lambda) prediction + lambda SIGReg, both means over views (Algorithm 2). The batch, N, is that of all
devices.

Where paper and released code part; preset `paper` follows the text, `official` the code's MINIMAL.md, which is its one
complete training (ViT-S/8 on ImageNette):
  knots        17 on [-5, 5] (section 6.1); 17 on [0, 3], each counted twice. By symmetry the paper's are 9 on [0, 5].
  slices       1,024 directions (section 6.1); 256.
  weight       lambda .05; .02.
  views        2 large and 6 small ones (section 6.1; the same section recommends 8 small ones); 4 large ones.
  colours      those of the code's README, for the text gives none; MINIMAL.md changes them twice as much and more.
  projector    an MLP, whose widths but for the last are unsaid, and whose norm: from MINIMAL.md in both, with its
               linear layer to 512 in front. The last is 512 in the code's ImageNet scripts; 16 in MINIMAL.md.

What differs from both, for a shared ViT and trainer: positions are fixed sin-cos, those of small views resampled to
their grid, and the initialisation is MAE's; no drop path; biases and norms get no weight decay; BatchNorm's statistics
are of all views and devices; linear layers before it have no bias, which it would take off again. The mean of encoders
over steps (SWA, optional in section 6.1) is left out. Evaluations read CLS of the encoder; the paper's linear probe
reads those of its last two blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sslbench.draws import rand_together
from sslbench.losses import TILE, float32, gather
from sslbench.method import Method, MethodConfig
from sslbench.pictures import Canvas
from sslbench.recipe import Augment
from sslbench.siamese import mlp
from sslbench.views import Crop, CropScale, TwoViews, small_views
from sslbench.vit import VisionTransformer, initialise


class LeJEPAConfig(MethodConfig):
    weight: float = Field(0.05, ge=0, le=1)  # lambda, of SIGReg; of the prediction: 1 - lambda
    slices: int = Field(1024, gt=0)  # directions of a step
    t_max: float = Field(5.0, gt=0)  # the characteristic function is compared on [-t_max, t_max] ...
    knots: int = Field(9, gt=1)  # ... at so many places from 0 to t_max, and their mirror images
    embedding_dim: int = Field(512, gt=0)
    hidden_dim: int = Field(2048, gt=0)
    projector_dim: int = Field(512, gt=0)
    large_views: int = Field(2, gt=0)
    small_crops: int = Field(6, ge=0)
    small_size: int = Field(96, gt=0)
    small_scale: CropScale = (0.05, 0.3)  # of the image's area; of the large views: augment.crop_scale
    views: TwoViews = TwoViews(blur_p=(0.5, 0.5), solarise_p=(0.2, 0.2))  # the first of each pair, for all views


class LeJEPA(Method):
    Config = LeJEPAConfig
    presets = {
        "paper": {},
        "official": {
            "weight": 0.02,
            "slices": 256,
            "t_max": 3.0,
            "knots": 17,
            "projector_dim": 16,
            "large_views": 4,
            "small_crops": 0,
            "views": {"jitter": (0.8, 0.8, 0.8, 0.2), "blur_p": (0.5, 0.5), "solarise_p": (0.2, 0.2)},
        },
    }
    couples_batch = True
    compared = ("features", "slices")
    pool = "cls"

    def __init__(self, config: LeJEPAConfig, encoder: VisionTransformer, augment: Augment) -> None:
        super().__init__(config, encoder, augment)
        if config.small_crops and config.small_size % encoder.arch.patch:
            raise ValueError(f"small_size={config.small_size} is not a multiple of the patch, {encoder.arch.patch}")
        self.embedding = nn.Linear(encoder.arch.dim, config.embedding_dim, bias=False)
        widths = [config.embedding_dim, config.hidden_dim, config.hidden_dim, config.projector_dim]
        self.projector = mlp(widths, "bn", last_norm=False, everywhere=True)
        initialise(self)

    @classmethod
    def gathers_batch(cls, config: dict[str, Any]) -> bool:
        return True

    def crop_list(self) -> list[Crop]:
        c = self.config
        return [Crop()] * c.large_views + [Crop(c.small_size, c.small_scale)] * c.small_crops

    def build_views(self, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Large views x1, x2, ... (B, 3, S, S), small ones (B, V, 3, s, s), and what all images share: draws in 0..1 of
        the directions, slices (B, M, P), which take the memory of one image."""
        c = self.config
        law = self.augment, c.views, generator
        large = small_views(images, c.large_views, self.encoder.image[0], *law, first=0).unbind(1)
        views = {f"x{i}": x for i, x in enumerate(large, 1)}
        if c.small_crops:
            law = self.augment.model_copy(update={"crop_scale": c.small_scale}), c.views, generator
            views["small"] = small_views(images, c.small_crops, c.small_size, *law, first=c.large_views)
        slices = rand_together((c.slices, c.projector_dim), generator).to(images.device)
        return views | {"slices": slices.expand(len(images), -1, -1)}

    def embed(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """CLS of each view, large ones first, (B, V, D); the slices once a pass, (1, M, P)."""
        large = torch.stack([views[f"x{i + 1}"] for i in range(self.config.large_views)], 1)
        crops = [large, views["small"]] if "small" in views else [large]
        return {"features": torch.cat([self._cls(x) for x in crops], 1), "slices": views["slices"][:1]}

    def _cls(self, crops: Tensor) -> Tensor:
        """(B, V, 3, S, S) -> (B, V, D)."""
        cls = self.encoder.encode(self.encoder.tokens(crops.flatten(0, 1)), cls_only=True)[:, 0]
        return cls.unflatten(0, crops.shape[:2])

    def compare(self, embedded: dict[str, Tensor]) -> dict[str, Tensor]:
        """z (B, V, P), and the directions (M, P): unit vectors, alike in all passes."""
        x = embedded["features"]
        z = self.projector(self.embedding(x.flatten(0, 1))).unflatten(0, x.shape[:2])
        return {"z": z, "directions": directions(embedded["slices"][0].detach())}

    def loss(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        c, z = self.config, outputs["z"]
        prediction = distance_to_centre(z, c.large_views)
        sigreg = epps_pulley(z, outputs["directions"], c.t_max, c.knots)
        loss = (1 - c.weight) * prediction + c.weight * sigreg
        return {"loss": loss, "prediction": prediction, "sigreg": sigreg}

    def tokens_per_image(self) -> int:
        c = self.config
        small = (c.small_size // self.encoder.arch.patch) ** 2 + 1
        return c.large_views * (self.encoder.n_patches + 1) + c.small_crops * small

    def pictures(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"view {i + 1}": Canvas(self, views[f"x{i + 1}"]).whole() for i in range(self.config.large_views)}


@float32
def distance_to_centre(z: Tensor, large: int) -> Tensor:
    """Of z (B, V, P), the squared distance to the mean of an image's first `large` views: the mean over all of it."""
    return (z - z[:, :large].mean(1, keepdim=True)).square().mean()


@float32
def directions(draw: Tensor) -> Tensor:
    """Draws (M, P) in [0, 1) -> unit vectors, each direction as likely: Gaussian vectors, normalised.

    2^-24 keeps the least of the draws, which are multiples of that, from minus infinity.
    """
    return F.normalize(torch.erfinv(2 * draw - 1 + 2**-24), dim=-1)


@float32
def epps_pulley(z: Tensor, along: Tensor, t_max: float, knots: int) -> Tensor:
    """SIGReg of z (B, V, P) along unit vectors (M, P): the mean over views and directions (Algorithm 1).

    The integral over [-t_max, t_max] is the trapezoidal rule's at `knots` places of its half from 0 on, to which the
    other half is symmetric. B: images of all devices, whose characteristic functions are averaged.
    """
    t = torch.arange(knots, device=z.device, dtype=z.dtype) * (t_max / (knots - 1))
    gaussian = torch.exp(-0.5 * t**2)
    ends = (t == 0) | (t == t[-1])
    weight = gaussian * torch.where(ends, 1.0, 2.0) * (t_max / (knots - 1))
    at_once = max(1, TILE // (z.shape[0] * z.shape[1] * knots))  # directions; of more, the products are made twice
    if len(along) <= at_once:
        found = characteristic(z, along, t)
    else:
        parts = [
            checkpoint(characteristic, z, part, t, use_reentrant=False, preserve_rng_state=False)
            for part in along.split(at_once)
        ]
        found = torch.cat(parts, 2)
    everywhere, _ = gather(found[None])
    real, imaginary = everywhere.mean(0)
    error = (real - gaussian).square() + imaginary.square()
    return (error @ weight).mean() * len(z) * len(everywhere)


def characteristic(z: Tensor, along: Tensor, t: Tensor) -> Tensor:
    """Of z (B, V, P) along (M, P), the mean of exp(i t x) over B: real and imaginary part, (2, V, M, T)."""
    x = (z @ along.T)[..., None] * t
    return torch.stack([x.cos().mean(0), x.sin().mean(0)])
