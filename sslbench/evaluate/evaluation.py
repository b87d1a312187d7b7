"""`sslbench eval`: a protocol over an encoder, and its numbers into the ledger."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from rich.console import Console

from ..data import ImageSet, open_both, open_split, open_test, used_classes
from ..data.loader import held_out
from ..device import default_device
from ..errors import UserError
from ..files import digest, write_json
from ..knn import knn_right
from ..ledger import Measured, Measurement, Record, checked, to_ledger
from ..paths import home
from ..provenance import Spent
from ..recipe import Machine, SetMachine, find_recipe, merge, parse_sets, read_tree
from ..recipe.settings import shorten_warmup
from ..stats import mean_interval
from ..strict import Strict, validate
from ..train.folder import read_run
from ..train.launch import launched, leave_the_others, leave_to_first
from ..views import CropScale
from ..weights import check_weights, hashes
from .attentive import Attentive, AttentiveJob
from .features import Subject, contents, extract, find_weights, fine_tuned, newest_run, open_subject, view_of
from .finetune import Finetune, FinetuneJob, load_classifier, predict
from .function import Function
from .job import LabelledJob, protocol_hash
from .labels import LabelShare, list_facts, list_of, protocol_name
from .linprobe import linear_right
from .probe import AugmentedProbe, ProbeJob, Rate
from .segprobe import Segknn, Segprobe
from .told import NOTHING, PUBLIC, Told


class Knn(Strict):
    protocol: Literal["knn"]
    k: list[Annotated[int, Field(gt=0)]] = Field([10, 20, 100, 200], min_length=1)
    main_k: int = Field(20, gt=0)
    temperature: float = Field(0.07, gt=0)
    pool: Literal["cls", "mean", "mean_all"] | None = None  # None: the method's own


class HeldOutKnn(Knn):
    """k-NN of a tenth of train by the rest: what tuning selects by, so that val is not read."""

    protocol: Literal["knn_held_out"]  # type: ignore[assignment]


class Linprobe(Strict):
    protocol: Literal["linprobe"]
    lr: list[Rate] = Field([0.01, 0.03, 0.1, 0.3, 1.0, 3.0], min_length=1)
    epochs: int = Field(90, gt=0)
    batch_size: int = Field(1024, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    pool: Literal["cls", "mean", "mean_all"] | None = None
    labels: LabelShare = None  # a share of train's: see labels.py


class Robustness(Strict):
    protocol: Literal["robustness"]
    restrict: bool = True  # the answer is among the classes that the set has, as ImageNet-A and -R are scored
    # The recipe of the fine-tuning that is meant, where RUN is pre-trained and has several. It is not in the hash.
    finetune: str | None = Field(None, exclude=True)


class Geometry(Strict):
    """How features are described without labels (describe.py). Alignment's two views are cropped alike for all."""

    protocol: Literal["geometry"]
    pool: Literal["cls", "mean", "mean_all"] | None = None  # None: the method's own
    crop_scale: CropScale = (0.2, 1.0)  # of the evaluation view
    flip: bool = True


TRAINED = Finetune | AugmentedProbe | Attentive  # by the loop, in a run folder of its own


class EvalRecipe(Strict):
    name: str
    science: (
        Knn
        | HeldOutKnn
        | Linprobe
        | AugmentedProbe
        | Attentive
        | Finetune
        | Robustness
        | Geometry
        | Segprobe
        | Segknn
        | Function
    ) = Field(discriminator="protocol")
    machine: SetMachine = Machine()


def eval_recipe(kind: str, name: str | None = None, sets: list[str] | None = None) -> EvalRecipe:
    """The eval recipe of that protocol, checked."""
    path = find_recipe(name or kind, "eval")
    tree = merge(read_tree(path, "eval"), parse_sets(sets or []))
    recipe = validate(EvalRecipe, {**tree, "name": path.stem}, path.stem)
    if isinstance(recipe.science, Function):
        recipe.name = recipe.science.name or recipe.name
    shorten_warmup(recipe.science, parse_sets(sets or []).get("science", {}))
    if recipe.science.protocol.removesuffix("_augmented") != kind:
        raise UserError(f"recipe {path.stem} is of protocol {recipe.science.protocol}, not {kind}")
    return recipe


