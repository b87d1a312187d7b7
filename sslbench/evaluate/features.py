"""What is evaluated, and its frozen features."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..data import ImageSet
from ..data.images import MemoryImages
from ..data.loader import evaluation_batches, has_smaller, seed_of
from ..errors import UserError
from ..files import digest
from ..method import get_method, methods
from ..paths import home
from ..provenance import cores
from ..recipe import Augment, load_yaml
from ..train.folder import milestone, read_run, read_science
from ..views import VIEW, normalise
from ..vit import VisionTransformer, get_arch, initialise
from ..weights import check_weights, not_finite, tensors_sha256
from . import feature_cache, public
from .told import NOTHING, PUBLIC, Told, both, of_timm

SMALL = 128 << 20  # bytes of a pool's features


@dataclass
class Subject:
    """An encoder under test, and where it comes from."""

    encoder: VisionTransformer
    sha256: str
    arch: str
    pool: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    run: dict[str, Any]  # its run.json, {} where there is none
    path: Path | None
    epochs: float | None = None
    batch: int | None = None
    method: str = "untrained"
    data: str | None = None  # the SPEC it was pre-trained on
    name: str = ""  # as it was asked for
    public: Told | None = None  # what these weights of others are; None: they are a run's of this suite, or random

    def pool_of(self, asked: str | None) -> str:
        """The feature that is read: the one that a recipe asks for, or its own. UserError: it has no such feature."""
        pool = asked or self.pool
        if pool not in self.encoder.pools:
            raise UserError(
                f"'{self.name}' has no feature '{pool}', only {', '.join(self.encoder.pools)}: it has "
                f"{self.encoder.parts}; give --set science.pool={self.encoder.pools[0]}"
            )
        return pool

    def note(self) -> str:
        """What a command says of public weights; '' of others."""
        if self.public is None:
            return ""
        told = f": {self.public}" if self.public else "; --as METHOD --pretrained-on DATA --epochs N says what they are"
        return f"'{self.name}' is {PUBLIC}{told}"

    def facts(self) -> dict[str, Any]:
        """What a ledger record says of where the encoder comes from, plain data; of a run, as its run.json tells it."""
        run, spent = self.run, self.run.get("cost", {})
        share, public = run.get("milestone"), self.public
        return {
            "method": self.method,
            "preset": run.get("preset"),
            "arch": self.arch,
            "pretrain": {
                "recipe_hash": run.get("recipe_hash"),
                "run": self.path.parent.name if self.path and run else None,
                "data": run.get("data") if public is None else public.data,
                "epochs": self.epochs,
                "images_seen": spent.get("images_seen"),
                "batch": self.batch,
                **{k: run.get(k) for k in ("data_fingerprint", "code", "versions", "hardware")},
                **({"init": run["init"]} if run.get("init") else {}),
            },
            "sha256": self.sha256,
            "seed": run.get("seed"),
            **({} if share is None else {"milestone": share}),
            **({} if public is None else {"public": True}),
            "cost": _with_start({k: spent.get(k) for k in COSTS}, run.get("init")),
        }


COSTS = ("wall_s", "device_hours", "flops", "peak_memory_gib", "joules")


def _with_start(cost: dict[str, Any], init: dict[str, Any] | None) -> dict[str, Any]:
    """The cost of a pre-training and of the weights that it started from. What is not known of these is not known of
    both: FLOPs and energy; times, which have to be told, are then its own."""
    if init is None:
        return cost
    before = init["cost"] or {}
    both = {k: cost[k] + before[k] if None not in (cost[k], before.get(k)) else None for k in COSTS}
    both["peak_memory_gib"] = max(filter(None, (cost["peak_memory_gib"], before.get("peak_memory_gib"))), default=None)
    return both | {k: cost[k] if both[k] is None else both[k] for k in ("wall_s", "device_hours")}


def origin(subject: Subject) -> str:
    """What a subject is called by: its run's name, else as it was asked for."""
    return subject.path.parent.name if subject.run and subject.path else subject.name


