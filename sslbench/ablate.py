"""`sslbench ablate`: every row of a paper's ablation table, pre-trained and measured at a stated scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console

from .ablation import Ablation, read_ablation, row_recipes
from .data import known_size, open_both, open_split
from .errors import UserError
from .evaluate.run import eval_recipe, evaluate
from .listing import show
from .paths import home
from .recipe import Batch, Recipe

if TYPE_CHECKING:
    from .report.printed import Evaluation

# The columns of what the paper prints.
REPORTED = {"linprobe_top1": "paper linear", "finetune_top1": "paper finetune", "bbox_ap": "paper box AP"}


# ------------------------------------------------------------------------------------------------- what a row is


def evaluations(ablation: Ablation, number: int, scale: str, data: str | None = None) -> list[Evaluation]:
    """What measures a row: what its scale names, or at the paper's scale what measured the paper's table, or else k-NN
    and the quick probe. data: the labelled set; None: the scale's, or the one that was trained on."""
    from .report.papers import paper_tables, read_paper
    from .report.printed import Evaluation, evaluation_of

    at, table = ablation.at(scale), ablation.name
    labelled = at.eval_data or data
    if scale == "paper" and not at.measured_by and table in paper_tables():
        lines = read_paper(table)
        printed = [line for _, line in lines[(lines["row"] == str(number)) & (lines["value"] != "")].iterrows()]
        found = dict.fromkeys(e for line in printed if (e := evaluation_of(line)))
        return [Evaluation(e.command, e.recipe, _data_of(e, labelled, data), e.sets) for e in found]
    names = at.measured_by or ["knn", "linprobe"]
    return [Evaluation(f"eval {name.partition('_')[0]}", name, labelled) for name in names]


def _data_of(e: Evaluation, labelled: str | None, trained: str | None) -> str | None:
    """`transfer coco` reads COCO: the set that was trained on, where that is one."""
    kind = e.command.removeprefix("transfer ")
    if kind == e.command:
        return labelled
    return trained if trained and trained.startswith(f"{kind}:") else None


# -------------------------------------------------------------------------------------------------- running them


def ready(e: Evaluation) -> None:
    """Raise the UserError that `measure` would: before the hours of a pre-training, not after them."""
    command, kind = e.command.split()
    if command == "transfer":
        from .transfer.run import find_data, require

        require()
        find_data(kind, e.data)
    elif e.data:
        open_both(e.data)


def measure(e: Evaluation, run: str, seed: int) -> dict[str, Any]:
    """The ledger record of the main number, as the command of the evaluation makes it."""
    command, kind = e.command.split()
    if command == "transfer":
        from .transfer.protocol import transfer_recipe
        from .transfer.run import transfer

        recipe = transfer_recipe(kind, e.recipe, [*e.sets, f"science.seed={seed}"])
        return transfer(recipe, run, e.data, Console(stderr=True, highlight=False))
    return evaluate(eval_recipe(kind, e.recipe, [*e.sets]), run, e.data, seed)[0].model_dump(mode="json")


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
    measured_by = {number: evaluations(ablation, number, scale, data) for number in recipes}
    every = dict.fromkeys(e for row in measured_by.values() for e in row)
    reported, rows = _reported(table), []
    first = next(iter(recipes.values())).science
    console.print(
        f"{table} at scale {scale}: {len(recipes)} rows, {ablation.method} {first.arch} on {first.data.spec}, "
        f"{first.epochs:g} epochs each, seed {seed}; measured by {', '.join(e.recipe for e in every)}\n"
    )
    if not dry_run:
        open_split(first.data.spec, "train")
        for e in every:
            ready(e)
    for number, recipe in recipes.items():
        row: dict[str, Any] = {"row": number, "setting": ablation.rows[number].label}
        row |= reported.get(str(number), {})
        if dry_run:
            row |= _plan(recipe)
        else:
            folder = home() / "runs" / run_name(recipe)
            pretrain(recipe, folder, Console(stderr=True, highlight=False))
            records = [measure(e, str(folder), seed) for e in measured_by[number]]
            measured = {r["metric"]: _number(r) for r in records}
            row |= measured
            said = ", ".join(f"{metric.removesuffix('_top1')} {value}" for metric, value in measured.items())
            console.print(f"row {number}, {row['setting']}: {said}")
        rows.append(row)
    console.print()
    show([{k.replace("_top1", ""): v for k, v in row.items()} for row in rows], console)
    if not dry_run:
        console.print("±: half-width of the 95 % interval over test images, one seed; `sslbench report` keeps it")
    return {"table": table, "scale": scale, "seed": seed, "rows": rows}


def _number(record: dict[str, Any]) -> str:
    value, stderr = record["value"], record["stderr"]
    return f"{value:.1f}" if stderr is None else f"{value:.1f} ± {1.96 * stderr:.1f}"


def _plan(recipe: Recipe) -> dict[str, Any]:
    spec = recipe.science.data.spec
    images = known_size(spec) or len(open_split(spec, "train"))
    steps = round(images // Batch.of(recipe).total * recipe.science.epochs)
    return {"batch": recipe.science.batch_size, "steps": steps, "hash": recipe.hash()}


def _reported(table: str) -> dict[str, dict[str, str]]:
    """{row: {"paper linear": ..., "paper finetune": ...}} of the paper's table, where it is transcribed."""
    from .report.papers import paper_tables, read_paper

    if table not in paper_tables():
        return {}
    lines = read_paper(table)
    lines = lines[lines["metric"].isin([*REPORTED])]
    columns = [name for metric, name in REPORTED.items() if metric in set(lines["metric"])]
    out: dict[str, dict[str, str]] = {}
    for row, metric, value in zip(lines["row"], lines["metric"], lines["value"], strict=True):
        out.setdefault(row, dict.fromkeys(columns, ""))[REPORTED[metric]] = value
    return out
