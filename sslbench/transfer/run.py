"""`sslbench transfer`: train an encoder with a head on dense labels, score it, and its numbers into the ledger."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from ..data.dense import find_data
from ..data.loader import seed_of
from ..errors import UserError
from ..evaluate.features import Subject, newest_run, open_subject, read_safetensors
from ..evaluate.run import in_ledger, same_images, same_subject
from ..evaluate.told import NOTHING, Told
from ..files import check_weights, digest, hashes, write_json, write_weights
from ..ledger import Measurement, Record, Scale, to_ledger
from ..paths import home
from ..provenance import Spent
from ..recipe import Batch
from ..train.launch import leave_the_others
from ..train.loop import fit, make_fabric
from ..train.run import read_run
from .protocol import TransferRecipe, check_encoder

EXTRA = "pip install 'sslbench[transfer]', or in a clone pip install -e '.[transfer]'"
PARTS = ("models", "datasets", "evaluation", "visualization")  # of mmdet and mmseg


@dataclass
class Split:
    """A data set of mmdet or mmseg, with what the suite asks of one."""

    name: str
    split: str
    dataset: Any
    fingerprint: str
    said: list[str] = field(default_factory=list)  # what was mended in it, or decided

    def __len__(self) -> int:
        return len(self.dataset)


def require() -> None:
    """Make the mm libraries importable, or a UserError that says what to install."""
    try:
        with quiet():
            importlib.import_module("mmengine")
            importlib.import_module(".ops", __package__).install()
            for name in ("mmcv.ops", "pycocotools.coco", *(f"{a}.{b}" for a in ("mmdet", "mmseg") for b in PARTS)):
                importlib.import_module(name)
    except ModuleNotFoundError as e:
        raise UserError(f"transfer needs the mm libraries, and '{e.name}' is not installed: {EXTRA}") from None
    except ImportError as e:
        hint = "install the system's libGL (apt-get install libgl1 libglib2.0-0)" if "lib" in str(e) else EXTRA
        raise UserError(f"the mm libraries are installed but do not load ({e}): {hint}") from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what mm libraries and pycocotools print: standard output is ours."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def scope_of(task: Any) -> Iterator[None]:
    """Where mm libraries look names up for that module of a task: mmdet or mmseg; quietly."""
    from mmengine.registry import DefaultScope

    with quiet(), DefaultScope.overwrite_default_scope(task.SCOPE):
        yield


def fingerprint_of(recipe: TransferRecipe, data: str | None) -> str:
    """Which images `transfer` would score. UserError where that, or a library, is not there."""
    require()
    task = importlib.import_module(f".{recipe.science.protocol}", __package__)
    root = find_data(recipe.science.protocol, data)
    with scope_of(task):
        return task.open_data(root, recipe.science)[1].fingerprint


class TransferJob:
    """One recipe on one encoder and one data set, for `fit`."""

    too_large = "use --set science.batch_size="

    def __init__(self, recipe: TransferRecipe, subject: Subject, root: Path) -> None:
        s = recipe.science
        self.task = importlib.import_module(f".{s.protocol}", __package__)
        self.recipe, self.science, self.machine, self.subject = recipe, s, recipe.machine, subject
        self.kind, self.optim, self.seed, self.batch_size = s.protocol, s.optim, s.seed, s.batch_size
        self.depth, self.label = subject.encoder.arch.depth, f"{s.protocol} {subject.method} {subject.arch}"
        self.patch = subject.encoder.arch.patch
        if self.patch % 4:
            raise UserError(
                f"{subject.arch} has patch {self.patch}; the pyramid halves it twice, so it must be a multiple of 4"
            )
        check_encoder(subject.encoder, s.encoder)
        with self.scope():
            self.train, self.val = self.task.open_data(root, s)
        self.spec = self.train.name
        self.protocol = {"name": recipe.name, "hash": recipe.protocol_hash()}
        hash = digest([self.protocol["hash"], subject.sha256, self.spec, self.train.fingerprint])
        self.identity = {"arch": subject.arch, "recipe_hash": hash, "seed": s.seed}
        origin = subject.path.parent.name if subject.run and subject.path else subject.name
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", origin)
        self.folder_name = f"{self.kind}_{stem}_{hash[:8]}" + (f"_s{s.seed}" if s.seed else "")

    def batch(self) -> Batch:
        return Batch.divide(self.batch_size, self.machine)

    def data(self) -> Split:
        return self.train

    def total(self, batch: int) -> int:
        """Iterations."""
        s = self.science
        return s.iterations or max(1, round(len(self.train) // batch * (s.epochs or 0)))

    def build(self, synchronised: bool = False) -> nn.Module:
        """The detector or segmentor, its heads drawn from the seed, its backbone the subject's encoder."""
        from mmengine.config import ConfigDict
        from mmengine.registry import MODELS

        torch.manual_seed(seed_of("weights", self.seed))
        config = self.task.model(self.science, self.subject, self.machine, synchronised, len(self.classes))
        with self.scope():
            model = MODELS.build(ConfigDict(config))
            model.init_weights()
        return model

    def scope(self) -> contextlib.AbstractContextManager[None]:
        """Where mm libraries look names up: mmdet or mmseg; quietly."""
        return scope_of(self.task)

    def flops_per_image(self) -> None:
        """None before the first iteration, which counts it: what the heads compute depends on what they find there."""

    def info(self) -> dict[str, Any]:
        return {
            "method": self.subject.method,
            "data": self.spec,
            "recipe": self.recipe.name,
            "protocol": self.protocol,
            "subject": self.subject.facts(),
            **self.identity,
        }

    def save_weights(self, path: Path, model: nn.Module) -> None:
        metadata = {"kind": self.kind, "science": self.science.model_dump_json(), "classes": json.dumps(self.classes)}
        write_weights(path, model.state_dict(), metadata)

    @property
    def classes(self) -> list[str]:
        return list(self.val.dataset.metainfo["classes"])