def protocol_of(recipe: EvalRecipe, pool: str, side: int, *sets: ImageSet) -> dict[str, str]:
    """{"name", "hash"} of that protocol on an encoder of images of `side` pixels, for sets of images whose sizes may
    decide what a view is. pool: where the recipe has none."""
    s = recipe.science
    assert not isinstance(s, Robustness)
    pool, side = s.pool or pool, getattr(s, "image_size", None) or side
    return {"name": protocol_name(recipe, pool), "hash": protocol_hash(s, pool, (side, side), view_of(side, *sets))}


def evaluate_named(
    recipe: EvalRecipe,
    run: str | None,
    data: str | None,
    seed: int | None,
    seeds: int,
    console: Console,
    told: Told = NOTHING,
) -> dict[str, Any]:
    """`sslbench eval`: the newest run where none is named, the run's own data where none is given.

    told: what RUN is, where it is public weights.
    """
    protocol = recipe.science.protocol
    if not isinstance(recipe.science, TRAINED):
        leave_to_first()
    if isinstance(recipe.science, Robustness):
        if told:
            raise UserError(
                "a fine-tuned model knows what it was made of; leave out --as, --pretrained-on and --epochs"
            )
        run = str(_tuned_run(recipe.science, run))
        console.print(f"the fine-tuned model: {run}")
    elif run is None:
        run = str(newest_run())
        console.print(f"the newest finished run: {run}")
    if seeds > 1 and protocol in ("knn", "robustness") and not run.startswith("untrained:"):
        raise UserError(f"--seeds {seeds}: {protocol} draws nothing, so every seed would give the same number")
    if seeds > 1 and (launched() or recipe.machine.devices * recipe.machine.nodes > 1):
        raise UserError(f"--seeds {seeds} is for one process; on several devices give one --seed after the other")
    first_seed, main = seed or 0, []
    for s in range(first_seed, first_seed + seeds):
        records = evaluate(recipe, run, data, s if seeds > 1 else seed, console=console, told=told)
        main.append(records[0])
        for r in records:
            what = f"{r.dataset}, n={r.n}, {r.protocol.name}" + (f", seed {r.seed}" if seeds > 1 else "")
            console.print(f"{r.metric:16} {r.value:6.2f} +- {r.stderr:.2f} %  {what}")
    answer = main[0].model_dump(mode="json")
    if seeds > 1:
        values = [r.value for r in main]
        mean, half = mean_interval(values)
        console.print(f"{'mean':16} {mean:6.2f} +- {half:.2f} %  95 % interval over {seeds} seeds (Student t)")
        answer |= {"value": mean, "half_width": half, "values": values, "seeds": [r.seed for r in main]}
    return answer


def evaluate(
    recipe: EvalRecipe,
    run: str,
    data: str | None = None,
    seed: int | None = None,
    image_size: int | None = None,
    console: Console | None = None,
    tuning: dict[str, Any] | None = None,
    told: Told = NOTHING,
) -> list[Record]:
    """Run the protocol and append its numbers; the main one comes first. seed None: the run's own, or 0.

    tuning: what it took to choose the settings of the run, for the numbers' cost. told: what public weights are.
    """
    console = console or Console(quiet=True)
    if isinstance(recipe.science, Robustness):
        return [_robustness(recipe, recipe.science, run, data)]
    if isinstance(recipe.science, HeldOutKnn):
        return [_held_out(recipe, recipe.science, run, data, seed)]
    device = default_device()
    spent = Spent(device.type)
    s = recipe.science
    trains = isinstance(s, TRAINED)
    subject = open_subject(run, seed or 0, None if trains else image_size, told)
    if note := subject.note():
        console.print(note, markup=False)
    if isinstance(s, TRAINED):
        return [_train_and_score(recipe, subject, data, seed, console, tuning)]
    data, train, val = _splits(subject, data)
    pool = subject.pool_of(s.pool)
    features = {d.split: extract(subject, d, device, recipe.machine.workers, pool) for d in (train, val)}
    assert train.labels is not None and val.labels is not None
    own = subject.run.get("seed", seed or 0)
    if isinstance(s, Knn):
        seed = own
        arrays = features["train"], train.labels, features["val"], val.labels
        ks = [s.main_k, *(k for k in s.k if k != s.main_k)]
        by_k = knn_right(*arrays, ks, s.temperature, device=device)
        values: list[tuple[str, torch.Tensor, dict[str, Any]]] = [
            ("knn_top1" if k == s.main_k else f"knn_top1_k{k}", v, {"k": k}) for k, v in by_k.items()
        ]
    elif isinstance(s, Function):
        seed = own if seed is None else seed
        right = s.right(features["train"], train.labels, features["val"], val.labels, seed)
        values = [("function_top1", right, {})]
    else:
        assert isinstance(s, Linprobe)
        seed = own if seed is None else seed
        chosen = list_of(train, s.labels, seed, data)
        part = slice(None) if chosen is None else chosen
        right, lr = linear_right(
            features["train"][part],
            train.labels[part],
            features["val"],
            val.labels,
            lrs=s.lr,
            epochs=s.epochs,
            batch_size=s.batch_size,
            momentum=s.momentum,
            weight_decay=s.weight_decay,
            seed=seed,
            device=device,
        )
        values = [("linprobe_top1", right, {"lr": lr, **list_facts(train, s.labels, chosen)})]
    side, cost = subject.encoder.image[0], spent.after()
    protocol = protocol_of(recipe, pool, side, train, val)
    encoder = subject.facts()
    measurements = [
        Measurement(metric, v, val, data, protocol, {**c, "pool": pool}, seed, side, encoder, cost, tuning=tuning)
        for metric, v, c in values
    ]
    return [to_ledger(m) for m in measurements]


