"""Batches in an order that is a function of (seed, epoch, step) alone: a resumed run sees what it would have."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import random
import signal
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from multiprocessing import forkserver, resource_tracker
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ..draws import seed_of
from ..errors import RunFailed, UserError
from ..provenance import cores
from ..views import Crop, Crops, centred, place_boxes, resize_centre
from .images import ImageSet, MemoryImages, NoImage, PackedImages, rgb

T = TypeVar("T")
Box = tuple[int, int, int, int]  # top, left, height, width
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # what asks a run to stop; the last is a cluster's warning
CORRUPT_LIMIT = 0.001  # the share of a data set's files that may be unreadable


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """The permutation of n images that an epoch reads."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed_of("order", seed, epoch)))


def held_out(n: int) -> tuple[Tensor, Tensor]:
    """(the rest, a tenth) of n images, always the same: what is chosen or watched without reading val."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed_of("held out")))
    return order[max(1, n // 10) :], order[: max(1, n // 10)]


def decoders(workers: int, device: torch.device) -> dict[str, Any]:
    """DataLoader's arguments for that many processes that read images, or as many as there are cores."""
    workers = min(workers, cores())
    if workers:
        _shield()
    return {
        "num_workers": workers,
        "pin_memory": device.type == "cuda",
        # The main process holds threads and, with a GPU, a CUDA context: forking it is not safe.
        "multiprocessing_context": "forkserver" if workers else None,
        # An iterator draws a seed when it is made: not from where the model draws, so that one made on resuming
        # changes nothing.
        "generator": torch.Generator(),
    }


def _shield() -> None:
    """Start the server that loader processes are forked from, deaf to the signals that ask a run to stop.

    Its children inherit that. A terminal, scancel and a cluster's warning reach every process of a group: the step
    that goes on until it is saved still needs its images. The children end with the iterator, or with this process.
    """
    # The tracker first: the server would start it, and that leaves signals unblocked.
    for start in (resource_tracker.ensure_running, forkserver.ensure_running):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        try:
            start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def delivered(loader: DataLoader[Any]) -> Generator[tuple[Any, float]]:
    """The loader's batches, each with the seconds that it was waited for. To be closed: its processes end with it."""
    batches = iter(loader)
    try:
        for _ in range(len(loader)):
            begin = time.perf_counter()
            batch = next(batches)
            yield batch, time.perf_counter() - begin
    finally:
        del batches  # and its processes, though a traceback may hold this frame
        for stuck in multiprocessing.active_children():  # torch would ask them to end by SIGTERM, which is blocked
            stuck.kill()


class MicroBatches:
    """This rank's micro-batches, uint8 on the device, from a step on to the end of the run.

    Micro-batch j of a step's global batch belongs to rank j % world; `accumulation` of them make the step.
    """

    def __init__(
        self,
        data: ImageSet,
        *,
        seed: int,
        micro: int,
        world: int,
        accumulation: int,
        rank: int,
        device: torch.device,
        crops: int | list[Crop],
        image_size: int,
        crop_scale: tuple[float, float],
        workers: int,
        crop_tries: int = 10,
        interpolation: str = "bicubic",
        distort: Callable[[Image.Image], Image.Image] | None = None,
        labelled: bool = False,
    ) -> None:
        """crops: of each image, their number or what each is. distort: what to do to each crop while it is a PIL image,
        with draws from `random` and `numpy.random`. labelled: yield (images, labels) instead of images."""
        self.data, self.seed, self.device, self.rank = data, seed, device, rank
        self.distort, self.labelled = distort, labelled
        self.micro, self.world, self.accumulation = micro, world, accumulation
        self.steps_per_epoch = len(data) // (micro * world * accumulation)
        asked = [Crop()] * crops if isinstance(crops, int) else crops
        self.crops = [(c.size or image_size, c.scale or crop_scale) for c in asked]
        self.plain = all(crop == Crop() for crop in asked)
        self.law = (crop_tries, interpolation)
        self.workers = workers
        self.corrupt: set[int] = set()  # indices of files that could not be read
        self.wait_s = 0.0  # host time spent waiting for data
        self.order_device = torch.device("cpu")
        self.resident: Tensor | None = None
        if isinstance(data, MemoryImages) and distort is None:
            # The order too: a copy of indices in every step would wait for the device.
            self.resident, self.order_device = data.images.to(device), device
            self.labels = None if data.labels is None else data.labels.to(device)

    def indices(self, first: int, last: int) -> Iterator[tuple[int, Tensor]]:
        """(epoch, indices) of each micro-batch of steps first .. last - 1."""
        epoch, order = -1, torch.empty(0, dtype=torch.long)
        for step in range(first, last):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = epoch_order(len(self.data), self.seed, epoch).to(self.order_device)
            begin = step % self.steps_per_epoch * self.micro * self.world * self.accumulation
            for a in range(self.accumulation):
                start = begin + (a * self.world + self.rank) * self.micro
                yield epoch, order[start : start + self.micro]

    def __call__(self, first: int, last: int) -> Generator[Any]:
        if self.resident is not None:
            for _, index in self.indices(first, last):
                images = self.resident[index]
                yield (images, self.labels[index]) if self.labelled and self.labels is not None else images
            return
        loader = DataLoader(
            _Decoded(self.data, self.seed, self.crops, self.plain, *self.law, self.distort),
            batch_sampler=_Keys(self, first, last),
            collate_fn=_collate,
            **decoders(self.workers, self.device),
        )
        with contextlib.closing(delivered(loader)) as batches:
            for batch, waited_s in batches:
                images, labels, corrupt = _received(batch)
                self.wait_s += waited_s
                self.corrupt.update(corrupt)
                if corrupt and self.world == 1:
                    self.check_corrupt()
                images = images.to(self.device, non_blocking=True)
                yield (images, labels.to(self.device, non_blocking=True)) if self.labelled else images

    def check_corrupt(self) -> None:
        """RunFailed where too many files of the set could not be read; of several ranks, to be asked by all together,
        each of which knows those that it came upon."""
        if self.world > 1 and self.resident is None:
            of_all: list[Any] = [None] * self.world
            dist.all_gather_object(of_all, self.corrupt)
            self.corrupt.update(*of_all)
        if len(self.corrupt) > CORRUPT_LIMIT * len(self.data):
            raise _too_many(self.data, self.corrupt)


