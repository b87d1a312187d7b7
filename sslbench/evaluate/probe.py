"""The linear probe with augmentation, on the loop of pre-training: a frozen encoder, and a head for each learning rate.

Papers' protocols: MAE's (LARS, BatchNorm before the head), MACRL's (AdamW), MoCo v3's (SGD, no BatchNorm). Where no
augmentation is wanted, linprobe.py does it on cached features in seconds.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ..data import ImageSet, subset
from ..data.loader import evaluation_batches, seed_of
from ..errors import UserError
from ..method import Method
from ..recipe import Augment, Batch, Epochs, Optim
from ..siamese import BatchNorm
from ..strict import Strict
from ..train.optim import Lars
from ..views import normalise, one_view
from ..vit import VisionTransformer
from ..weights import write_weights
from .features import Subject, read_safetensors
from .job import LabelledJob
from .labels import LabelShare

Rate = Annotated[float, Field(gt=0)]
HELD_OUT = 0.1  # of train, to choose a learning rate by


class AugmentedProbe(Strict):
    """The protocol's every switch. Defaults: MAE's for ViT-B on ImageNet."""

    protocol: Literal["linprobe_augmented"]
    optimizer: Literal["lars", "sgd", "adamw"] = "lars"
    lr: list[Rate] = Field([0.1], min_length=1)  # several are trained side by side, one is chosen on a tenth of train
    scale_lr: bool = True  # the actual lr is lr x batch_size / 256
    epochs: Epochs = Field(90, gt=0)
    batch_size: int = Field(16384, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    warmup_epochs: float = Field(10, ge=0)
    batch_norm: bool = True  # without affine, before the head
    norm_batch: int = Field(512, gt=1)  # images that BatchNorm takes together, over all devices; MAE's images a GPU
    pool: Literal["cls", "mean", "mean_all"] | None = None  # None: the method's own
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_tries: Literal[1, 10] = 1  # 1: MAE's sampler; 10: torchvision's (views.crop_boxes)
    flip: bool = True
    head_std: float = Field(0.01, gt=0)
    image_size: None = None  # the encoder is frozen: that of its pre-training
    labels: LabelShare = None  # a share of train's: see labels.py

    @property
    def optim(self) -> Optim:
        """The schedule, of the first learning rate; each head's group has its ratio to it."""
        base = self.lr[0] if self.scale_lr else self.lr[0] * 256 / self.batch_size
        return Optim(lr=base, warmup_epochs=self.warmup_epochs, weight_decay=self.weight_decay)


