"""The cells of a study: what each would train and measure, and what the ledger has of it already."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, get_args

from ..data import open_both
from ..errors import UserError
from ..evaluate.evaluation import EvalRecipe, eval_recipe
from ..evaluate.features import open_subject
from ..evaluate.finetune import Finetune, FinetuneJob
from ..evaluate.start import settle
from ..ledger import Record
from ..recipe import Batch, Recipe, compose, length, merge
from ..train.build import flops_per_image
from ..train.job import run_name
from .budget import Budget, parse_budget, within
from .measure import SELECT, DataSets, Measure, measure, measures_of
from .printed import evaluations_printed
from .spec import TRIAL_SEED, Evaluation, Level, Pool, Study

UNTRAINED, SCRATCH = "untrained", "from scratch"
QUICK = [Evaluation(protocol="knn"), Evaluation(protocol="linprobe")]


@dataclass
class Cell:
    """One run of a study and its numbers. `recipe` None: an encoder that is not trained."""

    row: str
    budget: str  # '' where rows are run as their recipes are
    seed: int
    recipe: Recipe | None
    run: str  # what `eval` is given
    measures: list[Measure]
    steps: int | None = None  # None: the clock tells
    flops: float | None = None
    factor: float | None = None  # of a trial: what its lr is multiplied by
    tuning: dict[str, Any] | None = None  # what the trials took that chose the lr
    numbers: dict[str, Record] = field(default_factory=dict)  # what the ledger has of it, by measure
    status: str = "open"  # then running, done, failed, interrupted
    reason: str = ""

    @property
    def missing(self) -> list[Measure]:
        return [m for m in self.measures if m.name not in self.numbers]

    def name(self) -> str:
        trial = "" if self.factor is None else f" lr x {self.factor:g}"
        return " ".join(part for part in (self.row + trial, self.budget, f"seed {self.seed}") if part)

    def look(self, records: Iterable[Record], sets: DataSets, planning: bool = False) -> None:
        """Take up what the ledger has of it: the same recipe, seed, images and protocol, wherever it was measured.

        planning: data that is not on this machine has no numbers. Else it is a UserError.
        """
        self.numbers = {}
        for m in self.measures:
            try:
                identity = m.identity(sets)
            except UserError:
                if planning:
                    continue
                raise
            same = [r for r in records if self._is(r, identity, sets)]
            if same:
                self.numbers[m.name] = max(same, key=lambda r: (r.created, r.id))
        if not self.missing:
            self.status = "done"

    def _is(self, r: Record, identity: tuple[str, str, str], sets: DataSets) -> bool:
        if (r.protocol.hash, r.metric, r.data_fingerprint) != identity:
            return False
        if (r.run_seed, r.seed) != (self.seed, self.seed):
            return False
        if self.recipe is None:
            return r.method == UNTRAINED and f"{UNTRAINED}:{r.arch}" == self.run.partition("@")[0]
        if "milestone" in r.condition or r.pretrain.recipe_hash != self.recipe.hash():
            return False
        # Two folders of one name are two data sets; old lines do not say.
        seen = sets.train(self.recipe.science.data.spec).fingerprint
        return r.pretrain.data_fingerprint in (None, seen)


@dataclass
class ResolvedRow:
    """A row with its recipe as it stands before any budget."""

    name: str
    label: str
    recipe: Recipe
    evaluations: list[Evaluation]


def rows_of(study: Study, scale: str | None, data: str | None, sets: list[str]) -> list[ResolvedRow]:
    """Every row's recipe, resolved. A wrong row stops the study before anything runs."""
    level, out = study.at(scale), []
    scale = scale or next(iter(study.scales), None)
    for name, row in study.rows.items():
        science = merge(merge(level.science, row.science), getattr(row, scale) if scale else {})
        if data:
            science = merge(science, {"data": {"spec": data}})
        method = row.method or study.method or str(name)
        recipe = compose(method, recipe=row.recipe or level.recipe, preset=row.preset, science=science, sets=sets)
        recipe = settle(recipe)
        Batch.of(recipe)  # refuses what does not divide
        by = row.evaluations or level.evaluations or study.evaluations
        if not by and scale == "paper":
            by = [Evaluation(protocol=e.kind, recipe=e.recipe, set=[*e.sets])
                  for e in evaluations_printed(study.name, str(name))]  # fmt: skip
        out.append(ResolvedRow(str(name), row.label or str(name), recipe, by or QUICK))
    return out


def trained(row: str, recipe: Recipe, budget: Budget | None, seed: int, warmup: float, flops: float) -> Cell:
    """The cell of a row at a budget, without its measures. flops: of an image."""
    if budget:
        recipe = within(recipe, budget, warmup, flops)
    else:
        recipe = recipe.model_copy(deep=True)
    recipe.science.seed = seed
    timed = budget is not None and budget.kind == "device_s"
    steps = None if timed else length(recipe)[2]
    cost = None if steps is None else flops * steps * recipe.science.batch_size
    return Cell(row, budget.text if budget else "", seed, recipe, run_name(recipe), [], steps, cost)


