"""From the words of a command line to the recipe that is meant, checked, with every default written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import strict
from ..data import data_name, unpacked_name
from ..errors import UserError, nearest
from ..method import get_method, name_of
from ..vit import get_arch
from .read import choose, find_recipe, merge, parse_sets, read_tree
from .schema import Recipe, Science
from .settings import is_known, look, settings_for, shorten_warmup


def compose(
    method: str,
    *,
    recipe: str | None = None,
    preset: str | None = None,
    sets: list[str] | None = None,
    science: dict[str, Any] | None = None,
    machine: dict[str, Any] | None = None,
) -> Recipe:
    """The recipe that is meant: a named or chosen file, then the preset, the flags that were given, and --set.

    For data that no recipe of the method is for, what fits the set comes between the file and these; `notes` of the
    recipe say so, and where a warm-up was too long for the epochs asked for.
    """
    get_method(method)
    given = drop_none({"science": science or {}, "machine": machine or {}})
    said = given.get("science", {})
    if "arch" in said:
        get_arch(said["arch"])
    asked = merge(given, parse_sets(sets or []))
    arch, spec = said.get("arch"), said.get("data", {}).get("spec")
    notes, fitted = [], None
    if recipe:
        path = find_recipe(recipe)
    elif is_known(method, arch, spec):
        path = choose(method, arch, spec)
    else:
        images, pixels = look(spec)
        batch = asked.get("science", {}).get("batch_size")
        fitted = settings_for(method, arch, images, pixels, unpacked_name(data_name(spec)), batch)
        path = fitted.recipe
        what = f"{arch} on {data_name(spec)}" if arch else data_name(spec)
        seen = f"no recipe of {name_of(method)} is for {what}: {images:,} images of about {pixels} pixels get"
        notes = [seen, *fitted.why]
    tree = read_tree(path)
    if fitted and fitted.borrowed:
        tree["science"] = {k: v for k, v in tree["science"].items() if k not in ("method", "contrastive_batch")}
    tree = merge(merge(tree, fitted.tree if fitted else {}), given)
    named = tree.get("science", {}).get("method", {}).get("name")
    if named != method:
        if named is not None and ":" not in method:
            raise UserError(f"recipe {path.stem} is for {named}, not {method}; leave --recipe out or name another")
        tree = merge(tree, {"science": {"method": {"name": method}}})
    if preset:
        tree = merge(tree, {"science": {"method": {"preset": preset}}})
    tree = merge(tree, parse_sets(sets or []))
    name = f"{path.parent.name}/{path.stem}" if path.parent.name == method else path.stem
    resolved = resolve(tree, name)
    shortened = shorten_warmup(resolved.science, asked.get("science", {}))
    resolved.notes.extend([*notes, *filter(None, [shortened])])
    return resolved


def drop_none(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the tree without the keys that nobody gave a value."""
    out = {k: drop_none(v) if isinstance(v, dict) else v for k, v in tree.items()}
    return {k: v for k, v in out.items() if v is not None and v != {}}


def resolve(tree: dict[str, Any], name: str) -> Recipe:
    """A checked recipe with every default written out, the method's config included."""
    if wrong := problems(tree):
        raise UserError(f"recipe {name}: " + "; ".join(wrong))
    recipe = Recipe.model_validate({**tree, "name": name})
    given = dict(recipe.science.method)
    method = get_method(str(given.pop("name")))
    preset = str(given.pop("preset", "paper"))
    config = method.Config.model_validate({**method.presets[preset], **given})
    recipe.science.method = {"name": recipe.method, "preset": preset, **config.model_dump(mode="json")}
    recipe.science.data.image_size = recipe.science.data.image_size or get_arch(recipe.science.arch).image
    return recipe


def problems(tree: dict[str, Any]) -> list[str]:
    """A line for everything that is wrong with a recipe; [] of one that resolves."""
    wrong = strict.problems(Recipe, {**tree, "name": ""})
    science = _mapping(tree, "science")
    given = _mapping(science, "method")
    if "name" in given:
        wrong += problem_of(lambda: _check_method(given))
    elif isinstance(science.get("method"), dict):
        wrong.append("science.method.name is missing")
    arch = science.get("arch", Science.model_fields["arch"].default)
    if not isinstance(arch, dict):  # whose sizes the schema checks
        wrong += problem_of(lambda: get_arch(str(arch)))
    if wrong:
        return wrong
    s = Recipe.model_validate({**tree, "name": ""}).science
    patch = get_arch(s.arch).patch
    if s.data.image_size and s.data.image_size % patch:
        return [f"science.data.image_size={s.data.image_size} is not a multiple of {s.arch}'s patch, {patch}"]
    return []


def _mapping(tree: dict[str, Any], key: str) -> dict[str, Any]:
    """What stands under a key, {} where that is no mapping."""
    return tree[key] if isinstance(tree.get(key), dict) else {}


def problem_of(check: Callable[[], Any]) -> list[str]:
    """What a check says is wrong; [] where it passes."""
    try:
        check()
    except UserError as e:
        return [str(e)]
    return []


def _check_method(given: dict[str, Any]) -> None:
    """UserError: there is no such method or preset, or its config is wrong. given: `science.method`."""
    config = dict(given)
    name, preset = str(config.pop("name")), str(config.pop("preset", "paper"))
    method = get_method(name)
    if preset not in method.presets:
        raise UserError(f"{name_of(name)} has no preset '{preset}'{nearest(preset, method.presets)}")
    if wrong := strict.problems(method.Config, {**method.presets[preset], **config}, "science.method."):
        raise UserError("; ".join(wrong))
