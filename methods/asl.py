"""ASL: arbitrary self-supervised learning (Li et al. 2024): MAE with patch-level alignment of two decoded branches.

One encoder pass over the visible patches gives two features: the encoder's own, and those after one more Transformer
layer (AEE, the default), or two passes under two dropouts of the patch embedding (DLE). One shared decoder predicts
the masked patches from both; the predictions are pulled together by L1, patch by patch (Eq. 9 to 11).
No code was released, so there is one preset, `paper`.

Facts worth knowing: the stop-gradients of Eq. 9 change no gradient (value twice the plain L1's, gradient the same), so
that the loss cannot collapse only because the pixel loss holds the encoder's branch.

Where the paper does not say, and what is done here (each a switch):
  recon_on       which branch the pixel loss trains. Eq. 11 has one term: `ori`. Table 7's rows (b) and (d), without
                 alignment, cost 2x and 1.5x and so must train the second branch: `both_mean`.
  l1_reduction   the norm of Eq. 9: mean over a patch's values, which keeps weight 1 comparable with the pixel loss.
  aee_norm       a LayerNorm of its own after the extra layer, which takes the encoder's output after its final norm.
  dle_p          SimCSE's dropout of .1, on the projected patches before positions, in both passes.
  aee_cls        CLS goes through the extra layer with the patches, as through any Transformer layer.
  cls_align      the "[cls] align" of section 4.6: L1 between the decoder's CLS rows.
  mask_ratio     .75, and of Eq. 1's target norm_pix_loss: MAE's defaults, on which all is built (3.3).
  decoder        MAE's 8 blocks of width 512: with them AEE costs the ~1.5x of Tables 1 and 7 (1.58 by counting).
The appendix with the settings is not published: lr, warm-up, decay, crop and flip of the recipes are MAE's, and those
of its probes on small sets a choice (recipes/eval/linprobe_asl.yaml).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from sslbench.decoder import Decoder
from sslbench.draws import rand_each
from sslbench.losses import float32, normalise_patches, patch_mse
from sslbench.masking import n_kept, random_order
from sslbench.method import Method, MethodConfig
from sslbench.pictures import Canvas
from sslbench.recipe import Augment
from sslbench.views import one_view
from sslbench.vit import Block, VisionTransformer, initialise, patchify, take


class ASLConfig(MethodConfig):
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    augmentation: Literal["aee", "dle", "none"] = "aee"  # none: MAE itself, row (a) of Table 7
    align: bool = True
    align_loss: Literal["l1", "cosine"] = "l1"
    align_tokens: Literal["masked", "all"] = "masked"
    l1_reduction: Literal["mean", "sum"] = "mean"
    cls_align: Literal["none", "decoder", "encoder"] = "none"
    recon_on: Literal["ori", "aug", "both_mean", "both_sum"] = "ori"
    aee_norm: Literal["own", "none"] = "own"
    aee_cls: bool = True  # CLS goes through the extra layer
    dle_p: float = Field(0.1, gt=0, lt=1)
    dle_place: Literal["patches", "positions"] = "patches"  # before or after positions are added
    dle_on: Literal["both", "aug"] = "both"
    norm_pix_loss: bool = True
    decoder_dim: int = Field(512, gt=0, multiple_of=4)
    decoder_depth: int = Field(8, gt=0)
    decoder_heads: int = Field(16, gt=0)

    @model_validator(mode="after")
    def _trained(self) -> ASLConfig:
        if self.augmentation == "none" and (self.align or self.cls_align != "none" or self.recon_on != "ori"):
            raise ValueError("augmentation none has one branch: set align false, cls_align none and recon_on ori")
        if self.augmentation == "aee" and not self.align and self.recon_on == "ori":
            raise ValueError("without alignment the extra layer gets no gradient: set recon_on, such as both_mean")
        return self


class ASL(Method):
    Config = ASLConfig
    hybrid = True
    pool = "cls"

    def __init__(self, config: ASLConfig, encoder: VisionTransformer, augment: Augment) -> None:
        super().__init__(config, encoder, augment)
        self.n_kept = n_kept(encoder.n_patches, config.mask_ratio)
        self.decoder = Decoder(encoder, config.decoder_dim, config.decoder_depth, config.decoder_heads)
        if config.augmentation == "aee":
            dim, own = encoder.arch.dim, config.aee_norm == "own"
            norm = nn.LayerNorm(dim, eps=1e-6) if own else nn.Identity()
            self.aee = nn.Sequential(Block(dim, encoder.arch.heads), norm)
        initialise(self)

    def build_views(self, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        b, c = len(images), self.config
        views = {"images": one_view(images, self.encoder.image[0], self.augment, generator)}
        views["order"] = random_order(b, self.encoder.n_patches, generator).to(images.device)
        if c.augmentation == "dle":
            shape = (b, self.n_kept, self.encoder.arch.dim)
            for branch in ("ori", "aug") if c.dle_on == "both" else ("aug",):
                views[f"kept_{branch}"] = (rand_each(shape, generator) >= c.dle_p).to(images.device)
        return views

    def forward(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """`ori` and `aug`: predictions (B, 1 + N, P) of CLS and every patch in the order of `order`; their target."""
        order = views["order"]
        ori = self._encode(views, "ori")
        outputs = {"order": order, "target": take(patchify(views["images"], self.encoder.arch.patch), order)}
        branches, features = ["ori"], [ori]
        if self.config.augmentation != "none":
            branches, features = ["ori", "aug"], [ori, self._augmented(views, ori)]
        whole = self.config.align_tokens == "all" or self.config.cls_align == "decoder"
        rows = slice(0 if whole else 1 + self.n_kept, None)
        decoded = self.decoder(torch.cat(features), order.repeat(len(features), 1), rows).chunk(len(features))
        outputs |= dict(zip(branches, decoded, strict=True))
        if self.config.cls_align == "encoder":
            outputs |= {f"cls_{name}": x[:, 0] for name, x in zip(branches, features, strict=True)}
        return outputs

    def _encode(self, views: dict[str, Tensor], branch: str) -> Tensor:
        keep = views["order"][:, : self.n_kept]
        kept = views.get(f"kept_{branch}")
        if kept is None:
            return self.encoder(views["images"], keep)
        gain = kept / (1 - self.config.dle_p)
        if self.config.dle_place == "patches":
            return self.encoder.encode(self.encoder.tokens(views["images"], keep, gain))
        tokens = self.encoder.tokens(views["images"], keep)
        return self.encoder.encode(torch.cat([tokens[:, :1], tokens[:, 1:] * gain], dim=1))

    def _augmented(self, views: dict[str, Tensor], ori: Tensor) -> Tensor:
        if self.config.augmentation == "dle":
            return self._encode(views, "aug")
        return self.aee(ori) if self.config.aee_cls else torch.cat([ori[:, :1], self.aee(ori[:, 1:])], dim=1)

    def loss(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """L_MAE + L_SEM (Eq. 11), and the extra CLS term where asked for, each with weight 1."""
        c, masked = self.config, outputs["target"].shape[1] - self.n_kept
        target = outputs["target"][:, self.n_kept :]
        if c.norm_pix_loss:
            target = normalise_patches(target)
        on = ("ori", "aug") if c.recon_on.startswith("both") else (c.recon_on,)
        losses = [patch_mse(outputs[name][:, -masked:], target) for name in on]
        recon = sum(losses) / (len(losses) if c.recon_on == "both_mean" else 1)
        terms: dict[str, Any] = {"recon": recon}
        if c.align:
            first = 1 if c.align_tokens == "all" else -masked
            terms["align"] = align(outputs["ori"][:, first:], outputs["aug"][:, first:], c.align_loss, c.l1_reduction)
        if c.cls_align == "decoder":
            terms["cls_align"] = align(outputs["ori"][:, :1], outputs["aug"][:, :1], "l1", c.l1_reduction)
        elif c.cls_align == "encoder":
            terms["cls_align"] = align(outputs["cls_ori"], outputs["cls_aug"], "l1", c.l1_reduction)
        return {"loss": sum(terms.values()), **terms}

    def tokens_per_image(self) -> int:
        return (2 if self.config.augmentation == "dle" else 1) * (self.n_kept + 1)

    def pictures(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        order, canvas, outputs = views["order"], Canvas(self, views["images"]), self(views)
        hidden = order[:, self.n_kept :]
        shown = {"visible": canvas.only(order[:, : self.n_kept])}
        for name, title in (("ori", "reconstruction"), ("aug", "augmented branch")):
            if name in outputs:
                prediction = outputs[name][:, -hidden.shape[1] :]
                shown[title] = canvas.filled(prediction, hidden, self.config.norm_pix_loss)
        return shown


@float32
def align(a: Tensor, b: Tensor, loss: str, reduction: str) -> Tensor:
    """Eq. 9 and 10 over rows (..., P): |a - sg(b)| + |sg(a) - b|, or 1 - cosine in both directions; mean over rows."""

    def distance(x: Tensor, y: Tensor) -> Tensor:
        if loss == "cosine":
            return 1 - torch.cosine_similarity(x, y, dim=-1)
        gap = (x - y).abs()
        return gap.mean(-1) if reduction == "mean" else gap.sum(-1)

    return (distance(a, b.detach()) + distance(a.detach(), b)).mean()
