"""mmcv's compiled operators where they are, else torchvision's nms and RoIAlign in their place.

A plain install of mmcv compiles nothing. Mask R-CNN needs two of its operators, both of which torchvision has for CPU
and CUDA; `install` puts a module with mmcv's signatures where mmcv looks for its extension. Any other operator is
there by name, as mmcv's import demands, and raises when it is called.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
import torchvision  # noqa: F401 - registers torch.ops.torchvision
from torch import Tensor

EXTENSION = "mmcv._ext"


def implementation() -> str:
    """`mmcv` where its compiled extension is installed, else `torchvision`. Imports mmcv."""
    if isinstance(sys.modules.get(EXTENSION), StandIn) or importlib.util.find_spec(EXTENSION) is None:
        return "torchvision"
    return "mmcv"


def install() -> str:
    """Make `mmcv.ops` importable, and say whose operators it uses. To be called before anything imports mmcv.ops."""
    provider = implementation()
    if provider == "torchvision" and EXTENSION not in sys.modules:
        sys.modules[EXTENSION] = StandIn(EXTENSION)
    return provider


class StandIn(ModuleType):
    """What `import mmcv._ext` gives where nothing was compiled."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)  # mmengine asks for it

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in OPERATORS:
            return OPERATORS[name]

        def missing(*args: Any, **kwargs: Any) -> None:
            raise NotImplementedError(
                f"mmcv's operator '{name}' is not compiled here, and torchvision has none to stand in for it; "
                f"install an mmcv that was built with its operators"
            )

        return missing


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int = 0) -> Tensor:
    """Indices that are kept, best first. offset 1: boxes count their last pixel, so are wider and higher by one."""
    if offset:
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    return torch.ops.torchvision.nms(_full(boxes), _full(scores), iou_threshold)


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """input (B, C, H, W), rois (K, 5) -> writes output (K, C, aligned_height, aligned_width)."""
    _averages(pool_mode)
    size = spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned
    output.copy_(torch.ops.torchvision.roi_align(_full(input), _full(rois), *size))


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """grad_output (K, C, aligned_height, aligned_width) -> writes grad_input (B, C, H, W)."""
    _averages(pool_mode)
    size = spatial_scale, aligned_height, aligned_width, *grad_input.shape, sampling_ratio, aligned
    grad_input.copy_(torch.ops.torchvision._roi_align_backward(_full(grad_output), _full(rois), *size))


def _averages(pool_mode: int) -> None:
    if pool_mode != 1:
        raise NotImplementedError("torchvision's RoIAlign averages; for pool_mode='max' mmcv must be compiled")


def _full(x: Tensor) -> Tensor:
    """Return it in float32 or better: torchvision's kernels know no bfloat16, and in 16 bits a box is pixels off."""
    return x if x.dtype == torch.float64 else x.float()


OPERATORS: dict[str, Callable[..., Any]] = {
    "nms": nms,
    "roi_align_forward": roi_align_forward,
    "roi_align_backward": roi_align_backward,
}
