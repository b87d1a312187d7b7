"""`sslbench eval`: a protocol over an encoder, and its numbers into the ledger."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field
from rich.console import Console

from .. import provenance
from ..data import ImageSet, open_both, open_split, open_test, used_classes
from ..data.loader import held_out
from ..errors import UserError
from ..ledger import Record, Scale, accuracy_stderr, append, checked
from ..paths import home
from ..provenance import Spent
from ..recipe import (
    Machine,
    Strict,
    data_name,
    digest,
    find_recipe,
    merge,
    parse_sets,
    read_tree,
    unpacked_name,
    validate,
)
from ..right import keep
from ..settings import shorten_warmup
from ..stats import mean_interval
from ..train.device import default_device
from ..train.launch import alone, launched, leave_to_first
from ..train.loop import fit
from ..train.run import read_run
from ..train.state import check_weights, hashes, write_json
from .attentive import Attentive, AttentiveJob
from .features import Subject, contents, extract, find_weights, fine_tuned, newest_run, open_subject, view_of
from .finetune import Finetune, FinetuneJob, load_classifier, predict
from .geometry import Geometry
from .job import LabelledJob, protocol_hash
from .knn import knn_right
from .labels import LabelShare, list_facts, list_of, protocol_name
from .linprobe import linear_right
from .probe import AugmentedProbe, ProbeJob, Rate


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


TRAINED = Finetune | AugmentedProbe | Attentive  # by the loop, in a run folder of its own


class EvalRecipe(Strict):
    name: str
    science: Knn | HeldOutKnn | Linprobe | AugmentedProbe | Attentive | Finetune | Robustness | Geometry = Field(
        discriminator="protocol"
    )
    machine: Machine = Machine()


def eval_recipe(kind: str, name: str | None = None, sets: list[str] | None = None) -> EvalRecipe:
    """The eval recipe of that protocol, checked."""
    path = find_recipe(name or kind, "eval")
    tree = merge(read_tree(path, "eval"), parse_sets(sets or []))
    recipe = validate(EvalRecipe, {**tree, "name": path.stem}, path.stem)
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
    recipe: EvalRecipe, run: str | None, data: str | None, seed: int | None, seeds: int, console: Console
) -> dict[str, Any]:
    """`sslbench eval`: the newest run where none is named, the run's own data where none is given."""
    protocol = recipe.science.protocol
    if not isinstance(recipe.science, TRAINED):
        leave_to_first()
    if isinstance(recipe.science, Robustness):
        run = str(_tuned_run(recipe.science, run))
        console.print(f"the fine-tuned model: {run}")
    elif run is None:
        run = str(newest_run())
        console.print(f"the newest finished run: {run}")
    if seeds > 1 and protocol in ("knn", "robustness") and not run.startswith("untrained:"):
        raise UserError(f"--seeds {seeds}: {protocol} draws nothing, so every seed would give the same number")
    if seeds > 1 and (launched() or recipe.machine.devices * recipe.machine.nodes > 1):
        raise UserError(f"--seeds {seeds} is for one process; on several devices give one --seed after the other")
    first, main = seed or 0, []
    for s in range(first, first + seeds):
        records = evaluate(recipe, run, data, s if seeds > 1 else seed, console=console)
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
) -> list[Record]:
    """Run the protocol and append its numbers; the main one comes first. seed None: the run's own, or 0.

    tuning: what it took to choose the settings of the run, for the numbers' cost.
    """
    if isinstance(recipe.science, TRAINED):
        return [_train_and_score(recipe, run, data, seed, console or Console(quiet=True), tuning)]
    if isinstance(recipe.science, Robustness):
        return [_robustness(recipe, recipe.science, run, data)]
    if isinstance(recipe.science, HeldOutKnn):
        return [_held_out(recipe, recipe.science, run, data, seed)]
    device = default_device()
    spent = Spent(device.type)
    subject = open_subject(run, seed or 0, image_size)
    data, train, val = _splits(subject, data)
    pool = recipe.science.pool or subject.pool
    features = {d.split: extract(subject, d, device, recipe.machine.workers)[pool] for d in (train, val)}
    assert train.labels is not None and val.labels is not None
    s = recipe.science
    own = subject.run.get("seed", seed or 0)
    if isinstance(s, Knn):
        seed = own
        arrays = features["train"], train.labels, features["val"], val.labels
        ks = [s.main_k, *(k for k in s.k if k != s.main_k)]
        by_k = knn_right(*arrays, ks, s.temperature, device=device)
        values: list[tuple[str, torch.Tensor, dict[str, Any]]] = [
            ("knn_top1" if k == s.main_k else f"knn_top1_k{k}", v, {"k": k}) for k, v in by_k.items()
        ]
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
        )
        values = [("linprobe_top1", right, {"lr": lr, **list_facts(train, s.labels, chosen)})]
    side, cost = subject.encoder.image[0], spent.after()
    protocol = protocol_of(recipe, pool, side, train, val)
    facts = subject.facts()
    return [
        to_ledger(facts, metric, v, val, data, protocol, {**c, "pool": pool}, seed, side, cost, {}, tuning=tuning)
        for metric, v, c in values
    ]


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
    pool, side = s.pool or subject.pool, subject.encoder.image[0]
    x, y = extract(subject, train, device, recipe.machine.workers)[pool], train.labels
    rest, tenth = held_out(len(train))
    right = knn_right(x[rest], y[rest], x[tenth], y[tenth], [s.main_k], s.temperature, device=device)[s.main_k]
    cost, own = spent.after(), subject.run.get("seed", seed or 0)
    condition = {"k": s.main_k, "pool": pool, "split": "a tenth of train"}
    scored, protocol = HeldOut(train.fingerprint, len(tenth)), protocol_of(recipe, pool, side, train)
    return to_ledger(
        subject.facts(), "knn_held_out_top1", right, scored, spec, protocol, condition, own, side, cost, {}
    )


