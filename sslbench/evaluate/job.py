"""What learns from labels on the loop of pre-training: fine-tuning and the augmented probe share all but the model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from ..data import ImageSet, data_name, subset
from ..files import digest
from ..recipe import Batch
from ..train.job import ImageJob
from .features import Subject, origin, view_of
from .labels import list_facts, list_of, protocol_name


def protocol_hash(science: BaseModel, pool: str, image_size: tuple[int, ...], view: dict[str, int]) -> str:
    """Hash all that may change an evaluation's number but the run: its science, the feature that it reads, the size
    (height, width) of its views, and what `view_of` says of them."""
    return digest({**science.model_dump(mode="json"), "pool": pool, "image_size": [*image_size], **view})


class LabelledJob(ImageJob):
    """One recipe on one subject and one data set. Subclasses say what to build, and how to score it."""

    too_large = "use --set science.batch_size="
    labelled = True
    metric: str

    def __init__(
        self,
        recipe: Any,
        subject: Subject,
        spec: str,
        train: ImageSet,
        pool: str,
        seed: int,
        val: ImageSet | None = None,
    ) -> None:
        """val: what will be scored; with train's, its images decide what the protocol's hash says of the view."""
        s = recipe.science
        self.recipe: Any = recipe
        self.science, self.subject, self.train, self.pool = s, subject, train, pool
        self.label = f"{self.kind} {subject.method} {subject.arch}"
        self.machine, self.optim, self.spec = recipe.machine, s.optim, spec
        self.seed, self.epochs, self.batch_size = seed, s.epochs, s.batch_size
        self.image_size, self.crop_scale = s.image_size or subject.encoder.image[0], s.crop_scale
        view = view_of(self.image_size, train, *([] if val is None else [val]))
        hash = protocol_hash(s, pool, (self.image_size, self.image_size), view)
        self.protocol = {"name": protocol_name(recipe, pool), "hash": hash}
        chosen = list_of(train, s.labels, seed, spec)
        self.labelled_part = list_facts(train, s.labels, chosen)
        if chosen is not None:
            self.train = train = subset(train, chosen)
        hash = digest([self.protocol["hash"], subject.sha256, data_name(spec), train.fingerprint])
        self.identity = {"arch": subject.arch, "recipe_hash": hash, "seed": seed}
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", origin(subject))
        self.folder_name = f"{self.kind}_{stem}_{data_name(spec)}_{hash[:8]}" + (f"_s{seed}" if seed else "")

    def batch(self) -> Batch:
        return Batch.divide(self.batch_size, self.machine)

    def data(self) -> ImageSet:
        return self.train

    def info(self) -> dict[str, Any]:
        return {
            "method": self.subject.method,
            "data": data_name(self.spec),
            "recipe": self.recipe.name,
            "protocol": self.protocol,
            "subject": self.subject.facts(),
            **self.identity,
        }

    def score(self, weights: Path, val: ImageSet, device: torch.device) -> tuple[Tensor, dict[str, Any]]:
        """(which images of val are right (N,), what a reader should know of it), from what `save_weights` wrote."""
        raise NotImplementedError