def newest_run(root: Path | None = None) -> Path:
    """The pre-training that finished last."""
    finished = [
        (str(run.get("updated", "")), folder)
        for folder, run in _finished("pretrain", root)
        if (folder / "weights.safetensors").is_file()
    ]
    if not finished:
        raise UserError(
            f"no finished pre-training run under {root or home() / 'runs'}; `sslbench pretrain ocl --data builtin` "
            f"makes one, or name a run folder or a weights file"
        )
    return max(finished)[1]


def fine_tuned(run: str | None, science: dict[str, Any] | None = None) -> Path:
    """The fine-tuned model that RUN means: itself, or the one made of the pre-trained RUN; None: the only one there is.

    science: of the recipe that it was fine-tuned by, where there are several. UserError: none, or more than one. Which
    of them is the newest says nothing: a command that finds its run finished leaves it as old as it was.
    """
    folder = home() / "runs" / run if run and not Path(run).exists() else Path(run or "")
    origin = read_run(folder) if run and folder.is_dir() else {}
    if run and (not origin or origin.get("kind", "pretrain") != "pretrain"):
        return Path(run)  # whether it is a fine-tuned model, and whole, is seen when it is opened
    models = [
        (path, str(tuned.get("recipe")))
        for path, tuned in _finished("finetune")
        if not run or (tuned.get("subject") or {}).get("sha256") == origin.get("weights_sha256")
        if not science or _science_of(path) == science
    ]
    if len(models) == 1:
        return models[0][0]
    where = f"of {run}" if run else f"under {home() / 'runs'}"
    if not models:
        raise UserError(
            f"no finished fine-tuning run {where}{' by that recipe' if science else ''}; `sslbench eval finetune` "
            f"makes one, or name a run folder or a weights file"
        )
    listed = ", ".join(f"{path} ({recipe})" for path, recipe in models)
    raise UserError(
        f"{len(models)} fine-tuned models {where}: {listed}; name one of these folders, or the pre-trained run with "
        f"the fine-tuning's recipe, --set science.finetune=NAME"
    )


def _science_of(folder: Path) -> Any:
    with contextlib.suppress(UserError, OSError):  # of a folder that nobody asked for
        return load_yaml(folder / "recipe.yaml").get("science")


