"""`sslbench eval segprobe` and `segknn`: a dense probe over an encoder, its numbers into the ledger, and pictures."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ..data.dense import find_data, open_dense
from ..data.label_maps import read_pair
from ..data.labelled import Labelled, accept
from ..device import default_device
from ..files import digest, write_atomically
from ..ledger import Measurement, Record, Scale, to_ledger
from ..paths import home
from ..pictures import beside
from ..provenance import Spent
from ..stats import image_interval
from ..train.launch import leave_to_first
from .evaluation import EvalRecipe
from .features import Subject, newest_run, open_subject
from .patches import Counts, Frozen, Scores, answer, mean_iou, pixel_accuracy
from .segprobe import Segknn, Segprobe, learn, remember
from .told import NOTHING, Told

PICTURES = 6  # val images that are drawn


def segment(
    recipe: EvalRecipe, run: str | None, data: str | None, seed: int | None, console: Console, told: Told = NOTHING
) -> dict[str, Any]:
    """Probe RUN's patch tokens and append mIoU and pixel accuracy; returns the record of mIoU, and where pictures are.

    data: a folder that `transfer ade20k` takes too; None: the run's own where it is such a set, else $SSLBENCH_DATA's.
    seed: of what is drawn; None: the run's own, or 0. UserError: there is no such set, or it has faults.
    """
    leave_to_first()
    if run is None:
        run = str(newest_run())
        console.print(f"the newest finished run: {run}")
    s, device = recipe.science, default_device()
    assert isinstance(s, Segprobe | Segknn)
    spent, subject = Spent(device.type), open_subject(run, seed or 0, told=told)
    if note := subject.note():
        console.print(note, markup=False)
    frozen = Frozen(subject, s.crop, device, recipe.machine.workers)
    train, val = _open(data or (subject.data if (subject.data or "").startswith("ade20k:") else None), console)
    seed = subject.run.get("seed", 0) if seed is None else seed
    scores, condition = learn(frozen, train, s, seed) if isinstance(s, Segprobe) else remember(frozen, train, s, seed)
    (counts,) = frozen.count(val, [*range(len(val))], scores)
    condition["classes"] = int((counts.either.sum(0) > 0).sum())
    records = _append(recipe, subject, val, counts, condition, seed, spent.after())
    for r in records:
        console.print(_line(r), markup=False)
    folder = home() / "results" / "pictures" / records[0].id
    draw(frozen, val, scores, folder)
    console.print(f"pictures in {folder}", markup=False)
    return records[0].model_dump(mode="json") | {"pictures": str(folder)}


def _append(
    recipe: EvalRecipe,
    subject: Subject,
    val: Labelled,
    counts: Counts,
    condition: dict[str, Any],
    seed: int,
    cost: dict[str, Any],
) -> list[Record]:
    """Every number into the ledger, mIoU first."""
    s, encoder = recipe.science, subject.facts()
    assert isinstance(s, Segprobe | Segknn)
    protocol = {"name": recipe.name, "hash": digest(s.model_dump(mode="json"))}
    scale: Scale | None = None if val.name == "ade20k" else "tiny"  # as transfer's
    return [
        to_ledger(
            Measurement(
                metric=f"{s.protocol}_{name}",
                value=value,
                images=val,
                data=val.name,
                protocol=protocol,
                condition={**condition, "interval": interval},
                seed=seed,
                image_size=s.crop,
                encoder=encoder,
                spent=cost,
                accuracy=False,
                stderr=stderr,
                scale=scale,
            )
        )
        for name, (value, stderr, interval) in numbers(counts).items()
    ]


def _open(data: str | None, console: Console) -> tuple[Labelled, Labelled]:
    root = find_data("ade20k", data)
    console.print(f"looking at every photograph and label of {root}", markup=False)
    splits = open_dense("ade20k", root)
    accept(*splits)
    for said in (*splits[0].said, *splits[1].said):
        console.print(said, markup=False)
    return splits


def _line(r: Record) -> str:
    """`segprobe_miou     31.20 +- 0.90 %  ade3, n=50, segprobe; 95 % interval over images 29.5 to 33.0`"""
    line = f"{r.metric:16} {r.value:6.2f}"
    if r.stderr is None:
        return f"{line} %  {r.dataset}, n={r.n}, {r.protocol.name}"
    low, high = r.condition["interval"]
    interval = f"95 % interval over images {low:.1f} to {high:.1f}"
    return f"{line} +- {r.stderr:.2f} %  {r.dataset}, n={r.n}, {r.protocol.name}; {interval}"


def numbers(c: Counts) -> dict[str, tuple[float, float | None, list[float] | None]]:
    """{metric: (percent, standard error, 95 % interval)}, the latter two by drawing images anew."""
    values = {}
    for name, statistic, sums in (("miou", mean_iou, (c.both, c.either)), ("aacc", pixel_accuracy, (c.both, c.truth))):
        values[name] = float(statistic(*(x.sum(0) for x in sums))), *image_interval(statistic, *sums)
    return values


def draw(frozen: Frozen, val: Labelled, scores: Scores, folder: Path) -> None:
    """Write `folder`/INDEX_NAME.png: some images of val, what is true, and what was answered."""
    chosen = np.linspace(0, len(val) - 1, min(PICTURES, len(val))).astype(int).tolist()
    for index, (tokens, truth) in zip(chosen, frozen.tokens(val, chosen), strict=True):
        answered = answer(scores(tokens)[0], (truth.shape[0], truth.shape[1]))
        picture = beside(read_pair(val, index)[0], truth.numpy(), answered.numpy().astype(np.uint8), val.classes)
        png = io.BytesIO()
        picture.save(png, "PNG")
        write_atomically(folder / f"{index}_{val.files[index].stem}.png", png.getvalue())
