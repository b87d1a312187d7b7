"""Images and labels of mmdet and mmseg, augmented by their pipelines, in the order that the seed gives."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from typing import Any

from lightning_fabric import Fabric
from mmengine.dataset import pseudo_collate
from torch.utils.data import DataLoader, Dataset

from ..data.loader import decoders, delivered, epoch_order, host_seed, seed_of
from ..recipe import Batch


class Order:
    """The batch sampler: this rank's micro-batches of steps first .. last - 1, as lists of (epoch, index)."""

    def __init__(self, n: int, seed: int, batch: Batch, rank: int, first: int, last: int) -> None:
        self.n, self.seed, self.batch, self.rank, self.steps = n, seed, batch, rank, range(first, last)

    def __len__(self) -> int:
        return len(self.steps) * self.batch.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        b = self.batch
        per_epoch = self.n // b.total
        for step in self.steps:
            epoch = step // per_epoch
            if step == self.steps.start or step % per_epoch == 0:
                order = epoch_order(self.n, self.seed, epoch).tolist()
            for a in range(b.accumulation):
                start = step % per_epoch * b.total + (a * b.world + self.rank) * b.micro
                yield [(epoch, i) for i in order[start : start + b.micro]]


class Drawn(Dataset[Any]):
    """A data set of mmdet or mmseg whose augmentation is a function of seed, epoch and index, whoever computes it."""

    def __init__(self, data: Any, seed: int) -> None:
        self.data, self.seed, self.metainfo = data, seed, data.metainfo

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        with host_seed(seed_of("views", self.seed, *key)):
            return self.data[key[1]]


class Feed:
    """This device's micro-batches, {"inputs": [...], "data_samples": [...]}, as the mm libraries collate them."""

    def __init__(self, dataset: Any, seed: int, batch: Batch, fabric: Fabric, workers: int) -> None:
        self.data, self.batch, self.rank = Drawn(dataset, seed), batch, fabric.global_rank
        self.workers, self.device = workers, fabric.device
        self.steps_per_epoch = len(dataset) // batch.total
        self.wait_s, self.corrupt = 0.0, set[int]()

    def __call__(self, first: int, last: int) -> Generator[dict[str, Any]]:
        order = Order(len(self.data), self.data.seed, self.batch, self.rank, first, last)
        loader: DataLoader[Any] = DataLoader(
            self.data,
            batch_sampler=order,  # type: ignore[arg-type]
            collate_fn=pseudo_collate,
            **decoders(self.workers, self.device),
        )
        with contextlib.closing(delivered(loader)) as batches:
            for batch, waited_s in batches:
                self.wait_s += waited_s
                yield batch

    def check_corrupt(self) -> None:
        """Nothing: a photograph that cannot be read ends the run at once, for its labels are another's."""
