"""`sslbench export`: an encoder as a file or a folder that others load, with no converter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from .. import ledger
from ..errors import UserError
from ..evaluate.features import Subject, open_subject
from ..evaluate.hugging_face import CARD, FILES, write_folder
from ..files import write_atomically
from ..report.card import card
from ..report.tables import UNTRAINED
from ..vit import PLAIN
from ..weights import write_weights

FORMATS = ("timm", "safetensors", "hf")


def export(run: str, format: str, out: Path | None, push: str | None, console: Console) -> dict[str, Any]:
    """Write the encoder beside its run, or to `--out`.

    `timm` (a .safetensors file, or the folder to put it in): for `timm.create_model(name, checkpoint_path=file,
    **kwargs)`; the call is printed and stored in the file's metadata. `safetensors`: the same tensors with the suite's
    own metadata. `hf`: a folder that transformers loads. push: a repository of the Hugging Face hub that gets it.
    """
    if format not in FORMATS:
        raise UserError(f"unknown format '{format}'; known: {', '.join(FORMATS)}")
    if push and format != "hf":
        raise UserError("--push sends what the Hugging Face hub shows: give --format hf")
    hub = _hub(push) if push else None
    subject = open_subject(run)
    if subject.method == UNTRAINED:
        raise UserError(f"'{run}' is random weights; nothing to export")
    if format == "hf":
        return _to_transformers(subject, out, push, hub, console)
    return _to_file(subject, run, format, out, console)


def _to_transformers(
    subject: Subject, out: Path | None, push: str | None, hub: Any, console: Console
) -> dict[str, Any]:
    """Write the folder, with the model card that the ledger gives; hub: what uploads it to `push`."""
    folder = out or _beside(subject) / f"{_stem(subject)}_hf"
    if folder.is_dir() and (others := sorted(p.name for p in folder.iterdir() if p.name not in FILES)):
        raise UserError(f"{folder} holds other files ({', '.join(others[:3])}); give a new folder with --out")
    records = ledger.read()
    write_folder(subject, folder)
    write_atomically(folder / CARD, card(subject, records, push or folder.name).encode())
    call = f'transformers.AutoModel.from_pretrained("{folder}")'
    console.print(str(folder), markup=False)
    console.print(call, markup=False)
    answer = {"folder": str(folder), "format": "hf", "model": "ViTModel", "call": call}
    return {**answer, "pushed": _upload(hub, push, folder, console)} if push else answer


def _hub(repo: str) -> Any:
    """What uploads to the hub. UserError where its library is not installed, or no repository can be called that."""
    try:
        import huggingface_hub
    except ImportError:
        raise UserError("--push needs huggingface-hub: pip install 'sslbench[hf]'") from None
    try:
        huggingface_hub.utils.validate_repo_id(repo)
    except ValueError as e:
        raise UserError(f"--push {repo}: expected NAME/MODEL on the hub ({' '.join(str(e).split())})") from None
    return huggingface_hub.HfApi()


def _upload(hub: Any, repo: str, folder: Path, console: Console) -> str:
    """Make the repository where there is none, and upload: its page's address. UserError: the hub does not take it."""
    try:
        url = str(hub.create_repo(repo, exist_ok=True))
        hub.upload_folder(
            repo_id=repo, folder_path=folder, allow_patterns=list(FILES), commit_message="Exported by sslbench"
        )
    except Exception as e:  # network, login and rights: the hub's client raises many kinds
        raise UserError(
            f"--push {repo}: the hub does not take it ({' '.join(str(e).split())[:200]}); `hf auth login` logs in, and "
            f"{folder} is written: the same command pushes it again"
        ) from None
    console.print(f"pushed to {url}", markup=False)
    return url


def _beside(subject: Subject) -> Path:
    """Where an export goes that nobody says a place for."""
    return subject.path.parent if subject.path else Path()


def _stem(subject: Subject) -> str:
    return subject.path.parent.name if subject.path and subject.run else subject.method


def _to_file(subject: Subject, run: str, format: str, out: Path | None, console: Console) -> dict[str, Any]:
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
    target = out or _beside(subject)
    if target.suffix != ".safetensors":
        target = target / f"{_stem(subject)}_{format}.safetensors"
    write_weights(target, subject.encoder.state_dict(), metadata)
    arguments = ", ".join(f"{k}={v!r}" for k, v in kwargs.items())
    call = f'timm.create_model("{name}", checkpoint_path="{target}", {arguments})'
    console.print(str(target), markup=False)
    console.print(call, markup=False)
    return {"file": str(target), "format": format, "model": name, "kwargs": kwargs, "call": call}
