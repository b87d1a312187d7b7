"""A transfer as a job of the one loop: mmdet's or mmseg's model, its images, AdamW and its schedule by iteration."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..data.loader import seed_of
from ..device import default_device
from ..errors import UserError
from ..evaluate.features import Subject
from ..files import digest
from ..method import Trainable
from ..recipe import Batch
from ..train.job import Batches, Job
from ..train.optim import layer_groups
from ..vit import RelativeTable
from ..weights import write_weights
from .protocol import IterationOptim, TransferRecipe, check_encoder

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass
class Split:
    """A data set of mmdet or mmseg, with what the suite asks of one."""

    name: str
    split: str
    dataset: Any
    fingerprint: str
    said: list[str] = field(default_factory=list)  # what was mended in it, or decided

    def __len__(self) -> int:
        return len(self.dataset)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what mm libraries and pycocotools print: standard output is ours."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def scope_of(task: Any) -> Iterator[None]:
    """Where mm libraries look names up for that module of a task: mmdet or mmseg; quietly."""
    from mmengine.registry import DefaultScope

    with quiet(), DefaultScope.overwrite_default_scope(task.SCOPE):
        yield


class Dense(Trainable):
    """A detector or segmentor of the mm libraries, as what the loop trains."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @property
    def encoder(self) -> nn.Module:
        return self.model.backbone

    def build_views(self, batch: dict[str, Any], generator: torch.Generator, *labels: Tensor) -> dict[str, Any]:
        """{"inputs": images, uint8 (3, H, W) each, "data_samples"} -> both on the device, the images one normalised
        and padded tensor (B, 3, H, W). The augmentation is done: see feed.py."""
        return self.model.data_preprocessor(batch, True)

    def forward(self, views: dict[str, Any]) -> dict[str, Any]:
        return self.model(**views, mode="loss")

    def loss(self, outputs: dict[str, Any]) -> dict[str, Tensor]:
        total, named = self.model.parse_losses(outputs)
        return {**named, "loss": total}


