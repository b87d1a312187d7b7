"""The model card of an exported encoder: what it is, what it cost, and what the ledger has measured of it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from ..evaluate.features import Subject
from ..ledger import Record
from ..provenance import code
from .provenance import unit_of
from .tables import form_of

SUITE = "sslbench"


def card(subject: Subject, records: Iterable[Record], name: str) -> str:
    """README.md in Markdown. records: of the ledger; those of these weights are listed. name: what it is loaded by."""
    facts = subject.facts()
    sections = [
        _front(subject),
        f"# {subject.method} {subject.arch}\n\n{_opening(subject, facts['pretrain'])}",
        f"## Loading\n\n```python\n{_loading(subject, name)}```\n\n"
        f"`last_hidden_state` is CLS and then the patches, row by row; `pooler_output` is CLS as it is. Positions are "
        f"for {subject.encoder.image[0]} pixels; other sizes take `interpolate_pos_encoding=True`.",
        "## Where it comes from\n\n" + _table(["", ""], _origin(subject, facts)),
        "## What was measured\n\n" + _measured(subject, records),
        f"## Licence\n\n{_licence(subject)}",
    ]
    return "\n\n".join(sections) + "\n"


def _front(subject: Subject) -> str:
    """What the hub reads of a model."""
    tags = ["self-supervised-learning", "vision", subject.method.lower().replace(" ", "-")]
    head = ["library_name: transformers", "pipeline_tag: image-feature-extraction"]
    return "\n".join(["---", *head, f"tags: {json.dumps(tags)}", "---"])


def _opening(subject: Subject, pretrain: dict[str, Any]) -> str:
    epochs = "" if subject.epochs is None else f" for {subject.epochs:g} epochs"
    on = f", pre-trained on {pretrain['data']}{epochs}" if pretrain["data"] else ""
    return (
        f"A Vision Transformer{on} without labels by {subject.method}, exported by {SUITE} as transformers' ViTModel: "
        f"the same function of an image. It gives features and has no classifier."
    )


def _loading(subject: Subject, name: str) -> str:
    feature = {"cls": "tokens[:, 0]", "mean": "tokens[:, 1:].mean(1)", "mean_all": "tokens.mean(1)"}[subject.pool]
    return (
        "from transformers import AutoImageProcessor, AutoModel\n\n"
        f'processor = AutoImageProcessor.from_pretrained("{name}")\n'
        f'model = AutoModel.from_pretrained("{name}").eval()\n'
        'tokens = model(**processor(images, return_tensors="pt")).last_hidden_state\n'
        f"feature = {feature}  # what is read of {subject.method}\n"
    )


def _origin(subject: Subject, facts: dict[str, Any]) -> list[list[str]]:
    """(what, value) of the pre-training; what is not known is said so."""
    p, cost, run = facts["pretrain"], facts["cost"], subject.run
    batch = f", in batches of {p['batch']:,}" if p["batch"] else ""
    return [
        ["method", f"{subject.method}, preset {facts['preset']}" if facts["preset"] else subject.method],
        ["arch", f"{subject.arch}, views of {subject.encoder.image[0]} pixels"],
        ["data", _known(p["data"]) + (f", fingerprint {p['data_fingerprint']}" if p["data_fingerprint"] else "")],
        ["seen", f"{p['images_seen']:,} images{batch}" if p["images_seen"] else "not known"],
        *([["started from", f"{p['init']['source']}: {p['init']['method']}"]] if p.get("init") else []),
        *([["milestone", f"at {run['milestone']:g} of the run, whose schedule had not ended"]]
          if "milestone" in run else []),
        ["recipe", f"hash {p['recipe_hash']}, seed {facts['seed']}" if p["recipe_hash"] else "not known"],
        ["code", _commit(p["code"])],
        ["hardware", ", ".join(f"{k} {v}" for k, v in (p["hardware"] or {}).items()) or "not known"],
        ["cost", _cost(cost)],
        ["weights", f"SHA-256 of the tensors {subject.sha256}"],
    ]  # fmt: skip


def _known(value: Any) -> str:
    return "not known" if value is None else str(value)


def _commit(of: dict[str, Any] | None) -> str:
    """The commit that trained it; where nobody says, nothing is put in its place."""
    if not of or not of.get("commit"):
        return "not known"
    return f"commit {of['commit']}" + (" with changes that are not committed" if of.get("dirty") else "")


def _cost(cost: dict[str, Any]) -> str:
    if cost.get("wall_s") is None:
        return "not known"
    flops = "" if cost.get("flops") is None else f", {cost['flops']:.3g} FLOP"
    joules = "" if cost.get("joules") is None else f", {cost['joules']:,.0f} J"
    return f"{cost['device_hours']:.3g} device hours{flops}{joules}, {cost['peak_memory_gib'] or 0:.2f} GiB at its peak"


def _measured(subject: Subject, records: Iterable[Record]) -> str:
    """A row for each number that the ledger has of these weights, the newest of those that are the same."""
    rows: dict[tuple[Any, ...], Record] = {}
    for r in sorted(records, key=lambda r: r.created):
        if r.weights_sha256 == subject.sha256:
            rows[r.metric, r.dataset, r.data_fingerprint, r.protocol.hash, r.seed] = r
    if not rows:
        return "Nothing yet."
    shown = [
        [r.metric, r.dataset, _value(r), f"{r.n:,}" if r.n else "", f"{r.protocol.name} {r.protocol.hash}", str(r.seed)]
        for _, r in sorted(rows.items(), key=lambda item: (item[1].dataset, item[1].protocol.name, item[1].metric))
    ]
    head = ["metric", "data", "value", "test images", "protocol and its hash", "seed"]
    return f"{_table(head, shown)}\n\n±: half of the 95 % interval over the test images, of one run."


def _value(r: Record) -> str:
    form = form_of(r.metric)
    half = "" if r.stderr is None else f" ± {1.96 * r.stderr:{form}}"
    return f"{r.value:{form}}{half}{unit_of(r)}"


def _licence(subject: Subject) -> str:
    """The suite's; that of weights and images is not the suite's to say."""
    exported = code()["commit"]
    by = f"{SUITE}, which exported this{f' at commit {exported}' if exported else ''}, is under Apache-2.0."
    if subject.public is not None:
        return f"{by} The weights are others', and so is their licence: see where they were published."
    return f"{by} Who publishes the weights says theirs; the images that they learned from have their own."


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
