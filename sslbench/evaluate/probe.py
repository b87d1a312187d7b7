"""The linear probe with augmentation, on the loop of pre-training: a frozen encoder, and a head for each learning rate.

Papers' protocols: MAE's (LARS, BatchNorm before the head), MACRL's (AdamW), MoCo v3's (SGD, no BatchNorm). Where no
augmentation is wanted, linprobe.py does it on cached features in seconds.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import ImageSet, subset
from ..data.loader import evaluation_batches, seed_of
from ..method import Method
from ..recipe import Augment, Batch, Epochs, Machine, Optim, Strict, data_name, digest
from ..train.loop import Job
from ..train.optim import Lars
from ..train.state import write_atomically
from ..views import normalise, one_view
from ..vit import VisionTransformer, pool_tokens
from .features import Subject

HELD_OUT = 0.1  # of train, to choose a learning rate by


class AugmentedProbe(Strict):
    """The protocol's every switch. Defaults: MAE's for ViT-B on ImageNet."""

    protocol: Literal["linprobe_augmented"]
    optimizer: Literal["lars", "sgd", "adamw"] = "lars"
    lr: list[float] = Field([0.1], min_length=1)  # several are trained side by side, one is chosen on a tenth of train
    scale_lr: bool = True  # the actual lr is lr x batch_size / 256
    epochs: Epochs = Field(90, gt=0)
    batch_size: int = Field(16384, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    warmup_epochs: float = Field(10, ge=0)
    batch_norm: bool = True  # without affine, before the head
    pool: Literal["cls", "mean", "mean_all"] | None = None  # None: the method's own
    crop_scale: tuple[float, float] = (0.08, 1.0)
    flip: bool = True
    head_std: float = Field(0.01, gt=0)


class Probe(Method):
    """Linear heads on one frozen encoder; their losses add up, and since they share nothing, each learns alone."""

    def __init__(
        self, science: AugmentedProbe, encoder: VisionTransformer, augment: Augment, classes: int, pool: str
    ) -> None:
        super().__init__(None, encoder, augment)
        self.pool = pool  # type: ignore[misc]
        encoder.requires_grad_(False)
        dim = encoder.arch.dim
        self.norm: nn.Module = nn.BatchNorm1d(dim, affine=False, eps=1e-6) if science.batch_norm else nn.Identity()
        self.heads = nn.ModuleList(nn.Linear(dim, classes) for _ in science.lr)
        first = torch.empty(classes, dim)
        nn.init.trunc_normal_(first, std=science.head_std)
        for head in self.heads:  # the same start: the learning rate is all that differs
            head.weight.data.copy_(first)  # type: ignore[operator, union-attr]
            nn.init.zeros_(head.bias)  # type: ignore[arg-type]

    def train(self, mode: bool = True) -> Probe:
        super().train(mode)
        self.encoder.eval()
        return self

    def build_views(
        self, images: Tensor, generator: torch.Generator, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        assert labels is not None
        return {"images": one_view(images, self.encoder.image[0], self.augment, generator), "labels": labels}

    def forward(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"logits": self.logits(views["images"]), "labels": views["labels"]}

    def logits(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, S, S) -> (heads, B, classes)."""
        with torch.no_grad():
            feature = pool_tokens(self.encoder(images), self.pool)
        feature = self.norm(feature.float())
        return torch.stack([head(feature) for head in self.heads])

    def loss(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.autocast(outputs["logits"].device.type, enabled=False):
            return {
                "loss": torch.stack([F.cross_entropy(x.float(), outputs["labels"]) for x in outputs["logits"]]).sum()
            }


class ProbeJob(Job):
    """A probe of one subject on one data set, for the loop."""

    kind = "linprobe"
    too_large = "use --set science.batch_size="
    labelled = True

    def __init__(
        self, recipe: Any, subject: Subject, spec: str, train: ImageSet, pool: str, protocol: dict[str, str], seed: int
    ) -> None:
        s: AugmentedProbe = recipe.science
        self.recipe: Any = recipe
        self.science, self.subject, self.pool, self.protocol = s, subject, pool, protocol
        self.label = f"linprobe {subject.method} {subject.arch}"
        self.machine: Machine = recipe.machine
        self.spec, self.seed, self.epochs, self.batch_size = spec, seed, s.epochs, s.batch_size
        self.image_size, self.crop_scale = subject.encoder.image[0], s.crop_scale
        # The schedule is of the first rate; each head's group has its ratio to it.
        base = s.lr[0] if s.scale_lr else s.lr[0] * 256 / s.batch_size
        self.optim = Optim(lr=base, warmup_epochs=s.warmup_epochs, weight_decay=s.weight_decay)
        self.classes = train.classes
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed_of("held out", seed)))
        held = max(1, round(HELD_OUT * len(train))) if len(s.lr) > 1 else 0
        self.select = subset(train, order[:held]) if held else None
        self.train = subset(train, order[held:].sort().values) if held else train
        hash = digest([protocol["hash"], subject.sha256, data_name(spec)])
        self.identity = {"arch": subject.arch, "recipe_hash": hash, "seed": seed}
        origin = subject.path.parent.name if subject.run and subject.path else subject.name
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", origin)
        self.folder_name = f"linprobe_{stem}_{data_name(spec)}_{hash[:8]}" + (f"_s{seed}" if seed else "")

    def batch(self) -> Batch:
        return Batch.divide(self.batch_size, self.machine)

    def data(self) -> ImageSet:
        return self.train

    def build(self) -> Probe:
        s, subject = self.science, self.subject
        augment = Augment(crop_scale=s.crop_scale, flip=s.flip, mean=subject.mean, std=subject.std)  # type: ignore[arg-type]
        return Probe(s, subject.encoder, augment, len(self.classes), self.pool)

    def optimizer(self, method: Method) -> torch.optim.Optimizer:
        assert isinstance(method, Probe)
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
        from torch.utils.flop_counter import FlopCounterMode

        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            encoder = VisionTransformer(self.subject.encoder.arch, self.image_size)
            encoder(torch.zeros(1, 3, *encoder.image))
        return float(counter.get_total_flops())  # forward alone; the heads are nothing beside it

    def info(self) -> dict[str, Any]:
        s = self.subject
        return {
            "method": s.method,
            "data": data_name(self.spec),
            "recipe": self.recipe.name,
            "protocol": self.protocol,
            "subject": s.facts(),
            **self.identity,
        }

    def save_weights(self, path: Path, method: Method) -> None:
        """The heads and their BatchNorm; the encoder stays where it is."""
        state = {k: v for k, v in method.state_dict().items() if not k.startswith("encoder.")}
        write_atomically(path, safetensors_bytes({k: v.detach().cpu().contiguous() for k, v in state.items()}))


@torch.inference_mode()
def probe_top1(job: ProbeJob, weights: Path, val: ImageSet, device: torch.device, workers: int) -> tuple[float, float]:
    """(top-1 on val in percent, the learning rate): of the head that does best on the held-out tenth of train."""
    model = job.build()
    model.load_state_dict({**model.state_dict(), **load_file(weights)})
    model = model.to(device).eval()

    def hits(data: ImageSet, head: int | None = None) -> Tensor:
        assert data.labels is not None
        right, start = torch.zeros(len(model.heads)), 0
        for images in evaluation_batches(data, model.encoder.image[0], 250, device, workers):
            answer = model.logits(normalise(images, model.augment.mean, model.augment.std)).argmax(-1).cpu()
            right += (answer == data.labels[start : start + len(images)]).sum(1)
            start += len(images)
        return 100 * right / len(data)

    best = int(hits(job.select).argmax()) if job.select is not None else 0
    return float(hits(val)[best]), job.science.lr[best]