def _too_many(data: ImageSet, corrupt: set[int]) -> Exception:
    """What to raise: the run failed, or the user's table has no images where it should."""
    example, why = min(corrupt), OSError("now it can be read")
    try:
        data.read(example)
    except OSError as e:
        why = e
    return (UserError if isinstance(why, NoImage) else RunFailed)(
        f"{len(corrupt)} of {len(data)} images cannot be read, more than {CORRUPT_LIMIT:.1%}; the first is "
        f"{data.where(example)} ({' '.join(str(why).split())}); `sslbench data check` lists them all"
    )


class _Keys:
    """The batch sampler: lists of (epoch, index)."""

    def __init__(self, batches: MicroBatches, first: int, last: int) -> None:
        self.batches, self.first, self.last = batches, first, last

    def __len__(self) -> int:
        return (self.last - self.first) * self.batches.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch, index in self.batches.indices(self.first, self.last):
            yield [(epoch, i) for i in index.tolist()]


class _Decoded(Dataset[tuple[Tensor, int, list[int]]]):
    """(epoch, index) -> crops uint8 (V, 3, S, S), cut in the worker, their boxes a function of (seed, epoch, index);
    the label, -1 where there is none; the indices that could not be read. Crops that are not `plain`, all of one size
    and scale: a list of them, and their places (V, 4), as `views.placed_crop` says them."""

    def __init__(
        self,
        data: ImageSet,
        seed: int,
        crops: list[tuple[int, tuple[float, float]]],
        plain: bool,
        tries: int,
        interpolation: str,
        distort: Callable[[Image.Image], Image.Image] | None = None,
    ) -> None:
        """crops: the size and scale of each."""
        self.data, self.seed, self.crops, self.plain = data, seed, crops, plain
        self.tries, self.interpolation, self.distort = tries, interpolation, distort

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[tuple[Tensor, int, list[int]]]:
        """What the loader asks for: a batch. Of a packed set all boxes at once, which saves a quarter of its time."""
        if not isinstance(self.data, PackedImages):
            return _delivered(lambda: [self[key] for key in keys])
        draw = torch.stack([self._draw(*key) for key in keys], 1)
        boxes = self._boxes(draw, self.data.table[[index for _, index in keys], 1:3]).tolist()
        items = []
        for (epoch, index), of_image in zip(keys, boxes, strict=True):
            pixels = self.data.pixels(index)
            image, sizes = torch.from_numpy(pixels), [size for size, _ in self.crops]
            views = [resized_crop(image, box, s, self.interpolation) for box, s in zip(of_image, sizes, strict=True)]
            items.append(self._finish(views, of_image, pixels.shape[:2], epoch, index, index, []))
        return items

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, list[int]]:
        epoch, index = key
        (views, boxes, size), read, corrupt = _readable(self.data, index, lambda image: self._cut(image, epoch, index))
        return self._finish(views, boxes, size, epoch, index, read, corrupt)

    def _draw(self, epoch: int, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed_of("crop", self.seed, epoch, index))
        return torch.rand(4, len(self.crops), self.tries, generator=generator)

    def _boxes(self, draw: Tensor, sizes: Tensor) -> Tensor:
        """Draws (4, N, V, tries) in images of `sizes` (N, 2), height and width -> boxes (N, V, 4)."""
        height, width = sizes[:, :1], sizes[:, 1:]
        if len({scale for _, scale in self.crops}) == 1:
            n, v = draw.shape[1:3]
            rows = height.repeat_interleave(v, 0), width.repeat_interleave(v, 0)
            return torch.stack(place_boxes(draw.flatten(1, 2), *rows, self.crops[0][1]), 1).long().view(n, v, 4)
        of_crop = [
            torch.stack(place_boxes(draw[:, :, v], height, width, scale), 1) for v, (_, scale) in enumerate(self.crops)
        ]
        return torch.stack(of_crop, 1).long()

    def _cut(self, image: Image.Image, epoch: int, index: int) -> tuple[list[Tensor], list[Box], tuple[int, int]]:
        size = (image.height, image.width)
        (boxes,) = self._boxes(self._draw(epoch, index)[:, None], torch.tensor([size])).tolist()
        return decoded_crops(image, boxes, [s for s, _ in self.crops], self.interpolation), boxes, size

    def _finish(
        self,
        views: list[Tensor],
        boxes: list[Box],
        size: tuple[int, ...],
        epoch: int,
        index: int,
        read: int,
        corrupt: list[int],
    ) -> tuple[Any, int, list[int]]:
        if self.distort:
            with host_seed(seed_of("distort", self.seed, epoch, index)):
                pictures = [self.distort(Image.fromarray(view.permute(1, 2, 0).numpy())) for view in views]
            views = [to_tensor(picture) for picture in pictures]
        label = -1 if self.data.labels is None else int(self.data.labels[read])
        return (
            torch.stack(views) if self.plain else (views, torch.tensor(boxes) / torch.tensor(size * 2)),
            label,
            corrupt,
        )


