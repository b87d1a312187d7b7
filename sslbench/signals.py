"""A signal asks for a stop, which comes where all is saved: after the step, or the file, that it arrived in."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar

import torch

if TYPE_CHECKING:
    from lightning_fabric import Fabric

AGAIN_S = 1.0  # after which a second SIGINT is another


class Signals:
    """SIGINT, SIGTERM and SIGUSR1 (a cluster's warning) ask for a stop: the loop saves and leaves after a step."""

    unheeded: ClassVar[str | None] = None  # what the last run received in its last step, too late to stop it

    def __init__(self) -> None:
        self.received: str | None = None
        self.first_s: float | None = None  # when the first SIGINT came

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            # A second Ctrl-C means now, unless it is the first again, which torchrun sends on to its processes.
            self.first_s = self.first_s or time.monotonic()
            if time.monotonic() > self.first_s + AGAIN_S:
                raise KeyboardInterrupt
        if not self.requeue:
            self.received = signal.Signals(number).name

    @property
    def requeue(self) -> bool:
        """Whether a cluster asked, which will start the run again."""
        return self.received == "SIGUSR1"

    def __enter__(self) -> Signals:
        self._before: dict[int, Any] = {}
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: whoever runs us handles signals
                break
        return self

    def asked(self, fabric: Fabric, together: bool) -> bool:
        """Whether to stop now. Several processes agree on it, and do so only where all say `together`, at log steps."""
        if fabric.world_size == 1:
            return self.received is not None
        if not together:
            return False
        mine = (self.received is not None) + self.requeue  # 2: stop, and start again
        most: Any = fabric.all_reduce(torch.tensor(float(mine), device=fabric.device), reduce_op="max")
        if (agreed := most.item()) > mine:
            self.received = "SIGUSR1" if agreed == 2 else "a signal to another process"
        return agreed > 0

    def __exit__(self, *error: object) -> None:
        Signals.unheeded = self.received if error[0] is None else None
        for number, handler in self._before.items():
            signal.signal(number, handler)