class FrozenProbe(Method):
    """Heads on one frozen encoder; their losses add up, and since they share nothing, each learns alone."""

    heads: nn.ModuleList

    def __init__(self, encoder: VisionTransformer, augment: Augment, pool: str, crop_tries: int) -> None:
        super().__init__(None, encoder, augment)
        self.pool = pool  # type: ignore[misc]
        self.crop_tries = crop_tries
        encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> FrozenProbe:
        super().train(mode)
        self.encoder.eval()
        return self

    def build_views(
        self, images: Tensor, generator: torch.Generator, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        assert labels is not None
        x = one_view(images, self.encoder.image[0], self.augment, generator, tries=self.crop_tries)
        return {"images": x, "labels": labels}

    def forward(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"logits": self.logits(views["images"]), "labels": views["labels"]}

    def logits(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, S, S) -> (heads, B, classes)."""
        raise NotImplementedError

    def loss(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.autocast(outputs["logits"].device.type, enabled=False):
            return {
                "loss": torch.stack([F.cross_entropy(x.float(), outputs["labels"]) for x in outputs["logits"]]).sum()
            }


class Probe(FrozenProbe):
    """Linear heads, each with a learning rate of its own."""

    def __init__(
        self,
        science: AugmentedProbe,
        encoder: VisionTransformer,
        augment: Augment,
        classes: int,
        pool: str,
        chunk: int | None = None,
    ) -> None:
        """chunk: images that the encoder takes at once; None: all of a batch."""
        super().__init__(encoder, augment, pool, science.crop_tries)
        self.chunk = chunk
        dim = encoder.arch.dim
        self.norm: nn.Module = nn.Identity()
        if science.batch_norm:
            self.norm = BatchNorm(dim, affine=False, everywhere=True)
            self.norm.eps = 1e-6
        self.heads = nn.ModuleList(nn.Linear(dim, classes) for _ in science.lr)
        start = torch.empty(classes, dim)
        nn.init.trunc_normal_(start, std=science.head_std)
        for head in self.heads:  # the same start: the learning rate is all that differs
            head.weight.data.copy_(start)  # type: ignore[operator, union-attr]
            nn.init.zeros_(head.bias)  # type: ignore[arg-type]

    def logits(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            parts = [self.encoder.feature(self.encoder(x), self.pool) for x in images.split(self.chunk or len(images))]
        feature = self.norm(torch.cat(parts).float())
        return torch.stack([head(feature) for head in self.heads])


class ProbeJob(LabelledJob):
    kind = "linprobe"
    metric = "linprobe_top1"

    def __init__(self, recipe: Any, subject: Subject, spec: str, train: ImageSet, *about: Any) -> None:
        super().__init__(recipe, subject, spec, train, *about)
        train = self.train
        self.classes, self.crop_tries = train.classes, self.science.crop_tries
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed_of("held out", self.seed)))
        held = max(1, round(HELD_OUT * len(train))) if len(self.science.lr) > 1 else 0
        self.select = subset(train, order[:held]) if held else None
        self.train = subset(train, order[held:].sort().values) if held else train

    def augment(self) -> Augment:
        s, subject = self.science, self.subject
        return Augment(crop_scale=s.crop_scale, flip=s.flip, mean=subject.mean, std=subject.std)  # type: ignore[arg-type]

    def build(self) -> FrozenProbe:
        chunk = self.machine.images_a_pass
        return Probe(self.science, self.subject.encoder, self.augment(), len(self.classes), self.pool, chunk)

    def batch(self) -> Batch:
        """BatchNorm takes the same images together on any machine: a pass has these; the encoder's may be smaller."""
        s, world = self.science, self.machine.devices * self.machine.nodes
        if not s.batch_norm:
            return super().batch()
        together = min(s.norm_batch, s.batch_size)
        if together % world or s.batch_size % together:
            raise UserError(
                f"BatchNorm takes {together} images together (science.norm_batch): they do not divide among {world} "
                f"device(s), or the batch of {s.batch_size} into whole parts; change machine.devices or that batch"
            )
        return Batch.divide(s.batch_size, self.machine.model_copy(update={"micro_batch": together // world}))

    def optimizer(self, method: Method) -> torch.optim.Optimizer:
        assert isinstance(method, FrozenProbe)
        s = self.science
        groups = [
            {"params": list(head.parameters()), "lr_scale": lr / s.lr[0]}
            for head, lr in zip(method.heads, s.lr, strict=True)
        ]
        if s.optimizer == "lars":
            return Lars(groups, self.optim.lr, s.momentum, s.weight_decay)
        if s.optimizer == "sgd":
            return torch.optim.SGD(groups, self.optim.lr, s.momentum, weight_decay=s.weight_decay, fused=True)
        return torch.optim.AdamW(groups, self.optim.lr, weight_decay=s.weight_decay, fused=True)

    def flops_per_image(self) -> float:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            encoder = VisionTransformer(self.subject.encoder.arch, self.image_size, self.subject.encoder.parts)
            encoder(torch.zeros(1, 3, *encoder.image))
        return float(counter.get_total_flops())  # forward alone; the heads are nothing beside it

    def score(self, weights: Path, val: ImageSet, device: torch.device) -> tuple[Tensor, dict[str, Any]]:
        """Score the head that does best on the held-out tenth of train."""
        model = self.build()
        model.load_state_dict({**model.state_dict(), **read_safetensors(weights)[0]})
        model = model.to(device).eval()
        right = partial(_right, model, device=device, workers=self.machine.workers)
        best = int(right(self.select).sum(1).argmax()) if self.select is not None else 0
        return right(val)[best], {"lr": self.science.lr[best]}

    def save_weights(self, path: Path, method: Method) -> None:
        """The heads and their BatchNorm; the encoder stays where it is."""
        write_weights(path, {k: v for k, v in method.state_dict().items() if not k.startswith("encoder.")})


@torch.inference_mode()
def _right(model: FrozenProbe, data: ImageSet, device: torch.device, workers: int) -> Tensor:
    """(heads, N) booleans: which images each head has right."""
    assert data.labels is not None
    answers = [
        model.logits(normalise(images, model.augment.mean, model.augment.std)).argmax(-1).cpu()
        for images in evaluation_batches(data, model.encoder.image[0], 250, device, workers)
    ]
    return torch.cat(answers, 1) == data.labels