@dataclass
class HeldOut:
    """A part of train, as a number is of it."""

    fingerprint: str  # of all of train
    n: int

    def __len__(self) -> int:
        return self.n


def _held_out(recipe: EvalRecipe, s: HeldOutKnn, run: str, data: str | None, seed: int | None) -> Record:
    """k-NN of a tenth of train by the rest; val is not opened."""
    device = default_device()
    spent, subject = Spent(device.type), open_subject(run, seed or 0)
    spec = data or subject.data or ""
    train = open_split(spec, "train")
    if train.labels is None:
        raise UserError(f"data '{spec}' has no labels; to select by k-NN needs them")
    pool, side = subject.pool_of(s.pool), subject.encoder.image[0]
    x, y = extract(subject, train, device, recipe.machine.workers, pool), train.labels
    rest, tenth = held_out(len(train))
    right = knn_right(x[rest], y[rest], x[tenth], y[tenth], [s.main_k], s.temperature, device=device)[s.main_k]
    cost, own = spent.after(), subject.run.get("seed", seed or 0)
    condition = {"k": s.main_k, "pool": pool, "split": "a tenth of train"}
    scored, protocol = HeldOut(train.fingerprint, len(tenth)), protocol_of(recipe, pool, side, train)
    return to_ledger(
        Measurement(
            metric="knn_held_out_top1",
            value=right,
            images=scored,
            data=spec,
            protocol=protocol,
            condition=condition,
            seed=own,
            image_size=side,
            encoder=subject.facts(),
            spent=cost,
        )
    )


def _splits(subject: Subject, data: str | None) -> tuple[str, ImageSet, ImageSet]:
    """The SPEC that is meant, its train and its val."""
    spec = data or subject.data
    if spec is None and subject.public is not None:
        raise UserError(f"'{subject.name}' is {PUBLIC}: give the data to evaluate them on, --data SPEC")
    if spec is None:
        raise UserError(f"'{subject.name}' does not say what data it was trained on; give --data SPEC")
    return spec, *open_both(spec)


def _train_and_score(
    recipe: EvalRecipe,
    subject: Subject,
    data: str | None,
    seed: int | None,
    console: Console,
    tuning: dict[str, Any] | None,
) -> Record:
    """Train on it in a run folder of its own, then score val once. A finished one gives the number it has."""
    s = recipe.science
    spec, train, val = _splits(subject, data)
    seed = subject.run.get("seed", 0) if seed is None else seed
    assert isinstance(s, TRAINED)
    pool = s.pool if isinstance(s, Attentive) else subject.pool_of(s.pool)
    kind = FinetuneJob if isinstance(s, Finetune) else AttentiveJob if isinstance(s, Attentive) else ProbeJob
    job: LabelledJob = kind(recipe, subject, spec, train, pool, seed, val)
    folder = home() / "runs" / job.folder_name
    from ..train.loop import fit  # and Fabric, as slow to import as torch; k-NN and the report need neither

    fit(job, folder, console)
    if not leave_the_others():
        raise SystemExit(0)
    info = read_run(folder)
    images = contents(val)
    known = same_images(info.get("record"), val) and info.get("val_contents", images) == images
    if known and same_subject(info["record"], subject):
        console.print(f"{folder} is finished: the number below is the one it has in the ledger")
        return in_ledger(info["record"], folder)
    device, weights = default_device(), folder / "weights.safetensors"
    spent = Spent(device.type)
    check_weights(weights, info)
    info |= hashes(weights)
    right, more = job.score(weights, val, device)
    condition = {"pool": job.pool, **more, **job.labelled_part, "eval_run": folder.name}
    cost = spent.after(info["cost"])
    record = to_ledger(
        Measurement(
            metric=job.metric,
            value=right,
            images=val,
            data=spec,
            protocol=job.protocol,
            condition=condition,
            seed=seed,
            image_size=job.image_size,
            encoder=subject.facts(),
            spent=cost,
            trained=info,
            tuning=tuning,
        )
    )
    write_json(folder / "run.json", {**info, "record": record.model_dump(mode="json"), "val_contents": images})
    return record


