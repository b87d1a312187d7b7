"""FSDP2: each device holds a part of the weights, gradients and moments, for ViTs that are too large to hold whole.

What it changes is in this file. A checkpoint holds whole tensors, so that any number of devices resumes it, sharded or
not. The norms of the loss terms' gradients are not measured: a pass over a term alone would part the weights again.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from lightning_fabric.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import UserError
from ..recipe import Batch
from ..vit import ARCHS, Block, find_arch
from .job import Job

FROM = "vit_h14"  # and wider: `auto` shards


def shards(job: Job, batch: Batch) -> bool:
    """Whether machine.strategy means sharding. UserError where it says so and something else does not go with it."""
    machine, arch = job.machine, find_arch(str(job.identity["arch"]))
    wide = arch is not None and arch.dim >= ARCHS[FROM].dim
    if batch.world == 1 or machine.strategy == "ddp" or (machine.strategy == "auto" and not wide):
        return False
    against = [
        what
        for what, there in {
            f"`{job.kind}`": job.kind not in ("pretrain", "finetune"),
            "machine.compile": machine.compile,
            "machine.precision=16": machine.precision == "16",
            "a gradient cache (machine.micro_batch)": batch.passes > 1,
        }.items()
        if there
    ]
    if against and machine.strategy == "fsdp":
        raise UserError(f"machine.strategy=fsdp does not go with {against[0]}; leave that out, or use ddp")
    return not against


def sharding(world: int) -> ModelParallelStrategy:
    return ModelParallelStrategy(_shard, data_parallel_size=world, tensor_parallel_size=1)


def units(root: nn.Module) -> list[nn.Module]:
    """What is whole only while it computes: three quarters of each block. The rest is whole while `root` computes.

    A unit must be called as a module, as attn.qkv is not always (see `vit.Block`).
    """
    blocks: list[Any] = [m for m in root.modules() if isinstance(m, Block)]
    return [unit for block in blocks for unit in (block.attn.proj, block.mlp)]


def _shard(root: Any, mesh: DeviceMesh) -> Any:
    over = mesh["data_parallel"]
    # That what a unit returns must not be changed in place, which no block does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    for unit in units(root):
        fully_shard(unit, mesh=over)
    fully_shard(root, mesh=over)
    return root


@contextlib.contextmanager
def unsharded(root: nn.Module) -> Iterator[None]:
    """Hold the weights whole, for parts of `root` that are called by themselves; on every device alike."""
    if not isinstance(root, FSDPModule):
        yield
        return
    root.unshard()
    yield
    root.reshard()


def whole_weights(root: Any) -> dict[str, Any]:
    """The method's state dict as one device has it. To be called on every device: each has a part."""
    return {name: _whole(x) for name, x in root.method.state_dict().items()}


def whole_moments(optimizer: Any) -> dict[str, Any]:
    """The optimiser's state dict, likewise."""
    parts = optimizer.state_dict()
    state = {i: {k: _whole(x) for k, x in moments.items()} for i, moments in parts["state"].items()}
    return {**parts, "state": state}


def _whole(x: Any) -> Any:
    return x.full_tensor().cpu() if isinstance(x, DTensor) else x


def load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """What `whole_moments` gave, of any number of devices."""
    parameters = _parameters(optimizer)

    def part(x: Tensor, p: Tensor) -> Tensor:
        x = x.reshape(p.shape)  # version 0.1 had a scale without a dimension
        return distribute_tensor(x, p.device_mesh, p.placements) if isinstance(p, DTensor) else x

    moments = {
        i: {k: x if k == "step" else part(x, parameters[i]) for k, x in values.items()}
        for i, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})


def _parameters(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