def final_cells(study: Study, level: Level, rows: list[ResolvedRow], factors: dict[str, float]) -> list[Cell]:
    """Budget by budget from the smallest, seed by seed, row by row, so that what is there early can be compared.

    factors: what tuning chose for each row's lr.
    """
    cells: list[Cell] = []
    flops = {row.name: flops_per_image(row.recipe) for row in rows}
    budgets: list[Budget | None] = [*sorted(map(parse_budget, study.budgets), key=lambda b: b.amount)] or [None]
    for budget in budgets:
        for seed in study.seeds_at(budget):
            for row in rows:
                recipe = with_factor(row.recipe, factors.get(row.name, 1.0))
                cell = trained(row.name, recipe, budget, seed, study.warmup, flops[row.name])
                assert cell.recipe is not None
                cell.measures = measures_of(row.evaluations, cell.recipe, level.eval_data, budget)
                cells.append(cell)
            if study.untrained:
                cells += [c for c in _untrained(level, rows, seed) if not _there(c, cells)]
            if study.scratch and budget:
                cells += from_scratch(level, rows, budget, seed)
    return cells


def _untrained(level: Level, rows: list[ResolvedRow], seed: int) -> list[Cell]:
    """An untrained ViT of each shape that the rows have, measured by what needs no training."""
    cells = []
    for row in _shapes(rows):
        frozen = [e for e in row.evaluations if e.protocol in ("knn", "linprobe", "attentive") and e.budgets is None]
        measures = measures_of(frozen, row.recipe, level.eval_data, None)
        cells.append(Cell(UNTRAINED, "", seed, None, _untrained_run(row), measures))
    return cells


def from_scratch(level: Level, rows: list[ResolvedRow], budget: Budget, seed: int) -> list[Cell]:
    """Fine-tuning of an untrained ViT of each shape, for the FLOPs of pre-training and fine-tuning together."""
    cells = []
    for row in _shapes(rows):
        run = _untrained_run(row)
        tuned = [e for e in row.evaluations if e.protocol == "finetune"]
        for m in measures_of(tuned, row.recipe, level.eval_data, budget):
            assert isinstance(m.recipe, EvalRecipe) and m.data is not None
            train, val = open_both(m.data)
            job = FinetuneJob(m.recipe, open_subject(run, seed), m.data, train, m.pool, seed, val)
            an_epoch = job.flops_per_image() * (len(job.train) // job.batch_size * job.batch_size)
            m.recipe = m.recipe.model_copy(deep=True)
            assert isinstance(m.recipe.science, Finetune)
            share = m.recipe.science.optim.warmup_epochs / m.recipe.science.epochs
            m.recipe.science.epochs += budget.amount / an_epoch
            m.recipe.science.optim.warmup_epochs = share * m.recipe.science.epochs
            m.name += "_scratch"
            cells.append(Cell(SCRATCH, budget.text, seed, None, run, [m], flops=an_epoch * m.recipe.science.epochs))
    return cells


def _shapes(rows: list[ResolvedRow]) -> list[ResolvedRow]:
    """A row of each arch and size of view that the rows have."""
    return list({(r.recipe.science.arch, r.recipe.science.data.image_size): r for r in rows}.values())


def _untrained_run(row: ResolvedRow) -> str:
    return f"{UNTRAINED}:{row.recipe.science.arch}@{row.recipe.science.data.image_size}"


def _there(cell: Cell, cells: list[Cell]) -> bool:
    return any((c.row, c.run, c.seed) == (cell.row, cell.run, cell.seed) for c in cells)


def trial_cells(study: Study, rows: list[ResolvedRow]) -> list[Cell]:
    """Give each row the same trials, at the smallest budget, with a seed that no final run has."""
    if study.tune is None:
        return []
    smallest = min(map(parse_budget, study.budgets), key=lambda b: b.amount) if study.budgets else None
    cells = []
    for row in rows:
        flops = flops_per_image(row.recipe)
        for factor in study.tune.lr_factors:
            cell = trained(row.name, with_factor(row.recipe, factor), smallest, TRIAL_SEED, study.warmup, flops)
            assert cell.recipe is not None
            cell.factor = factor
            # By the feature that the study ranks by; where that is each method's own, by that.
            pool = next((p for p in get_args(Pool) if (study.metric or "").endswith(f"_{p}")), None)
            select = eval_recipe(SELECT, sets=[f"science.pool={pool}"] if pool else [])
            cell.measures = [measure(select, cell.recipe, cell.recipe.science.data.spec)]
            cells.append(cell)
    return cells


def tuning_cost(trials: list[Cell], row: str) -> dict[str, Any] | None:
    """What a row's trials took, pre-training and evaluation; None where it had none."""
    costs = [r.cost for c in trials if c.row == row for r in c.numbers.values()]
    if not costs:
        return None
    flops = [c.flops for c in costs if c.flops is not None]
    return {"trials": len(costs), "device_hours": sum(c.device_hours for c in costs), "flops": sum(flops)}


def with_factor(recipe: Recipe, factor: float) -> Recipe:
    """The recipe with its lr times `factor`."""
    new = recipe.model_copy(deep=True)
    new.science.optim.lr = float(f"{recipe.science.optim.lr * factor:.6g}")  # 3 x 1e-3 is 3e-3, and one hash
    return new


def choose_factors(trials: list[Cell]) -> dict[str, float]:
    """{row: factor} of the best trial of each row; of equal ones the nearest to 1. Rows whose trials are not all there
    are left out."""
    out: dict[str, float] = {}
    for row in {c.row: None for c in trials}:
        its = [c for c in trials if c.row == row]
        if any(c.missing for c in its):
            continue
        value = {c.factor or 1.0: next(iter(c.numbers.values())).value for c in its}
        out[row] = max(value, key=lambda f: (value[f], -abs(math.log(f))))
    return out
