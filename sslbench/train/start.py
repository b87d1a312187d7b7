"""Weights that a pre-training starts from: `science.init`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..method import Method
from ..vit import Arch, VisionTransformer, resample_positions


@dataclass(frozen=True)
class Start:
    """An encoder that was trained before, perhaps with its decoder, and what it is."""

    encoder: dict[str, Tensor]  # timm's names
    arch: Arch
    grid: tuple[int, int]  # that its positions are for
    decoder: dict[str, Tensor] = field(default_factory=dict)  # as our Decoder names them; {} without
    unused: tuple[str, ...] = ()  # what else the file has
    facts: dict[str, Any] = field(default_factory=dict)  # for run.json: source, sha256, method, data, epochs, cost

    def check(self, arch_name: str, arch: Arch) -> None:
        """UserError where an encoder of this arch cannot take it up."""
        mine, theirs = ((a.patch, a.dim, a.depth, a.heads) for a in (arch, self.arch))
        if mine != theirs:
            raise UserError(
                f"science.init: {self.facts['source']} is a ViT of {_said(self.arch)}, and {arch_name} one of "
                f"{_said(arch)}; give the arch of the weights, or other weights"
            )

    @torch.no_grad()
    def apply(self, method: Method) -> tuple[list[str], list[str]]:
        """Lay the weights into a new method: into its encoder, each copy that follows it, and its decoder where that is
        of the same shape. Returns the names of (modules that start new, tensors of the file that are not used)."""
        for module in method.modules():
            if isinstance(module, VisionTransformer):
                table = resample_positions(self.encoder["pos_embed"], self.grid, module.grid)
                module.load_state_dict({**self.encoder, "pos_embed": table})
        taken = self._decoder(method)
        followers = {id(p) for m in method.modules() if isinstance(m, VisionTransformer) for p in m.parameters()}
        new = {k.partition(".")[0] for k, p in method.named_parameters() if id(p) not in followers and k not in taken}
        left = [] if taken else [f"decoder.{k}" for k in self.decoder]
        return sorted(new), [*left, *self.unused]

    def _decoder(self, method: Method) -> set[str]:
        """The names of the method's tensors that got the file's; none, or all but its positions."""
        mine = method.state_dict()
        theirs = {f"decoder.{k}": x for k, x in self.decoder.items()}
        wanted = {k for k in mine if k.startswith("decoder.") and k != "decoder.pos_embed"}
        if not wanted or any(k not in theirs or mine[k].shape != theirs[k].shape for k in wanted):
            return set()
        method.load_state_dict({k: theirs[k] for k in wanted}, strict=False)
        return wanted | {"decoder.pos_embed"}


def _said(a: Arch) -> str:
    return f"patch {a.patch}, width {a.dim}, {a.depth} blocks and {a.heads} heads"
