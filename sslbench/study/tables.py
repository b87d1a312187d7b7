"""The papers' tables as studies: a row is what pre-trains for a printed row, measured as the paper measured it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from ..errors import UserError, nearest
from ..ledger import Record
from ..method import get_method, methods
from ..paths import recipe_files
from ..recipe import Recipe, compose, drop_none
from ..vit import ARCHS
from .cells import rows_of
from .printed import Evaluation as PrintedEvaluation
from .printed import epochs_of, evaluation_of, paper_tables, plugin_of, read_paper
from .spec import Evaluation, Level, Study, StudyRow, check, read_study, studies

# Keys of a row's condition that say what its recipe or its evaluation has anyway. Another, such as `kappa=4` in a text,
# is a setting that no recipe here is known to have, so that nothing measured is that number.
DESCRIBES = {"aug", "iterations", "head", "linprobe_epochs", "finetune_epochs"}


def study_named(name: str) -> Study:
    """A study by its file's path or its bundled name; or a paper's table, whose rows are those that can be trained."""
    if name.endswith((".yaml", ".yml")) or name in studies():
        return read_study(name)
    if name in paper_tables():
        return table_study(name)
    raise UserError(f"no study or paper's table '{name}'{nearest(name, [*studies(), *paper_tables()])}")


def table_study(table: str) -> Study:
    """The rows of a paper's table that no file of recipes/studies/ lays out, each by the recipe that is its own.

    What `report --missing` lists, as one study. UserError where no row of it can be trained here.
    """
    rows: dict[str, StudyRow] = {}
    measured: dict[str, dict[Any, Evaluation]] = {}
    lines = read_paper(table)
    several = lines["pretrain_data"].nunique() > 1
    for _, line in lines.iterrows():
        run, by = pretraining_of(line), evaluation_of(line)
        if not line["value"] or run is None or by is None:
            continue
        s = run.recipe.science
        name = f"{run.recipe.method}_{s.arch}_{s.epochs:g}" + (f"_{s.data.spec}" if several else "")
        rows.setdefault(name, StudyRow(method=run.recipe.method, recipe=run.own or None, science=run.science))
        # On the data of pre-training where it is that, so that `--data` is said once.
        labelled = None if by.data == s.data.spec else by.data
        measured.setdefault(name, {})[by] = Evaluation(
            protocol=by.kind,
            recipe=by.recipe,
            data=labelled,
            set=[*by.sets],  # type: ignore[arg-type]
        )
    if not rows:
        raise UserError(
            f"{table} has no number that a method of this suite is trained for; see `sslbench report {table}`"
        )
    for name, row in rows.items():
        row.evaluations = [*measured[name].values()]
    question = f"What does {table.replace('_t', ', Table ')} print, trained and measured here?"
    return check(Study(name=table, question=question, rows={**rows}, scales={"paper": Level()}))


@functools.cache
def paper_rows(table: str) -> dict[str, Recipe]:
    """{row: its recipe at the paper's scale} of a table that a file of recipes/studies/ lays out; {} of another."""
    if table not in studies() or "paper" not in (study := read_study(table)).scales:
        return {}
    return {row.name: row.recipe for row in rows_of(study, "paper", None, [])}


@dataclass(frozen=True)
class Pretraining:
    """The pre-training that a printed number asks for."""

    command: str
    recipe: Recipe
    ablation: bool = False  # whether it is a row of what `command` runs
    own: str = ""  # the recipe that is for this table alone
    science: Any = None  # what the row says

    @functools.cached_property
    def hash(self) -> str:
        return self.recipe.hash()


def pretraining_of(line: Any) -> Pretraining | None:
    """None where the suite has no such method or arch, or no recipe that is known to have the row's condition."""
    table = f"{line['paper']}_{line['table']}"
    if rows := paper_rows(table):
        recipe = rows.get(line["row"])
        return Pretraining(f"sslbench ablate {table} --scale paper", recipe, True) if recipe else None
    if _keys(line["condition"]) - DESCRIBES:
        return None
    data = line["pretrain_data"].replace("_", "-")
    return _composed(table, plugin_of(line), line["arch"], data, epochs_of(line))


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
    command = f"sslbench pretrain {method} {chosen} --data {data}" + (f" --epochs {epochs}" if epochs else "")
    return Pretraining(command, recipe, own=own, science=drop_none(science))


def behind(line: Any, records: list[Record]) -> list[Record]:
    """The records of a printed number: of the very recipe, whatever the seed, under its protocol, on its data.

    Where no run of that recipe was measured, of public weights that are what the row says.
    """
    evaluation = evaluation_of(line)
    if evaluation is None:
        return []
    wanted = (line["metric"], line["dataset"].replace("_", "-"))
    its = [r for r in records if (r.metric, r.dataset.replace("_", "-")) == wanted]
    if not its:
        return []
    if run := pretraining_of(line):
        pool, side = get_method(run.recipe.method).pool, run.recipe.science.data.image_size or 0
        protocols = evaluation.protocol_hashes(pool, side)
        own = [r for r in its if r.pretrain.recipe_hash == run.hash and r.protocol.hash in protocols]
        if own:
            return own
    return _public(line, evaluation, its)


def _public(line: Any, evaluation: PrintedEvaluation, records: list[Record]) -> list[Record]:
    """Return one file's records: public weights whose method, arch, data, epochs and protocol are those printed."""
    if paper_rows(f"{line['paper']}_{line['table']}") or _keys(line["condition"]) - DESCRIBES or not line["epochs"]:
        return []  # a row whose settings no such weights are known to have
    printed = (line["method"].casefold(), line["arch"], line["pretrain_data"].replace("_", "-"), epochs_of(line))
    own = get_method(plugin_of(line)).pool if plugin_of(line) in methods() else None
    side = ARCHS[line["arch"]].image if line["arch"] in ARCHS else 0
    its = []
    for r in (r for r in records if r.public):
        row = (r.method.casefold(), r.arch, (r.pretrain.data or "").replace("_", "-"), f"{r.pretrain.epochs or 0:g}")
        pool = own or str(r.condition.get("pool", "cls"))  # of a method that this suite has not, its own feature
        if row == printed and r.protocol.hash in evaluation.protocol_hashes(pool, side):
            its.append(r)
    last = max(its, key=lambda r: (r.created, r.id), default=None)
    return [r for r in its if last and r.weights_sha256 == last.weights_sha256]


def _keys(condition: str) -> set[str]:
    return {part.partition("=")[0] for part in condition.split(";") if part}
