"""The ledger: one JSON line for every number that was measured, with its provenance and cost."""

from __future__ import annotations

import json
import math
import re
import typing
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from . import provenance
from .data import data_name, unpacked_name
from .device import default_device
from .errors import UserError
from .files import append_line, digest, is_torn
from .paths import home
from .right import keep

Scale = Literal["tiny", "cifar", "paper"]
PERCENT = (
    r"(knn|linprobe|attentive|finetune|knn_held_out|function)_top1|knn_top1_k\d+|top1|(bbox|mask)_ap\w*|miou|aacc|macc|"
    r"(segprobe|segknn)_(miou|aacc)"
)
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
    cost: Cost | None = None  # with that of `init`; its FLOPs are None where those of `init` are not known
    init: dict[str, Any] | None = None  # the weights that it started from: source, sha256, method, data, epochs, cost


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

    @property
    def public(self) -> bool:
        """Whether the weights are others', published: method and pre-training are as they were told."""
        return self.condition.get("weights") == "public"


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


class Measured(typing.Protocol):
    """What a number was measured on."""

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...


@dataclass
class Measurement:
    """A number as an evaluation has it: what it is, of what, and what it took."""

    metric: str
    value: float | Tensor  # the number; or which of the images are right (N,), whose percentage it is
    images: Measured
    data: str  # the SPEC that they were opened by
    protocol: dict[str, str]  # name, hash
    condition: dict[str, Any]
    seed: int  # of the evaluation
    image_size: int  # pixels a side of the views
    encoder: dict[str, Any]  # `Subject.facts`: where it comes from, and what it cost
    spent: dict[str, Any]  # on the evaluation, as `Spent.after` tells it
    trained: dict[str, Any] = field(default_factory=dict)  # run.json of what the evaluation trained, if it did
    accuracy: bool = True  # a share of the images, which has a binomial standard error; others have `stderr`
    stderr: float | None = None
    scale: Scale | None = None  # None: what data and image_size say
    tuning: dict[str, Any] | None = None  # what it took to choose the settings of the pre-training


def to_ledger(m: Measurement) -> Record:
    """Add the number, with the code and the machine that computed it; where images were right or wrong, keep which."""
    right = m.value.numpy() if isinstance(m.value, Tensor) else None
    value = 100 * m.value.double().mean().item() if isinstance(m.value, Tensor) else m.value
    pretraining, device = _of_pretraining(m.encoder["cost"]), default_device().type
    record = append(
        {
            "created": provenance.now(),
            "metric": m.metric,
            "dataset": data_name(m.data),
            "value": value,
            "stderr": accuracy_stderr(value, len(m.images)) if m.accuracy else m.stderr,
            "n": len(m.images),
            **{k: m.encoder[k] for k in ("method", "preset", "arch")},
            "pretrain": {**m.encoder["pretrain"], "cost": pretraining},
            "protocol": m.protocol,
            "weights_sha256": m.encoder["sha256"],
            "head_sha256": m.trained.get("weights_sha256"),
            "data_fingerprint": m.images.fingerprint,
            "seed": m.seed,
            "code": provenance.code(),
            "versions": provenance.versions(),
            "hardware": m.trained.get("hardware") or provenance.hardware(device),
            "cost": {**_together(pretraining, m.spent, provenance.peak_memory_gib(device)), "tuning": m.tuning},
            "scale": m.scale or scale_of(m.encoder["pretrain"]["data"] or data_name(m.data), m.image_size),
            "condition": {**m.condition, **_of_encoder(m.encoder, m.seed)},
        }
    )
    if right is not None:
        keep(record.method, record.id, right)
    return record


def _of_pretraining(cost: dict[str, Any]) -> dict[str, Any] | None:
    """What the encoder cost; None of public weights, which do not tell."""
    return None if cost.get("wall_s") is None else {"joules": None, **cost}


def _together(pretraining: dict[str, Any] | None, evaluation: dict[str, Any], peak_gib: float) -> dict[str, Any]:
    """The cost of both; of public weights the evaluation's alone. peak_gib: of this process."""
    costs = [evaluation] if pretraining is None else [pretraining, evaluation]
    flops = [c["flops"] for c in costs if c.get("flops") is not None]
    joules = [c["joules"] for c in costs]
    return {
        "wall_s": sum(c["wall_s"] for c in costs),
        "device_hours": sum(c.get("device_hours") or 0.0 for c in costs),
        "flops": sum(flops) if flops else None,
        "peak_memory_gib": max(peak_gib, *(c.get("peak_memory_gib") or 0.0 for c in costs)),
        "joules": None if None in joules else sum(joules),
    }


def _of_encoder(encoder: dict[str, Any], seed: int) -> dict[str, Any]:
    """What of the encoder is a condition of the number: a schedule that had not ended, public weights, another seed."""
    condition = {}
    if (share := encoder.get("milestone")) is not None:
        condition["milestone"] = share
    if encoder.get("public"):
        condition["weights"] = "public"
    if encoder.get("seed") not in (None, seed):
        condition["pretrain_seed"] = encoder["seed"]
    return condition


# Sets of photographs: the papers', and what public weights were trained on.
FULL_SIZE = {"imagenet", "imagenet100", "coco", "imagenette", "imagewoof", "ade20k", "inat18", "inat19", "flowers102",
             "imagenet22k", "lvd142m"}  # fmt: skip


def scale_of(pretrain_data: str, image_size: int) -> Scale:
    """tiny: the built-in subset, or what is unknown. cifar: small images. paper: a paper's set at full size."""
    parts = {unpacked_name(part) for part in pretrain_data.split("+")}
    if image_size >= 224 and parts <= FULL_SIZE:
        return "paper"
    return "tiny" if pretrain_data == "builtin" or image_size >= 224 else "cifar"


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
        if lines and is_torn(lines[-1][1]):
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
