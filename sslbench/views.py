"""Batched views of uint8 images, on the device that holds them. Every draw comes from the generator given.

Cropping is two small matrix products an image, whose weights are PIL's antialiased bicubic kernel: a crop equals
torchvision's `resized_crop` on PIL images to the rounding, on any device, for a whole batch at once.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def crop_boxes(
    batch: int, size: tuple[int, int], scale: tuple[float, float], generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """RandomResizedCrop's boxes: top, left, height, width, each (batch,) and integral, in an image of `size` (H, W).

    torchvision's rule: area uniform in `scale`, aspect log-uniform in (3/4, 4/3), ten tries, then the largest
    central crop within the aspect range.
    """
    h, w = size
    device = generator.device
    draw = torch.rand(4, batch, 10, generator=generator, device=device)
    area = h * w * (scale[0] + draw[0] * (scale[1] - scale[0]))
    log_ratio = math.log(3 / 4) + draw[1] * (math.log(4 / 3) - math.log(3 / 4))
    widths, heights = (area * log_ratio.exp()).sqrt().round(), (area / log_ratio.exp()).sqrt().round()
    fits = (widths > 0) & (widths <= w) & (heights > 0) & (heights <= h)
    first = fits.int().argmax(1, keepdim=True)
    box_w, box_h = widths.gather(1, first)[:, 0], heights.gather(1, first)[:, 0]
    top = (draw[2, :, 0] * (h - box_h + 1)).floor()
    left = (draw[3, :, 0] * (w - box_w + 1)).floor()
    # The central fallback.
    ratio = w / h
    fall_w = w if ratio <= 4 / 3 else round(h * 4 / 3)
    fall_h = h if ratio >= 3 / 4 else round(w / (3 / 4))
    found = fits.any(1)
    return (
        torch.where(found, top, (h - fall_h) // 2),
        torch.where(found, left, (w - fall_w) // 2),
        torch.where(found, box_h, fall_h),
        torch.where(found, box_w, fall_w),
    )


def _bicubic(x: Tensor) -> Tensor:
    """The bicubic kernel with a = -0.5, PIL's."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def resize_weights(
    start: Tensor, length: Tensor, n: int, out: int, flip: Tensor | None = None, beyond: bool = False
) -> Tensor:
    """(B, out, n): rows that resample [start, start + length) of an axis of n pixels to `out`, antialiased bicubic.

    flip (B,) bool: those images get their outputs in reverse, a mirror for free. beyond: the kernel may look at pixels
    outside the interval, as when an image is resized first and cropped after.
    """
    step = (length / out)[:, None]  # source pixels an output pixel
    width = step.clamp_min(1.0)  # the kernel widens when shrinking: antialiasing
    index = torch.arange(out, device=start.device, dtype=torch.float32)[None].expand(len(start), -1)
    if flip is not None:
        index = torch.where(flip[:, None], out - 1 - index, index)
    centre = start[:, None] + (index + 0.5) * step
    source = torch.arange(n, device=start.device, dtype=torch.float32) + 0.5
    weights = _bicubic((source - centre[..., None]) / width[..., None])
    if not beyond:
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
    images: Tensor,
    size: int,
    scale: tuple[float, float],
    flip: bool,
    generator: torch.Generator,
    view: int = 0,
) -> Tensor:
    """One random crop of each image, mirrored half the time where `flip`: float (B, C, size, size) in 0..255.

    images (B, C, H, W) uint8 are cropped here. (B, V, C, size, size) are V crops of each image that the loader's
    workers have already made, where the images are too large or too varied to travel whole: `view` picks one.
    """
    batch = len(images)
    mirrored = torch.rand(batch, generator=generator, device=generator.device) < 0.5 if flip else None
    if images.ndim == 5:
        crops = images[:, view].float()
        if mirrored is not None:
            crops = torch.where(mirrored.to(crops.device)[:, None, None, None], crops.flip(-1), crops)
        return crops
    h, w = images.shape[-2:]
    top, left, height, width = crop_boxes(batch, (h, w), scale, generator)
    rows = resize_weights(top, height, h, size)
    columns = resize_weights(left, width, w, size, mirrored)
    return resample(images, rows.to(images.device), columns.to(images.device))


def centre_window(size: tuple[int, int], crop: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) that an image of `size` is resized to, and (top, left) of the centre crop in it.

    The short side becomes crop / 0.875 (224 -> 256); the long side truncates and the offset rounds, as in torchvision.
    """
    short = int(crop / 0.875)
    h, w = (short if side == min(size) else int(short * side / min(size)) for side in size)
    return (h, w), (round((h - crop) / 2), round((w - crop) / 2))


def resize_centre(images: Tensor, size: int) -> Tensor:
    """Evaluation's view: uint8 (B, C, H, W) -> float (B, C, size, size), resized and cropped at its centre.

    Images no larger than the view are enlarged whole: there is nothing to crop. CIFAR at its own size stays as it is.
    """
    h, w = images.shape[-2:]
    if (h, w) == (size, size):
        return images.float()
    if max(h, w) <= size:
        (rh, rw), (top, left) = (size, size), (0, 0)
    else:
        (rh, rw), (top, left) = centre_window((h, w), size)
    ones = torch.ones(len(images), device=images.device)
    rows = resize_weights(top * h / rh * ones, size * h / rh * ones, h, size, beyond=True)
    columns = resize_weights(left * w / rw * ones, size * w / rw * ones, w, size, beyond=True)
    return resample(images, rows, columns)


@functools.cache
def _statistics(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(C, 1, 1) on the device, made once: a copy from the host in every step would wait for the device."""
    with torch.inference_mode(False):  # whoever asks first, training may use it too
        return torch.tensor(values, device=device).view(-1, 1, 1) * 255


def normalise(images: Tensor, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD) -> Tensor:
    """0..255 -> zero mean and unit variance by channel."""
    return (images.float() - _statistics(mean, images.device)) / _statistics(std, images.device)


def denormalise(
    images: Tensor, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD
) -> Tensor:
    """The inverse of `normalise`, clamped to 0..255."""
    return (images.float() * _statistics(std, images.device) + _statistics(mean, images.device)).clamp(0, 255)