class TransferJob(Job):
    """One recipe on one encoder and one data set."""

    too_large = "use --set science.batch_size="
    pulls = False  # a gradient of the whole backbone for each of five terms: more memory than the step itself

    def __init__(self, recipe: TransferRecipe, subject: Subject, root: Path) -> None:
        s = recipe.science
        self.task = importlib.import_module(f".{s.protocol}", __package__)
        self.recipe: TransferRecipe = recipe
        self.science, self.machine, self.subject = s, recipe.machine, subject
        self.kind, self.optim, self.seed, self.batch_size = s.protocol, s.optim, s.seed, s.batch_size
        self.depth, self.label = subject.encoder.arch.depth, f"{s.protocol} {subject.method} {subject.arch}"
        self.patch = subject.encoder.arch.patch
        if self.patch % 4:
            raise UserError(
                f"{subject.arch} has patch {self.patch}; the pyramid halves it twice, so it must be a multiple of 4"
            )
        check_encoder(subject.encoder, s.encoder)
        with self.scope():
            self.train, self.val = self.task.open_data(root, s)
        self.spec = self.train.name
        self.total = s.iterations or max(1, round(len(self.train) // s.batch_size * (s.epochs or 0)))
        self.epochs = self.total / max(1, len(self.train) // s.batch_size)
        self.protocol = {"name": recipe.name, "hash": recipe.protocol_hash()}
        hash = digest([self.protocol["hash"], subject.sha256, self.spec, self.train.fingerprint])
        self.identity = {"arch": subject.arch, "recipe_hash": hash, "seed": s.seed}
        origin = subject.path.parent.name if subject.run and subject.path else subject.name
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", origin)
        self.folder_name = f"{self.kind}_{stem}_{hash[:8]}" + (f"_s{s.seed}" if s.seed else "")

    def batch(self) -> Batch:
        return Batch.divide(self.batch_size, self.machine)

    def data(self) -> Split:
        return self.train

    def steps(self, per_epoch: int) -> int:
        return self.total

    def build(self) -> Dense:
        """The detector or segmentor, its heads drawn from the seed, its backbone the subject's encoder."""
        from mmengine.config import ConfigDict
        from mmengine.registry import MODELS

        torch.manual_seed(seed_of("weights", self.seed))
        synchronised = self.machine.devices * self.machine.nodes > 1 and default_device().type == "cuda"
        config = self.task.model(self.science, self.subject, self.machine, synchronised, len(self.classes))
        with self.scope():
            model = MODELS.build(ConfigDict(config))
            model.init_weights()
        return Dense(model)

    def optimizer(self, method: Dense) -> torch.optim.AdamW:
        return adamw(method.model, self.depth, self.optim)

    def learning_rate(self, step: int, epoch: float) -> float:
        return learning_rate(self.optim, step, self.total)

    def batches(self, data: Split, method: Dense, batch: Batch, fabric: Fabric) -> Batches:
        from .feed import Feed

        return Feed(data.dataset, self.seed, batch, fabric, self.machine.workers)

    def scope(self) -> contextlib.AbstractContextManager[None]:
        """Where mm libraries look names up: mmdet or mmseg; quietly."""
        return scope_of(self.task)

    def flops_per_image(self) -> None:
        """None: what the heads compute depends on what they find there."""

    def warnings(self, method: Dense, batch: Batch) -> list[str]:
        """Where BatchNorm's statistics are not those of the recipe's batch; UserError where it cannot have any."""
        norms = [m for m in method.modules() if isinstance(m, _BatchNorm)]
        synchronised = any(isinstance(m, nn.SyncBatchNorm) for m in norms)
        seen = batch.micro * batch.world if synchronised else batch.micro
        if norms and seen == 1 and self.kind == "ade20k":
            raise UserError(
                f"UPerNet's BatchNorm pools an image to one pixel, so it needs two images or more a device, not "
                f"{batch}: raise science.batch_size or machine.micro_batch"
            )
        if not norms or 1 < seen >= batch.total:
            return []
        return [
            f"warning: BatchNorm in the heads sees {seen} image(s) at a time, not the batch of {batch.total}; "
            f"a run with more images a device will give other numbers"
        ]

    def info(self) -> dict[str, Any]:
        return {
            "method": self.subject.method,
            "data": self.spec,
            "recipe": self.recipe.name,
            "protocol": self.protocol,
            "subject": self.subject.facts(),
            **self.identity,
        }

    def save_weights(self, path: Path, method: Dense) -> None:
        metadata = {"kind": self.kind, "science": self.science.model_dump_json(), "classes": json.dumps(self.classes)}
        write_weights(path, method.model.state_dict(), metadata)

    @property
    def classes(self) -> list[str]:
        return list(self.val.dataset.metainfo["classes"])


def adamw(model: nn.Module, depth: int, o: IterationOptim) -> torch.optim.AdamW:
    """AdamW whose lr falls layer by layer from the heads to the patches."""
    from .backbone import Decomposed

    tables = [] if o.decay_relative else [m for m in model.modules() if isinstance(m, RelativeTable | Decomposed)]
    plain = frozenset(p for m in tables for p in m.parameters())
    groups = layer_groups(model, depth, o.weight_decay, o.layer_decay, "backbone.", o.decay_biases, plain)
    return torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, fused=True)


def learning_rate(o: IterationOptim, step: int, total: int) -> float:
    """Return the heads' lr at a step of `total`: mmengine's LinearLR, then MultiStepLR, CosineAnnealingLR or PolyLR."""
    warmup = min(o.warmup, total)
    if step < warmup:
        return o.lr * (o.warmup_factor + (1 - o.warmup_factor) * (step / (warmup - 1) if warmup > 1 else 1.0))
    if o.decay == "steps":
        return o.lr * 0.1 ** sum(step >= round(m * total) for m in o.milestones)
    if o.decay == "cosine":
        return o.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
    return o.lr * (1 - (step - warmup) / max(1, total - warmup - 1))
