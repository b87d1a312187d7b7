"""MACRL: masked contrastive representation learning (Yao et al. 2022): MAE and MoCo on two augmented views.

Both views, weakly and strongly augmented, go masked through the encoder, and whole through its momentum copy. The
mean tokens are projected and contrasted across views against a memory bank (Eq. 2); a one-block decoder reconstructs
each view with an L1 loss (Eq. 1). The total is alpha x contrast + reconstruction (Eq. 3, Algorithm 1).
No code was released, so there is one preset, `paper`.

Where the paper contradicts itself or is silent, and what is done here (each a switch):
  branches       the main one strong and masked, the momentum one weak and whole (section 3), against Algorithm 1 and
                 Figure 2, where both views go through both: Algorithm 1.
  alpha          "scaled down by a factor of alpha (e.g. 10)" against Eq. 3: multiply by .1.
  recon_on       "only for the visible tokens" (section 3) against "the masked image" (abstract): visible, literally.
  mask_ratio     .75 (section 4), "e.g. 80 %" (section 3).
  momentum, tau  unstated, "as MoCo": .99 to 1 along a cosine and .2, as MoCo v3's code for ViTs.
  norm_pix_loss  off: the target is "the original augmented sample", pixels as the encoder gets them.
  token_mean     "averaged in the token dimension": of all tokens, CLS too.
  projector      "two-layer feedforward following SimCLR", LayerNorm for BatchNorm: so ReLU; hidden as wide as its
                 output, 512; a norm after both layers, the last without affine, as MoCo v3's heads.
  bank_keys      whose keys enter is unstated: those of both views, since each is the key of a loss (Algorithm 1).
  blur           which share of the views is unstated: BYOL's, all of the first (weak) and a tenth of the second.
What the paper leaves open of its recipes, and what they have:
  lr             "the learning rate is" 1.5e-4 (pre-training), 1.5e-3 (fine-tuning), 0.1 (probe), with no word of a
                 base lr or of scaling by batch / 256. 1.5e-4 is scaled: it is the base lr of MAE and of MoCo v3, whose
                 encoder and loss these are. The others stand as they are: scaled, AdamW would have .012 without layer
                 decay, and .8.
  betas          (.9, .95) in pre-training, MAE's; its other optimiser's settings are stated.
  crops          from .08, BYOL's, normalised by the data set's own statistics.
  CutOut         half of a side, in every image of fine-tuning; see recipes/eval/finetune_macrl_cifar.yaml.
The bank gets the keys of the whole batch, of all devices, after the step; the loss uses it as it was before. So the
loss of an image does not depend on how its batch is divided over devices and accumulation.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from sslbench.decoder import Decoder
from sslbench.losses import (
    cosine_matrix,
    cross_entropy_to,
    gather,
    gather_batch,
    info_nce_with_bank,
    normalise_patches,
    patch_l1,
    patch_mse,
)
from sslbench.masking import n_kept, random_order
from sslbench.method import Method, MethodConfig
from sslbench.pictures import Canvas
from sslbench.recipe import Augment
from sslbench.siamese import MemoryBank, cosine_momentum, ema_, mlp, momentum_copy
from sslbench.views import TwoViews, two_views
from sslbench.vit import VisionTransformer, initialise, patchify, pool_tokens, take


class MACRLConfig(MethodConfig):
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    alpha: float = Field(0.1, ge=0)
    recon_on: Literal["visible", "masked", "all"] = "visible"
    recon_loss: Literal["l1", "l2"] = "l1"  # section 3: "L2 metric presents similar performance"
    norm_pix_loss: bool = False
    token_mean: Literal["mean_all", "mean", "cls"] = "mean_all"  # all tokens, CLS too; patches; CLS alone
    proj_norm: Literal["ln", "bn"] = "ln"
    proj_hidden: int = Field(512, gt=0)
    proj_dim: int = Field(512, gt=0)
    memory_bank: bool = True
    bank_size: int = Field(65536, gt=0)
    bank_keys: Literal["both", "second"] = "both"  # which views' keys enter the bank
    tau: float = Field(0.2, gt=0)
    two_tau: bool = False  # MoCo v3's factor 2 tau on the contrast, which Eq. 2 lacks
    momentum: float = Field(0.99, ge=0, le=1)
    momentum_schedule: Literal["cosine", "constant"] = "cosine"
    freeze_patch_embed: bool = False
    gather_negatives: bool = True  # without a bank: contrast with the keys of all devices
    decoder_dim: int = Field(256, gt=0, multiple_of=4)
    decoder_depth: int = Field(1, gt=0)
    decoder_heads: int = Field(1, gt=0)
    views: TwoViews = TwoViews()


class MACRL(Method):
    Config = MACRLConfig
    hybrid = True
    crops = 2
    couples_batch = True
    pool = "mean_all"

    def __init__(self, config: MACRLConfig, encoder: VisionTransformer, augment: Augment) -> None:
        super().__init__(config, encoder, augment)
        self.n_kept = n_kept(encoder.n_patches, config.mask_ratio)
        self.decoder = Decoder(encoder, config.decoder_dim, config.decoder_depth, config.decoder_heads)
        widths = [encoder.arch.dim, config.proj_hidden, config.proj_dim]
        self.projector = mlp(widths, config.proj_norm, everywhere=config.gather_negatives)
        initialise(self)
        if config.freeze_patch_embed:
            encoder.freeze_patch_embed()
        self.momentum_encoder, self.momentum_projector = momentum_copy(encoder), momentum_copy(self.projector)
        self.bank = MemoryBank(config.bank_size, config.proj_dim) if config.memory_bank else None
        self.fresh: list[Tensor] = []  # keys of this step's micro-batches, (B, 2, C), between forward and after_step

    @classmethod
    def compares_batch(cls, config: dict[str, Any]) -> bool:
        return not config["memory_bank"] or config["proj_norm"] == "bn"

    def build_views(self, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        x1, x2 = two_views(images, self.encoder.image[0], self.augment, self.config.views, generator)
        orders = (random_order(len(images), self.encoder.n_patches, generator).to(images.device) for _ in (1, 2))
        return {"x1": x1, "x2": x2} | dict(zip(("order1", "order2"), orders, strict=True))

    def forward(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return of view i qi and ki (B, C), ki without gradient, and predicti and targeti (B, M, P) of its patches."""
        outputs = {}
        k, n = self.n_kept, self.encoder.n_patches
        first, last = {"visible": (0, k), "masked": (k, n), "all": (0, n)}[self.config.recon_on]
        for i in ("1", "2"):
            x, order = views["x" + i], views["order" + i]
            z = self.encoder(x, order[:, :k])
            outputs["q" + i] = self.projector(pool_tokens(z, self.config.token_mean))
            outputs["predict" + i] = self.decoder(z, order, slice(1 + first, 1 + last))
            outputs["target" + i] = take(patchify(x, self.encoder.arch.patch), order[:, first:last])
            with torch.no_grad():
                w = self.momentum_encoder(x)
                outputs["k" + i] = self.momentum_projector(pool_tokens(w, self.config.token_mean))
        return outputs

    def loss(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """alpha x L_cl + L_mim (Eq. 3), each summed over the two views."""
        cl = self._contrast(outputs["q1"], outputs["k2"]) + self._contrast(outputs["q2"], outputs["k1"])
        mim = self._reconstruct(outputs["predict1"], outputs["target1"])
        mim = mim + self._reconstruct(outputs["predict2"], outputs["target2"])
        if self.bank is not None and self.training:
            self.fresh.append(F.normalize(torch.stack([outputs["k1"].float(), outputs["k2"].float()], dim=1), dim=-1))
        return {"loss": self.config.alpha * cl + mim, "nce": cl, "recon": mim}

    def _contrast(self, q: Tensor, k: Tensor) -> Tensor:
        tau = self.config.tau
        if self.bank is not None:
            loss = info_nce_with_bank(q, k, self.bank.keys, tau)
        else:
            keys, first = gather(k) if self.config.gather_negatives else (k, 0)
            loss = cross_entropy_to(cosine_matrix(q, keys) / tau, first)
        return 2 * tau * loss if self.config.two_tau else loss

    def _reconstruct(self, prediction: Tensor, target: Tensor) -> Tensor:
        target = normalise_patches(target) if self.config.norm_pix_loss else target
        return (patch_l1 if self.config.recon_loss == "l1" else patch_mse)(prediction, target)

    def after_step(self, progress: float) -> None:
        c = self.config
        m = cosine_momentum(c.momentum, progress) if c.momentum_schedule == "cosine" else c.momentum
        ema_(self.momentum_encoder, self.encoder, m)
        ema_(self.momentum_projector, self.projector, m)
        if self.bank is not None and self.fresh:
            keys = gather_batch(self.fresh)
            for view in (0, 1) if c.bank_keys == "both" else (1,):
                self.bank.push(keys[:, view])
        self.fresh.clear()

    def tokens_per_image(self) -> int:
        return 2 * (self.n_kept + 1) + 2 * (self.encoder.n_patches + 1)

    def pictures(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Show each view, what the encoder saw of it, and every patch as the decoder gives it."""
        shown = {}
        for i, name in (("1", "weak"), ("2", "strong")):
            canvas, order = Canvas(self, views["x" + i]), views["order" + i]
            tokens = self.encoder(views["x" + i], order[:, : self.n_kept])
            prediction = self.decoder(tokens, order, slice(1, None))
            shown[f"{name} view"] = canvas.whole()
            shown[f"{name}, visible"] = canvas.only(order[:, : self.n_kept])
            shown[f"{name}, reconstruction"] = canvas.filled(prediction, order, self.config.norm_pix_loss)
        return shown
