"""Stops: a non-finite step before it moves the weights, and a signal after the step it arrived in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class FiniteGuard:
    """Lets an optimiser move weights only while every gradient so far was finite, without waiting for the device.

    The answer stays on the device: AdamW's fused kernel takes `found_inf` and leaves weights and moments alone where it
    is set. It stays set, so that nothing moves until a log step reads it and stops the run.
    """

    def __init__(self, device: torch.device) -> None:
        self.not_finite = torch.zeros((), device=device)

    def check(self, value: Tensor) -> None:
        """Remember whether `value` is finite, without a wait for the device; call it before each optimizer.step()."""
        self.not_finite.copy_(torch.maximum(self.not_finite, (~torch.isfinite(value)).float()))

    def arm(self, optimizer: Any) -> None:
        """Have `optimizer` (or the one that Fabric wrapped) look at the guard in every step."""
        getattr(optimizer, "optimizer", optimizer).found_inf = self.not_finite

    def tripped(self) -> bool:
        """Waits for the device: for log steps, and for CPUs, where there is nothing to wait for."""
        return self.not_finite.item() != 0