def resized_crop(image: Tensor, box: Box, size: int, interpolation: str = "bicubic") -> Tensor:
    """The box of an image uint8 (H, W, 3), resized to (3, size, size).

    PIL's antialiased filter in a third of PIL's time. Where PIL shrinks rows first and torch columns, the
    rounding in between moves a quarter of the pixels by a level of 255, hardly any by 8.
    """
    top, left, h, w = box
    part = image[top : top + h, left : left + w].permute(2, 0, 1)[None]
    return F.interpolate(part, (size, size), mode=interpolation, antialias=True)[0]


def decoded_crops(
    image: Image.Image, boxes: list[Box], sizes: list[int], interpolation: str = "bicubic"
) -> list[Tensor]:
    """The boxes of an image that is opened and not yet decoded, each resized to (3, size, size). For training only.

    A JPEG is decoded at a half, a quarter or an eighth of its size where every box still has `size` pixels a side then:
    within a mean of 2.5 levels of 255 of `plain_crops`, and up to 3 times as fast.
    """
    width, height = image.size
    asked = list(zip(boxes, sizes, strict=True))
    least, size = min(((min(box[2:]), size) for box, size in asked), key=lambda pair: pair[0] / pair[1])
    if least >= 2 * size:
        image.draft(None, (math.ceil(width * size / least), math.ceil(height * size / least)))
    shrunk = round(width / image.width)
    picture = rgb(image)
    if shrunk == 1:
        pixels = torch.from_numpy(np.array(picture))
        return [resized_crop(pixels, box, size, interpolation) for box, size in asked]
    kernel = Image.Resampling[interpolation.upper()]
    crops = []
    for (top, left, h, w), size in asked:
        part = (left / shrunk, top / shrunk, (left + w) / shrunk, (top + h) / shrunk)
        crops.append(to_tensor(picture.resize((size, size), kernel, part)))
    return crops


def plain_crops(image: Image.Image, boxes: list[Box], sizes: list[int], interpolation: str = "bicubic") -> list[Tensor]:
    """What `decoded_crops` does quickly."""
    parts = [rgb(image).crop((left, top, left + w, top + h)) for top, left, h, w in boxes]
    kernel = Image.Resampling[interpolation.upper()]
    return [to_tensor(part.resize((size, size), kernel)) for part, size in zip(parts, sizes, strict=True)]