def _splits(subject: Subject, data: str | None) -> tuple[str, ImageSet, ImageSet]:
    """The SPEC that is meant, its train and its val."""
    spec = data or subject.data
    if spec is None:
        raise UserError(f"'{subject.name}' does not say what data it was trained on; give --data SPEC")
    return spec, *open_both(spec)


def _train_and_score(
    recipe: EvalRecipe,
    run: str,
    data: str | None,
    seed: int | None,
    console: Console,
    tuning: dict[str, Any] | None,
) -> Record:
    """Train on RUN in a run folder of its own, then score val once. A finished one gives the number it has."""
    s = recipe.science
    subject = open_subject(run, seed or 0)
    spec, train, val = _splits(subject, data)
    seed = subject.run.get("seed", 0) if seed is None else seed
    assert isinstance(s, TRAINED)
    kind = FinetuneJob if isinstance(s, Finetune) else AttentiveJob if isinstance(s, Attentive) else ProbeJob
    job: LabelledJob = kind(recipe, subject, spec, train, s.pool or subject.pool, seed, val)
    folder = home() / "runs" / job.folder_name
    fit(job, folder, console)
    if not alone():
        raise SystemExit(0)
    info = read_run(folder)
    images = contents(val)
    if same_images(info.get("record"), val) and info.get("val_contents", images) == images:
        console.print(f"{folder} is finished: the number below is the one it has in the ledger")
        return in_ledger(info["record"], folder)
    device, weights = default_device(), folder / "weights.safetensors"
    spent = Spent(device.type)
    check_weights(weights, info)
    info |= hashes(weights)
    right, more = job.score(weights, val, device)
    condition = {"pool": job.pool, **more, **job.labelled_part, "eval_run": folder.name}
    cost = spent.after(info["cost"])
    facts = subject.facts()
    record = to_ledger(facts, job.metric, right, val, spec, job.protocol, condition, seed, job.image_size, cost, info,
                       tuning=tuning)  # fmt: skip
    write_json(folder / "run.json", {**info, "record": record.model_dump(mode="json"), "val_contents": images})
    return record


def same_images(record: dict[str, Any] | None, val: Measured) -> bool:
    """Whether the record that a run folder has is of these images."""
    return record is not None and record.get("data_fingerprint") == val.fingerprint


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
    facts = info.get("subject") or {
        "method": "unknown", "preset": None, "arch": arch, "pretrain": nothing, "cost": {},
        "sha256": trained["weights_sha256"],
    }  # fmt: skip
    condition = {"classes": len(names), "eval_run": path.parent.name if info else None}
    cost = spent.after(info.get("cost"))
    return to_ledger(facts, "top1", top1, test, data, protocol, condition, info.get("seed", 0), size, cost, trained)


