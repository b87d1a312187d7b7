"""How mmdet and mmseg read a photograph here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmcv.transforms import BaseTransform
from mmengine.registry import TRANSFORMS

from ..errors import RunFailed


@TRANSFORMS.register_module(name="SslbenchLoadImage")
class LoadImage(BaseTransform):
    """mmcv's LoadImageFromFile, but that only photographs in `turned` are turned as their EXIF tag says.

    mmcv turns each that has a tag, whichever way up its labels are.
    """

    def __init__(self, turned: frozenset[str]) -> None:
        self.turned = turned

    def read(self, path: str) -> np.ndarray:
        """uint8 (H, W, 3), blue first. RunFailed where the file cannot be decoded."""
        flag = cv2.IMREAD_COLOR if path in self.turned else cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
        data = np.frombuffer(Path(path).read_bytes(), np.uint8)
        image = cv2.imdecode(data, flag) if len(data) else None
        if image is None:
            raise RunFailed(f"{path} cannot be decoded any more: has it changed since the run began?")
        return image

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        image = self.read(results["img_path"])
        return {**results, "img": image, "img_shape": image.shape[:2], "ori_shape": image.shape[:2]}
