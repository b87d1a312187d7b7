"""`science.init` looked up: the weights that a pre-training starts from, and a pre-training that starts from them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from ..errors import UserError
from ..recipe import Recipe
from ..train.build import build
from ..train.job import Pretraining
from ..train.launch import agree
from ..train.start import Start
from ..vit import PLAIN, get_arch
from ..weights import tensors_sha256
from . import public
from .features import Subject, find_weights, open_subject

# MAE's names of its decoder's tensors, and ours (decoder.py).
DECODER = {r"^decoder_(embed|blocks|norm|pred)\.": r"\1.", r"^mask_token$": "mask_token"}


def settle(recipe: Recipe) -> Recipe:
    """The recipe with the hash of the weights that `science.init` names, and a note of what they are.

    UserError: they are not there, not those whose hash the recipe has, or of another arch.
    """
    if recipe.science.init is None:
        return recipe
    start = read_start(recipe)
    settled = recipe.model_copy(deep=True)
    assert settled.science.init
    settled.science.init.sha256 = start.facts["sha256"]
    settled.notes.extend([*recipe.notes, *_notes(start, recipe)])
    return settled


def read_start(recipe: Recipe) -> Start:
    """The weights of `science.init`, checked against the recipe."""
    init = recipe.science.init
    assert init
    if init.source.startswith("untrained:"):
        raise UserError(f"science.init: '{init.source}' is what pre-training starts from without it; leave it out")
    subject = open_subject(init.source)
    if subject.encoder.parts != PLAIN:
        raise UserError(f"science.init: pre-training takes plain ViTs; {init.source} has {subject.encoder.parts}")
    decoder, unused = _beside(init.source, subject)
    start = Start(
        {k: v.float() for k, v in subject.encoder.state_dict().items()},
        subject.encoder.arch,
        subject.encoder.grid,
        decoder,
        unused,
        _facts(init.source, subject, decoder),
    )
    if init.sha256 not in (None, start.facts["sha256"]):
        raise UserError(
            f"science.init: {init.source} holds other weights (sha256 {start.facts['sha256'][:12]}) than the recipe's "
            f"({str(init.sha256)[:12]}); give those, or leave science.init.sha256 out"
        )
    start.check(recipe.science.arch, get_arch(recipe.science.arch))
    return start


def pretrain(recipe: Recipe, folder: Path, console: Console, progress: bool = True) -> str:
    """Pre-train `recipe` in `folder`, from weights where it says so; see `train.loop.fit`."""
    from ..train.loop import fit  # and Fabric, as slow to import as torch; to settle a recipe needs neither
    from ..train.memory import fitted

    start = read_start(recipe) if recipe.science.init else None
    recipe = fitted(recipe.on(agree(recipe.machine)), console)
    return fit(Pretraining(recipe, start), folder, console, progress)


def _beside(source: str, subject: Subject) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """(decoder, names of what else there is) in a published file; nothing beside the encoder in ours and timm's."""
    if subject.public is None or source.startswith("timm:"):
        return {}, ()
    beside, around = public.beside_encoder(public.read_file(find_weights(source)[0]), source)
    decoder = {re.sub(a, b, k): x for k, x in beside.items() for a, b in DECODER.items() if re.search(a, k)}
    known = ("decoder_pos_embed", *DECODER)
    unused = [k for k in beside if not any(re.search(pattern, k) for pattern in known)]
    return decoder, (*unused, *around)


def _facts(source: str, subject: Subject, decoder: dict[str, Tensor]) -> dict[str, Any]:
    """What run.json and the ledger say of where a pre-training started. `cost`: None where nobody tells."""
    known = subject.facts()
    tensors = {**subject.encoder.state_dict(), **{f"decoder.{k}": x for k, x in decoder.items()}}
    cost = known["cost"] if known["cost"].get("wall_s") is not None else None
    return {
        "source": source,
        "sha256": tensors_sha256(tensors) if decoder else subject.sha256,
        **{k: known[k] for k in ("method", "arch")},
        **{k: known["pretrain"][k] for k in ("recipe_hash", "data", "epochs", "images_seen")},
        "cost": cost,
    }


def _notes(start: Start, recipe: Recipe) -> list[str]:
    """What the weights are, and what became of them, a line each."""
    f = start.facts
    seen = f"{f['epochs']:g} epochs of {f['data']}" if f["epochs"] and f["data"] else "it is not known what they saw"
    flops = (f["cost"] or {}).get("flops")
    spent = f"{flops:.3g} FLOP" if flops else "a cost that is not known and so not added"
    notes = [f"init        {f['source']}: {f['method']} {f['arch']}, {seen}, {spent}"]
    method = build(recipe)
    grid = method.encoder.grid
    if grid != start.grid:
        old, new = (" x ".join(map(str, g)) for g in (start.grid, grid))
        notes.append(f"            positions of {old} patches resampled to {new}")
    new_modules, unused = start.apply(method)
    if new_modules:
        notes.append(f"            new: {', '.join(new_modules)}")
    if unused:
        more = f" and {len(unused) - 8} more" if len(unused) > 8 else ""
        notes.append(f"            not used: {', '.join(unused[:8])}{more}")
    return notes