@contextlib.contextmanager
def host_seed(seed: int) -> Iterator[None]:
    """`random` and `numpy.random`, which timm's augmentations draw from, seeded within, and as before after it."""
    before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def _readable(data: ImageSet, index: int, use: Callable[[Image.Image], T]) -> tuple[T, int, list[int]]:
    """`use` of the image at `index`, or at the next index that can be read; that index; and those that could not."""
    corrupt: list[int] = []
    for i in range(index, index + len(data)):
        try:
            return data.use(i % len(data), use), i % len(data), corrupt
        except OSError:
            corrupt.append(i % len(data))
    raise RunFailed(f"no image of {data.name} can be read")


def _delivered(make: Callable[[], list[Any]]) -> list[Any]:
    """What a loader's process makes, or why it cannot: what it raised would arrive with its traceback for a message."""
    try:
        return make()
    except (UserError, RunFailed) as e:
        return [e]


def _received(batch: Any) -> Any:
    if isinstance(batch, Exception):
        raise batch
    return batch


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _collate(items: list[Any]) -> Exception | tuple[Tensor | Crops, Tensor, list[int]]:
    if isinstance(items[0], Exception):
        return items[0]
    images, labels, corrupt = zip(*items, strict=True)
    if isinstance(images[0], Tensor):
        crops, places = [torch.stack(images)], None
    else:
        of_crop, where = zip(*images, strict=True)
        crops, places = [torch.stack(x) for x in zip(*of_crop, strict=True)], torch.stack(where)
    numbers = torch.tensor(labels)
    if get_worker_info():  # here a full /dev/shm is an error; when it is sent, nobody hears of it and all wait for ever
        for part in (*crops, numbers, *([] if places is None else [places])):
            part.share_memory_()
    batch = crops[0] if places is None else Crops(crops, places)
    return batch, numbers, [i for bad in corrupt for i in bad]


class _Centred(Dataset[tuple[Tensor, int, list[int]]]):
    """index -> the evaluation view, uint8 (3, S, S), of `views.centred`."""

    def __init__(self, data: ImageSet, size: int) -> None:
        self.data, self.size = data, size

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, index: list[int]) -> list[Any]:
        return _delivered(lambda: [self[i] for i in index])

    def __getitem__(self, index: int) -> tuple[Tensor, int, list[int]]:
        try:
            image = self.data.read(index)
        except OSError:  # black: an answer to it counts, and is hardly ever right
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), -1, [index]
        return to_tensor(centred(image, self.size)), -1, []


def has_smaller(data: ImageSet, size: int) -> bool:
    """Whether an image is no larger than a view of `size`, and not of its size. Reads heads of files, no pixels."""

    def smaller(index: int) -> bool:
        with contextlib.suppress(OSError):  # one that cannot be read has no size
            w, h = data.use(index, lambda image: image.size)
            return max(w, h) <= size and (w, h) != (size, size)
        return False

    if isinstance(data, MemoryImages):
        return smaller(0)
    return any(map(smaller, range(len(data))))


def evaluation_sample(data: ImageSet, n: int, size: int) -> Tensor:
    """The evaluation view of n images, evenly spaced (sets are often sorted by class): (n, 3, size, size) in 0..255."""
    index = torch.linspace(0, len(data) - 1, min(n, len(data))).long()
    if isinstance(data, MemoryImages):
        return resize_centre(data.images[index], size)
    views = _Centred(data, size)
    return torch.stack([views[i][0] for i in index.tolist()]).float()


def evaluation_batches(data: ImageSet, size: int, batch: int, device: torch.device, workers: int) -> Iterator[Tensor]:
    """Every image once, in order: float (B, 3, size, size) in 0..255 on the device."""
    if isinstance(data, MemoryImages):
        for i in range(0, len(data), batch):
            yield resize_centre(data.images[i : i + batch], size).to(device)
        return
    loader = DataLoader(
        _Centred(data, size),
        batch,
        collate_fn=_collate,
        **decoders(workers, device),
    )
    corrupt: set[int] = set()
    for images, _, bad in map(_received, loader):
        corrupt.update(bad)
        if len(corrupt) > CORRUPT_LIMIT * len(data):
            raise _too_many(data, corrupt)
        yield images.to(device, non_blocking=True).float()
    if corrupt:
        warnings.warn(
            f"{len(corrupt)} of {len(data)} images of {data.name} cannot be read and were taken as black, such as "
            f"{data.where(min(corrupt))}; `sslbench data check` lists them all",
            stacklevel=2,
        )
