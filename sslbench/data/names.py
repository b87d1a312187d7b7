"""What a data SPEC is called, in names of runs, in hashes and in the ledger."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ..plugin import is_plugin


def data_name(spec: str) -> str:
    """What a data SPEC is called in names and hashes: without the folder it lies in. `npz:/a/b.npz` -> `b`."""
    parts = []
    for part in spec.split("+"):
        kind, _, where = part.partition(":")
        if kind == "packed":
            parts.append(_packed_name(Path(where).expanduser()))
            continue
        if is_plugin(part):
            kind = where
        name = Path(where).stem if kind in ("npz", "folder", "wds", "hfds") and where else kind
        if kind in ("folder", "imagenet") and "@" in where:  # PATH@FILE: what FILE lists
            name = Path(where.rpartition("@")[2]).stem
        name = re.sub(r"_(train|test|val)$", "", name)
        parts.append(re.sub(r"[^A-Za-z0-9.-]+", "-", name) or kind)
    return "+".join(parts)


def _packed_name(path: Path) -> str:
    """The name of the set that `sslbench data pack` put there, with its size where images were shrunk for it."""
    try:
        return json.loads((path / "pack.json").read_text())["name"]
    except (OSError, ValueError, KeyError, TypeError):  # opening the set says what is wrong
        return path.stem


def unpacked_name(name: str) -> str:
    """imagenet-256px -> imagenet"""
    return re.sub(r"(-\d+px)+$", "", name)
