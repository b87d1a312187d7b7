"""One training step: every image of it forward and backward, then one update of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import ModelParallelStrategy
from torch import Tensor, nn

from ..data.loader import seed_of
from ..draws import Draws
from ..method import Trainable
from ..recipe import Batch
from .cache import average_gradients, cached_backward
from .diagnose import term_gradients
from .guard import FiniteGuard
from .job import Job
from .shard import load_optimizer


class TrainStep(nn.Module):
    """uint8 images -> losses, as one module, so that precision and data parallelism wrap all of it."""

    def __init__(self, method: Trainable) -> None:
        super().__init__()
        self.method = method

    def forward(
        self, batch: Any, generator: torch.Generator, look: Callable[[dict[str, Tensor]], None] | None = None
    ) -> dict[str, Tensor]:
        """batch: images, (images, labels) for what learns from labels, or what the job's module takes in their place.

        `look` is shown the losses with their graph; what goes out of here may only be given to fabric.backward.
        """
        with torch.no_grad():
            images, *labels = batch if isinstance(batch, tuple) else (batch,)
            views = self.method.build_views(images, generator, *labels)
        losses = self.method.loss(self.method(views))
        if look:
            look(losses)
        return losses


class Learner:
    """The method, its optimiser, and the step that moves its weights.

    A step is a function of the weights, the step's number and its images: whatever is drawn in it is drawn anew from
    seeds that these give.
    """

    def __init__(self, job: Job, batch: Batch, fabric: Fabric) -> None:
        self.job, self.batch, self.fabric = job, batch, fabric
        torch.manual_seed(seed_of("weights", job.seed))
        self.module = TrainStep(job.build())
        self.method: Any = self.module.method  # compile and a gradient cache, where used, need it to be a Method
        self.draws = Draws(fabric.device)
        if job.machine.compile:
            self._compile()

    def _compile(self) -> None:
        if self.batch.passes == 1:
            self.method.compile()
        else:
            self.method.embed = torch.compile(self.method.embed)  # type: ignore[method-assign]
        torch._functorch.config.donated_buffer = False  # terms' gradients go through the graph more than once

    def load_weights(self, state: dict[str, Any]) -> None:
        """Take a checkpoint's, before `set_up`. RuntimeError where they are of another method."""
        self.method.load_state_dict(state["method"])

    def set_up(self) -> None:
        """Wrap the method for its devices, and give it an optimiser."""
        self.model = self.fabric.setup_module(self.module)
        # After that, for sharded weights are other tensors.
        self.optimizer: Any = self.fabric.setup_optimizers(self.job.optimizer(self.method))
        self.sharded = isinstance(self.fabric.strategy, ModelParallelStrategy)
        self.scaler: Any = getattr(self.fabric.strategy.precision, "scaler", None)  # of fp16's loss
        self.guard = FiniteGuard(self.fabric.device)
        self.guard.arm(self.optimizer)

    def load_moments(self, state: dict[str, Any]) -> None:
        """Take a checkpoint's, after `set_up`. ValueError where they are of another method."""
        load_optimizer(self.optimizer, state["optimizer"])
        self.fabric.strategy.precision.load_state_dict(state.get("precision", {}))

    def one_step(
        self,
        step: int,
        micro_batches: Iterator[Any],
        lr: float,
        weight_decay: float | None = None,
        pulls: dict[str, float] | None = None,
    ) -> dict[str, Tensor]:
        """Move the weights once, and return the losses, means over the step's images, and the norm of the gradient.

        pulls: a dict that takes how each loss term pulls at the encoder, where that is to be looked at.
        """
        torch.manual_seed(seed_of("model", self.job.seed, step, self.fabric.global_rank))  # for drop path
        self._set(lr, weight_decay)
        losses: dict[str, Any] = {}
        for part in range(self.batch.accumulation):
            of_part = self._backward(next(micro_batches), step, part, pulls)
            losses = {k: losses.get(k, 0.0) + x.detach() / self.batch.accumulation for k, x in of_part.items()}
        norm = self._clip()
        # fp16's norm may be infinite, and is left out then; a loss is of one device, a gradient of all.
        finite: Any = norm if self.scaler is None else self.fabric.all_reduce(losses["loss"])
        self.guard.check(finite)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {**losses, "grad_norm": norm}

    def _set(self, lr: float, weight_decay: float | None) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
            if weight_decay is not None and group["weight_decay"]:
                group["weight_decay"] = weight_decay

    def _backward(self, images: Any, step: int, part: int, pulls: dict[str, float] | None) -> dict[str, Tensor]:
        """Add the gradients of the loss of these images, part number `part` of the step's on this device."""
        b, fabric = self.batch, self.fabric
        first_image = (part * b.world + fabric.global_rank) * b.micro * b.passes
        if b.passes > 1:
            return cached_backward(
                self.method, self._replay(images, step, first_image), b.passes, fabric, b.accumulation
            )
        look = None if pulls is None or part > 0 or self.sharded else partial(self._look, pulls)
        with fabric.no_backward_sync(self.model, enabled=part < b.accumulation - 1):
            losses = self.model(images, self._draws_for(step, first_image), look)
            fabric.backward(losses["loss"] / b.accumulation)
        return losses

    def _look(self, pulls: dict[str, float], losses: dict[str, Tensor]) -> None:
        pulls.update(term_gradients(losses, self.method.encoder, self.fabric))

    def _draws_for(self, step: int, first_image: int) -> Draws:
        """The generator for the views of the step's images from number `first_image` on."""
        together = seed_of("views", self.job.seed, step, 0)
        alone = seed_of("alone", self.job.seed, step, first_image)
        self.draws.seek(together, alone, self.batch.total, first_image)
        return self.draws

    def _replay(self, images: Tensor, step: int, first_image: int) -> Callable[[int], dict[str, Tensor]]:
        """views(i) of the i-th pass over `images`, the same in every call, for the gradient cache."""

        def views(i: int) -> dict[str, Tensor]:
            torch.manual_seed(seed_of("model", self.job.seed, step, first_image, i))
            draws = self._draws_for(step, first_image + i * self.batch.micro)
            with torch.no_grad():
                return self.method.build_views(images.split(self.batch.micro)[i], draws)

        return views

    def _clip(self) -> Tensor:
        """The norm of the whole gradient, before it is clipped to job.clip_grad."""
        if self.batch.passes > 1 and self.batch.world > 1:
            average_gradients(self.method)
        if self.scaler is not None:  # by hand: Fabric does not unscale for a fused optimiser
            self.scaler.unscale_(self.optimizer.optimizer)
        norm: Any = nn.utils.get_total_norm([p.grad for p in self.method.parameters() if p.grad is not None])
        if self.job.clip_grad:
            nn.utils.clip_grads_with_norm_(self.method.parameters(), self.job.clip_grad, norm)
        return norm.full_tensor() if self.sharded else norm
