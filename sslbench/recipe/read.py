"""A recipe's file: found by its name or chosen, read, extended, and overridden by --set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from ..data import data_name, unpacked_name
from ..errors import UserError, nearest
from ..method import name_of
from ..paths import recipe_files

KINDS = ("pretrain", "eval", "transfer", "studies")
# Keys that only a study's file has.
STUDYS = {"rows", "question", "answer", "budgets", "seeds", "controls", "evaluations", "scales", "scratch", "tune"}

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's takes a ninth of the time


def find_recipe(name: str, kind: str = "pretrain") -> Path:
    """A recipe file, by path or by the name (or the last part of the name) of one that ships with the suite."""
    if name.endswith((".yaml", ".yml")):
        if Path(name).is_file():
            return Path(name)
        raise UserError(f"no recipe file {name}")
    known = recipe_files(kind)
    matches = [p for n, p in known.items() if _is(name, n, kind)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UserError(f"recipe '{name}' is ambiguous: {', '.join(n for n, p in known.items() if p in matches)}")
    raise UserError(f"unknown recipe '{name}'{nearest(name, known)}; `sslbench list recipes` shows all")


def find_any(name: str) -> tuple[Path, str]:
    """(file, kind) of a recipe of any kind: `pretrain`, `eval`, `transfer` or `studies`."""
    if name.endswith((".yaml", ".yml")):
        path = find_recipe(name)
        return path, kind_of(path)
    matches = {f"{kind}/{n}": (p, kind) for kind in KINDS for n, p in recipe_files(kind).items() if _is(name, n, kind)}
    if len(matches) == 1:
        return next(iter(matches.values()))
    if matches:
        raise UserError(f"recipe '{name}' is ambiguous: {', '.join(matches)}")
    known = [n for kind in KINDS for n in recipe_files(kind)]
    raise UserError(f"unknown recipe '{name}'{nearest(name, known)}; `sslbench list recipes` shows all")


def kind_of(path: Path, seen: tuple[Path, ...] = ()) -> str:
    """What kind of recipe a file is, by its keys, else by what it extends."""
    tree = load_yaml(path)
    science = tree.get("science")
    if STUDYS & tree.keys():
        return "studies"
    if isinstance(science, dict) and "protocol" in science:
        return "transfer" if science["protocol"] in ("coco", "ade20k") else "eval"
    base = str(tree.get("extends") or "")
    if base.endswith((".yaml", ".yml")) and path not in seen:
        return kind_of(find_recipe(base), (*seen, path))
    return find_any(base)[1] if base and path not in seen else "pretrain"


def _is(name: str, known: str, kind: str) -> bool:
    """Whether that is what a recipe may be called: its name, the last part of it, or both behind its kind."""
    return name in (known, known.rsplit("/", 1)[-1], f"{kind}/{known}")


def load_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(), Loader=LOADER)
    except (yaml.YAMLError, ValueError, RecursionError) as e:  # a date that there is not is a ValueError
        raise UserError(f"{path} is not a YAML file: {' '.join(str(e).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} is not a recipe: expected a mapping with 'science' and 'machine'")
    return tree


def read_tree(path: Path, kind: str = "pretrain", seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The recipe's mapping with `extends:` composed in. The child's keys win."""
    if path in seen:
        raise UserError(f"{path}: `extends` runs in a circle")
    tree = load_yaml(path)
    base = tree.pop("extends", None)
    if base:
        tree = merge(read_tree(find_recipe(str(base), kind), kind, (*seen, path)), tree)
    science, machine = (tree.get(key, {}) for key in ("science", "machine"))
    method = science.get("method", {}) if isinstance(science, dict) else {}
    for key, value in {"science": science, "machine": machine, "science.method": method}.items():
        if not isinstance(value, dict):
            raise UserError(f"{path}: {key} must be a mapping, found {value!r}")
    return tree


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, mapping by mapping."""
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merge(out[key], value) if both else value
    return out


def parse_sets(pairs: list[str]) -> dict[str, Any]:
    """['science.optim.lr=1e-3'] -> {'science': {'optim': {'lr': ...}}}"""
    tree: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"--set {pair}: expected KEY=VALUE, such as science.optim.lr=1e-3")
        try:
            leaf: Any = yaml.safe_load(value) if value.strip() else None
        except (yaml.YAMLError, ValueError) as e:
            raise UserError(f"--set {pair}: the value is not YAML ({' '.join(str(e).split())[:120]})") from None
        for part in reversed(key.strip().split(".")):
            leaf = {part: leaf}
        tree = merge(tree, leaf)
    return tree


def choose(method: str, arch: str | None, spec: str | None) -> Path:
    """The bundled recipe that `pretrain METHOD --arch --data` means.

    The exact `<arch>_<data>`; else, without an arch, the method's recipe for that data (small data, so small settings);
    else the arch's recipe for ImageNet, the papers' settings, or whichever it has. Arch and data given by the user then
    replace the recipe's own.
    """
    method = name_of(method)
    known = {n.split("/", 1)[1]: p for n, p in recipe_files().items() if n.startswith(f"{method}/")}
    data = unpacked_name(data_name(spec)) if spec else None
    if arch and (exact := known.get(f"{arch}_{data or 'imagenet'}")):
        return exact
    if data and not arch and data != "imagenet":
        # Of several archs for small data: the one that every method has, else the method's own, else a plain ViT.
        names = sorted(known, key=lambda n: [not n.startswith(start) for start in ("vit_ti4", method, "vit_")])
        named = [known[n] for n in names if n.endswith("_" + data)]
        small = known.get("vit_mini4_builtin")
        if data != "builtin" and named:
            return named[0]
        if small or named:
            return small or named[0]
    if arch:
        of_arch = [f"{arch}_imagenet", *(name for name in known if name.startswith(arch + "_"))]
        if nearest_path := next((known[name] for name in of_arch if name in known), None):
            return nearest_path
    fallback = known.get("vit_b16_imagenet") or next(iter(known.values()), None)
    if fallback is None:
        raise UserError(
            f"no recipe for {method}: write recipes/pretrain/{method}/<arch>_<data>.yaml, or give --recipe PATH"
        )
    return fallback


def dump(recipe: BaseModel) -> str:
    """The recipe as YAML, every value resolved."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
