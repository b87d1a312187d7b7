"""The attentive probe: learned queries gather a frozen encoder's tokens, and a linear layer classifies what they found.

A linear probe reads one vector, CLS or the mean of patches. Masked-image methods put no image-wide vector anywhere, so
that it reads them too low: MAE's ViT-B on ImageNet has 67.8 by it and 75.5 by this one (Psomas et al. 2025). For the
tokens x_n in R^D of an image, CLS and patches, and for each of M queries q_m in R^D:

    a_mn = softmax over n of (q_m . x_n / sqrt(D))        z_m = V_m sum_n a_mn x_n, V_m in R^(D/M x D)
    logits = W BatchNorm([z_1; ...; z_M]) + b

This is the efficient probe of Psomas et al. ("Attention, Please! Revisiting Attentive Probing Through the Lens of
Efficiency", 2025) with MAE's BatchNorm, which has no affine. Cross-attention with one query of M heads, as CAPI (Darcet
et al. 2025) reads tokens, is the same function: the key projection of head m, transposed and times its part of the
query, is one vector of R^D, q_m here. Values are projected after they are gathered, which is the same sum for a share
1 / N of the products.

Training is CAPI's: random crops and flips, AdamW, linear warm-up and a cosine, several learning rates side by side on
one pass of the encoder, and the best on a held-out tenth of train is what val is scored by. The encoder runs in every
epoch, on other crops each time: no tokens are kept, so memory does not grow with the data.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..errors import UserError
from ..losses import float32
from ..recipe import Augment, Epochs, Optim
from ..siamese import BatchNorm
from ..strict import Strict
from ..views import CropScale
from ..vit import VisionTransformer
from .labels import LabelShare
from .probe import FrozenProbe, ProbeJob, Rate

HEAD_STD = 0.02  # of the queries' and the classifier's initial weights


class Attentive(Strict):
    """The protocol's every switch."""

    protocol: Literal["attentive"]
    queries: int = Field(32, gt=0)  # M, which divides the encoder's width
    lr: list[Rate] = Field([3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3], min_length=1)  # x batch_size / 256
    epochs: Epochs = Field(20, gt=0)
    batch_size: int = Field(256, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup_epochs: float = Field(2, ge=0)
    pool: Literal["tokens"] = "tokens"  # what is read: all of them
    crop_scale: CropScale = (0.08, 1.0)
    flip: bool = True
    image_size: None = None  # the encoder is frozen: that of its pre-training
    labels: LabelShare = None  # a share of train's: see labels.py
    optimizer: ClassVar[str] = "adamw"
    batch_norm: ClassVar[bool] = True
    crop_tries: ClassVar[int] = 10

    @property
    def norm_batch(self) -> int:
        """Images that BatchNorm takes together."""
        return self.batch_size

    @property
    def optim(self) -> Optim:
        """The schedule, of the first learning rate; each head's group has its ratio to it."""
        return Optim(lr=self.lr[0], warmup_epochs=self.warmup_epochs, weight_decay=self.weight_decay)


class Head(nn.Module):
    """One head's weights: queries (M, D), values (M, D / M, D), a classifier (classes, D) with its bias."""

    def __init__(self, dim: int, queries: int, classes: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(queries, dim))
        self.values = nn.Parameter(torch.empty(queries, dim // queries, dim))
        self.weight, self.bias = nn.Parameter(torch.empty(classes, dim)), nn.Parameter(torch.zeros(classes))
        for tensor, std in ((self.queries, HEAD_STD), (self.values, dim**-0.5), (self.weight, HEAD_STD)):
            nn.init.trunc_normal_(tensor, std=std)


def gather(tokens: Tensor, queries: Tensor) -> Tensor:
    """Tokens (B, N, D), queries (L, M, D) of L heads -> what each query gathers, (B, L, M, D)."""
    scores = torch.einsum("bnd,lmd->blmn", tokens, queries) * tokens.shape[-1] ** -0.5
    return torch.einsum("blmn,bnd->blmd", scores.softmax(-1), tokens)


class AttentiveProbe(FrozenProbe):
    """Attentive heads with the same start, each with a learning rate of its own."""

    def __init__(
        self,
        science: Attentive,
        encoder: VisionTransformer,
        augment: Augment,
        classes: int,
        chunk: int | None = None,
    ) -> None:
        """chunk: images that the encoder takes at once; None: all of a batch."""
        super().__init__(encoder, augment, encoder.pools[-1], science.crop_tries)  # the pool of the meters alone
        self.chunk = chunk
        dim = encoder.arch.dim
        if dim % science.queries:
            raise UserError(f"science.queries={science.queries} does not divide the encoder's width of {dim}")
        self.heads = nn.ModuleList(Head(dim, science.queries, classes) for _ in science.lr)
        for head in self.heads:  # the learning rate is all that differs
            head.load_state_dict(self.heads[0].state_dict())
        self.norm = BatchNorm(dim * len(self.heads), affine=False, everywhere=True)
        self.norm.eps = 1e-6

    def logits(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            tokens = torch.cat([self.encoder(x) for x in images.split(self.chunk or len(images))])
        return self.read(tokens if self.encoder.parts.cls else tokens[:, 1:])

    @float32
    def read(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, D) -> (heads, B, classes), all heads at once."""
        names = ("queries", "values", "weight", "bias")
        queries, values, weight, bias = (torch.stack([getattr(head, n) for head in self.heads]) for n in names)
        z = torch.einsum("blmd,lmed->blme", gather(tokens, queries), values).flatten(1)
        z = self.norm(z).unflatten(1, (len(self.heads), -1))
        return torch.einsum("bld,lkd->lbk", z, weight) + bias[:, None]


class AttentiveJob(ProbeJob):
    kind = "attentive"
    metric = "attentive_top1"

    def build(self) -> AttentiveProbe:
        chunk = self.machine.images_a_pass
        return AttentiveProbe(self.science, self.subject.encoder, self.augment(), len(self.classes), chunk)

    def flops_per_image(self) -> float:
        """The encoder forward, the heads forward and backward."""
        with torch.device("meta"):
            encoder = VisionTransformer(self.subject.encoder.arch, self.image_size, self.subject.encoder.parts)
            model = AttentiveProbe(self.science, encoder, self.augment(), len(self.classes)).eval()
            with FlopCounterMode(display=False) as counter:
                model.logits(torch.zeros(2, 3, *encoder.image)).sum().backward()
        return counter.get_total_flops() / 2
