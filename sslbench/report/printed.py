"""What stands behind a number that a paper prints: the recipe that pre-trains for it, the command that measures it."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

from ..ablation import paper_rows
from ..errors import UserError
from ..evaluate.job import protocol_hash
from ..evaluate.run import Robustness, eval_recipe, robustness_hash
from ..ledger import Record
from ..method import get_method
from ..pretrain import compose
from ..recipe import Recipe, recipe_files
from ..transfer.protocol import transfer_recipe
from ..views import VIEW

# Keys of a row's condition that say what its recipe or its evaluation has anyway. Another, such as `kappa=4` in a text,
# is a setting that no recipe here is known to have, so that nothing measured is that number.
DESCRIBES = {"aug", "iterations", "head", "linprobe_epochs", "finetune_epochs"}


@dataclass(frozen=True)
class Evaluation:
    """`sslbench eval linprobe RUN --recipe linprobe_mae --data imagenet`, in parts."""

    command: str  # `eval linprobe`, `transfer coco`
    recipe: str
    data: str | None = None  # None: the run's own, or what `transfer` is about
    sets: tuple[str, ...] = ()
    of: Evaluation | None = None  # the fine-tuning whose model is scored, where it is not the encoder

    def commands(self, run: str) -> list[str]:
        """What to type, in order; the last gives the number."""
        words = ["sslbench", self.command, run, "--recipe", self.recipe]
        words += ["--data", self.data] if self.data else []
        words += [word for s in self.sets for word in ("--set", s)]
        return [*(self.of.commands(run) if self.of else []), " ".join(words)]

    @functools.cache  # noqa: B019 - frozen, and as few as the protocols of the tables
    def protocol_hashes(self, pool: str, side: int) -> set[str]:
        """Of the records that it makes, its recipe as it is shipped. pool: the encoder's own feature, for a recipe that
        leaves it open; side: pixels of the views that the encoder was trained on."""
        command, kind = self.command.split()
        if command == "transfer":
            return {transfer_recipe(kind, self.recipe, [*self.sets]).protocol_hash()}
        science = eval_recipe(kind, self.recipe, [*self.sets]).science
        size = getattr(science, "image_size", None) or side
        views = [{"view": VIEW}, *([{}] if size < 224 else [])]  # the images decide below that: features.view_of
        if isinstance(science, Robustness):
            assert self.of is not None
            tuned = self.of.protocol_hashes(pool, side)
            return {robustness_hash(science, hash, size, view) for hash in tuned for view in views}
        return {protocol_hash(science, science.pool or pool, (size, size), view) for view in views}


def evaluation_of(line: Any) -> Evaluation | None:
    """What measured a printed number; None for what is no such number."""
    if not (protocol := protocol_of(line)):
        return None
    command, recipe = protocol
    data = line["dataset"].replace("_", "-")
    if command == "eval robustness":
        tuned = evaluation_of({**line, "metric": "finetune_top1", "dataset": "imagenet"})
        assert tuned is not None
        return Evaluation(command, recipe, f"folder:{data}", (f"science.finetune={tuned.recipe}",), tuned)
    stated = re.search(r"(?:linprobe|finetune)_epochs=(\d+)", line["condition"])
    sets = (f"science.epochs={stated[1]}",) if stated else ()
    return Evaluation(command, recipe, None if command.startswith("transfer") else data, sets)


def protocol_of(line: Any) -> tuple[str, str] | None:
    """The protocol that a printed number was measured under: (command, recipe); None for what is no such number."""
    paper, method, metric = line["paper"], line["method"], line["metric"]
    large = line["arch"] in ("vit_l16", "vit_h14", "vit_h16")
    small = "cifar" if line["dataset"].startswith("cifar") else "subsets"
    if metric == "linprobe_top1":
        of_paper = {"ccmim": "linprobe_ccmim", "macrl": f"linprobe_macrl_{small}"}
        if line["dataset"] != "imagenet":
            of_paper["asl"] = "linprobe_asl"
        own = "linprobe_mocov3" if method == "mocov3" and paper != "macrl" else of_paper.get(paper)
        if large and method in ("ocl", "micl"):
            own = "linprobe_ocl_l"
        return "eval linprobe", own or ("linprobe_mae_l" if large else "linprobe_mae")
    if metric == "finetune_top1":
        fine = {"inat18": "_inat", "inat19": "_inat", "flowers102": "_flowers"}.get(line["dataset"], "")
        if paper in ("ocl", "micl"):
            own = ("finetune_ocl_l" if large else "finetune_ocl_b") if method in ("ocl", "micl") else None
        else:
            own = {"asl": "finetune_asl", "ccmim": f"finetune_ccmim{fine}", "macrl": f"finetune_macrl_{small}"}[paper]
        return "eval finetune", own or ("finetune_l" if large else "finetune")
    if metric.startswith(("bbox_ap", "mask_ap")):
        size = {"vit_l16": "_l", "vit_s16": "_s"}.get(line["arch"], "")
        return "transfer coco", f"coco_{'ocl' if paper == 'micl' else paper}{size}"
    if metric in ("miou", "aacc", "macc"):
        own = "ade20k_ocl" if paper in ("ocl", "micl") else "ade20k_mae"
        return "transfer ade20k", "ade20k_ccmim" if paper == "ccmim" else f"{own}{'_l' if large else ''}"
    return ("eval robustness", "robustness") if metric == "top1" and "imagenet_" in line["dataset"] else None


@dataclass(frozen=True)
class Pretraining:
    """The pre-training that a printed number asks for."""

    command: str
    recipe: Recipe
    ablation: bool = False  # whether it is a row of what `command` runs

    @functools.cached_property
    def hash(self) -> str:
        return self.recipe.hash()


def pretraining_of(line: Any) -> Pretraining | None:
    """None where the suite has no such method or arch, or no recipe that is known to have the row's condition."""
    table = f"{line['paper']}_{line['table']}"
    if rows := paper_rows(table):
        found = rows.get(line["row"])
        return Pretraining(f"sslbench ablate {table} --scale paper", found, True) if found else None
    if {part.partition("=")[0] for part in line["condition"].split(";") if part} - DESCRIBES:
        return None
    epochs = "" if epochs_contradicted(line) else line["epochs"]
    return _composed(table, plugin_of(line), line["arch"], line["pretrain_data"].replace("_", "-"), epochs)


