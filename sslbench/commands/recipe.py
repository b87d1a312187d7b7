"""`sslbench recipe`: a recipe as a file of one's own, and what is wrong with it, or what it comes to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .. import strict
from ..data import data_name, known_size, open_split
from ..data.sources import KINDS
from ..errors import UserError, nearest
from ..evaluate.evaluation import EvalRecipe, eval_recipe
from ..evaluate.start import settle
from ..files import write_atomically
from ..recipe import Batch, compose, find_any, length, load_yaml, problem_of, problems, read_tree
from ..recipe.text import repeated_keys, standalone
from ..study.cells import rows_of
from ..study.spec import Study
from ..study.spec import check as check_study
from ..train.build import build
from ..transfer.protocol import TransferRecipe, transfer_recipe

# An evaluation that no command runs: tuning does.
UNCALLED = "knn_held_out"


def copy(name: str, file: Path | None, force: bool, console: Console) -> dict[str, str]:
    """Write the named recipe as a file that stands alone, with its comments and what it extends merged in."""
    path, kind = find_any(name)
    file = file or Path(f"{path.stem}.yaml")
    if file.suffix not in (".yaml", ".yml"):
        raise UserError(f"{file}: a recipe's file ends in .yaml, which is how commands tell it from a recipe's name")
    if file.exists() and not force:
        raise UserError(f"{file} is there already; name another file, or give --force to replace it")
    base = load_yaml(path).get("extends")
    merged = f"with {base}, which that extends, merged in" if base else "which extends nothing"
    command = command_of(kind, read_tree(path, kind), file)
    head = f"# {command}   (stands alone: a copy of {name}, {merged})\n"
    write_atomically(file, (head + standalone(path, kind)).encode())
    console.print(f"wrote {file}; then: sslbench recipe check {file}, and {command}", markup=False)
    return {"recipe": name, "kind": kind, "file": str(file), "command": command}


def command_of(kind: str, tree: dict[str, Any], file: Path) -> str:
    """The command that runs a recipe's file."""
    if kind == "studies":
        return f"sslbench study {file}"
    if kind == "pretrain":
        return f"sslbench pretrain {tree['science']['method']['name']} --recipe {file}"
    protocol = str(tree["science"]["protocol"]).removesuffix("_augmented")
    if protocol == UNCALLED:
        return f"sslbench recipe check {file}"
    return f"sslbench {kind} {protocol} [RUN] --recipe {file}"


def check(name: str, console: Console) -> dict[str, Any]:
    """Print what a recipe comes to; nothing is trained. UserError with every problem that it has, a line each."""
    path, kind = find_any(name)
    problems, facts = CHECKS[kind](path)
    problems = [f"the key '{key}' stands twice" for key in repeated_keys(path)] + problems
    answer = {"file": str(path), "kind": kind, "ok": not problems, "problems": problems, **({} if problems else facts)}
    if problems:
        count = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
        raise UserError("\n  ".join([f"{path}: {count}", *problems]), answer)
    console.print(f"{path}: {'study' if kind == 'studies' else f'{kind} recipe'}, no problem found", markup=False)
    for key, value in facts.items():
        console.print(f"{key:<12}{value}", markup=False)
    return answer


Checked = tuple[list[str], dict[str, Any]]  # (problems, what it comes to)


def _pretrain(path: Path) -> Checked:
    tree = read_tree(path)
    if wrong := [*problems(tree), *_data_kind(tree)]:
        return wrong, {}
    try:
        recipe = compose(tree["science"]["method"]["name"], recipe=str(path))
        init = recipe.science.init
        elsewhere = init is not None and not init.sha256 and init.source.startswith("timm:")  # it would be downloaded
        recipe = recipe if elsewhere else settle(recipe)
    except UserError as e:
        return [str(e)], {}
    s = recipe.science
    with torch.device("meta"):
        wrong = [*problem_of(lambda: Batch.of(recipe)), *problem_of(lambda: build(recipe))]
    here = problem_of(lambda: known_size(s.data.spec) or open_split(s.data.spec, "train"))
    wrong += [] if here else problem_of(lambda: length(recipe))
    if wrong:
        return wrong, {}
    steps = f"its steps are not known: {here[0]}" if here else f"{length(recipe)[2]:,} steps"
    return [], {
        "method": f"{recipe.method_name}, preset {recipe.preset}",
        "arch": f"{s.arch} on {s.data.image_size} pixels",
        "data": data_name(s.data.spec),
        "batch": str(Batch.of(recipe)),
        "length": f"{s.device_minutes:g} minutes" if s.device_minutes else f"{s.epochs:g} epochs, {steps}",
        "hash": "counts the weights of science.init, once they are on this machine" if elsewhere else recipe.hash(),
        "seed": s.seed,
        **({"notes": "; ".join(" ".join(line.split()) for line in recipe.notes)} if recipe.notes else {}),
    }


