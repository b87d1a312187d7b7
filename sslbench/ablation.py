"""A paper's ablation table as recipes, recipes/ablations/<table>.yaml: rows of changes to a recipe, at three scales."""

from __future__ import annotations

import functools
from typing import Any

from pydantic import Field

from .errors import UserError, nearest
from .ledger import Scale
from .pretrain import compose
from .recipe import Recipe, Strict, find_recipe, merge, read_tree, recipe_files, validate


class AtScale(Strict):
    """What the rows are laid on at a scale: a bundled recipe, changes to its science, and how they are measured."""

    recipe: str
    science: dict[str, Any] = {}
    eval_data: str | None = None  # the labelled data; None: what was trained on
    # Eval recipes, such as linprobe_mae. []: at scale paper the protocols of the paper's table, else the quick ones.
    measured_by: list[str] = []


class Row(Strict):
    """A row of the table: its changes to science, and, where a scale needs other values, those."""

    label: str
    science: dict[str, Any] = {}
    tiny: dict[str, Any] = {}
    cifar: dict[str, Any] = {}
    paper: dict[str, Any] = {}


class Ablation(Strict):
    """recipes/ablations/<paper>_<table>.yaml; rows are numbered as in results/paper/<paper>_<table>.csv."""

    name: str
    method: str
    scales: dict[Scale, AtScale]
    rows: dict[int, Row] = Field(min_length=1)

    def at(self, scale: str) -> AtScale:
        for known, at in self.scales.items():
            if known == scale:
                return at
        raise UserError(f"{self.name} has no scale '{scale}'{nearest(scale, self.scales)}")


def read_ablation(table: str) -> Ablation:
    """The ablation of that name, checked. One that `extends` another has its rows: MiCL's tables are OCL's."""
    known = recipe_files("ablations")
    if table not in known:
        raise UserError(f"no ablation table '{table}'{nearest(table, known)}; there are {', '.join(known)}")
    path = find_recipe(table, "ablations")
    return validate(Ablation, {**read_tree(path, "ablations"), "name": path.stem}, path.stem)


def row_recipes(
    ablation: Ablation, scale: str, seed: int = 0, data: str | None = None, sets: list[str] | None = None
) -> dict[int, Recipe]:
    """The resolved recipe of each row at that scale."""
    at, out = ablation.at(scale), {}
    for number, row in ablation.rows.items():
        science = merge(merge(at.science, row.science), getattr(row, scale))
        science = merge(science, {"seed": seed, **({"data": {"spec": data}} if data else {})})
        out[number] = compose(ablation.method, recipe=at.recipe, science=science, sets=sets)
    return out


@functools.cache
def paper_rows(table: str) -> dict[str, Recipe]:
    """{row: its recipe at the paper's scale}; {} for a table that is no ablation here."""
    if table not in recipe_files("ablations"):
        return {}
    return {str(n): recipe for n, recipe in row_recipes(read_ablation(table), "paper").items()}
