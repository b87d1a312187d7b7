"""What the papers print, results/paper/*.csv, and the command that measures a number as a paper measured it."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ..errors import UserError, nearest
from ..evaluate.evaluation import Robustness, eval_recipe, robustness_hash
from ..evaluate.job import protocol_hash
from ..paths import bundled
from ..transfer.protocol import transfer_recipe
from ..views import VIEW

PAPERS = {
    "ocl": "OCL (Yang et al. 2025)",
    "micl": "MiCL, the earlier version of OCL (Yang et al.)",
    "asl": "ASL (Li et al. 2024)",
    "ccmim": "ccMIM (Zhang et al. 2023)",
    "macrl": "MACRL (Yao et al. 2022)",
}


def paper_tables() -> dict[str, Path]:
    """`ocl_t6` -> its CSV: paper by paper, its tables by number, then others, what the text says last."""

    def order(path: Path) -> tuple[int, int, str]:
        paper, _, table = path.stem.partition("_")
        at = [*PAPERS].index(paper) if paper in PAPERS else len(PAPERS)
        return at, int(table[1:]) if table[1:].isdigit() else 98 + (table == "text"), path.stem

    return {p.stem: p for p in sorted(bundled("results/paper").glob("*.csv"), key=order)}


def read_paper(name: str) -> pd.DataFrame:
    """A paper's table as printed, every column as text."""
    known = paper_tables()
    if name not in known:
        raise UserError(f"unknown table '{name}'{nearest(name, known)}; `sslbench list tables` shows all")
    return pd.read_csv(known[name], dtype=str, keep_default_na=False)


@dataclass(frozen=True)
class Evaluation:
    """`sslbench eval linprobe RUN --recipe linprobe_mae --data imagenet`, in parts."""

    command: str  # `eval linprobe`, `transfer coco`
    recipe: str
    data: str | None = None  # None: the run's own, or what `transfer` is about
    sets: tuple[str, ...] = ()
    of: Evaluation | None = None  # the fine-tuning whose model is scored, where it is not the encoder

    @property
    def kind(self) -> str:
        """The protocol: the last word of the command."""
        return self.command.split()[1]

    def commands(self, run: str) -> list[str]:
        """What to type, in order; the last gives the number."""
        words = ["sslbench", self.command, run, "--recipe", self.recipe]
        words += ["--data", self.data] if self.data else []
        words += [word for s in self.sets for word in ("--set", s)]
        return [*(self.of.commands(run) if self.of else []), " ".join(words)]

    @functools.cache  # noqa: B019 - frozen, and as few as the protocols of the tables
    def protocol_hashes(self, pool: str, side: int) -> set[str]:
        """Return the hashes of the records that it makes, its recipe as it is shipped. pool: the encoder's own feature,
        for a recipe that leaves it open; side: pixels of the views that the encoder was trained on."""
        kind = self.kind
        if self.command.startswith("transfer"):
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


def evaluations_printed(table: str, row: str) -> list[Evaluation]:
    """What measured the numbers that a paper's table prints of a row; [] where there is no such table."""
    if table not in paper_tables():
        return []
    lines = read_paper(table)
    printed = [line for _, line in lines[(lines["row"] == row) & (lines["value"] != "")].iterrows()]
    return list(dict.fromkeys(e for line in printed if (e := evaluation_of(line))))


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


def epochs_contradicted(line: Any) -> bool:
    """Whether the rest of the paper has other epochs than those printed in the row: its recipe's are taken."""
    return line["note"].startswith("epochs printed as")


def plugin_of(line: Any) -> str:
    """The method here that a printed row is of: MiCL is OCL's earlier version; MACRL's MoCo, v1, is run as v3."""
    return PLUGINS.get(line["method"], line["method"])


PLUGINS = {"micl": "ocl", "MoCo": "mocov3", "I-JEPA": "ijepa"} | {
    name: name.lower() for name in ("DINO", "iBOT", "SiameseIM", "SimMIM", "CMAE")
}
MULTI_CROP = 4


def epochs_of(line: Any) -> str:
    """Those that its method is trained for: as printed; "" where the paper contradicts itself.

    iBOT's tables, whose rows the papers quote, count an epoch of two large and ten small crops as four (Zhou et al.
    2022, section 4: "effective" epochs): there 1,600 of DINO and iBOT are 400 here.
    """
    epochs = "" if epochs_contradicted(line) else line["epochs"]
    if plugin_of(line) in ("dino", "ibot") and epochs and float(epochs) > 800:
        return f"{float(epochs) / MULTI_CROP:g}"
    return epochs
