"""A part of train's labels, as many of each class: what low-label fine-tuning and probing learn from."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from ..data import ImageSet
from ..data.loader import seed_of
from ..errors import UserError
from ..files import digest

# Of the labels, in a recipe's science; None: all, which the hash does not know of: it was the rule before it was a key.
LabelShare = Annotated[float | None, Field(gt=0, lt=1, exclude_if=lambda share: share is None)]


def list_of(train: ImageSet, share: float | None, seed: int, spec: str) -> Tensor | None:
    """Indices (K,) of the images whose labels are used, sorted, equally many of each class; None: all.

    A function of the labels, the share and the seed alone: one list for all methods, as SimCLR's of 1 % and 10 % of
    ImageNet are (Chen et al. 2020, section 4.2, 12.8 and 128 images a class; rounded here). A class that has fewer is
    taken whole. UserError: less than one image a class.
    """
    if share is None:
        return None
    assert train.labels is not None
    used = train.labels.unique().tolist()
    each = share * len(train) / len(used)
    if each < 1 - 1e-9:
        raise UserError(
            f"science.labels={share:g} of the {len(train):,} images of '{spec}' is {each:.2g} of each of its "
            f"{len(used)} classes; take {len(used) / len(train):.3g} or more, which is one"
        )
    chosen = []
    for label in used:
        its = (train.labels == label).nonzero()[:, 0]
        order = torch.randperm(len(its), generator=torch.Generator().manual_seed(seed_of("labels", seed, label)))
        chosen.append(its[order[: round(each)]])
    return torch.cat(chosen).sort().values


def list_facts(train: ImageSet, share: float | None, chosen: Tensor | None) -> dict[str, Any]:
    """What a number's condition says of the list: its share, how many images, and 12 hex digits that stand for it."""
    if chosen is None:
        return {}
    return {"labels": share, "labelled": len(chosen), "list": digest([train.fingerprint, chosen.tolist()])}


def protocol_name(recipe: Any, pool: str) -> str:
    """Such as linprobe_mean, or linprobe_1pct_mean where a hundredth of the labels is used."""
    share = getattr(recipe.science, "labels", None)
    return "_".join([recipe.name, *([f"{100 * share:g}pct"] if share else []), pool])
