"""CrossMAE (Fu et al. 2024), a control: MAE whose mask tokens see the visible patches, and not each other.

Each block of the decoder is cross-attention from mask tokens to the encoder's tokens and an MLP (section 3.2). What is
predicted of one patch then does not depend on which others are: of all patches a share `prediction_ratio` is, among
those that are masked (section 3.3). A block reads a map of its own, a weighted sum of the encoder's input and of what
each of its blocks gives, normalised (Eq. 1, section 3.4). The loss is MAE's.

Where paper and released code part; preset `paper` follows the text, `official` the code:
  map_init     weights of the maps are drawn from N(0, 1 / maps) (section 3.4, A.3). So they are in the code's
               constructor, and then drawn again with all linear layers: Xavier uniform.
In both, with inter-block maps nothing reads the encoder's last norm: it stays at 1 and 0, without gradient, and
evaluations read tokens that are normalised so. With maps `last`, the paper's row without inter-block attention
(Table 3d), which the released code cannot run, the decoder reads the encoder's output behind that norm (choice).

The rate is scaled by prediction ratio / mask ratio (A.6), in the recipes. Left out: self-attention between mask tokens
(A.4), sums whose weights are a softmax (Table 8), and maps of some blocks only (Table 3d).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from sslbench.losses import normalise_patches, patch_mse
from sslbench.masking import n_kept, random_order
from sslbench.method import Method, MethodConfig
from sslbench.pictures import Canvas
from sslbench.recipe import Augment
from sslbench.views import one_view
from sslbench.vit import (
    Mlp,
    VisionTransformer,
    attention,
    initialise,
    patchify,
    sincos_positions,
    split_heads,
    take,
)


class CrossMAEConfig(MethodConfig):
    mask_ratio: float = Field(0.75, gt=0, lt=1)  # p
    prediction_ratio: float = Field(0.75, gt=0, lt=1)  # gamma: of all patches, at most the mask ratio
    norm_pix_loss: bool = True
    decoder_dim: int = Field(512, gt=0, multiple_of=4)
    decoder_depth: int = Field(12, gt=0)
    decoder_heads: int = Field(16, gt=0)
    maps: Literal["all", "last"] = "all"  # that a block of the decoder sums: inter-block attention, or none
    map_init: Literal["normal", "xavier"] = "normal"  # of the sum's weights


class CrossMAE(Method):
    Config = CrossMAEConfig
    presets = {"paper": {}, "official": {"map_init": "xavier"}}
    pool = "cls"

    def __init__(self, config: CrossMAEConfig, encoder: VisionTransformer, augment: Augment) -> None:
        super().__init__(config, encoder, augment)
        if config.prediction_ratio > config.mask_ratio:
            raise ValueError(
                f"prediction_ratio={config.prediction_ratio} is above mask_ratio={config.mask_ratio}: of all patches, "
                f"no more can be predicted than are masked"
            )
        n = encoder.n_patches
        self.n_kept = n_kept(n, config.mask_ratio)
        # As in the code, what rounding leaves over is predicted: those that are masked in vain round down.
        self.n_predicted = n - self.n_kept - int(n * (config.mask_ratio - config.prediction_ratio))
        shape = config.decoder_dim, config.decoder_depth, config.decoder_heads
        self.decoder = CrossDecoder(encoder, *shape, inter_block=config.maps == "all")
        initialise(self)
        weights = self.decoder.weights
        if weights is not None:
            encoder.norm.requires_grad_(False)
            if config.map_init == "normal":
                nn.init.normal_(weights.weight, std=weights.in_features**-0.5)

    def build_views(self, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        x = one_view(images, self.encoder.image[0], self.augment, generator)
        order = random_order(len(images), self.encoder.n_patches, generator)
        return {"images": x, "order": order.to(images.device)}

    def forward(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Prediction and target of those masked patches that are predicted, (B, M, P) each."""
        places = self.predicted(views["order"])
        prediction = self.decoder(self.feature_maps(views["images"], views["order"][:, : self.n_kept]), places)
        return {"prediction": prediction, "target": take(patchify(views["images"], self.encoder.arch.patch), places)}

    def predicted(self, order: Tensor) -> Tensor:
        """The last M of an order (B, N) whose first K are visible."""
        return order[:, order.shape[1] - self.n_predicted :]

    def feature_maps(self, images: Tensor, keep: Tensor) -> Tensor:
        """What the decoder reads of the patches keep (B, K): maps (F, B, 1 + K, D) of the encoder's input and of each
        block; or its output alone, F = 1."""
        if self.config.maps == "last":
            return self.encoder(images, keep)[None]
        maps = [self.encoder.tokens(images, keep)]
        for block in self.encoder.blocks:
            maps.append(block(maps[-1]))
        return torch.stack(maps)

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
        maps = self.feature_maps(views["images"], order[:, : self.n_kept])
        hidden = order[:, self.n_kept :]  # all of them: to predict one does not change the others
        return {
            "visible": canvas.only(order[:, : self.n_kept]),
            "reconstruction": canvas.filled(self.decoder(maps, hidden), hidden, self.config.norm_pix_loss),
        }


class CrossDecoder(nn.Module):
    """Maps of visible tokens, and places -> pixels there, each for itself."""

    def __init__(self, encoder: VisionTransformer, dim: int, depth: int, heads: int, inter_block: bool) -> None:
        super().__init__()
        width = encoder.arch.dim
        # Of each block, the weights of the maps (Eq. 1), and the norm of their sum.
        self.weights = nn.Linear(encoder.arch.depth + 1, depth, bias=False) if inter_block else None
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in range(depth if inter_block else 0))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_positions(dim, encoder.grid), requires_grad=False)
        self.blocks = nn.ModuleList(CrossBlock(width, dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pred = nn.Linear(dim, encoder.arch.patch**2 * 3)

    def forward(self, maps: Tensor, places: Tensor) -> Tensor:
        """maps (F, B, 1 + K, D), places (B, M) of patches -> (B, M, P)."""
        read: Any = [maps[0]] * len(self.blocks)
        if self.weights is not None:
            sums = torch.einsum("jf,fbtd->jbtd", self.weights.weight, maps)  # of all blocks at once, as in the code
            read = [norm(x) for norm, x in zip(self.norms, sums, strict=True)]
        x = self.mask_token + take(self.pos_embed[:, 1:].expand(len(places), -1, -1), places)
        for block, tokens in zip(self.blocks, read, strict=True):
            x = block(x, tokens)
        return self.pred(self.norm(x))


class CrossBlock(nn.Module):
    """A pre-norm block whose attention goes from its tokens (width `dim`) to others (`width`), which come normalised.

    `vit.Block` but for that: keys and values are projected from the encoder's width, so no layer between the two is
    needed (section 3.2).
    """

    def __init__(self, width: int, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(width, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """x (B, M, dim), tokens (B, T, width) -> (B, M, dim)."""
        k, v = self.kv(tokens).chunk(2, dim=-1)
        q, k, v = (split_heads(t, self.heads) for t in (self.q(self.norm1(x)), k, v))
        x = x + self.proj(attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))
