"""`sslbench export`: an encoder as a file that others load, with no converter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import UserError
from ..evaluate.features import open_subject
from ..files import write_weights
from ..report.tables import UNTRAINED
from ..vit import PLAIN


def export(run: str, format: str, out: Path | None, console: Console) -> dict[str, Any]:
    """Write the encoder beside its run, or to `--out` (a folder or a .safetensors file).

    `timm`: for `timm.create_model(name, checkpoint_path=file, **kwargs)`; the call is printed and stored in the
    file's metadata. `safetensors`: the same tensors with the suite's own metadata.
    """
    if format not in ("timm", "safetensors"):
        raise UserError(f"unknown format '{format}'; known: timm, safetensors")
    subject = open_subject(run)
    if subject.method == UNTRAINED:
        raise UserError(f"'{run}' is random weights; nothing to export")
    if subject.encoder.parts != PLAIN:
        raise UserError(f"'{run}' is no plain ViT, it has {subject.encoder.parts}: give others its own file")
    name, kwargs = subject.encoder.arch.timm, subject.encoder.arch.timm_kwargs(subject.encoder.image[0])
    metadata = {"timm_kwargs": json.dumps(kwargs)}
    if format == "timm":
        metadata |= {"format": "pt", "architecture": name, "source": subject.method}
    else:
        own = {"recipe_hash": subject.run["recipe_hash"]} if "recipe_hash" in subject.run else {}
        metadata |= {
            "arch": subject.arch,
            "image_size": str(subject.encoder.image[0]),
            "method": subject.method,
            "pool": subject.pool,
            "mean": json.dumps(subject.mean),
            "std": json.dumps(subject.std),
            "timm": name,
            **own,
        }
    target = out or (subject.path.parent if subject.path else Path())
    if target.suffix != ".safetensors":
        stem = subject.path.parent.name if subject.path and subject.run else subject.method
        target = target / f"{stem}_{format}.safetensors"
    write_weights(target, subject.encoder.state_dict(), metadata)
    arguments = ", ".join(f"{k}={v!r}" for k, v in kwargs.items())
    call = f'timm.create_model("{name}", checkpoint_path="{target}", {arguments})'
    console.print(str(target), markup=False)
    console.print(call, markup=False)
    return {"file": str(target), "format": format, "model": name, "kwargs": kwargs, "call": call}
