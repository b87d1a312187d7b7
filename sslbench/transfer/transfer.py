"""`sslbench transfer`: train an encoder with a head on dense labels, score it, and its numbers into the ledger."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..data.dense import find_data
from ..errors import UserError
from ..evaluate.evaluation import in_ledger, same_images, same_subject
from ..evaluate.features import newest_run, open_subject, read_safetensors
from ..evaluate.told import NOTHING, Told
from ..files import write_json
from ..ledger import Measurement, Record, Scale, to_ledger
from ..paths import home
from ..provenance import Spent
from ..train.folder import read_run
from ..train.launch import leave_the_others
from ..weights import check_weights, hashes
from .job import TransferJob, quiet, scope_of
from .protocol import TransferRecipe

EXTRA = "pip install 'sslbench[transfer]', or in a clone pip install -e '.[transfer]'"
PARTS = ("models", "datasets", "evaluation", "visualization")  # of mmdet and mmseg


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


def fingerprint_of(recipe: TransferRecipe, data: str | None) -> str:
    """Which images `transfer` would score. UserError where that, or a library, is not there."""
    require()
    task = importlib.import_module(f".{recipe.science.protocol}", __package__)
    root = find_data(recipe.science.protocol, data)
    with scope_of(task):
        return task.open_data(root, recipe.science)[1].fingerprint


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
    from ..train.loop import fit  # and Fabric, as slow to import as torch, which a study's plan does not need

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
    console.print(f"{folder}: batch {job.batch()}, {job.total} iterations, {len(job.train)} images")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = fit(job, folder, console)
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
    from ..train.loop import make_fabric

    fabric = make_fabric(job.machine.model_copy(update={"devices": 1, "nodes": 1}))
    spent = Spent(fabric.device.type)
    model = job.build().model
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