def _finished(kind: str, root: Path | None = None) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(folder, run.json) of every finished run of that kind."""
    for path in sorted((root or home() / "runs").glob("*/run.json")):
        try:
            run = read_run(path.parent)
        except UserError:  # not one that anybody asked for
            continue
        if run.get("status") == "finished" and run.get("kind", "pretrain") == kind:
            yield path.parent, run


def find_weights(run: str, kind: str = "pretrain") -> tuple[Path, dict[str, Any]]:
    """RUN, a folder, its name under `runs/`, or a weights file -> (weights file, run.json or {}).

    RUN@0.5 is what `machine.keep_at` kept at half of the run, finished or not; run.json then has the cost so far.
    """
    folder, at, share = run.rpartition("@")
    if at and re.fullmatch(r"0?\.\d+", share) and not Path(run).exists():
        return _kept(folder, float(share))
    path = Path(run)
    if not path.exists() and (home() / "runs" / run).is_dir():
        path = home() / "runs" / run
    if path.name == "weights.safetensors" and (path.parent / "run.json").is_file():
        path = path.parent
    info: dict[str, Any] = {}
    if path.is_dir():
        if not (path / "run.json").is_file():
            raise UserError(f"{path} is no run folder: it has no run.json; `sslbench list runs` shows what there is")
        info = read_run(path)
        if info.get("status") != "finished":
            state = info.get("status", "no run")
            raise UserError(f"{path} holds no finished run ({state}); finish it with the command that started it")
        if info.get("kind", "pretrain") != kind:
            maker = {"pretrain": "sslbench pretrain", "finetune": "sslbench eval finetune"}[kind]
            raise UserError(f"{path} is a {info.get('kind', 'pretrain')} run; give one that `{maker}` made")
        path = path / "weights.safetensors"
        if not path.is_file():
            raise UserError(f"{path} is gone; the command that started the run writes it again from its checkpoint")
        check_weights(path, info)
    if not path.is_file():
        raise UserError(f"no run folder and no weights file at {run}; `sslbench list runs` shows what there is")
    return path, info


def _kept(run: str, share: float) -> tuple[Path, dict[str, Any]]:
    """(weights, run.json) at that share of a run."""
    folder = Path(run) if Path(run).is_dir() else home() / "runs" / run
    info, path = read_run(folder), milestone(folder, share)
    kept = info.get("kept", {}).get(path.name)
    if kept is None or not path.is_file():
        there = ", ".join(f"{k['share']:g}" for k in info.get("kept", {}).values())
        raise UserError(
            f"{folder} keeps no weights at {share:g} of the run{f', but at {there}' if there else ''}; "
            f"`--set machine.keep_at=[{share:g}]` has a pre-training keep them"
        )
    check_weights(path, kept)
    epochs = kept["step"] / info["steps_per_epoch"]
    return path, {**info, "epochs": epochs, "cost": kept["cost"], "milestone": share}


def open_subject(run: str, seed: int = 0, image_size: int | None = None, told: Told = NOTHING) -> Subject:
    """RUN -> the encoder to evaluate: a run folder, a weights file (ours, or one of a published model as its authors
    write it), `timm:NAME`, or `untrained:ARCH[@PIXELS]` (random, by seed).

    told: what public weights are. UserError where they are none: a run of this suite says itself what it is.
    """
    subject = _open(run, seed, image_size, told)
    if told and subject.public is None:
        raise UserError(f"'{run}' is not {PUBLIC}: what it is, is known; leave out --as, --pretrained-on and --epochs")
    return subject


def _open(run: str, seed: int, image_size: int | None, told: Told) -> Subject:
    kind, colon, name = run.partition(":")
    if kind == "untrained" and colon:
        arch, at, pixels = name.partition("@")
        if at and not pixels.isdecimal():
            raise UserError(f"'{run}': expected untrained:ARCH[@PIXELS], such as untrained:vit_mini4@24")
        return replace(_untrained(arch, seed, int(pixels) if at else image_size), name=run)
    if kind == "timm" and colon:
        state, config = public.read_timm(name)
        return _public(state, run, *public.statistics(config), both(of_timm(name, config), told, run))
    if colon and not Path(run).exists():
        raise UserError(f"'{run}': give a run folder, a weights file, timm:NAME or untrained:ARCH")
    path, info = find_weights(run)
    if not _is_ours(path):
        tree = public.read_file(path)
        return _public(tree, str(path), *public.statistics_of_file(tree, path, told.method), told, path)
    return replace(_from_file(path, info), name=path.stem)


def _untrained(arch: str, seed: int, image_size: int | None) -> Subject:
    torch.manual_seed(seed_of("weights", seed))
    encoder = VisionTransformer(get_arch(arch), image_size)
    initialise(encoder)
    a = Augment()
    return Subject(encoder, tensors_sha256(encoder.state_dict()), arch, "cls", a.mean, a.std, {}, None)


def _is_ours(path: Path) -> bool:
    """Whether the file says which arch it is, as what `sslbench pretrain` writes does."""
    if path.suffix != ".safetensors":
        return False
    try:
        with safe_open(path, "pt") as f:
            return "arch" in (f.metadata() or {})
    except (SafetensorError, OSError):
        return True  # _from_file says what is wrong with it


def _public(
    tree: Any, where: str, mean: tuple[float, ...], std: tuple[float, ...], told: Told, path: Path | None = None
) -> Subject:
    encoder, arch = public.to_encoder(tree, where)
    tensors = encoder.state_dict()
    _refuse_not_finite(tensors, where)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem if path else where)
    plugin = next((m for m in methods() if told.method and m.casefold() == told.method.casefold()), None)
    told = replace(told, method=plugin or told.method)
    pool = get_method(plugin).pool if plugin else "cls"  # the feature that this suite reads of that method
    pool = pool if pool in encoder.pools else encoder.pools[0]
    return Subject(encoder, tensors_sha256(tensors), arch, pool, mean, std, {}, None, told.epochs,
                   method=told.method or name, name=name, public=told)  # fmt: skip


def _refuse_not_finite(tensors: dict[str, Tensor], where: str) -> None:
    if names := not_finite(tensors):
        raise UserError(f"{where} cannot be scored, its weights are not finite: {names}; give an earlier checkpoint")


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file that this suite wrote."""
    try:
        with safe_open(path, "pt") as f:
            meta = f.metadata() or {}
        tensors = load_file(path)
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} is not a safetensors file ({e})") from None
    _refuse_not_finite(tensors, str(path))
    return tensors, meta