def _data_kind(tree: dict[str, Any]) -> list[str]:
    """What is wrong with the kinds of a data SPEC, whether or not the data is on this machine."""
    data = tree["science"].get("data", {})
    spec = data.get("spec", "") if isinstance(data, dict) else ""
    kinds = [part.partition(":")[0] for part in str(spec).split("+") if ":" in part]
    return [f"science.data.spec: unknown kind '{k}'{nearest(k, KINDS)}" for k in kinds if k not in KINDS]


def _eval(path: Path) -> Checked:
    wrong = strict.problems(EvalRecipe, {**read_tree(path, "eval"), "name": path.stem})
    if wrong:
        return wrong, {}
    protocol = str(read_tree(path, "eval")["science"]["protocol"])
    recipe = eval_recipe(protocol.removesuffix("_augmented"), str(path))
    size: int | None = getattr(recipe.science, "batch_size", None)
    divides = size is not None and protocol != "linprobe"  # whose batches are of features, on one device
    wrong = problem_of(lambda: Batch.divide(size or 0, recipe.machine)) if divides else []
    return wrong, {
        "protocol": protocol,
        **({"batch": str(Batch.divide(size or 0, recipe.machine))} if divides and not wrong else {}),
        "hash": "of these values with an encoder's feature and image size; a number's record has it",
    }


def _transfer(path: Path) -> Checked:
    tree = {**read_tree(path, "transfer"), "name": path.stem}
    if wrong := strict.problems(TransferRecipe, tree):
        return wrong, {}
    recipe = TransferRecipe.model_validate(tree)
    s = recipe.science
    wrong = problem_of(lambda: Batch.divide(s.batch_size, recipe.machine))
    return wrong, {
        "protocol": s.protocol,
        **({} if wrong else {"batch": str(Batch.divide(s.batch_size, recipe.machine))}),
        "length": f"{s.iterations:,} iterations" if s.iterations else f"{s.epochs:g} epochs",
        "hash": recipe.protocol_hash(),
    }


def _study(path: Path) -> Checked:
    tree = {**read_tree(path, "studies"), "name": path.stem}
    if wrong := strict.problems(Study, tree):
        return wrong, {}
    study = Study.model_validate(tree)
    wrong = [*problem_of(lambda: check_study(study)), *_evaluations(study)]
    hashes: dict[str, str] = {}
    for scale in study.scales or [None]:
        for row in study.rows:
            one = study.model_copy(update={"rows": {row: study.rows[row]}})
            at = f"row {row}" + (f" at scale {scale}" if scale else "")

            def resolve(one: Study = one, scale: str | None = scale, at: str = at) -> None:
                recipe = rows_of(one, scale, None, [])[0].recipe
                hashes[at] = f"{recipe.method_name} {recipe.science.arch}, {recipe.hash()}"

            wrong += [f"{at}: {problem}" for problem in problem_of(resolve)]
    wrong = [p for p in wrong if not any(p != other and p in other for other in wrong)]  # as the row says it
    return wrong, {
        "budgets": ", ".join(study.budgets) or "none: each row's recipe as it is",
        "seeds": study.seeds,
        **hashes,
        "hash": study.hash(),
    }


def _evaluations(study: Study) -> list[str]:
    """What is wrong with the recipes that its evaluations name."""
    levels: list[Any] = [study, *study.scales.values(), *study.rows.values()]
    named = {(e.protocol, e.recipe, tuple(e.set)) for level in levels for e in level.evaluations or []}

    def open_recipe(protocol: str, recipe: str | None, sets: tuple[str, ...]) -> Callable[[], Any]:
        read: Callable[..., Any] = transfer_recipe if protocol in ("coco", "ade20k") else eval_recipe
        return lambda: read(protocol, recipe, list(sets))

    return [f"evaluation {e[0]}: {problem}" for e in sorted(named, key=str) for problem in problem_of(open_recipe(*e))]


CHECKS: dict[str, Callable[[Path], Checked]] = {
    "pretrain": _pretrain,
    "eval": _eval,
    "transfer": _transfer,
    "studies": _study,
}
