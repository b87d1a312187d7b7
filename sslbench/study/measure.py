"""What the cells of a study are measured by, `eval` or `transfer`, and how the ledger knows a number of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console

from ..data import ImageSet, open_both, open_split, open_test
from ..evaluate.evaluation import EvalRecipe, Robustness, eval_recipe, evaluate, protocol_of, robustness_hash
from ..evaluate.features import view_of
from ..evaluate.labels import protocol_name
from ..ledger import Record, checked
from ..method import get_method
from ..recipe import Recipe
from ..transfer.protocol import TransferRecipe, transfer_recipe
from ..transfer.transfer import fingerprint_of, transfer
from .budget import Budget, parse_budget
from .spec import Evaluation

SELECT = "knn_held_out"  # the protocol that tuning selects by
DENSE = {"coco": "bbox_ap", "ade20k": "miou"}  # the protocols of `transfer`, and the main number of each


class DataSets:
    """The labelled sets of a study, each opened once. What is not there is a UserError."""

    def __init__(self) -> None:
        self.opened: dict[str, tuple[ImageSet, ImageSet]] = {}
        self.trained: dict[str, ImageSet] = {}
        self.known: dict[tuple[str, str | None], str] = {}

    def both(self, spec: str) -> tuple[ImageSet, ImageSet]:
        if spec not in self.opened:
            self.opened[spec] = open_both(spec)
        return self.opened[spec]

    def train(self, spec: str) -> ImageSet:
        if spec not in self.trained:
            self.trained[spec] = self.opened[spec][0] if spec in self.opened else open_split(spec, "train")
        return self.trained[spec]

    def dense(self, recipe: TransferRecipe, data: str | None) -> str:
        """The fingerprint of what `transfer` scores."""
        key = recipe.science.protocol, data
        if key not in self.known:
            self.known[key] = fingerprint_of(recipe, data)
        return self.known[key]


@dataclass
class Measure:
    """One number to measure: a protocol on a labelled set, by a feature, in views of `side` pixels."""

    name: str  # such as knn_mean
    recipe: EvalRecipe | TransferRecipe
    data: str | None  # None: where `transfer` looks for its set
    pool: str
    side: int
    of: Measure | None = None  # the fine-tuning whose model is scored, where it is not the encoder

    def identity(self, sets: DataSets) -> tuple[str, str, str]:
        """(hash of the protocol, metric, fingerprint of the images): what a record of it says."""
        if isinstance(self.recipe, TransferRecipe):
            return self.recipe.protocol_hash(), self.metric, sets.dense(self.recipe, self.data)
        assert self.data is not None
        s = self.recipe.science
        if isinstance(s, Robustness):
            assert self.of is not None
            test, size = open_test(self.data), self.of.recipe.science.image_size or self.side  # type: ignore[union-attr]
            hash = robustness_hash(s, self.of.identity(sets)[0], size, view_of(size, test))
            return hash, self.metric, test.fingerprint
        scored = [sets.train(self.data)] if self.recipe.name == SELECT else [*sets.both(self.data)]
        return protocol_of(self.recipe, self.pool, self.side, *scored)["hash"], self.metric, scored[-1].fingerprint

    @property
    def metric(self) -> str:
        """What its main number is called; a protocol may have others."""
        protocol = self.recipe.science.protocol
        if protocol in DENSE:
            return DENSE[protocol]
        return "top1" if protocol == "robustness" else f"{protocol.removesuffix('_augmented')}_top1"

    def take(self, run: str, seed: int, console: Console, tuning: dict[str, Any] | None) -> Record:
        """Measure it, on the run of that folder or name. The record is in the ledger."""
        if isinstance(self.recipe, TransferRecipe):
            recipe = self.recipe.model_copy(deep=True)
            recipe.science.seed = seed
            return checked(transfer(recipe, run, self.data, console, tuning))
        if self.of:
            self.of.take(run, seed, console, tuning)  # finished already, but where its folder is gone
        return evaluate(self.recipe, run, self.data, seed, console=console, tuning=tuning)[0]

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "recipe": self.recipe.model_dump(mode="json"),
            "data": self.data,
            "pool": self.pool,
            "side": self.side,
            "of": self.of.as_json() if self.of else None,
        }


def from_json(tree: dict[str, Any]) -> Measure:
    """What `as_json` gave."""
    dense = tree["recipe"]["science"]["protocol"] in DENSE
    recipe = (TransferRecipe if dense else EvalRecipe).model_validate(tree["recipe"])
    return Measure(**{**tree, "recipe": recipe, "of": from_json(tree["of"]) if tree["of"] else None})


def measures_of(
    evaluations: list[Evaluation], recipe: Recipe, data: str | None, budget: Budget | None
) -> list[Measure]:
    """What a run of `recipe` is measured by. data: labelled; None: what it was trained on."""
    out = []
    for e in evaluations:
        at = None if e.budgets is None else {parse_budget(b).text for b in e.budgets}
        if at is not None and (budget is None or budget.text not in at):
            continue
        if e.protocol in DENSE:
            dense = transfer_recipe(e.protocol, e.recipe, e.set)
            out.append(Measure(dense.name, dense, e.data or _of_kind(recipe, e.protocol), "", 0))
            continue
        labelled = e.data or data or recipe.science.data.spec
        pools = e.pool if isinstance(e.pool, list) else [e.pool]
        for pool in pools:
            sets = [*e.set, *([f"science.pool={pool}"] if pool else [])]
            out.append(measure(eval_recipe(e.protocol, e.recipe, sets), recipe, labelled, data))
    return out


def measure(protocol: EvalRecipe, recipe: Recipe, labelled: str, trained: str | None = None) -> Measure:
    """What that protocol measures of what `recipe` trains.

    trained: the labels that a model whose robustness is scored was fine-tuned by; None: those of what `recipe` trains
    on.
    """
    side = recipe.science.data.image_size or 0
    s = protocol.science
    if isinstance(s, Robustness):
        tuned = measure(eval_recipe("finetune", s.finetune), recipe, trained or recipe.science.data.spec)
        return Measure(f"{protocol.name}_{labelled.rpartition('/')[2]}", protocol, labelled, "", side, tuned)
    pool = s.pool or get_method(recipe.method).pool
    return Measure(protocol_name(protocol, pool), protocol, labelled, pool, side)


def _of_kind(recipe: Recipe, protocol: str) -> str | None:
    """The set that was trained on, where it is one that the protocol reads."""
    spec = recipe.science.data.spec
    return spec if spec.startswith(f"{protocol}:") else None
