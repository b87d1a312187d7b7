"""The ledger: one JSON line for every number that was measured, with its provenance and cost."""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import warnings
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from .errors import RunFailed, UserError, full
from .paths import home
from .recipe import digest

Scale = Literal["tiny", "cifar", "paper"]
PERCENT = r"(knn|linprobe|attentive|finetune|knn_held_out)_top1|knn_top1_k\d+|top1|(bbox|mask)_ap\w*|miou|aacc|macc"
GEOMETRY = ("rankme", "effective_rank", "feature_std", "uniformity", "alignment", "cka")  # numbers without a unit


def _known(metric: str) -> str:
    if metric not in GEOMETRY and not re.fullmatch(PERCENT, metric):
        raise ValueError(f"'{metric}' is no metric of this suite")
    return metric


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Protocol(Part):
    name: str
    hash: str


class Cost(Part):
    """What something took; None where that is not known."""

    wall_s: float
    device_hours: float
    flops: float | None
    peak_memory_gib: float | None
    joules: float | None
    tuning: dict[str, Any] | None = None  # of the trials that chose a run's settings: trials, device_hours, flops


class Pretrain(Part):
    """The pre-training behind a number, as its own run.json tells it. From `data_fingerprint` on: None in old lines."""

    recipe_hash: str | None
    run: str | None
    data: str | None
    epochs: float | None
    images_seen: int | None
    batch: int | None
    data_fingerprint: str | None = None
    code: dict[str, Any] | None = None
    versions: dict[str, str] | None = None
    hardware: dict[str, Any] | None = None
    cost: Cost | None = None


class Record(Part):
    """One number. Accuracies are percentages, what GEOMETRY lists has no unit; stderr is over the n test images.

    `code`, `versions` and `hardware` are the evaluation's, `pretrain` has those of the pre-training. `cost` is of both
    together, `pretrain.cost` the pre-training's share. `weights_sha256` is of the encoder as it was pre-trained,
    `head_sha256` of what the evaluation trained, if it did: a probe's heads, a fine-tuned model, a detector.
    """

    id: str
    created: str
    metric: Annotated[str, AfterValidator(_known)]
    dataset: str
    value: float
    stderr: float | None
    n: int | None
    method: str
    preset: str | None
    arch: str
    protocol: Protocol
    pretrain: Pretrain
    weights_sha256: str
    head_sha256: str | None = None
    data_fingerprint: str
    seed: int
    code: dict[str, Any]
    versions: dict[str, str]
    hardware: dict[str, Any]
    cost: Cost
    scale: Scale
    condition: dict[str, Any] = Field(default_factory=dict)

    @property
    def run_seed(self) -> int:
        """The pre-training's seed. `seed` is the evaluation's, which differs where it was asked for."""
        return int(self.condition.get("pretrain_seed", self.seed))


def ledger_folder() -> Path:
    return home() / "results" / "ledger"


def accuracy_stderr(percent: float, n: int) -> float:
    """The binomial standard error of an accuracy in percent over n images."""
    p = percent / 100
    return 100 * math.sqrt(p * (1 - p) / n)


def append(fields: dict[str, Any]) -> Record:
    """Add a number, and return its record."""
    record = Record(id="", **fields)
    record.id = digest(record.model_dump(mode="json", exclude={"id"}))
    append_line(ledger_folder() / f"{record.method}.jsonl", (record.model_dump_json() + "\n").encode())
    return record


def append_line(path: Path, line: bytes) -> None:
    """One write of one line under a lock: two processes never interleave, and a full disk leaves no part of it.

    A line that was left unfinished, by a process that was killed while it wrote, is set aside with a warning.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b", buffering=0) as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        before = _heal(path, f)
        if f.write(line) < len(line):  # the disk is full
            f.truncate(before)
            raise RunFailed(full(path))
        os.fsync(f.fileno())


def _heal(path: Path, f: BinaryIO) -> int:
    """Make the open ledger file end with a whole line, and return its length."""
    f.seek(0)
    content = f.read()
    body = content.rstrip()
    start = body.rfind(b"\n") + 1
    last = body[start:]
    if not _is_torn(last):
        missing = b"" if content.endswith(b"\n") or not last else b"\n"
        return len(content) + f.write(missing)
    aside = path.with_suffix(".torn")
    with open(aside, "ab") as torn:
        torn.write(last + b"\n")
        torn.flush()
        os.fsync(torn.fileno())
    f.truncate(start)
    warnings.warn(f"the last line of {path} was never finished; it is set aside in {aside}", stacklevel=3)
    return start


def _is_torn(line: bytes) -> bool:
    """Whether it is the beginning of a record, and not the whole of one."""
    try:
        json.loads(line)
    except ValueError:
        return line.startswith(b"{")
    return False


def checked(fields: dict[str, Any]) -> Record:
    """The record of a ledger line as it was read. ValueError where it is none, or not the one that was written."""
    record = Record.model_validate(fields)
    written = {k: v for k, v in fields.items() if k != "id"}
    known, epochs = {digest(written)}, record.pretrain.epochs
    if epochs is not None and epochs.is_integer():  # version 0.1 took the digest before they became a float
        known.add(digest({**written, "pretrain": {**written["pretrain"], "epochs": int(epochs)}}))
    if record.id not in known:
        raise ValueError(f"its id {record.id} is not that of its content: the line was changed after it was written")
    return record


def read(folder: Path | None = None) -> list[Record]:
    """Every number of every ledger file. A line that is not ours is an error that names file and line.

    A last line that was never finished is left out with a warning; `append` sets it aside.
    """
    records: list[Record] = []
    seen: dict[str, str] = {}
    for path in sorted((folder or ledger_folder()).glob("*.jsonl")):
        lines = [(n, line) for n, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()]
        if lines and _is_torn(lines[-1][1]):
            warnings.warn(f"{path}, line {lines.pop()[0]} was never finished: its number is left out", stacklevel=2)
        for number, line in lines:
            try:
                record = checked(json.loads(line))
            except ValueError as e:
                why = (
                    "; ".join(f"{'.'.join(map(str, x['loc'])) or 'line'}: {x['msg']}" for x in e.errors()[:3])
                    if isinstance(e, ValidationError)
                    else str(e)
                )
                raise UserError(
                    f"{path}, line {number} is not a ledger record ({why}); mend or remove the line"
                ) from None
            if record.id in seen:
                raise UserError(f"{path}, line {number} repeats record {record.id} of {seen[record.id]}; remove one")
            seen[record.id] = f"{path}, line {number}"
            records.append(record)
    return records
