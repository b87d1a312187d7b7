"""Models of what a user writes: a key that nobody knows is an error that names it and the nearest known one."""

from __future__ import annotations

from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import UserError, nearest

T = TypeVar("T", bound=BaseModel)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


def validate(model: type[T], tree: dict[str, Any], name: str, prefix: str = "") -> T:
    """`tree` as `model`, or a UserError that names every wrong key and the nearest known one."""
    try:
        return model.model_validate(tree)
    except ValidationError as e:
        lines = []
        for error in e.errors():
            path, known = _follow(model, error["loc"])
            key = prefix + ".".join(path)
            if error["type"] == "extra_forbidden":
                lines.append(f"unknown key '{key}'{nearest(path[-1], known)}")
            else:
                lines.append(f"{key}: {error['msg'].removeprefix('Value error, ')} (got {error['input']!r})")
        raise UserError(f"recipe {name}: " + "; ".join(lines)) from None


def _follow(model: type[BaseModel] | None, loc: tuple[Any, ...]) -> tuple[list[str], list[str]]:
    """(the key that `loc` is, as a user writes it, and the keys that there are beside it).

    Of a union of models pydantic names the one it took, which is no part of the key.
    """
    path: list[str] = []
    union: tuple[Any, ...] = ()
    known: list[str] = []
    for part in map(str, loc):
        chosen = next((m for m in union if any(part in get_args(f.annotation) for f in m.model_fields.values())), None)
        if chosen:
            model, union = chosen, ()
            continue
        known = list(model.model_fields) if model else []
        annotation = model.model_fields[part].annotation if model and part in model.model_fields else None
        model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
        union = tuple(m for m in get_args(annotation) if isinstance(m, type) and issubclass(m, BaseModel))
        path.append(part)
    return path, known