def _from_file(path: Path, info: dict[str, Any]) -> Subject:
    tensors, meta = read_safetensors(path)
    try:
        arch, image_size = meta["arch"], int(meta["image_size"])
        mean, std = json.loads(meta["mean"]), json.loads(meta["std"])
    except (KeyError, ValueError) as e:
        raise UserError(
            f"{path} does not say its arch, image size, mean and std ({e}); give weights that `sslbench pretrain` wrote"
        ) from None
    encoder = VisionTransformer(get_arch(arch), image_size)
    load_exactly(encoder, tensors, path)
    science: dict[str, Any] = {}
    if (recipe := path.parent / "recipe.yaml").is_file():
        science = read_science(recipe)
    return Subject(
        encoder,
        tensors_sha256(tensors),
        arch,
        meta.get("pool", "cls"),
        tuple(mean),
        tuple(std),
        info,
        path,
        info.get("epochs", science.get("epochs")),  # run.json of version 0.1 does not have them
        info.get("batch_size", science.get("batch_size")),
        meta.get("method", "unknown"),
        science.get("data", {}).get("spec"),
    )


def load_exactly(encoder: VisionTransformer, tensors: dict[str, Tensor], path: Path) -> None:
    try:
        encoder.load_state_dict(tensors)
    except RuntimeError as e:
        reason = " ".join(str(e).split())[:300]
        raise UserError(f"{path} does not fit its arch: {reason}") from None


@torch.inference_mode()
def extract(
    subject: Subject, data: ImageSet, device: torch.device, workers: int, pool: str, batch: int = 250
) -> Tensor:
    """Features (N, D) float32 on the CPU of every image, as the encoder's `pool` has them.

    Cached by all that they are made of: weights, arch, statistics, the rule of the view, and the images as they are.
    Of a small set every pool is kept, since one pass gives them all.
    """
    size, encoder = subject.encoder.image[0], subject.encoder
    made_of = [subject.sha256, subject.arch, subject.mean, subject.std, size, VIEW, contents(data)]
    name = f"{subject.sha256[:16]}_{data.split}_{digest(made_of)}"
    if (kept := feature_cache.read(name, pool)) is not None:
        return kept
    shape = len(data), encoder.arch.dim
    pools = encoder.pools if 4 * shape[0] * shape[1] <= SMALL else (pool,)
    encoder.to(device).eval()
    with feature_cache.writing(name, dict.fromkeys(pools, shape)) as add:
        for images in evaluation_batches(data, size, batch, device, workers):
            tokens = encoder(normalise(images, subject.mean, subject.std))
            for each in pools:
                add(each, encoder.feature(tokens, each))
    return feature_cache.mapped(name, pool)


def view_of(size: int, *sets: ImageSet) -> dict[str, int]:
    """What a protocol's hash says of the view: its version where versions differ in what becomes of these images.

    They differ in images no larger than the view, and beyond 224 pixels; a number of others, such as CIFAR's at up to
    32 pixels, keeps its hash. At 224 nobody looks: ImageNet has such images.
    """
    return {"view": VIEW} if size >= 224 or any(has_smaller(data, size) for data in sets) else {}


def contents(data: ImageSet) -> str:
    """12 hex digits over the fingerprint and the bytes of every image as it is stored, which may change under it.

    Reads all of them, unless they are in memory: a hundredth of the time that decoding JPEGs takes where the files are
    in the system's cache, else as long as reading takes (ImageNet: 140 GB).
    """
    if isinstance(data, MemoryImages):
        return data.fingerprint

    def part(first: int) -> bytes:
        of_each = hashlib.sha256()
        for i in range(first, min(first + 256, len(data))):
            try:
                of_each.update(hashlib.sha256(data.stored(i)).digest())
            except OSError:  # evaluated as black
                of_each.update(b"unreadable")
        return of_each.digest()

    with ThreadPoolExecutor(cores()) as threads:
        parts = b"".join(threads.map(part, range(0, len(data), 256)))
    return hashlib.sha256(data.fingerprint.encode() + parts).hexdigest()[:12]
