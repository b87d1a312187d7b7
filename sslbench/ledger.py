"""The ledger: one JSON line for every number that was measured, with its provenance and cost."""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from .errors import RunFailed, UserError, full
from .paths import home
from .recipe import digest

Scale = Literal["tiny", "cifar", "paper"]
METRICS = r"(knn|linprobe|finetune)_top1|knn_top1_k\d+|top1|(bbox|mask)_ap\w*|miou|aacc|macc"


def _known(metric: str) -> str:
    if not re.fullmatch(METRICS, metric):
        raise ValueError(f"'{metric}' is no metric of this suite")
    return metric


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Protocol(Part):
    name: str
    hash: str


class Pretrain(Part):
    recipe_hash: str | None
    run: str | None
    data: str | None
    epochs: float | None
    images_seen: int | None
    batch: int | None


class Cost(Part):
    """What the evaluation and the pre-training behind it took, together."""

    wall_s: float
    device_hours: float
    flops: float | None
    peak_memory_gib: float | None
    joules: float | None


class Record(Part):
    """One number. Accuracies are percentages; stderr is over the n test images."""

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
    """Add a number, and return its record. One write of one line under a lock: two processes never interleave."""
    record = Record(id=digest(fields), **fields)
    folder = ledger_folder()
    folder.mkdir(parents=True, exist_ok=True)
    path, line = folder / f"{record.method}.jsonl", (record.model_dump_json() + "\n").encode()
    with open(path, "ab", buffering=0) as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        before = f.seek(0, os.SEEK_END)
        if f.write(line) < len(line):  # the disk is full
            f.truncate(before)
            raise RunFailed(full(path))
        os.fsync(f.fileno())
    return record


def read(folder: Path | None = None) -> list[Record]:
    """Every number of every ledger file. A line that is not ours is an error that names file and line."""
    records: list[Record] = []
    seen: dict[str, str] = {}
    for path in sorted((folder or ledger_folder()).glob("*.jsonl")):
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                record = Record.model_validate(json.loads(line))
            except (ValueError, ValidationError) as e:
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