def transfer(
    recipe: TransferRecipe,
    run: str | None,
    data: str | None,
    console: Console,
    tuning: dict[str, Any] | None = None,
    told: Told = NOTHING,
) -> dict[str, Any]:
    """The ledger record of the main number. A finished run folder gives the number that it has.

    tuning: what it took to choose the settings of RUN, for the numbers' cost. told: what public weights are.
    """
    require()
    kind = recipe.science.protocol
    root = find_data(kind, data)
    if run is None:
        run = str(newest_run())
        console.print(f"the newest finished run: {run}")
    subject = open_subject(run, recipe.science.seed, told=told)
    if note := subject.note():
        console.print(note, markup=False)
    console.print(f"looking at every photograph and label of {root}", markup=False)
    job = TransferJob(recipe, subject, root)
    for said in (*job.train.said, *job.val.said):
        console.print(said, markup=False)
    folder = home() / "runs" / job.folder_name
    console.print(f"{folder}: batch {job.batch()}, {job.total(job.batch_size)} iterations, {len(job.train)} images")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = fit(job, folder, console, by=importlib.import_module(".runner", __package__).train)  # type: ignore[arg-type]
        if not leave_the_others():
            return {}
        info = read_run(folder)
        known = info.get("records") and same_images(info["records"][0], job.val)
        if known and same_subject(info["records"][0], subject):
            console.print(f"{folder} is finished: the numbers below are those it has in the ledger")
            records = [in_ledger(r, folder) for r in info["records"]]
        else:
            console.print(f"{done}; scoring {len(job.val)} validation images")
            records = score(job, folder, info, tuning)
    for r in records:
        console.print(f"{r.metric:10} {r.value:6.2f} %  {r.dataset}, n={r.n}, {r.protocol.name}")
    return records[0].model_dump(mode="json")


def score(job: TransferJob, folder: Path, info: dict[str, Any], tuning: dict[str, Any] | None = None) -> list[Record]:
    """Test the weights of `folder` on val, once, and append what was found; the main number comes first."""
    fabric = make_fabric(job.machine.model_copy(update={"devices": 1, "nodes": 1}))
    spent = Spent(fabric.device.type)
    model = job.build()
    weights = folder / "weights.safetensors"
    check_weights(weights, info)
    info |= hashes(weights)
    tensors, _ = read_safetensors(weights)
    model.load_state_dict(tensors)
    with job.scope():
        values, condition = job.task.score(job, model.to(fabric.device), folder, fabric)
    encoder, cost = job.subject.facts(), spent.after(info["cost"])
    condition = {**condition, "eval_run": folder.name}
    size = job.task.image_size(job.science)
    scale: Scale = "paper" if job.spec == job.kind and size >= 512 else "tiny"
    records = [
        to_ledger(
            Measurement(
                metric=metric,
                value=value,
                images=job.val,
                data=job.spec,
                protocol=job.protocol,
                condition=condition,
                seed=job.seed,
                image_size=size,
                encoder=encoder,
                spent=cost,
                trained=info,
                accuracy=False,
                scale=scale,
                tuning=tuning,
            )
        )
        for metric, value in values.items()
    ]
    write_json(folder / "run.json", {**info, "records": [r.model_dump(mode="json") for r in records]})
    with job.scope(), torch.inference_mode():
        job.task.draw(job, model.eval(), folder)
    return records