@functools.cache
def _composed(table: str, method: str, arch: str, data: str, epochs: str) -> Pretraining | None:
    own = f"{method}/{table}_{data}"  # a recipe for this table alone, where its settings are not the method's usual
    own = own if own in recipe_files() else ""
    science = {"arch": arch, "data": {"spec": data}, "epochs": float(epochs) if epochs else None}
    try:
        recipe = compose(method, recipe=own or None, science=science)
    except UserError:
        return None
    chosen = f"--recipe {own}" if own else f"--arch {arch}"
    return Pretraining(
        f"sslbench pretrain {method} {chosen} --data {data}" + (f" --epochs {epochs}" if epochs else ""), recipe
    )


def epochs_contradicted(line: Any) -> bool:
    """Whether the rest of the paper has other epochs than those printed in the row: its recipe's are taken."""
    return line["note"].startswith("epochs printed as")


def plugin_of(line: Any) -> str:
    """The method here that a printed row is of: MiCL is OCL's earlier version; MACRL's MoCo, v1, is run as v3."""
    return {"micl": "ocl", "MoCo": "mocov3"}.get(line["method"], line["method"])


def behind(line: Any, records: list[Record]) -> list[Record]:
    """The records of a printed number: of the very recipe, whatever the seed, under its protocol, on its data."""
    run, evaluation = pretraining_of(line), evaluation_of(line)
    if not run or not evaluation:
        return []
    pool, side = get_method(run.recipe.method).pool, run.recipe.science.data.image_size or 0
    protocols = evaluation.protocol_hashes(pool, side)
    wanted = (run.hash, line["metric"], line["dataset"].replace("_", "-"))
    its = [r for r in records if (r.pretrain.recipe_hash, r.metric, r.dataset.replace("_", "-")) == wanted]
    return [r for r in its if r.protocol.hash in protocols]
