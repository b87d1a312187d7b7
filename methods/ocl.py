"""OCL: occlusion-based contrastive learning (Yang et al. 2025; its earlier version is MiCL).

Two disjoint groups of patches of one image are two views of it. No decoder, no momentum encoder, no projector:
the CLS feature of each group is contrasted within the batch, under the T-SP similarity (Eq. 1 to 3, Algorithm 1).

Where the paper and the released code part:
  kappa        Eq. 2 multiplies by kappa = 64; the code's constructor has 1/64, which is a division by 64.
  temperature  Eq. 3 multiplies by a trainable tau; the code divides by a fixed 0.07.
  patch embed  fixed at its random values (section 2.1); trained in the code.
  negatives    Eq. 3's sum over 2B, k != i; Algorithm 1 and the code are a B x B cross-entropy, and so are both presets.
               denominator eq3 adds the pairs within a group and takes the positive out: an experiment.
Preset `paper` follows the text and Algorithm 1, `official` the code.

Where the paper contradicts itself or is silent, and what is done here:
  CLS          "each group adds an independent [CLS] token" (2.1): one learned token, put before each, as in the code.
               Its position, p_0, is 0 in MAE's table.
  kept         patches are rounded down to an even number, so that the groups are as large (code).
  views        "without hand-crafted augmentation": no second view. The one view is MAE's crop and flip, as in the code.
  mlp_head     Table 4 gives widths, GELU and "BN in all layers", and else MoCo v3's design: so no bias before a
               BatchNorm, and the last BatchNorm without affine.
  tau          trainable, but neither start nor bound is published: 1 / .07, the code's, clamped at 100 as CLIP does.
  pool         the feature of fine-tuning is not said; pre-training trains CLS alone, yet the code's notes keep MAE's:
               the mean of patches to fine-tune, CLS to probe. So do the recipes.
  batch        of ViT-L: 2,048 (section 3, Tables 2 to 4), not Table 9's 2,400. Epochs: 800, not Table 6's 1,600.
  probe        90 and 50 epochs (Table 11); section 3 says 100 and 50 of fine-tuning and probe in one sentence.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from sslbench.losses import cosine_matrix, cross_entropy_to, float32, gather, over_rows, tsp
from sslbench.masking import random_split, split_kept
from sslbench.method import Method, MethodConfig
from sslbench.pictures import Canvas
from sslbench.recipe import Augment
from sslbench.siamese import mlp
from sslbench.views import one_view
from sslbench.vit import VisionTransformer, initialise


class OCLConfig(MethodConfig):
    mask_ratio: float = Field(0.3, ge=0, lt=1)  # .3 for ViT-B, .4 for ViT-L (section 3)
    kappa: float = Field(64.0, ge=0)
    kappa_form: Literal["multiply", "divide"] = "multiply"
    tau: Literal["learnable", "fixed"] = "learnable"
    tau_init: float = Field(1 / 0.07, gt=0)  # the factor on the similarity; no initial value is published
    tau_max: float = Field(100.0, gt=0)  # clamp of the learnable factor, as CLIP does; no clamp is published
    tau_param: Literal["exp", "softplus"] = "exp"  # softplus(s) + 1 from s = 0, as t-vMF's code, without tau_init
    denominator: Literal["algorithm1", "eq3"] = "algorithm1"
    freeze_patch_embed: bool = True
    gather_negatives: bool = False  # the code contrasts within one device's batch (MiCL Table 3 says so)
    mlp_head: Literal["none", "2-layer", "3-layer"] = "none"  # Table 4


class OCL(Method):
    Config = OCLConfig
    hybrid = True
    presets = {
        "paper": {},
        "official": {"kappa_form": "divide", "tau": "fixed", "freeze_patch_embed": False},
    }
    couples_batch = True
    compared = ("features",)
    pool = "cls"

    def __init__(self, config: OCLConfig, encoder: VisionTransformer, augment: Augment) -> None:
        super().__init__(config, encoder, augment)
        if split_kept(encoder.n_patches, config.mask_ratio) < 1:
            raise ValueError(
                f"mask_ratio {config.mask_ratio} leaves no patch for each of the two groups of {encoder.n_patches}"
            )
        # Table 4: hidden layers 1024 wide with GELU, output 512 without, BatchNorm after every layer.
        hidden = {"none": [], "2-layer": [1024], "3-layer": [1024, 1024]}[config.mlp_head]
        widths = [encoder.arch.dim, *hidden, 512]
        self.head = mlp(widths, "bn", nn.GELU, everywhere=config.gather_negatives) if hidden else nn.Identity()
        initialise(self)
        if config.freeze_patch_embed:
            encoder.freeze_patch_embed()
        if config.tau == "learnable":
            exp = config.tau_param == "exp"
            self.log_scale = nn.Parameter(torch.tensor([math.log(config.tau_init) if exp else 0.0]))
            self.register_load_state_dict_pre_hook(_with_a_dimension)

    def build_views(self, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        x = one_view(images, self.encoder.image[0], self.augment, generator)
        keep = random_split(len(images), self.encoder.n_patches, self.config.mask_ratio, generator)
        return {"images": x, "keep": keep.to(images.device)}

    def embed(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Row 2i and 2i + 1 of the encoder's batch are the two groups of image i; its CLS rows are the features."""
        tokens = self.encoder.tokens(views["images"], views["keep"])
        return {"features": self.encoder.encode(tokens, cls_only=True)[:, 0].unflatten(0, (-1, 2))}

    def compare(self, embedded: dict[str, Tensor]) -> dict[str, Tensor]:
        """m and n, (B, D) each: the two groups' features, after the head if there is one."""
        m, n = embedded["features"].unbind(1)
        return {"m": self.head(m), "n": self.head(n)}

    def loss(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The symmetric cross-entropy of Algorithm 1 over scaled T-SP similarities."""
        m, n = outputs["m"], outputs["n"]
        (all_m, first), (all_n, _) = (gather(x) if self.config.gather_negatives else (x, 0) for x in (m, n))
        nce = (self._contrast(m, all_n, all_m, first) + self._contrast(n, all_m, all_n, first)) / 2
        scale = self.scale()
        return {"loss": nce, "nce": nce, **({"scale": scale.detach()} if isinstance(scale, Tensor) else {})}

    def _contrast(self, anchors: Tensor, others: Tensor, own: Tensor, first: int) -> Tensor:
        """One direction: anchors (B, D) among the other group's features (C, D); own: those of the anchors' group."""

        def loss(part: Tensor, i: int) -> Tensor:
            across = self.similarity(part, others) * self.scale()
            if self.config.denominator == "eq3":
                return without_positive(across, self.similarity(part, own) * self.scale(), i)
            return cross_entropy_to(across, i)

        return over_rows(loss, anchors, len(others), first)

    def similarity(self, a: Tensor, b: Tensor) -> Tensor:
        return tsp(cosine_matrix(a, b), self.config.kappa, self.config.kappa_form)

    def scale(self) -> Tensor | float:
        """The factor tau on the similarities (Eq. 3)."""
        if self.config.tau == "fixed":
            return self.config.tau_init
        raw = self.log_scale[0].float()
        return raw.exp() if self.config.tau_param == "exp" else F.softplus(raw) + 1

    def after_step(self, progress: float) -> None:
        if self.config.tau == "learnable" and self.config.tau_param == "exp":
            self.log_scale.data.clamp_(max=math.log(self.config.tau_max))

    def tokens_per_image(self) -> int:
        return 2 * (split_kept(self.encoder.n_patches, self.config.mask_ratio) + 1)

    def pictures(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        canvas = Canvas(self, views["images"])
        return {f"group {i + 1}": canvas.only(views["keep"][:, i]) for i in (0, 1)}


@float32
def without_positive(across: Tensor, within: Tensor, first: int) -> Tensor:
    """Eq. 3 of similarities (B, C) across and within groups: log-sum-exp of all but k = i, less the positive."""
    rows = torch.arange(len(across), device=across.device)
    own = torch.zeros_like(across, dtype=torch.bool)
    own[rows, rows + first] = True
    others = torch.cat([across.masked_fill(own, -torch.inf), within.masked_fill(own, -torch.inf)], dim=1)
    return (others.logsumexp(1) - across[rows, rows + first]).mean()


def _with_a_dimension(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """In checkpoints of version 0.1 the scale is a tensor without one, which FSDP does not take."""
    if (key := f"{prefix}log_scale") in state:
        state[key] = state[key].reshape(1)
