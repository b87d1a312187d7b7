"""`sslbench ablate`: every row of a paper's ablation table, pre-trained and measured at a stated scale."""

from __future__ import annotations

import functools
from typing import Any

from pydantic import Field
from rich.console import Console

from .data import known_size, open_split
from .errors import UserError, nearest
from .evaluate.run import EvalRecipe, eval_recipe, evaluate
from .ledger import Scale
from .listing import show
from .paths import bundled, home
from .pretrain import compose
from .recipe import Batch, Recipe, Strict, find_recipe, load_yaml, merge, recipe_files, validate


class AtScale(Strict):
    """What the rows are laid on at a scale: a bundled recipe, changes to its science, and the labelled data."""

    recipe: str
    science: dict[str, Any] = {}
    eval_data: str | None = None  # None: the data that was trained on


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
    known = recipe_files("ablations")
    if table not in known:
        raise UserError(f"no ablation table '{table}'{nearest(table, known)}; there are {', '.join(known)}")
    path = find_recipe(table, "ablations")
    return validate(Ablation, {**load_yaml(path), "name": path.stem}, path.stem)


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
def paper_hashes(table: str) -> dict[str, str]:
    """{row: hash of its recipe} at the paper's scale; {} for a table that is no ablation here."""
    if table not in recipe_files("ablations"):
        return {}
    return {str(n): recipe.hash() for n, recipe in row_recipes(read_ablation(table), "paper").items()}


def protocols(table: str, number: int, scale: str) -> list[EvalRecipe]:
    """What a row is measured by: at the paper's scale what the paper's table was, else k-NN and the quick probe."""
    from .report.papers import paper_tables, protocol_of, read_paper

    lines = read_paper(table) if scale == "paper" and table in paper_tables() else None
    found = [] if lines is None else [protocol_of(line) for _, line in lines[lines["row"] == str(number)].iterrows()]
    named = [(p[0].removeprefix("eval "), p[1]) for p in found if p and p[0].startswith("eval ")]
    return [eval_recipe(*p) for p in dict.fromkeys(named or [("knn", "knn"), ("linprobe", "linprobe")])]


def ablate(
    table: str, scale: str, seed: int, data: str | None, sets: list[str], dry_run: bool, console: Console
) -> dict[str, Any]:
    """Run the rows one after the other, each resumed or skipped where it is there already, and print the table."""
    from .train.job import run_name
    from .train.loop import pretrain

    ablation = read_ablation(table)
    recipes = row_recipes(ablation, scale, seed, data, sets)  # all of them: a wrong row stops before the first runs
    if not dry_run and any(r.machine.devices * r.machine.nodes > 1 for r in recipes.values()):
        raise UserError("ablate trains and measures its rows in one process: leave machine.devices and nodes out")
    at, rows = ablation.at(scale), []
    reported = _reported(table)
    first = next(iter(recipes.values())).science
    console.print(
        f"{table} at scale {scale}: {len(recipes)} rows, {ablation.method} {first.arch} on {first.data.spec}, "
        f"{first.epochs:g} epochs each, seed {seed}\n"
    )
    for number, recipe in recipes.items():
        row: dict[str, Any] = {"row": number, "setting": ablation.rows[number].label}
        row |= reported.get(str(number), {})
        if dry_run:
            row |= _plan(recipe)
        else:
            folder = home() / "runs" / run_name(recipe)
            pretrain(recipe, folder, Console(stderr=True, highlight=False))
            measured = {}
            for protocol in protocols(table, number, scale):
                record = evaluate(protocol, str(folder), at.eval_data or data, seed)[0]
                measured[record.metric] = f"{record.value:.1f} ± {1.96 * (record.stderr or 0):.1f}"
            row |= measured
            said = ", ".join(f"{metric.removesuffix('_top1')} {value}" for metric, value in measured.items())
            console.print(f"row {number}, {row['setting']}: {said}")
        rows.append(row)
    console.print()
    show([{k.replace("_top1", ""): v for k, v in row.items()} for row in rows], console)
    if not dry_run:
        console.print("±: half-width of the 95 % interval over test images, one seed; `sslbench report` keeps it")
    return {"table": table, "scale": scale, "seed": seed, "rows": rows}


def _plan(recipe: Recipe) -> dict[str, Any]:
    spec = recipe.science.data.spec
    images = known_size(spec) or len(open_split(spec, "train"))
    steps = round(images // Batch.of(recipe).total * recipe.science.epochs)
    return {"batch": recipe.science.batch_size, "steps": steps, "hash": recipe.hash()}


def _reported(table: str) -> dict[str, dict[str, str]]:
    """{row: {"paper linear": ..., "paper finetune": ...}} of the paper's table, where it is transcribed."""
    import pandas as pd

    path = bundled("results/paper") / f"{table}.csv"
    if not path.is_file():
        return {}
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    names = {"linprobe_top1": "paper linear", "finetune_top1": "paper finetune"}
    out: dict[str, dict[str, str]] = {}
    for line in frame[frame["metric"].isin(names)].itertuples():
        out.setdefault(str(line.row), dict.fromkeys((names[m] for m in names if m in set(frame["metric"])), ""))
        out[str(line.row)][names[str(line.metric)]] = str(line.value)
    return out
