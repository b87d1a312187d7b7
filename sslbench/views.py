"""Batched views of uint8 images, on the device that holds them. Every draw comes from the generator given.

Cropping is two small matrix products an image, whose weights are PIL's antialiased kernels: a crop equals
torchvision's `resized_crop` on PIL images to the rounding, on any device, for a whole batch at once.
"""

from __future__ import annotations

import functools
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import AfterValidator, Field
from torch import Tensor

from .draws import rand
from .strict import Strict

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
VIEW = 2  # of evaluation's view. 1 enlarged what is no larger than the view to a square, and cropped beyond 224 pixels


def _ordered(scale: tuple[float, float]) -> tuple[float, float]:
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError("expected (low, high) with 0 < low <= high <= 1")
    return scale


CropScale = Annotated[tuple[float, float], AfterValidator(_ordered)]  # shares of an image's area


class Augment(Strict):
    """How a crop of an image becomes a view. Defaults: MAE's pre-training (crop (.2, 1), flip, ImageNet statistics)."""

    crop_scale: CropScale = (0.2, 1.0)
    # Of crops. The default is not part of the hash: it was the rule before it was a key.
    interpolation: Literal["bicubic", "bilinear"] = Field("bicubic", exclude_if=lambda kernel: kernel == "bicubic")
    flip: bool = True
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Crop:
    """A random crop of an image that a method asks for. None: as the recipe says."""

    size: int | None = None  # pixels a side
    scale: tuple[float, float] | None = None  # of the image's area


class Crops:
    """Crops that a loader's workers made, of several sizes, and where they lie: in place of images (B, 3, H, W)."""

    def __init__(self, pixels: list[Tensor], places: Tensor) -> None:
        """pixels: of each crop of the method's list, uint8 (B, 3, S, S). places: (B, crops, 4), as of `placed_crop`."""
        self.pixels, self.places = pixels, places

    def __len__(self) -> int:
        return len(self.places)

    @property
    def device(self) -> torch.device:
        return self.places.device

    def to(self, device: torch.device, non_blocking: bool = False) -> Crops:
        return Crops([x.to(device, non_blocking=non_blocking) for x in self.pixels], self.places.to(device))

    def split(self, n: int) -> list[Crops]:
        """Cut into parts of n images."""
        pixels = zip(*(x.split(n) for x in self.pixels), strict=True)
        return [Crops(list(x), places) for x, places in zip(pixels, self.places.split(n), strict=True)]


