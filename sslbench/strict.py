"""Models of what a user writes: a key that nobody knows is an error that names it and the nearest known one."""

from __future__ import annotations

from typing import Any, TypeGuard, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from .errors import UserError, nearest

T = TypeVar("T", bound=BaseModel)


class Strict(BaseModel):
    """A model that refuses keys that it does not know, and numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


def validate(model: type[T], tree: dict[str, Any], name: str, prefix: str = "") -> T:
    """`tree` as `model`, or a UserError that names every wrong key and the nearest known one."""
    if wrong := problems(model, tree, prefix):
        raise UserError(f"recipe {name}: " + "; ".join(wrong))
    return model.model_validate(tree)


def problems(model: type[BaseModel], tree: dict[str, Any], prefix: str = "") -> list[str]:
    """A line for every wrong key of `tree`, with the nearest known one; [] where it is a `model`."""
    try:
        model.model_validate(tree)
    except ValidationError as e:
        return [_problem(model, error, prefix) for error in e.errors()]
    return []


def _problem(model: type[BaseModel], error: ErrorDetails, prefix: str) -> str:
    path, known = _follow(model, error["loc"])
    key = prefix + ".".join(path)
    if error["type"] == "extra_forbidden":
        return f"unknown key '{key}'{nearest(path[-1], known)}"
    if error["type"] == "missing":
        return f"{key} is missing"
    return f"{key}: {error['msg'].removeprefix('Value error, ')} (got {error['input']!r})"


def _follow(model: type[BaseModel] | None, loc: tuple[Any, ...]) -> tuple[list[str], list[str]]:
    """(the key that pydantic's `loc` is, part by part as a user writes it; the keys that there are beside it)."""
    path: list[str] = []
    known: list[str] = []
    union: tuple[type[BaseModel], ...] = ()
    for part in map(str, loc):
        if taken := _tagged(union, part):
            model, union = taken, ()
        else:
            path.append(part)
            known = list(model.model_fields) if model else []
            model, union = _below(model, part)
    return path, known


def _tagged(union: tuple[type[BaseModel], ...], tag: str) -> type[BaseModel] | None:
    """The model of a union that has this tag: pydantic puts it into `loc`, where a user has no key for it."""
    return next((m for m in union if any(tag in get_args(f.annotation) for f in m.model_fields.values())), None)


def _below(model: type[BaseModel] | None, key: str) -> tuple[type[BaseModel] | None, tuple[type[BaseModel], ...]]:
    """What may stand under a key: (a model, or None; the models of a union, if it is one)."""
    if model is None or key not in model.model_fields:
        return None, ()
    annotation = model.model_fields[key].annotation
    if _is_model(annotation):
        return annotation, ()
    return None, tuple(filter(_is_model, get_args(annotation)))


def _is_model(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
