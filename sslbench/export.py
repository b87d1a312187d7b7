"""`sslbench export`: an encoder as a file that others load, with no converter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes

from .errors import UserError
from .evaluate.features import open_subject
from .train.state import write_atomically


def export(run: str, format: str, out: Path | None, console: Console) -> dict[str, Any]:
    """Write the encoder beside its run, or to `--out` (a folder or a .safetensors file).

    `timm`: for `timm.create_model(name, checkpoint_path=file, **kwargs)`; the call is printed and stored in the
    file's metadata. `safetensors`: the same tensors with the suite's own metadata.
    """
    if format not in ("timm", "safetensors"):
        raise UserError(f"unknown format '{format}'; known: timm, safetensors")
    subject = open_subject(run)
    if subject.path is None:
        raise UserError(f"'{run}' has no weights file to export")
    with safe_open(subject.path, "pt") as f:
        metadata = f.metadata()
    name, kwargs = subject.encoder.arch.timm, subject.encoder.arch.timm_kwargs(subject.encoder.image[0])
    if format == "timm":
        metadata = {
            "format": "pt",
            "architecture": name,
            "timm_kwargs": json.dumps(kwargs),
            "source": metadata["method"],
        }
    target = (out or subject.path.parent) if out is None or out.suffix != ".safetensors" else out
    if target.suffix != ".safetensors":
        target = target / f"{subject.path.parent.name}_{format}.safetensors"
    write_atomically(target, safetensors_bytes(load_file(subject.path), metadata))
    arguments = ", ".join(f"{k}={v!r}" for k, v in kwargs.items())
    call = f'timm.create_model("{name}", checkpoint_path="{target}", {arguments})'
    console.print(str(target), markup=False)
    console.print(call, markup=False)
    return {"file": str(target), "format": format, "model": name, "kwargs": kwargs, "call": call}
