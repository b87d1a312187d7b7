"""`sslbench eval`: a protocol over a frozen encoder, and its numbers into the ledger."""

from __future__ import annotations

import time
from typing import Any, Literal

import torch
from pydantic import Field
from rich.console import Console

from .. import provenance
from ..data import ImageSet
from ..errors import UserError
from ..ledger import Record, Scale, accuracy_stderr, append
from ..recipe import Strict, data_name, digest, find_recipe, merge, parse_sets, read_tree, validate
from .features import Subject, both_splits, extract, newest_run, open_subject
from .knn import knn_top1
from .linprobe import linear_top1


class Knn(Strict):
    protocol: Literal["knn"]
    k: list[int] = Field([10, 20, 100, 200], min_length=1)
    main_k: int = 20
    temperature: float = Field(0.07, gt=0)
    pool: Literal["cls", "mean", "mean_all"] | None = None  # None: the method's own


class Linprobe(Strict):
    protocol: Literal["linprobe"]
    lr: list[float] = Field([0.01, 0.03, 0.1, 0.3, 1.0, 3.0], min_length=1)
    epochs: int = Field(90, gt=0)
    batch_size: int = Field(1024, gt=0)
    momentum: float = 0.9
    weight_decay: float = 0.0
    pool: Literal["cls", "mean", "mean_all"] | None = None


class EvalMachine(Strict):
    workers: int = Field(4, ge=0)


class EvalRecipe(Strict):
    name: str
    science: Knn | Linprobe = Field(discriminator="protocol")
    machine: EvalMachine = EvalMachine()


def eval_recipe(kind: str, name: str | None = None, sets: list[str] | None = None) -> EvalRecipe:
    """The eval recipe of that protocol, checked."""
    path = find_recipe(name or kind, "eval")
    tree = merge(read_tree(path, "eval"), parse_sets(sets or []))
    recipe = validate(EvalRecipe, {**tree, "name": path.stem}, path.stem)
    if recipe.science.protocol != kind:
        raise UserError(f"recipe {path.stem} is of protocol {recipe.science.protocol}, not {kind}")
    return recipe


def evaluate_named(
    recipe: EvalRecipe, run: str | None, data: str | None, seed: int, console: Console
) -> dict[str, Any]:
    """`sslbench eval`: the newest run where none is named, the run's own data where none is given."""
    if run is None:
        run = str(newest_run())
        console.print(f"the newest finished run: {run}")
    records = evaluate(recipe, run, data, seed)
    for r in records:
        console.print(f"{r.metric:16} {r.value:6.2f} +- {r.stderr:.2f} %  {r.dataset}, n={r.n}, {r.protocol.name}")
    return records[0].model_dump(mode="json")


def evaluate(
    recipe: EvalRecipe, run: str, data: str | None = None, seed: int = 0, image_size: int | None = None
) -> list[Record]:
    """Run the protocol and append its numbers; the main one comes first."""
    began = time.perf_counter()
    subject = open_subject(run, seed, image_size)
    data = data or subject.data
    if data is None:
        raise UserError(f"'{run}' does not say what data it was trained on; give --data SPEC")
    train, val = both_splits(data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pool = recipe.science.pool or subject.pool
    features = {d.split: extract(subject, d, device, recipe.machine.workers)[pool] for d in (train, val)}
    assert train.labels is not None and val.labels is not None
    arrays = features["train"], train.labels, features["val"], val.labels
    s = recipe.science
    if isinstance(s, Knn):
        ks = [s.main_k, *(k for k in s.k if k != s.main_k)]
        by_k = knn_top1(*arrays, ks, s.temperature)
        values: list[tuple[str, float, dict[str, Any]]] = [
            ("knn_top1" if k == s.main_k else f"knn_top1_k{k}", v, {"k": k}) for k, v in by_k.items()
        ]
    else:
        top1, lr = linear_top1(
            *arrays,
            lrs=s.lr,
            epochs=s.epochs,
            batch_size=s.batch_size,
            momentum=s.momentum,
            weight_decay=s.weight_decay,
            seed=seed,
        )
        values = [("linprobe_top1", top1, {"lr": lr})]
    science = {**s.model_dump(mode="json"), "pool": pool, "image_size": list(subject.encoder.image)}
    protocol = {"name": f"{recipe.name}_{pool}", "hash": digest(science)}
    wall = time.perf_counter() - began
    return [
        _record(subject, val, data, metric, v, {**c, "pool": pool}, protocol, seed, wall) for metric, v, c in values
    ]


def _record(
    subject: Subject,
    val: ImageSet,
    data: str,
    metric: str,
    value: float,
    condition: dict[str, Any],
    protocol: dict[str, str],
    seed: int,
    wall: float,
) -> Record:
    run = subject.run
    spent = run.get("cost", {})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return append(
        {
            "created": provenance.now(),
            "metric": metric,
            "dataset": data_name(data),
            "value": value,
            "stderr": accuracy_stderr(value, len(val)),
            "n": len(val),
            "method": subject.method,
            "preset": run.get("preset"),
            "arch": subject.arch,
            "protocol": protocol,
            "pretrain": {
                "recipe_hash": run.get("recipe_hash"),
                "run": subject.path.parent.name if subject.path else None,
                "data": run.get("data"),
                "epochs": subject.epochs,
                "images_seen": spent.get("images_seen"),
                "batch": subject.batch,
            },
            "weights_sha256": subject.sha256,
            "data_fingerprint": val.fingerprint,
            "seed": run.get("seed", seed),
            "code": provenance.code(),
            "versions": provenance.versions(),
            "hardware": run.get("hardware") or provenance.hardware(device),
            "cost": {
                "wall_s": spent.get("wall_s", 0.0) + wall,
                "device_hours": spent.get("device_hours", 0.0) + wall / 3600,
                "flops": spent.get("flops"),
                "peak_memory_gib": max(spent.get("peak_memory_gib", 0.0), provenance.peak_memory_gib(device)),
                "joules": None,
            },
            "scale": scale_of(run.get("data") or data_name(data), subject.encoder.image[0]),
            "condition": condition,
        }
    )


def scale_of(pretrain_data: str, image_size: int) -> Scale:
    """tiny: the built-in subset. cifar: small images. paper: ImageNet at full size."""
    if pretrain_data == "imagenet" and image_size >= 224:
        return "paper"
    return "tiny" if pretrain_data == "builtin" or image_size >= 224 else "cifar"
