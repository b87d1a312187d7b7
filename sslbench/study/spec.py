"""A study's file: the question, what would answer it, and the rows, budgets, seeds and evaluations that it takes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from ..errors import UserError, nearest
from ..files import digest, write_atomically
from ..ledger import Scale
from ..method import get_method, name_of
from ..paths import recipe_files
from ..recipe import find_recipe, merge, read_tree
from ..strict import Strict, validate
from .budget import Budget, parse_budget

Pool = Literal["cls", "mean", "mean_all"]
ENOUGH = 3  # seeds that a ranking takes
TRIAL_SEED = 10**6  # of tuning; final runs have smaller ones


class Evaluation(Strict):
    """What a trained row is measured by: `sslbench eval PROTOCOL`, or `sslbench transfer PROTOCOL`."""

    protocol: Literal["knn", "linprobe", "attentive", "finetune", "robustness", "coco", "ade20k"]
    recipe: str | None = None  # None: the protocol's own
    pool: Pool | list[Pool] | None = None  # each of several is a number; None: the recipe's
    data: str | None = None  # None: the labels of the data that was trained on
    set: list[str] = []
    budgets: list[str] | None = None  # at which it is done; None: at all


class StudyRow(Strict):
    """A method and its settings; at a scale, that scale's changes on top."""

    method: str | None = None  # a name or path/to/file.py:Class; None: the study's, else the row's own name
    label: str = ""
    recipe: str | None = None
    preset: str | None = None
    science: dict[str, Any] = {}
    tiny: dict[str, Any] = {}
    cifar: dict[str, Any] = {}
    paper: dict[str, Any] = {}
    evaluations: list[Evaluation] | None = None  # in place of the study's


class Level(Strict):
    """What the rows are laid on."""

    recipe: str | None = None  # None: what `pretrain METHOD` takes for the arch and data in `science`
    science: dict[str, Any] = {}
    eval_data: str | None = None  # labelled; None: the data that was trained on
    # None: at the paper's scale of a paper's table what measured it, else k-NN and a linear probe.
    evaluations: list[Evaluation] | None = None


class Tune(Strict):
    """The same trials for every row: its lr times each factor, chosen by k-NN on a tenth of train."""

    lr_factors: list[Annotated[float, Field(gt=0)]] = Field(min_length=2)


Seeds = int | list[int]


class Study(Level):
    """recipes/studies/NAME.yaml. `scales` are what `--scale` chooses from; without them the file is of one scale."""

    name: str
    question: str = ""
    answer: str = ""  # what would count as one
    metric: str | None = None  # the main one: an evaluation's name, such as knn_mean
    method: str | None = None  # of rows that name none
    rows: dict[str | int, StudyRow] = Field(min_length=1)
    controls: list[str] = []
    untrained: bool = False  # the untrained ViT stands beside
    scratch: bool = False  # beside fine-tuning, training from scratch for the FLOPs of both
    budgets: list[str] = []  # none: each row's recipe as it is
    seeds: Seeds | dict[str, Seeds] = 1  # numbers 0, 1, ..; a list of them; or by budget
    warmup: float = Field(0.1, ge=0, le=0.5)  # of the run, where there is a budget
    tune: Tune | None = None
    scales: dict[Scale, Level] = {}

    def at(self, scale: str | None) -> Level:
        """What the rows are laid on at that scale, the file's first where none is said."""
        if not self.scales:
            if scale:
                raise UserError(f"{self.name} has no scales: leave --scale out")
            return self
        scale = scale or next(iter(self.scales))
        for known, level in self.scales.items():
            if known == scale:
                return level
        raise UserError(f"{self.name} has no scale '{scale}'{nearest(scale, self.scales)}")

    def seeds_at(self, budget: Budget | None) -> list[int]:
        """The seeds of the final runs at a budget."""
        given = self.seeds
        if isinstance(given, dict):
            if budget is None or budget.text not in {parse_budget(b).text for b in given}:
                raise UserError(f"{self.name}: seeds names no number for {budget.text if budget else 'no budget'}")
            given = next(n for b, n in given.items() if parse_budget(b).text == budget.text)
        seeds = list(range(given)) if isinstance(given, int) else given
        if not seeds or len(set(seeds)) < len(seeds) or not all(0 <= s < TRIAL_SEED for s in seeds):
            raise UserError(f"{self.name}: seeds {given}: expected different numbers from 0 to {TRIAL_SEED - 1}")
        return seeds

    def hash(self) -> str:
        """12 hex digits of all that the file says."""
        return digest(self.model_dump(mode="json", exclude_defaults=True))


def read_study(name: str) -> Study:
    """A study by the name of a bundled one, or by its file's path."""
    path = find_recipe(name, "studies")
    return check(validate(Study, {**read_tree(path, "studies"), "name": path.stem}, path.stem))


def check(study: Study) -> Study:
    """The study, or a UserError for what no single key shows to be wrong."""
    study.rows = {str(k): row for k, row in study.rows.items()}
    for control in study.controls:
        if control not in study.rows:
            raise UserError(f"{study.name}: controls names no row '{control}'{nearest(control, map(str, study.rows))}")
    budgets = [parse_budget(b) for b in study.budgets]
    if len({b.amount for b in budgets}) < len(budgets):
        raise UserError(f"{study.name}: a budget stands twice in {', '.join(study.budgets)}")
    if len({b.kind for b in budgets}) > 1:
        raise UserError(f"{study.name}: budgets {', '.join(study.budgets)} are of several kinds; give one kind")
    if study.scratch and any(b.kind != "flops" for b in budgets):
        raise UserError(f"{study.name}: scratch spends the FLOPs of a budget, so budgets have to be in FLOPs")
    for row, r in study.rows.items():
        get_method(r.method or study.method or str(row))
    if study.tune and len(set(study.tune.lr_factors)) < len(study.tune.lr_factors):
        raise UserError(f"{study.name}: tune.lr_factors has a factor twice")
    return study


def study_of(
    rows: list[str], budgets: list[str], seeds: int, data: str | None, science: dict[str, Any] | None = None
) -> Study:
    """The study that `--rows A,B` means: those methods, k-NN and a linear probe by CLS and mean, the untrained ViT.

    science: what every row has beside its own recipe.
    """
    if not budgets:
        raise UserError("--rows needs a --budget, such as 10epochs, 20min or 100TFLOP")
    names = [name_of(method) for method in rows]
    if twice := next((n for n in names if names.count(n) > 1), None):
        raise UserError(f"--rows names '{twice}' twice")
    tree = {
        "question": f"Which of {', '.join(names)} is better{f' on {data}' if data else ''} at an equal budget?",
        "answer": f"A difference in the main metric with p < .05 after Holm, over {ENOUGH} seeds or more.",
        "metric": "knn_mean",
        "rows": {n: {"method": m} for n, m in zip(names, rows, strict=True)},
        "untrained": True,
        "budgets": budgets,
        "seeds": seeds,
        "evaluations": [{"protocol": p, "pool": ["cls", "mean"]} for p in ("knn", "linprobe")],
        "science": merge(science or {}, {"data": {"spec": data}} if data else {}),
    }
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", "_vs_".join(names))
    return check(validate(Study, {**tree, "name": name}, name))


def write_study(study: Study, path: Path) -> None:
    """The file that repeats it."""
    tree = study.model_dump(mode="json", exclude_defaults=True, exclude={"name"})
    head = f"# sslbench study {path}\n"
    write_atomically(path, (head + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)).encode())


def studies() -> Mapping[str, Path]:
    """The bundled studies by name."""
    return recipe_files("studies")
