"""`sslbench ablate`: the study of a paper's ablation table, its rows printed beside what the paper reports."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from ..errors import UserError, nearest
from ..ledger import Record
from ..recipe import Recipe, length
from ..study.cells import ResolvedRow, rows_of
from ..study.grid import Grid
from ..study.printed import paper_tables, read_paper
from ..study.spec import Study, read_study, studies
from .listing import show

# The columns of what the paper prints.
REPORTED = {"linprobe_top1": "paper linear", "finetune_top1": "paper finetune", "bbox_ap": "paper box AP"}


def ablations() -> list[str]:
    """The tables that are laid out at several scales."""
    return [name for name in studies() if read_study(name).scales]


def ablate(
    table: str, scale: str, seed: int, data: str | None, sets: list[str], dry_run: bool, console: Console
) -> dict[str, Any]:
    """Run the rows, each resumed or skipped where it is there already, and print the table."""
    known = ablations()
    if table not in known:
        raise UserError(f"no ablation table '{table}'{nearest(table, known)}; there are {', '.join(known)}")
    study = read_study(table)
    study.seeds = [seed]
    rows = rows_of(study, scale, data, sets)  # all of them: a wrong row stops before the first runs
    _announce(study, rows, scale, seed, console)
    cells = {}
    if not dry_run:
        grid = Grid(study, scale, data, sets, [])
        grid.execute(1, console)
        cells = {cell.row: cell for cell in grid.cells}
    reported, entries = _reported(table), []
    for row in rows:
        number = int(row.name) if row.name.isdigit() else row.name
        entry: dict[str, Any] = {"row": number, "setting": row.label, **reported.get(row.name, {})}
        entry |= _plan(row.recipe) if dry_run else {r.metric: _number(r) for r in cells[row.name].numbers.values()}
        entries.append(entry)
    console.print()
    show([{k.replace("_top1", ""): v for k, v in entry.items()} for entry in entries], console)
    answer = {"table": table, "scale": scale, "seed": seed, "rows": entries}
    if not dry_run:
        console.print("±: half-width of the 95 % interval over test images, one seed; `sslbench report` keeps it")
        grid.check(console, answer)
    return answer


def _announce(study: Study, rows: list[ResolvedRow], scale: str, seed: int, console: Console) -> None:
    recipe = rows[0].recipe
    measured_by = dict.fromkeys(e.recipe or e.protocol for row in rows for e in row.evaluations)
    console.print(
        f"{study.name} at scale {scale}: {len(rows)} rows, {recipe.method} {recipe.science.arch} on "
        f"{recipe.science.data.spec}, {recipe.science.epochs:g} epochs each, seed {seed}; measured by "
        f"{', '.join(measured_by)}\n"
    )


def _number(r: Record) -> str:
    return f"{r.value:.1f}" if r.stderr is None else f"{r.value:.1f} ± {1.96 * r.stderr:.1f}"


def _plan(recipe: Recipe) -> dict[str, Any]:
    return {"batch": recipe.science.batch_size, "steps": length(recipe)[2], "hash": recipe.hash()}


def _reported(table: str) -> dict[str, dict[str, str]]:
    """{row: {"paper linear": ..., "paper finetune": ...}} of the paper's table, where it is transcribed."""
    if table not in paper_tables():
        return {}
    lines = read_paper(table)
    lines = lines[lines["metric"].isin([*REPORTED])]
    columns = [name for metric, name in REPORTED.items() if metric in set(lines["metric"])]
    out: dict[str, dict[str, str]] = {}
    for row, metric, value in zip(lines["row"], lines["metric"], lines["value"], strict=True):
        out.setdefault(row, dict.fromkeys(columns, ""))[REPORTED[metric]] = value
    return out