def crop_boxes(
    batch: int, size: tuple[int, int], scale: tuple[float, float], generator: torch.Generator, tries: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """RandomResizedCrop's boxes: top, left, height, width, each (batch,) and integral, in an image of `size` (H, W).

    torchvision's rule: area uniform in `scale`, aspect log-uniform in (3/4, 4/3), ten tries, then the largest
    central crop within the aspect range. With one try, the rule of MAE's linear probe (util/crop.py): a side that is
    longer than the image is cut to it, so that large crops come about more often.
    """
    return place_boxes(rand((4, batch, tries), generator, 1), *size, scale)


def place_boxes(
    draw: Tensor, h: int | Tensor, w: int | Tensor, scale: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`crop_boxes` of draws (4, batch, tries) in 0..1. h, w: of all images, or of each, int64 (batch, 1)."""
    area = h * w * (scale[0] + draw[0] * (scale[1] - scale[0]))
    log_ratio = math.log(3 / 4) + draw[1] * (math.log(4 / 3) - math.log(3 / 4))
    widths, heights = (area * log_ratio.exp()).sqrt().round(), (area / log_ratio.exp()).sqrt().round()
    if draw.shape[2] == 1:
        widths, heights = widths.clamp(min=1).clamp(max=w), heights.clamp(min=1).clamp(max=h)
    fits = (widths > 0) & (widths <= w) & (heights > 0) & (heights <= h)
    first = fits.int().argmax(1, keepdim=True)
    box_w, box_h = widths.gather(1, first), heights.gather(1, first)
    top = (draw[2, :, :1] * (h - box_h + 1)).floor()
    left = (draw[3, :, :1] * (w - box_w + 1)).floor()
    # The central fallback; (8 x + 3) // 6 is 4/3 x, rounded.
    lesser: Any = torch.minimum if isinstance(h, Tensor) else min
    fall_w, fall_h = lesser(w, (8 * h + 3) // 6), lesser(h, (8 * w + 3) // 6)
    any_fits = fits.any(1, keepdim=True)
    return (
        torch.where(any_fits, top, (h - fall_h) // 2)[:, 0],
        torch.where(any_fits, left, (w - fall_w) // 2)[:, 0],
        torch.where(any_fits, box_h, fall_h)[:, 0],
        torch.where(any_fits, box_w, fall_w)[:, 0],
    )


def _bicubic(x: Tensor) -> Tensor:
    """The bicubic kernel with a = -0.5, PIL's."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def _bilinear(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp_min(0)


KERNELS = {"bicubic": _bicubic, "bilinear": _bilinear}


def resize_weights(
    start: Tensor, length: Tensor, n: int, out: int, flip: Tensor | None = None, interpolation: str = "bicubic"
) -> Tensor:
    """(B, out, n): rows that resample [start, start + length) of an axis of n pixels to `out`, antialiased.

    flip (B,) bool: those images get their outputs in reverse, a mirror for free.
    """
    step = (length / out)[:, None]  # source pixels an output pixel
    width = step.clamp_min(1.0)  # the kernel widens when shrinking: antialiasing
    index = torch.arange(out, device=start.device, dtype=torch.float32)[None].expand(len(start), -1)
    if flip is not None:
        index = torch.where(flip[:, None], out - 1 - index, index)
    centre = start[:, None] + (index + 0.5) * step
    source = torch.arange(n, device=start.device, dtype=torch.float32) + 0.5
    weights = KERNELS[interpolation]((source - centre[..., None]) / width[..., None])
    weights = weights * ((source >= start[:, None, None]) & (source < (start + length)[:, None, None]))
    return weights / weights.sum(-1, keepdim=True)


def resample(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(B, C, H, W) uint8 with row weights (B, S, H) and column weights (B, T, W) -> (B, C, S, T) float in 0..255.

    Rounded to whole levels, as an 8-bit image would be.
    """
    with torch.autocast(images.device.type, enabled=False):
        x = torch.einsum("bchw,btw->bcht", images.float(), columns)
        x = torch.einsum("bsh,bcht->bcst", rows, x.round().clamp(0, 255))
    return x.round().clamp(0, 255)


def random_resized_crop(
    images: Tensor | Crops,
    size: int,
    scale: tuple[float, float],
    flip: bool,
    generator: torch.Generator,
    view: int = 0,
    tries: int = 10,
    interpolation: str = "bicubic",
) -> Tensor:
    """One random crop of each image, mirrored half the time where `flip`: float (B, C, size, size) in 0..255.

    The boxes are `crop_boxes`' of so many tries.
    images (B, C, H, W) uint8 are cropped here. (B, V, C, size, size) are V crops of each image that the loader's
    workers have already made, where the images are too large or too varied to travel whole, and so are Crops: `view`
    picks one.
    """
    return placed_crop(images, size, scale, flip, generator, view, tries, interpolation)[0]


def placed_crop(
    images: Tensor | Crops,
    size: int,
    scale: tuple[float, float],
    flip: bool,
    generator: torch.Generator,
    view: int = 0,
    tries: int = 10,
    interpolation: str = "bicubic",
) -> tuple[Tensor, Tensor]:
    """`random_resized_crop`, and where in the image each crop lies: (B, 4), top, left, height, width, as shares of the
    image's height and width. Of a mirrored one, left is its right edge and width is below 0. NaN where nobody knows."""
    batch = len(images)
    mirrored = rand((batch,), generator) < 0.5 if flip else None
    if isinstance(images, Tensor) and images.ndim == 4:
        h, w = images.shape[-2:]
        top, left, height, width = crop_boxes(batch, (h, w), scale, generator, tries)
        rows = resize_weights(top, height, h, size, interpolation=interpolation)
        columns = resize_weights(left, width, w, size, mirrored, interpolation=interpolation)
        crops = resample(images, rows.to(images.device), columns.to(images.device))
        places = torch.stack([top / h, left / w, height / h, width / w], 1).to(images.device)
    elif isinstance(images, Tensor):
        crops, places = images[:, view].float(), torch.full((batch, 4), torch.nan, device=images.device)
    else:
        crops, places = images.pixels[view].float(), images.places[:, view]
    if mirrored is not None:
        turned = mirrored.to(crops.device)
        if not (isinstance(images, Tensor) and images.ndim == 4):
            crops = torch.where(turned[:, None, None, None], crops.flip(-1), crops)
        top, left, height, width = places.unbind(1)
        places = torch.where(turned[:, None], torch.stack([top, left + width, height, -width], 1), places)
    return crops, places


def centre_window(size: tuple[int, int], crop: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) that an image of `size` is resized to, and (top, left) of the centre crop in it.

    MAE's rule (util/datasets.py), with torchvision's roundings: the short side becomes crop / 0.875 (224 -> 256), or
    `crop` itself above 224 pixels; the long side truncates and the offset rounds. Where an image is the view already,
    below 224 pixels, it stays as it is: sets of 32 and 64 pixels are evaluated whole, as they are trained on.
    """
    if size == (crop, crop) and crop < 224:
        return size, (0, 0)
    short = int(crop / 0.875) if crop <= 224 else crop
    h, w = (short if side == min(size) else int(short * side / min(size)) for side in size)
    return (h, w), (round((h - crop) / 2), round((w - crop) / 2))


def centred(image: Image.Image, size: int) -> Image.Image:
    """Evaluation's view of one RGB image, by PIL, so that it is torchvision's Resize and CenterCrop to the bit."""
    (h, w), (top, left) = centre_window((image.height, image.width), size)
    if image.size != (w, h):
        image = image.resize((w, h), Image.Resampling.BICUBIC)
    return image.crop((left, top, left + size, top + size))


def resize_centre(images: Tensor, size: int) -> Tensor:
    """Evaluation's view of images in memory: uint8 (B, 3, H, W) -> float (B, 3, size, size) in 0..255."""
    h, w = images.shape[-2:]
    resized, (top, left) = centre_window((h, w), size)
    if resized == (h, w):
        return images[:, :, top : top + size, left : left + size].float()
    pictures = map(Image.fromarray, images.permute(0, 2, 3, 1).cpu().numpy())
    with ThreadPoolExecutor() as pool:
        views = [np.asarray(view) for view in pool.map(lambda picture: centred(picture, size), pictures)]
    return torch.from_numpy(np.stack(views)).to(images.device).permute(0, 3, 1, 2).float()


@functools.cache
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """The values on the device, put there once: a copy from the host in every step would wait for the device."""
    with torch.inference_mode(False):  # whoever asks first, training may use it too
        return torch.tensor(values, device=device)


def _statistics(values: tuple[float, ...], device: torch.device) -> Tensor:
    return _constant(values, device).view(-1, 1, 1) * 255


def normalise(images: Tensor, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD) -> Tensor:
    """0..255 -> zero mean and unit variance by channel."""
    return (images.float() - _statistics(mean, images.device)) / _statistics(std, images.device)


def denormalise(
    images: Tensor, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD
) -> Tensor:
    """The inverse of `normalise`, clamped to 0..255."""
    return (images.float() * _statistics(std, images.device) + _statistics(mean, images.device)).clamp(0, 255)


def one_view(
    images: Tensor | Crops, size: int, augment: Augment, generator: torch.Generator, view: int = 0, tries: int = 10
) -> Tensor:
    """What a masked-image method sees: one random crop of each image, mirrored at times, normalised."""
    law = (augment.crop_scale, augment.flip, generator, view, tries, augment.interpolation)
    crops = random_resized_crop(images, size, *law)
    return normalise(crops, augment.mean, augment.std)


def cut_out(x: Tensor, side: int, p: float, generator: torch.Generator) -> Tensor:
    """CutOut (DeVries & Taylor 2017) of normalised images (B, C, H, W), each with probability p.

    A square of `side` pixels becomes 0, the mean. Its centre is any pixel, so that at the border less is cut.
    """
    draw = rand((len(x), 3), generator).to(x.device)
    inside = []
    for axis, n in enumerate(x.shape[-2:]):
        first = (draw[:, axis, None] * n).floor() - side // 2
        index = torch.arange(n, device=x.device)
        inside.append((index >= first) & (index < first + side))
    hole = inside[0][:, :, None] & inside[1][:, None, :] & (draw[:, 2] < p)[:, None, None]
    return x.masked_fill(hole[:, None], 0.0)


# ------------------------------------------------------------------- the two views of contrastive methods (BYOL's law)


class TwoViews(Strict):
    """BYOL's augmentations with the numbers of MoCo v3's code; where a pair is given: (first view, second view)."""

    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue
    jitter_p: float = Field(0.8, ge=0, le=1)
    gray_p: float = Field(0.2, ge=0, le=1)
    blur_p: tuple[float, float] = (1.0, 0.1)
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels, at any resolution
    solarise_p: tuple[float, float] = (0.0, 0.2)


def two_views(
    images: Tensor | Crops, size: int, augment: Augment, law: TwoViews, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Two normalised views (B, 3, size, size) of each image: crop and flip, jitter, grey, blur, solarise, by chance."""
    views = []
    for view in (0, 1):
        x = random_resized_crop(
            images, size, augment.crop_scale, augment.flip, generator, view, interpolation=augment.interpolation
        )
        x = distort(x, law, view, generator)
        views.append(normalise(x, augment.mean, augment.std))
    return views[0], views[1]


def small_views(
    images: Tensor | Crops,
    count: int,
    size: int,
    augment: Augment,
    law: TwoViews,
    generator: torch.Generator,
    first: int,
) -> Tensor:
    """`count` more views of each image, (B, count, 3, size, size), by the law's first view. first: the place of the
    first of them among the method's crops."""
    views = []
    for view in range(first, first + count):
        x = random_resized_crop(
            images, size, augment.crop_scale, augment.flip, generator, view, interpolation=augment.interpolation
        )
        views.append(normalise(distort(x, law, 0, generator), augment.mean, augment.std))
    return torch.stack(views, 1)


def distort(x: Tensor, law: TwoViews, view: int, generator: torch.Generator) -> Tensor:
    """All but the crop of a view, on (B, 3, H, W) in 0..255. Each image draws for itself."""

    def uniform(*shape: int) -> Tensor:
        return rand((len(x), *shape), generator).to(x.device)

    def where(p: float, changed: Tensor) -> Tensor:
        return torch.where((uniform() < p)[:, None, None, None], changed, x)

    with torch.autocast(x.device.type, enabled=False):
        strength = _constant(law.jitter[:3], x.device)
        factors = (1 + (2 * uniform(3) - 1) * strength).clamp_min(0)
        hue = (2 * uniform() - 1) * law.jitter[3]
        x = where(law.jitter_p, jitter(x, factors, hue, uniform(3).argsort(1), (uniform() * 4).long()))
        x = where(law.gray_p, luma(x).expand_as(x))
        low, high = law.blur_sigma
        x = where(law.blur_p[view], blur(x, low + uniform() * (high - low)))
        if law.solarise_p[view]:
            x = where(law.solarise_p[view], solarise(x))
    return x


def luma(x: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W): ITU-R 601-2 grey, as PIL's and torchvision's."""
    return 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


def jitter(x: Tensor, factors: Tensor, hue: Tensor, order: Tensor, hue_at: Tensor) -> Tensor:
    """torchvision's ColorJitter on (B, 3, H, W) in 0..255.

    factors (B, 3) of brightness, contrast, saturation, applied in `order` (B, 3), a permutation; a shift by hue (B,)
    of the colour circle after the first `hue_at` (B,) of them. All 24 orders come about, yet hue is computed once.
    """

    def blends(x: Tensor, active: Tensor) -> Tensor:  # active (B, 3): which of the three steps count
        for step in range(3):
            which = order[:, step]
            f = factors.gather(1, which[:, None])[:, :, None, None]
            grey = luma(x)
            which = which[:, None, None, None]
            other = torch.where(which == 1, grey.mean((2, 3), keepdim=True), grey) * (which != 0)
            blended = (x * f + (1 - f) * other).clamp(0, 255)
            x = torch.where(active[:, step, None, None, None], blended, x)
        return x

    before = torch.arange(3, device=x.device)[None] < hue_at[:, None]
    return blends(shift_hue(blends(x, before), hue), ~before)


def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the colours of (B, 3, H, W) in 0..255 by shift (B,), a share of the circle; value and saturation stay."""
    value, least = x.amax(1), x.amin(1)
    spread = value - least
    r, g, b = x.unbind(1)
    safe = torch.where(spread > 0, spread, 1.0)
    angle = torch.where(
        value == r, ((g - b) / safe) % 6, torch.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4)
    )
    angle = angle + 6 * shift[:, None, None]
    # HSV back to RGB: channel n is value - spread x max(0, min(k, 4 - k, 1)), k = (n + hue / 60 degrees) mod 6.
    k = (_constant((5.0, 3.0, 1.0), x.device).view(3, 1, 1) + angle[:, None]) % 6
    return value[:, None] - spread[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of (B, 3, H, W) with sigma (B,) in pixels, edge pixels repeated beyond the edge."""
    for axis in (-2, -1):
        n = x.shape[axis]
        reach = min(8, n - 1)  # four of the largest sigma
        offset = torch.arange(-reach, reach + 1, device=x.device)
        weight = torch.exp(-0.5 * (offset / sigma[:, None]) ** 2)
        weight = (weight / weight.sum(1, keepdim=True))[:, None].expand(-1, n, -1)
        source = (torch.arange(n, device=x.device)[:, None] + offset).clamp(0, n - 1)[None].expand(len(x), -1, -1)
        matrix = torch.zeros(len(x), n, n, device=x.device).scatter_add_(2, source, weight.contiguous())
        x = torch.einsum("bsh,bchw->bcsw", matrix, x) if axis == -2 else torch.einsum("btw,bchw->bcht", matrix, x)
    return x


def solarise(x: Tensor, threshold: float = 128) -> Tensor:
    """Invert what is at least as bright as the threshold, channel by channel, in 0..255."""
    return torch.where(x >= threshold, 255 - x, x)
