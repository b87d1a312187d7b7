"""I-JEPA (Assran et al. 2023), a control: from one block of an image, a momentum encoder's features of other blocks.

The momentum encoder sees the whole image. From the encoder's features of a context block, out of which four target
blocks are taken, a narrow ViT predicts the features, normalised, at the places of each target (section 3, Figure 3).
Of an image there is one crop; no flip and no change of colour (the recipes' part).

Where paper and released code part; preset `paper` follows the text, `official` the code:
  loss         the squared distance (Eq. 1; here a mean over channels and patches, not a sum); smooth L1 in the code.
  sizes        scale and aspect of a block are two draws; in the code one draw gives both: large targets are tall.
  edges        by an off-by-one no block of the code reaches the last row or column, and large contexts never move.
  dropped      contexts are cut to one size; which patches go is unsaid: random here, in the code the last ones in
               reading order.
That features are normalised (LayerNorm without weights) is in the code alone, and here in both presets.

What differs from both, for tensors of one shape whose rows do not depend on how a batch is divided:
  targets      each image draws the size of its four blocks; in the code all of a device share it. A smaller block is
               filled up to the largest with tokens that nothing attends to and no loss counts; images weigh the same.
  contexts     have `context_share` of all patches. The code cuts those of a device, 128 images, to the smallest: of
               14 x 14 patches, 24 % on average. About one image in a hundred has fewer, and some of its own twice.
For a shared ViT and trainer: a CLS token goes along in both encoders, which the predictor does not see; the
initialisation is MAE's; weight decay rises along a cosine, as in the code (linearly in the paper); warm-up starts at 0;
what is published is the encoder, where the paper evaluates its momentum copy.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from sslbench.draws import rand
from sslbench.losses import float32
from sslbench.method import Method, MethodConfig
from sslbench.pictures import Canvas
from sslbench.recipe import Augment
from sslbench.siamese import ema_, momentum_copy
from sslbench.views import CropScale, one_view
from sslbench.vit import Block, VisionTransformer, initialise, sincos_positions, take


class IJEPAConfig(MethodConfig):
    targets: int = Field(4, gt=0)
    target_scale: CropScale = (0.15, 0.2)  # of all patches
    target_aspect: tuple[float, float] = (0.75, 1.5)  # height / width
    context_scale: CropScale = (0.85, 1.0)  # of all patches, before the targets are taken out; its aspect is 1
    context_share: float = Field(0.25, gt=0, le=1)  # of all patches, that the encoder sees
    one_draw: bool = False  # True, the code: scale and aspect of a target are tied
    edges: bool = True  # False, the code: blocks keep off the last row and column
    dropped: Literal["random", "last"] = "random"  # of a context that is larger than the share
    loss: Literal["l2", "smooth_l1"] = "l2"
    momentum: float = Field(0.996, ge=0, le=1)  # of the first step; rises to 1, linearly
    predictor_dim: int = Field(384, gt=0, multiple_of=4)
    predictor_depth: int = Field(12, gt=0)  # 6 for ViT-B
    predictor_heads: int | None = Field(None, gt=0)  # None: as many as the encoder's


class Predictor(nn.Module):
    """A narrow ViT: features of the context and places -> features there."""

    def __init__(self, encoder: VisionTransformer, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder.arch.dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_positions(dim, encoder.grid), requires_grad=False)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pred = nn.Linear(dim, encoder.arch.dim)

    def forward(self, context: Tensor, keep: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
        """context (B, K, D) at patches keep (B, K), and targets (B, M, T) -> (B, M, T, D). valid (B, T): which count.

        Of an image, each target is predicted by itself.
        """
        b, m, t = targets.shape
        positions = self.pos_embed[:, 1:].expand(b, -1, -1)
        x = self.embed(context) + take(positions, keep)
        masked = self.mask_token + take(positions, targets.flatten(1)).unflatten(1, (m, t))
        x = torch.cat([x[:, None].expand(-1, m, -1, -1), masked.to(x.dtype)], dim=2).flatten(0, 1)
        seen = F.pad(valid, (keep.shape[1], 0), value=True).repeat_interleave(m, 0)
        bias = torch.zeros_like(seen, dtype=x.dtype).masked_fill(~seen, -torch.inf)[:, None, None]
        *body, last = self.blocks
        for block in body:
            x = block(x, bias=bias)
        x = last(x, slice(keep.shape[1], None), bias)
        return self.pred(self.norm(x)).unflatten(0, (b, m))


class IJEPA(Method):
    Config = IJEPAConfig
    presets = {
        "paper": {},
        "official": {"one_draw": True, "edges": False, "dropped": "last", "loss": "smooth_l1"},
    }
    pool = "mean"  # of patches: what the paper probes

    def __init__(self, config: IJEPAConfig, encoder: VisionTransformer, augment: Augment) -> None:
        super().__init__(config, encoder, augment)
        self.n_context = max(1, int(encoder.n_patches * config.context_share))
        # The largest target: sides grow with scale, so that what is left to look through is the aspect.
        aspect = torch.linspace(0, 1, 4097, device="cpu")
        scale = aspect if config.one_draw else torch.ones_like(aspect)
        height, width = self.sides(scale, aspect, config.target_scale, config.target_aspect)
        self.n_target = int((height * width).max())
        heads = config.predictor_heads or encoder.arch.heads
        self.predictor = Predictor(encoder, config.predictor_dim, config.predictor_depth, heads)
        initialise(self)
        self.momentum_encoder = momentum_copy(encoder)

    def sides(
        self, u: Tensor, v: Tensor, scale: tuple[float, float], aspect: tuple[float, float]
    ) -> tuple[Tensor, Tensor]:
        """Height and width of blocks, in patches, of draws of their scale and their aspect in 0..1."""
        area = (self.encoder.n_patches * (scale[0] + u * (scale[1] - scale[0]))).floor()
        ratio = aspect[0] + v * (aspect[1] - aspect[0])
        most = [max(1, side - (not self.config.edges)) for side in self.encoder.grid]
        return (area * ratio).sqrt().round().clamp(1, most[0]), (area / ratio).sqrt().round().clamp(1, most[1])

    def block(self, height: Tensor, width: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Where blocks of these sizes lie, by draws of their place in 0..1: all (...), -> boolean (..., N)."""
        rows, columns = self.encoder.grid
        y, x = (torch.arange(n, device=u.device) for n in (rows, columns))
        spare = 1 if self.config.edges else 0
        top, left = (u * (rows - height + spare)).floor(), (v * (columns - width + spare)).floor()
        inside = [(i >= a[..., None]) & (i < (a + n)[..., None]) for i, a, n in ((y, top, height), (x, left, width))]
        return (inside[0][..., :, None] & inside[1][..., None, :]).flatten(-2)

    def masks(self, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw each image's context patches (B, K) and target patches (B, M, T), and how many of them count, (B,): what
        comes behind these repeats them."""
        c, n, device = self.config, self.encoder.n_patches, generator.device
        scale, aspect, context_scale = rand((3, batch), generator, 1)
        places = rand((2, batch, 1 + c.targets), generator, 1)
        height, width = self.sides(scale, scale if c.one_draw else aspect, c.target_scale, c.target_aspect)
        target = self.block(height[:, None], width[:, None], *places[:, :, 1:])
        block = self.block(*self.sides(context_scale, context_scale, c.context_scale, (1, 1)), *places[:, :, 0])
        # The context comes first; only where it has no patch, others of no target; only where these have none, any.
        taken = target.any(1)
        order = torch.arange(n, device=device) / n if c.dropped == "last" else rand((batch, n), generator)
        order = (2 * taken + 1 * ~block + order).argsort(1)
        size = (block & ~taken).sum(1, keepdim=True).clamp_min(1)
        context = order.gather(1, torch.arange(self.n_context, device=device) % size)
        count = (height * width).long().clamp(max=self.n_target)
        slots = torch.arange(self.n_target, device=device) % count[:, None]
        places_of = (~target).byte().argsort(stable=True, dim=2)
        targets = places_of.gather(2, slots[:, None].expand(-1, c.targets, -1))
        return {"context": context, "targets": targets, "count": count}

    def build_views(self, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        x = one_view(images, self.encoder.image[0], self.augment, generator)
        masks = self.masks(len(images), generator)
        return {"images": x, **{key: mask.to(images.device) for key, mask in masks.items()}}

    def forward(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Prediction and target of the features at each target block, (B, M, T, D); which of them count, (B, T)."""
        images, keep, targets = views["images"], views["context"], views["targets"]
        valid = torch.arange(targets.shape[2], device=targets.device) < views["count"][:, None]
        prediction = self.predictor(self.encoder(images, keep)[:, 1:], keep, targets, valid)
        with torch.no_grad():
            features = self.momentum_encoder(images)[:, 1:]
            features = F.layer_norm(features, features.shape[-1:])
            target = take(features, targets.flatten(1)).unflatten(1, targets.shape[1:])
        return {"prediction": prediction, "target": target, "valid": valid}

    def loss(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        distance = block_distance(outputs["prediction"], outputs["target"], outputs["valid"], self.config.loss)
        return {"loss": distance, "jepa": distance}

    def after_step(self, progress: float) -> None:
        ema_(self.momentum_encoder, self.encoder, 1 - (1 - self.config.momentum) * (1 - progress))

    def tokens_per_image(self) -> int:
        return self.n_context + 1 + self.encoder.n_patches + 1

    def pictures(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        canvas = Canvas(self, views["images"])
        targets = {f"target {i}": canvas.only(views["targets"][:, i - 1]) for i in range(1, self.config.targets + 1)}
        return {"context": canvas.only(views["context"]), **targets}


@float32
def block_distance(prediction: Tensor, target: Tensor, valid: Tensor, form: str) -> Tensor:
    """Average the distance of features (B, M, T, D) over channels, an image's `valid` patches (B, T), and images."""
    distance = F.mse_loss if form == "l2" else F.smooth_l1_loss
    of_patch = distance(prediction, target, reduction="none").mean((1, 3))
    return ((of_patch * valid).sum(1) / valid.sum(1)).mean()
