"""ccMIM: contextual masked image modelling (Zhang et al. 2023): hide what CLS attends to, and contrast the two parts.

A scoring pass without gradient ranks the patches of an image by what CLS attends to (Eq. 4); importance sampling
(Eq. 5, 6) masks most of the important ones. The visible part is encoded and decoded as in MAE (Eq. 9), and its CLS
is contrasted with that of the masked part (Eq. 7), which gets no gradient and so is encoded without storing any.

Where paper and released code part (preset `paper` follows the text where it can be followed, `official` the code):
  contrast   Eq. 7 also contrasts visible CLS with visible CLS, the anchor being the masked one; the code is the
             cross-entropy of visible anchors against masked keys, times 2 tau.
  lambda     .2 (appendix C); .1 in the code (.2 until March 2023).
  decoder    two blocks (4.1); eight in the code.
  score      Eq. 4 names no block, scales by D and takes the embedded input, whose CLS has not seen the image. Both
             presets follow the code: sum over blocks of the softmaxed head-mean row. The equation is
             score_layers first, score_stage pre_softmax, score_scale dim.
  batch      1024 (appendix C); 4096 in the code's README, four micro-batches of 1024 images compared on their own.
  BatchNorm  Statistics of the projector: of a device's 32 images in the code; here of all images compared, in both
             presets, so that a result does not depend on how many devices there were.
  flip       none in the recipes of the paper's tables: "only use the random resized crop" (appendix C). The code flips,
             and so do the suite's own comparisons at small scale, where every method's views are flipped.
Where the paper is silent or prints what it cannot mean, in both presets:
  tau            not in the paper: the code's .5.
  norm_pix_loss  "the pixel values", "in line with MAE" (3.2): normalised by patch, as the code's README runs it.
  Eq. 9          prints a 2-norm, not squared, over the number of masked elements; the text says MSE: MAE's.
  projector      "two-layer MLP" (3.1): the code's, D to D to 256, a BatchNorm after both, the last without affine.
  predictor      p of Eq. 8, "two layers", not in the code: SimSiam's bottleneck of a quarter of the width.
  mask_ratio     .75, as betas and a warm-up of 40 epochs: MAE's ("in line with MAE", appendix C).
The code ranks by w / softmax(u), w the softmax of the scores S, u uniform: the order of S - u, which is computed here.
It computes the losses of this method without mixed precision; here the losses alone are float32.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from sslbench.decoder import Decoder
from sslbench.draws import rand
from sslbench.losses import (
    cosine_matrix,
    cross_entropy_to,
    float32,
    gather,
    info_nce,
    normalise_patches,
    over_rows,
    patch_mse,
)
from sslbench.masking import blockwise_order, n_kept, random_order
from sslbench.method import Method, MethodConfig
from sslbench.pictures import Canvas
from sslbench.recipe import Augment
from sslbench.siamese import mlp
from sslbench.views import one_view
from sslbench.vit import VisionTransformer, initialise, patchify, take


class CCMIMConfig(MethodConfig):
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    divide: Literal["importance_sampling", "importance", "random", "blockwise"] = "importance_sampling"  # Table 5
    noise: Literal["uniform_ratio", "gumbel"] = "uniform_ratio"  # gumbel: exact sampling without replacement by w
    score_layers: Literal["all", "first", "last"] | list[int] = "all"
    score_stage: Literal["post_softmax", "pre_softmax"] = "post_softmax"
    score_scale: Literal["head_dim", "dim"] = "head_dim"
    contrast: Literal["nce", "official", "align", "none"] = "nce"  # Eq. 7, the code's, Eq. 8, nothing
    contrast_weight: float = Field(0.2, ge=0)  # the paper's lambda
    tau: float = Field(0.5, gt=0)  # not in the paper; the code's
    gather_negatives: bool = True  # CLS features of all devices are contrasted, as in the code
    projector_dim: int = Field(256, gt=0)
    norm_pix_loss: bool = True
    decoder_dim: int = Field(512, gt=0, multiple_of=4)
    decoder_depth: int = Field(2, gt=0)
    decoder_heads: int = Field(16, gt=0)


class CCMIM(Method):
    Config = CCMIMConfig
    hybrid = True
    presets = {
        "paper": {},
        "official": {"contrast": "official", "contrast_weight": 0.1, "decoder_depth": 8},
    }
    couples_batch = True
    compared = ("v", "m")
    pool = "mean"  # section 4.1

    def __init__(self, config: CCMIMConfig, encoder: VisionTransformer, augment: Augment) -> None:
        super().__init__(config, encoder, augment)
        self.n_kept = n_kept(encoder.n_patches, config.mask_ratio)
        depth, layers = encoder.arch.depth, config.score_layers
        named = {"all": list(range(depth)), "first": [0], "last": [depth - 1]}
        self.score_layers = layers if isinstance(layers, list) else named[layers]
        if not self.score_layers or not all(0 <= i < depth for i in self.score_layers):
            raise ValueError(f"score_layers {layers}: this encoder's blocks are 0 to {depth - 1}")
        self.decoder = Decoder(encoder, config.decoder_dim, config.decoder_depth, config.decoder_heads)
        dim, out, everywhere = encoder.arch.dim, config.projector_dim, config.gather_negatives
        if config.contrast != "none":
            self.projector = mlp([dim, dim, out], "bn", everywhere=everywhere)
        if config.contrast == "align":  # SimSiam's bottleneck
            self.predictor = mlp([out, out // 4, out], "bn", last_norm=False, everywhere=everywhere)
        initialise(self)

    @classmethod
    def compares_batch(cls, config: dict[str, Any]) -> bool:
        return config["contrast"] != "none"

    def build_views(self, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The crop, and the random part of the division: an order of the patches, or the noise on their scores."""
        views = {"images": one_view(images, self.encoder.image[0], self.augment, generator)}
        b, n, divide = len(images), self.encoder.n_patches, self.config.divide
        if divide == "importance_sampling":
            views["noise"] = rand((b, n), generator).to(images.device)
        elif divide == "random":
            views["order"] = random_order(b, n, generator).to(images.device)
        elif divide == "blockwise":
            views["order"] = blockwise_order(b, self.encoder.grid, n - self.n_kept, generator).to(images.device)
        return views

    @torch.no_grad()
    def importance(self, images: Tensor) -> Tensor:
        """S (B, N): how much CLS attends to each patch, summed over the blocks that score (Eq. 4)."""
        c = self.config
        tokens = self.encoder.tokens(images)
        scale = 1.0 if c.score_scale == "head_dim" else math.sqrt(1 / self.encoder.arch.heads)
        return self.encoder.cls_attention(tokens, self.score_layers, c.score_stage == "post_softmax", scale).sum(1)

    def divide(self, views: dict[str, Tensor]) -> Tensor:
        """(B, N): the order of the patches, the visible ones (unimportant) first."""
        if "order" in views:
            return views["order"]
        scores = self.importance(views["images"])
        if "noise" not in views:
            return scores.argsort(1)
        u = views["noise"]
        if self.config.noise == "gumbel":  # the masked are the largest of log w + Gumbel noise
            return (scores - (-(u.clamp_min(1e-20).log())).clamp_min(1e-20).log()).argsort(1)
        return (scores - u).argsort(1)

    def embed(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Prediction and target of the masked patches (B, N - K, P), and both parts' CLS (B, D), v and m."""
        order, images = self.divide(views), views["images"]
        tokens = self.encoder(images, order[:, : self.n_kept])
        embedded = {"prediction": self.decoder(tokens, order)}
        embedded["target"] = take(patchify(images, self.encoder.arch.patch), order[:, self.n_kept :])
        if self.config.contrast != "none":
            embedded["v"] = tokens[:, 0]
            with torch.no_grad():
                masked = self.encoder.tokens(images, order[:, self.n_kept :])
                embedded["m"] = self.encoder.encode(masked, cls_only=True)[:, 0]
        return embedded

    def compare(self, embedded: dict[str, Tensor]) -> dict[str, Tensor]:
        """h_v and h_m, both parts' CLS in contrast space (B, C), the latter without gradient; p_v, h_v predicted."""
        outputs = {k: x for k, x in embedded.items() if k not in self.compared}
        if "v" in embedded:
            outputs["h_v"] = self.projector(embedded["v"])
            with torch.no_grad():
                outputs["h_m"] = self.projector(embedded["m"])
        if "v" in embedded and self.config.contrast == "align":
            outputs["p_v"] = self.predictor(outputs["h_v"])
        return outputs

    def loss(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """L_recons + lambda x contrast (Eq. 10), of these the terms whose outputs are given."""
        c, terms, total = self.config, {}, 0.0
        if "prediction" in outputs:
            target = normalise_patches(outputs["target"]) if c.norm_pix_loss else outputs["target"]
            total = terms["recon"] = patch_mse(outputs["prediction"], target)
        if "h_v" in outputs:
            if c.contrast == "align":
                terms["align"] = align(outputs["h_m"], outputs["p_v"])
            else:
                terms[c.contrast] = nce(outputs["h_v"], outputs["h_m"], c.tau, c.contrast == "nce", c.gather_negatives)
            total = total + c.contrast_weight * terms[c.contrast]
        return {"loss": total, **terms}

    def tokens_per_image(self) -> int:
        n, contrast = self.encoder.n_patches, self.config.contrast != "none"
        scored = self.config.divide in ("importance", "importance_sampling")
        return self.n_kept + 1 + contrast * (n - self.n_kept + 1) + scored * (n + 1)

    def pictures(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        order, canvas = self.divide(views), Canvas(self, views["images"])
        prediction = self(views)["prediction"]
        hidden = order[:, self.n_kept :]
        return {
            "importance": canvas.heat(self.importance(views["images"])),
            "visible": canvas.only(order[:, : self.n_kept]),
            "masked": canvas.only(hidden),
            "reconstruction": canvas.filled(prediction, hidden, self.config.norm_pix_loss),
        }


@float32
def nce(h_v: Tensor, h_m: Tensor, tau: float, eq7: bool, gathering: bool) -> Tensor:
    """Eq. 7, h_m being a constant: anchor h_m_i, positive h_v_i, negatives h_v_j; and h_v_i against h_v_j.

    Not eq7, the code's: anchor h_v_i, positive h_m_i, negatives h_m_j, times 2 tau.
    """
    keys, first = gather(h_v if eq7 else h_m) if gathering else (h_v if eq7 else h_m, 0)
    if not eq7:
        return 2 * tau * info_nce(h_v, keys, tau, first)

    def loss(both: Tensor, i: int) -> Tensor:
        masked, visible = both.unbind(1)
        across, within = cosine_matrix(masked, keys) / tau, cosine_matrix(visible, keys) / tau
        own = torch.arange(len(both), device=both.device)
        itself = torch.zeros_like(within, dtype=torch.bool)
        itself[own, own + i] = True
        return cross_entropy_to(torch.cat([across, within.masked_fill(itself, -torch.inf)], dim=1), i)

    return over_rows(loss, torch.stack([h_m, h_v], 1), 2 * len(keys), first)


@float32
def align(h_m: Tensor, p_v: Tensor) -> Tensor:
    """Eq. 8: 1 - cosine of the masked part's feature, a constant, and the visible part's, predicted."""
    return (1 - torch.cosine_similarity(h_m, p_v, dim=-1)).mean()
