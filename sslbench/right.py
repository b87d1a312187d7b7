"""Which test images a number had right: results/right/METHOD.jsonl, beside the ledger, for tests of two runs on the
same images. A line a record: its id, how many images, and a bit each, compressed."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .files import append_line
from .paths import home


def right_folder() -> Path:
    return home() / "results" / "right"


def keep(method: str, id: str, right: np.ndarray) -> None:
    """Which images the record of that id has right: (N,) booleans, in the order of the test images."""
    bits = base64.b85encode(zlib.compress(np.packbits(right).tobytes(), 9)).decode()
    line = json.dumps({"id": id, "n": len(right), "bits": bits}) + "\n"
    append_line(right_folder() / f"{method}.jsonl", line.encode())


def read(ids: Iterable[str]) -> dict[str, np.ndarray]:
    """{record id: booleans (N,)} of those that are kept. A line that is torn or not ours is passed over: what it said
    can be measured again, and no number hangs on it."""
    wanted, right = set(ids), {}
    for path in sorted(right_folder().glob("*.jsonl")):
        for line in path.read_bytes().splitlines():
            try:
                entry = json.loads(line)
                if entry["id"] in wanted:
                    bits = np.frombuffer(zlib.decompress(base64.b85decode(entry["bits"])), np.uint8)
                    right[entry["id"]] = np.unpackbits(bits, count=entry["n"]).astype(bool)
            except (ValueError, KeyError, TypeError, zlib.error):
                continue
    return right
