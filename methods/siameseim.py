"""SiameseIM: Siamese image modeling (Tao et al. 2023): from a masked view, the dense features of another one.

The online branch encodes what is visible of a view 1, which is masked in blocks, and projects it; a decoder predicts
from it the features of every patch of a view 2, where each mask token knows its patch's place and size in the frame of
view 1. The target is view 2, encoded and projected by momentum copies, normalised by token. The loss is the
squared error to it plus lambda x the mean square of the prediction's products with all targets of the batch, which
keeps features from being all alike (UniGrad's form of a contrast: Tao et al. 2022).
One preset, `paper`: its numbers are those of the released code's script (ViT-B/16, 1,600 epochs); they were taken from
there and not compared with the paper's tables.

As in the released code, and easily overlooked:
  norms          those within the projector's and the decoder's blocks are BatchNorms over all tokens of all devices.
  encoder.norm   is not part of the training: projectors read the last block. It stays at 1 and 0, without gradient, and
                 evaluations read tokens that are normalised so. The code's put a new norm behind the mean of patches.
  patch_embed    stays at its random values, as in MoCo v3.
  loss           both terms are divided by the width; the target is normalised, the prediction is not.
What differs from it, for a shared ViT and trainer: positions and their relative kind encode x first, as MAE's do (the
code's y); the gradient is clipped in float32, by the norm of all of it; the code's masks are BEiT's, as these are, but
for how many blocks are tried.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from sslbench.losses import float32, gather
from sslbench.masking import blockwise_order
from sslbench.method import Method, MethodConfig
from sslbench.pictures import Canvas
from sslbench.recipe import Augment
from sslbench.siamese import BatchNorm, cosine_momentum, ema_, momentum_copy
from sslbench.views import Crop, Crops, TwoViews, distort, normalise, placed_crop
from sslbench.vit import Block, VisionTransformer, initialise, sincos_positions, take


class SiameseIMConfig(MethodConfig):
    mask_ratio: float = Field(0.6, gt=0, lt=1)  # 118 of 196 patches
    smallest_block: int = Field(16, gt=0)  # patches
    decoder_dim: int = Field(768, gt=0, multiple_of=4)
    decoder_heads: int = Field(16, gt=0)
    projector_depth: int = Field(2, ge=0)
    decoder_depth: int = Field(4, gt=0)
    negative_weight: float = Field(0.02, ge=0)  # lambda
    momentum: float = Field(0.995, ge=0, le=1)  # of the first step; goes to 1 along half a cosine
    freeze_patch_embed: bool = True
    gather_negatives: bool = True
    views: TwoViews = TwoViews()


class SiameseIM(Method):
    Config = SiameseIMConfig
    crops = 2
    couples_batch = True
    compared = ("x1", "x2", "seen", "places")
    pool = "mean"

    def __init__(self, config: SiameseIMConfig, encoder: VisionTransformer, augment: Augment) -> None:
        super().__init__(config, encoder, augment)
        self.n_kept = encoder.n_patches - round(encoder.n_patches * config.mask_ratio)
        shape = config.decoder_dim, config.decoder_heads
        everywhere = config.gather_negatives
        self.projector = Projector(encoder.arch.dim, *shape, config.projector_depth, everywhere)
        self.decoder = RelativeDecoder(encoder.grid, *shape, config.decoder_depth, everywhere)
        initialise(self)
        encoder.norm.requires_grad_(False)
        if config.freeze_patch_embed:
            encoder.freeze_patch_embed()
        self.momentum_encoder, self.momentum_projector = momentum_copy(encoder), momentum_copy(self.projector)
        self.momentum_encoder.norm = nn.Identity()

    def crop_list(self) -> list[Crop]:
        return [Crop(self.encoder.image[0])] * 2  # as the recipe's, and their places

    def build_views(self, images: Tensor | Crops, generator: torch.Generator) -> dict[str, Tensor]:
        """Views x1 and x2 (B, 3, S, S), their `places` (B, 2, 4) and the `order` (B, N) of x1's patches."""
        a, size = self.augment, self.encoder.image[0]
        views, places = [], []
        for view in (0, 1):
            law = (a.crop_scale, a.flip, generator, view)
            x, place = placed_crop(images, size, *law, interpolation=a.interpolation)
            views.append(normalise(distort(x, self.config.views, view, generator), a.mean, a.std))
            places.append(place)
        n_masked, smallest = self.encoder.n_patches - self.n_kept, self.config.smallest_block
        order = blockwise_order(len(images), self.encoder.grid, n_masked, generator, smallest).to(images.device)
        return {"x1": views[0], "x2": views[1], "places": torch.stack(places, 1), "order": order}

    def embed(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tokens x1 (B, 1 + K, D) of what is visible and, of the momentum copy, x2 (B, 1 + N, D); where they lie."""
        keep = views["order"][:, : self.n_kept]
        x1 = last_block(self.encoder, views["x1"], keep)
        with torch.no_grad():
            x2 = last_block(self.momentum_encoder, views["x2"])
        return {"x1": x1, "x2": x2, "seen": keep.float(), "places": views["places"]}

    def compare(self, embedded: dict[str, Tensor]) -> dict[str, Tensor]:
        """Prediction and target of the patches of x2, (B, N, C) each."""
        x1 = self.projector(embedded["x1"])
        with torch.no_grad():
            x2 = self.momentum_projector(embedded["x2"])[:, 1:]
        first, second = embedded["places"].detach().unbind(1)
        return {"prediction": self.decoder(x1, embedded["seen"].long(), first, second), "target": x2}

    def loss(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        c = self.config
        match, negatives = unigrad(outputs["prediction"], outputs["target"], c.gather_negatives)
        return {"loss": match + c.negative_weight * negatives, "match": match, "negatives": negatives}

    def after_step(self, progress: float) -> None:
        m = cosine_momentum(self.config.momentum, progress)
        ema_(self.momentum_encoder, self.encoder, m)
        ema_(self.momentum_projector, self.projector, m)

    def tokens_per_image(self) -> int:
        return self.n_kept + 1 + self.encoder.n_patches + 1

    def pictures(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        seen = Canvas(self, views["x1"]).only(views["order"][:, : self.n_kept])
        return {"visible": seen, "view 2": Canvas(self, views["x2"]).whole()}


def last_block(encoder: VisionTransformer, images: Tensor, keep: Tensor | None = None) -> Tensor:
    """What the encoder's last block gives, no norm behind it."""
    x = encoder.tokens(images, keep)
    for block in encoder.blocks:
        x = block(x)
    return x


class TokenNorm(BatchNorm):
    """BatchNorm over all tokens, (B, T, C)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flatten(0, 1)).unflatten(0, input.shape[:2])


def blocks(depth: int, dim: int, heads: int, everywhere: bool) -> nn.ModuleList:
    """Transformer blocks whose norms are over the batch."""
    made = nn.ModuleList(Block(dim, heads) for _ in range(depth))
    for block in made:
        block.norm1, block.norm2 = (TokenNorm(dim, everywhere=everywhere) for _ in range(2))
    return made


class Projector(nn.Module):
    """The encoder's tokens -> those that the decoder reads, or predicts."""

    def __init__(self, width: int, dim: int, heads: int, depth: int, everywhere: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(width, dim)
        self.blocks = blocks(depth, dim, heads, everywhere)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x


class RelativeDecoder(nn.Module):
    """The visible tokens of one view -> a prediction for each patch of another."""

    def __init__(self, grid: tuple[int, int], dim: int, heads: int, depth: int, everywhere: bool) -> None:
        super().__init__()
        self.grid, self.dim = grid, dim
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_positions(dim, grid), requires_grad=False)
        self.place = nn.Linear(2 * dim, dim)
        self.blocks = blocks(depth, dim, heads, everywhere)
        self.pred = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, keep: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """tokens (B, 1 + K, C) of the patches `keep` (B, K) of a view that lies at `first`; predicted are those of one
        at `second`, (B, N, C)."""
        visible = tokens[:, 1:] + take(self.pos_embed[:, 1:].expand(len(tokens), -1, -1), keep)
        masked = self.mask_token + self.place(relative_positions(self.dim, self.grid, first, second))
        x = torch.cat([tokens[:, :1], visible, masked], 1)
        for block in self.blocks:
            x = block(x)
        return self.pred(x[:, 1 + keep.shape[1] :])


@float32
def relative_positions(dim: int, grid: tuple[int, int], first: Tensor, second: Tensor) -> Tensor:
    """(B, N, 2 dim): where each patch of the view at `second` lies in the frame of the one at `first`, and how large.

    first, second: (B, 4) as of `views.placed_crop`. The first half is sin-cos of a patch's column and row among those
    of the other view, which are whole numbers there; the other half of 10 log of the ratio of the views' sides.
    """
    omega = 1e4 ** (-torch.arange(dim // 4, device=first.device).to(first) / (dim // 4))
    places, sizes = [], []
    for axis in (1, 0):  # x, as in `sincos_positions`, then y
        n = grid[axis]
        ratio = second[:, 2 + axis] / first[:, 2 + axis]  # below 0 where one of them is mirrored
        start = (second[:, axis] - first[:, axis]) / first[:, 2 + axis]
        centre = (torch.arange(n, device=first.device).to(first) + 0.5) / n
        where = (start[:, None] + ratio[:, None] * centre) * n - 0.5  # (B, n)
        along = where[:, None, :].expand(-1, grid[0], -1) if axis else where[:, :, None].expand(-1, -1, grid[1])
        places.append(along.flatten(1)[..., None] * omega)
        sizes.append((10 * ratio.abs().log())[:, None, None] * omega)
    n = grid[0] * grid[1]
    halves = [*places, *(x.expand(-1, n, -1) for x in sizes)]
    return torch.cat([f(x) for x in halves for f in (torch.sin, torch.cos)], -1)


@float32
def unigrad(prediction: Tensor, target: Tensor, everywhere: bool) -> tuple[Tensor, Tensor]:
    """Return two terms of tokens and targets, (B, N, C) each, the latter without gradient: a token's squared error to
    its own target, and the mean of its squared products with all targets, of all devices where `everywhere`; over C."""
    width = prediction.shape[-1]
    p, z = prediction.flatten(0, 1), F.layer_norm(target, (width,)).flatten(0, 1)
    correlation = z.T @ z / len(z)
    if everywhere:
        parts, _ = gather(correlation[None])
        correlation = parts.mean(0)
    return (p - z).square().sum(-1).mean() / width, ((p @ correlation) * p).sum(-1).mean() / width
