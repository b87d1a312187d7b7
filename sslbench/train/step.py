"""One training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..method import Method


class TrainStep(nn.Module):
    """uint8 images -> losses, as one module, so that precision and data parallelism wrap all of it."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(
        self, batch: Any, generator: torch.Generator, look: Callable[[dict[str, Tensor]], None] | None = None
    ) -> dict[str, Tensor]:
        """batch: images, or (images, labels) for what learns from labels.

        `look` is shown the losses with their graph; what goes out of here may only be given to fabric.backward.
        """
        with torch.no_grad():
            images, *labels = batch if isinstance(batch, tuple) else (batch,)
            views = self.method.build_views(images, generator, *labels)
        losses = self.method.loss(self.method(views))
        if look:
            look(losses)
        return losses
