"""Where the numbers of a page come from: what several numbers share, a run or an environment, is said once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..evaluate.told import PUBLIC
from ..ledger import GEOMETRY, Cost, Record
from .tables import form_of


@dataclass
class Number:
    """A record: what is its own."""

    id: str
    title: str
    facts: dict[str, str]
    environment: int  # what it was evaluated by, an index of `Provenance.environments`


@dataclass
class Run:
    """The weights that numbers are of."""

    title: str
    facts: dict[str, str]
    environment: int | None  # what it was trained by; None where its records do not tell
    numbers: list[Number] = field(default_factory=list)


@dataclass
class Provenance:
    """environments: each `code; hardware; versions` once. methods: {method: its runs}, in alphabetical order."""

    environments: list[str] = field(default_factory=list)
    methods: dict[str, list[Run]] = field(default_factory=dict)

    def index(self, code: dict[str, Any] | None, hardware: dict[str, Any] | None, versions: Any) -> int:
        """The number of an environment, which is added where it is new."""
        text = f"code {_commit(code or {})}; {_listed(hardware or {})}; {_listed(versions or {})}"
        if text not in self.environments:
            self.environments.append(text)
        return self.environments.index(text)


def provenance(records: Iterable[Record]) -> Provenance:
    out = Provenance()
    runs: dict[tuple[Any, ...], Run] = {}
    for r in sorted(records, key=_reading_order):
        p = r.pretrain
        facts = _run(r)
        by = out.index(p.code, p.hardware, p.versions) if p.cost else None
        key = (r.method, by, *facts.items())
        if key not in runs:
            runs[key] = Run(f"{p.run or 'no run'}, seed {r.run_seed}", facts, by)
            out.methods.setdefault(r.method, []).append(runs[key])
        runs[key].numbers.append(Number(r.id, _title(r), _number(r), out.index(r.code, r.hardware, r.versions)))
    return out


def _reading_order(r: Record) -> tuple[str, ...]:
    """Method by method, run by run, the numbers of a run by data set and protocol."""
    run = r.pretrain.recipe_hash or "", f"{r.run_seed:9}", r.weights_sha256
    return r.method, *run, r.dataset, r.protocol.name, r.metric, f"{r.seed:9}", r.id


def _title(r: Record) -> str:
    by = "" if r.seed == r.run_seed else f", evaluated by seed {r.seed}"
    value = f"{r.value:{form_of(r.metric)}}{unit_of(r)}"
    return f"{r.protocol.name} {r.metric}: {value}, {r.dataset}, seed {r.run_seed}{by}"


def _run(r: Record) -> dict[str, str]:
    p = r.pretrain
    facts = {
        "run": p.run or "none",
        "recipe": PUBLIC if r.public else f"{p.recipe_hash or 'none'}, preset {r.preset or 'none'}, seed {r.run_seed}",
        "pre-trained on": (p.data or "nothing") + (f", fingerprint {p.data_fingerprint}" if p.data_fingerprint else ""),
        "weights": r.weights_sha256,
    }
    if p.init:
        epochs = "epochs not known" if p.init["epochs"] is None else f"{p.init['epochs']:g} epochs"
        data = p.init["data"] or "data not known"
        facts["started from"] = f"{p.init['source']}: {p.init['method']}, {data}, {epochs}"
    return facts | ({"pre-training": _spent(p.cost)} if p.cost else {})


def _number(r: Record) -> dict[str, str]:
    error = "standard error unknown" if r.stderr is None else f"standard error {r.stderr:.2f}"
    facts = {
        "number": f"{r.metric} {r.value:.2f}{unit_of(r)}, {error}, n = {r.n}",
        "test images": f"{r.dataset}, fingerprint {r.data_fingerprint}",
        "protocol": f"{r.protocol.name} {r.protocol.hash}",
        "cost": _spent(r.cost),
        "when": r.created,
    }
    return facts | ({"trained on top": r.head_sha256} if r.head_sha256 else {})


def unit_of(r: Record) -> str:
    return "" if r.metric in GEOMETRY else " %"


def _commit(code: dict[str, Any]) -> str:
    commit = code.get("commit")
    return f"{commit[:12]}{' with changes' if code.get('dirty') else ''}" if commit else "not a git checkout"


def _listed(facts: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in facts.items())


def _spent(cost: Cost) -> str:
    joules = "" if cost.joules is None else f", {cost.joules:,.0f} J"
    flops = "FLOP not known" if cost.flops is None else f"{cost.flops:.3g} FLOP"
    return (
        f"{cost.wall_s:,.0f} s wall, {cost.device_hours:.4f} device hours, {flops}, "
        f"{cost.peak_memory_gib or 0:.2f} GiB at its peak{joules}"
    )