def robustness_hash(s: Robustness, tuned: str | None, size: int, view: dict[str, int]) -> str:
    """Of how the answer is chosen, of the protocol that fine-tuned the model, and of the view, as in protocol_hash."""
    return digest([s.model_dump(mode="json"), tuned, size, *view.values()])


class Measured(Protocol):
    """What a number was measured on."""

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...


def to_ledger(
    facts: dict[str, Any],
    metric: str,
    value: float | torch.Tensor,
    val: Measured,
    data: str,
    protocol: dict[str, str],
    condition: dict[str, Any],
    seed: int,
    image_size: int,
    spent: dict[str, Any],
    trained: dict[str, Any],
    accuracy: bool = True,
    stderr: float | None = None,
    scale: Scale | None = None,
    tuning: dict[str, Any] | None = None,
) -> Record:
    """Into the ledger: the number, where it comes from, and what it cost, pre-training (in `facts`) and `spent`.

    trained: run.json of the run that the evaluation trained, {} where it trained none. accuracy: the number is a share
    of the images, which has a binomial standard error; other numbers have `stderr`. value: the number, or which of
    the images are right (N,), whose percentage it is; these are kept too. tuning: what choosing the settings took.
    """
    right = value if isinstance(value, torch.Tensor) else None
    if isinstance(value, torch.Tensor):
        value = 100 * value.double().mean().item()
    before, device = facts["cost"], default_device().type
    ours = before.get("wall_s") is not None  # what public weights cost nobody tells: the evaluation's cost is all
    if (share := facts.get("milestone")) is not None:  # its schedule had not ended
        condition = {**condition, "milestone": share}
    if facts.get("seed") not in (None, seed):
        condition = {**condition, "pretrain_seed": facts["seed"]}
    flops = [c for c in (before.get("flops"), spent.get("flops")) if c is not None]
    joules = [before.get("joules") if ours else 0.0, spent["joules"]]
    record = append(
        {
            "created": provenance.now(),
            "metric": metric,
            "dataset": data_name(data),
            "value": value,
            "stderr": accuracy_stderr(value, len(val)) if accuracy else stderr,
            "n": len(val),
            **{k: facts[k] for k in ("method", "preset", "arch")},
            "pretrain": {**facts["pretrain"], "cost": {"joules": None, **before} if ours else None},
            "protocol": protocol,
            "weights_sha256": facts["sha256"],
            "head_sha256": trained.get("weights_sha256"),
            "data_fingerprint": val.fingerprint,
            "seed": seed,
            "code": provenance.code(),
            "versions": provenance.versions(),
            "hardware": trained.get("hardware") or provenance.hardware(device),
            "cost": {
                "wall_s": (before.get("wall_s") or 0.0) + spent["wall_s"],
                "device_hours": (before.get("device_hours") or 0.0) + spent["device_hours"],
                "flops": sum(flops) if flops else None,
                "peak_memory_gib": max(
                    before.get("peak_memory_gib") or 0.0,
                    spent.get("peak_memory_gib") or 0.0,
                    provenance.peak_memory_gib(device),
                ),
                "joules": None if None in joules else sum(joules),
                "tuning": tuning,
            },
            "scale": scale or scale_of(facts["pretrain"]["data"] or data_name(data), image_size),
            "condition": condition,
        }
    )
    if right is not None:
        keep(record, right.numpy())
    return record


# The papers' sets of photographs.
FULL_SIZE = {"imagenet", "imagenet100", "coco", "imagenette", "imagewoof", "ade20k", "inat18", "inat19", "flowers102"}


def scale_of(pretrain_data: str, image_size: int) -> Scale:
    """tiny: the built-in subset, or what is unknown. cifar: small images. paper: a paper's set at full size."""
    parts = {unpacked_name(part) for part in pretrain_data.split("+")}
    if image_size >= 224 and parts <= FULL_SIZE:
        return "paper"
    return "tiny" if pretrain_data == "builtin" or image_size >= 224 else "cifar"
