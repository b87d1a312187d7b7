"""The run folder to those who read it: run.json, recipe.yaml, weights on the way, and whose it is.

Without Fabric, which takes as long to import as torch, and which only training needs.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import warnings
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ..errors import UserError


def milestone(folder: Path, share: float) -> Path:
    """Where the weights at that share of a run are kept."""
    return folder / f"weights@{share:g}.safetensors"


class Costs(BaseModel):
    """What run.json says of the cost of a run."""

    model_config = ConfigDict(extra="allow", strict=True)

    wall_s: float | int | None = None
    device_hours: float | int | None = None
    flops: float | int | None = None
    peak_memory_gib: float | int | None = None
    joules: float | int | None = None
    images_seen: int | None = None


class Pretrained(BaseModel):
    """What run.json of an evaluation says of the pre-training."""

    model_config = ConfigDict(extra="allow", strict=True)

    recipe_hash: str | None
    run: str | None
    data: str | None
    epochs: float | int | None
    images_seen: int | None
    batch: int | None


class Facts(BaseModel):
    """What run.json of an evaluation says of the encoder that it is of."""

    model_config = ConfigDict(extra="allow", strict=True)

    method: str
    arch: str
    preset: str | None
    pretrain: Pretrained
    cost: Costs


class Kept(BaseModel):
    """What run.json says of weights that were kept on the way."""

    model_config = ConfigDict(extra="allow", strict=True)

    share: float
    step: int
    cost: Costs
    weights_sha256: str
    file_sha256: str


class RunFile(BaseModel):
    """What is read of run.json, where it is there; a file that was edited by hand or torn may hold anything."""

    model_config = ConfigDict(extra="allow", strict=True)

    status: str = ""
    kind: str = "pretrain"
    created: str = ""
    updated: str = ""
    method: str = ""
    preset: str | None = None
    arch: str = ""
    data: str | None = None
    recipe_hash: str | None = None
    seed: int = Field(0, ge=0)
    data_fingerprint: str = ""
    weights_sha256: str = ""
    step: int = Field(0, ge=0)
    steps_total: int | None = Field(0, ge=0)  # None: the clock ends it
    kept: dict[str, Kept] = {}
    resumed: int = Field(0, ge=0)
    hardware: dict[str, Any] = {}
    cost: Costs = Costs()
    protocol: dict[str, str] = {}
    subject: Facts | None = None
    record: dict[str, Any] | None = None
    records: list[dict[str, Any]] = Field([{}], min_length=1)


# What a finished run has said; `cost` with its wall time.
FINISHED = ("arch", "recipe_hash", "seed", "data_fingerprint", "weights_sha256", "cost")


class Said(BaseModel):
    """What an evaluation reads of the recipe that lies beside weights."""

    model_config = ConfigDict(strict=True)

    epochs: float | int | None = None
    batch_size: int | None = None
    data: dict[str, Any] = {}


def read_science(path: Path) -> dict[str, Any]:
    """`science` of the recipe.yaml of a run folder: {"epochs", "batch_size", "data": {"spec"}}, each where it is."""
    from ..recipe import load_yaml  # which imports torch, as `list runs` need not

    science = load_yaml(path).get("science")
    try:
        said = Said.model_validate(science)
        spec = TypeAdapter(str | None).validate_python(said.data.get("spec"), strict=True)
    except ValidationError as e:
        error = e.errors()[0]
        key = ".".join(map(str, ("science", *error["loc"])))
        raise UserError(f"{path} is not what a run writes ({key}: {error['msg']}); mend it, or remove it") from None
    return {"epochs": said.epochs, "batch_size": said.batch_size, "data": {"spec": spec}}


def read_run(folder: Path) -> dict[str, Any]:
    """run.json, or {} where the folder holds no run. A folder with other things in it is refused.

    UserError names the file and the key that is not what a run writes.
    """
    path = folder / "run.json"
    if path.is_file():
        try:
            run = json.loads(path.read_text())
            RunFile.model_validate(run)
        except ValidationError as e:
            where = ".".join(map(str, e.errors()[0]["loc"]))
            wrong = f"{where}: {e.errors()[0]['msg']}, found {str(e.errors()[0]['input'])[:60]}"
            raise UserError(f"{path} is not what a run writes ({wrong}); mend it, or remove its folder") from None
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path} is not readable ({e}); mend it, or remove its folder") from None
        lacking = [key for key in FINISHED if key not in run] if run.get("status") == "finished" else []
        if lacking or (run.get("status") == "finished" and run["cost"].get("wall_s") is None):
            raise UserError(
                f"{path} is not what a finished run writes (it lacks {', '.join(lacking or ['cost.wall_s'])}); mend "
                f"it, or remove its folder"
            )
        return run
    ours = (".lock", "recipe.yaml", "slurm")  # and what a killed run was about to write
    if folder.is_dir() and any(p.name not in ours and p.suffix != ".part" for p in folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no run; choose another folder with --out")
    return {}


def check_same(identity: dict[str, Any], previous: dict[str, Any], folder: Path) -> None:
    """A run folder belongs to one recipe and seed."""
    for key, value in identity.items():
        if previous and previous.get(key) != value:
            raise UserError(
                f"{folder} holds a run of another recipe ({key} {previous.get(key)}, this one {value}); choose "
                f"another folder with --out, or give the settings that run was started with ({folder}/recipe.yaml)"
            )


def hold(folder: Path) -> int:
    """A lock on the run folder for as long as this process lives."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"another process is training in {folder}") from None
    except OSError as e:
        if e.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        warnings.warn(  # a lock file of our own would outlive a killed run, which the same command is to resume
            f"the file system of {folder} has no locks ({e.strerror}), so nothing keeps a second process from training "
            f"there: see to it that only one does",
            stacklevel=2,
        )
    return descriptor