def same_images(record: dict[str, Any] | None, val: Measured) -> bool:
    """Whether the record that a run folder has is of these images."""
    return record is not None and record.get("data_fingerprint") == val.fingerprint


def same_subject(record: dict[str, Any], subject: Subject) -> bool:
    """Whether that record says of public weights what they are now said to be; of a run of ours, that it is its own."""
    facts = subject.facts()
    said = record["method"], record["pretrain"]["data"], record["pretrain"]["epochs"]
    return subject.public is None or said == (
        facts["method"],
        facts["pretrain"]["data"],
        facts["pretrain"]["epochs"],
    )


def in_ledger(record: dict[str, Any], folder: Path) -> Record:
    """The record that a run folder has. UserError where it is not the one that was written."""
    try:
        return checked(record)
    except ValueError as e:
        where = folder / "run.json"
        raise UserError(f"the record in {where} is not one of the ledger ({e}); mend or remove it") from None


def _tuned_run(s: Robustness, run: str | None) -> Path:
    tuned = eval_recipe("finetune", s.finetune).science if s.finetune else None
    return fine_tuned(run, tuned.model_dump(mode="json") if tuned else None)


def _robustness(recipe: EvalRecipe, s: Robustness, run: str, data: str | None) -> Record:
    """Score a fine-tuned model on images from elsewhere, whose folders are named as its classes."""
    if data is None:
        raise UserError("robustness needs --data folder:DIR, with a folder a class (DIR/n01440764/*.jpg)")
    device = default_device()
    spent = Spent(device.type)
    path, info = find_weights(str(_tuned_run(s, run)), "finetune")
    model, classes, arch = load_classifier(path)
    test = open_test(data)
    names = used_classes(test, data)
    if unknown := sorted(names.keys() - set(classes)):
        raise UserError(
            f"data '{data}': {len(unknown)} class(es) that the model was not trained on: {', '.join(unknown[:5])}"
        )
    assert test.labels is not None
    at, labels = torch.tensor([classes.index(c) for c in names]), test.labels.unique(return_inverse=True)[1]
    logits = predict(model, test, device, recipe.machine.workers)
    if s.restrict:
        answer = at[logits[:, at].argmax(1)]
    else:
        answer = logits.argmax(1)
    top1 = 100 * int((answer == at[labels]).sum()) / len(test)
    size = model.encoder.image[0]
    hash = robustness_hash(s, info.get("protocol", {}).get("hash"), size, view_of(size, test))
    protocol = {"name": recipe.name, "hash": hash}
    nothing = dict.fromkeys(("recipe_hash", "run", "data", "epochs", "images_seen", "batch"))
    trained = {**info, **hashes(path)}
    encoder = info.get("subject") or {
        "method": "unknown", "preset": None, "arch": arch, "pretrain": nothing, "cost": {},
        "sha256": trained["weights_sha256"],
    }  # fmt: skip
    condition = {"classes": len(names), "eval_run": path.parent.name if info else None}
    return to_ledger(
        Measurement(
            metric="top1",
            value=top1,
            images=test,
            data=data,
            protocol=protocol,
            condition=condition,
            seed=info.get("seed", 0),
            image_size=size,
            encoder=encoder,
            spent=spent.after(info.get("cost")),
            trained=trained,
        )
    )


def robustness_hash(s: Robustness, tuned: str | None, size: int, view: dict[str, int]) -> str:
    """Hash how the answer is chosen, the protocol that fine-tuned the model, and the view, as protocol_hash does."""
    return digest([s.model_dump(mode="json"), tuned, size, *view.values()])
