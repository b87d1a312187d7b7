"""`sslbench eval geometry`: numbers of the features of val that need no labels, into the ledger."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ..data import ImageSet, open_split
from ..data.loader import evaluation_batches, seed_of
from ..device import default_device
from ..errors import UserError
from ..files import digest
from ..geometry import alignment, cka, effective_rank, spread, uniformity
from ..ledger import Measurement, to_ledger
from ..provenance import Spent
from ..train.launch import leave_to_first
from ..views import normalise, random_resized_crop
from .evaluation import EvalRecipe, Geometry, protocol_of
from .features import Subject, extract, newest_run, open_subject, origin

VIEWS = "two random crops of the evaluation view"


def describe(
    recipe: EvalRecipe, run: str | None, other: str | None, data: str | None, seed: int | None, console: Console
) -> dict[str, Any]:
    """Measure RUN's features on val and append every number; returns the record of RankMe, with all as `numbers`.

    other: another RUN, whose features of the same images are compared with these by CKA. seed: of alignment's crops;
    None: the run's own, or 0. UserError: no data, or fewer than two images.
    """
    leave_to_first()
    if run is None:
        run = str(newest_run())
        console.print(f"the newest finished run: {run}")
    s, device = recipe.science, default_device()
    assert isinstance(s, Geometry)
    spent, subject = Spent(device.type), open_subject(run, seed or 0)
    second = open_subject(other, seed or 0) if other else None
    spec = data or subject.data
    if spec is None:
        raise UserError(f"'{subject.name}' does not say what data it was trained on; give --data SPEC")
    val = open_split(spec, "val")
    if len(val) < 2:
        raise UserError(f"data '{spec}': val has {len(val)} image; how images lie to each other takes two at least")
    seed = subject.run.get("seed", 0) if seed is None else seed
    pool, side, workers = subject.pool_of(s.pool), subject.encoder.image[0], recipe.machine.workers
    x = extract(subject, val, device, workers, pool).double()
    numbers = {
        "rankme": (effective_rank(x), None),
        "effective_rank": (effective_rank(x - x.mean(0)), None),
        "feature_std": (spread(x), None),
        "uniformity": uniformity(x),
        "alignment": alignment(*_two_views(subject, val, s, pool, seed, device, workers)),
    }
    conditions: dict[str, dict[str, Any]] = {"alignment": {"views": VIEWS}}
    if second:
        its_pool = second.pool_of(s.pool)
        numbers["cka"] = cka(x, extract(second, val, device, workers, its_pool).double()), None
        conditions["cka"] = {"with": origin(second), "with_sha256": second.sha256, "with_pool": its_pool}
    protocol, cost, records = protocol_of(recipe, pool, side, val), spent.after(), []
    for metric, (value, error) in numbers.items():
        condition = {"pool": pool, **conditions.get(metric, {})}
        its = _with(protocol, condition) if metric == "cka" else protocol
        stderr = None if error is None else error.item()
        r = to_ledger(Measurement(metric, value.item(), val, spec, its, condition, seed, side, subject.facts(), cost,
                                  accuracy=False, stderr=stderr))  # fmt: skip
        records.append(r)
        interval = "" if stderr is None else f" +- {stderr:.3f}"
        console.print(f"{metric:16} {r.value:8.3f}{interval}  {r.dataset}, n={r.n}, {its['name']}", markup=False)
    return records[0].model_dump(mode="json") | {"numbers": {r.metric: r.value for r in records}}


def _with(protocol: dict[str, str], c: dict[str, Any]) -> dict[str, str]:
    """CKA's protocol: with whom it is measured is part of it."""
    hash = digest([protocol["hash"], c["with_sha256"], c["with_pool"]])
    return {"name": f"{protocol['name']}_with_{c['with']}", "hash": hash}


@torch.inference_mode()
def _two_views(
    subject: Subject, val: ImageSet, s: Geometry, pool: str, seed: int, device: torch.device, workers: int
) -> tuple[Tensor, Tensor]:
    """Features (N, D) of two random crops of every image's evaluation view, float64 on the CPU."""
    encoder, size = subject.encoder.to(device).eval(), subject.encoder.image[0]
    draws = torch.Generator().manual_seed(seed_of("alignment", seed))
    parts: tuple[list[Tensor], list[Tensor]] = [], []
    for images in evaluation_batches(val, size, 250, device, workers):
        for part in parts:
            crops = random_resized_crop(images.round().to(torch.uint8), size, s.crop_scale, s.flip, draws)
            tokens = encoder(normalise(crops, subject.mean, subject.std))
            part.append(encoder.feature(tokens, pool).double().cpu())
    return torch.cat(parts[0]), torch.cat(parts[1])
