"""`sslbench report --missing`: the commands that would fill the papers' tables, and about what they cost."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from ..data import known_size
from ..device import SHARE, device_hours
from ..ledger import Record
from ..method import get_method
from ..recipe import length
from ..study.printed import epochs_contradicted, evaluation_of, paper_tables, read_paper
from ..study.tables import Pretraining, pretraining_of
from ..train.build import flops_per_image
from ..train.job import run_name
from .papers import contradiction, measured_for
from .tables import newest

YARDSTICK = "A100"


def missing(names: list[str], records: list[Record], console: Console) -> list[dict[str, Any]]:
    """Print and return [{"table", "kind" (hybrid or control), "pretrain" (a command), "eval" (commands), "flops",
    "device_hours", "note"}, ...].

    One entry a pre-training and table, for the methods of this suite; nothing where all its numbers are measured. The
    cost is of the pre-training alone, its FLOPs at `plan`'s share of an A100's peak: not measured.
    """
    out, records = [], newest(records)
    for name in names or [n for n in paper_tables() if not n.endswith("_text")]:
        kind, entries = "", sorted(_of_table(name, records), key=lambda entry: entry["kind"] != "hybrid")
        if entries:
            console.print(f"[bold]{name}[/]: all of it by sslbench study {name} --scale paper")
        for entry in entries:
            if entry["kind"] != kind:
                kind = entry["kind"]
                console.print(f"  {kind}s")
            cost = "" if entry["flops"] is None else f"    # about {entry['device_hours']:,.0f} {YARDSTICK} hours"
            console.print(f"  {entry['pretrain']}{cost}", markup=False)
            if entry["note"]:
                console.print(f"    # {entry['note']}", markup=False)
            for command in entry["eval"]:
                console.print(f"    {command}", markup=False)
        out += entries
    if out:
        console.print(
            f"\nHours: FLOPs at {SHARE:.0%} of one {YARDSTICK}'s peak; `sslbench plan` measures on this machine."
        )
    return out


def _of_table(name: str, records: list[Record]) -> list[dict[str, Any]]:
    """What is printed and not measured, by the command that pre-trains for it."""
    wanted: dict[str, dict[str, Any]] = {}
    for _, line in read_paper(name).iterrows():
        run, evaluation = pretraining_of(line), evaluation_of(line)
        if not line["value"] or not run or not evaluation or measured_for(line, records):
            continue
        if run.command not in wanted:
            wanted[run.command] = _entry(name, run)
        if run.ablation:
            continue  # its command evaluates too
        entry, folder = wanted[run.command], f"runs/{run_name(run.recipe)}"
        entry["eval"] += [c for c in evaluation.commands(folder) if c not in entry["eval"]]
        if epochs_contradicted(line):
            entry["note"] = contradiction(line["note"])
    return list(wanted.values())


def _entry(table: str, run: Pretraining) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "table": table,
        "kind": "hybrid" if get_method(run.recipe.method).hybrid else "control",
        "pretrain": run.command,
        "eval": [],
        "flops": None,
        "device_hours": None,
        "note": "",
    }
    s = run.recipe.science
    if not run.ablation and known_size(s.data.spec) is not None:
        entry["flops"] = flops_per_image(run.recipe) * length(run.recipe)[2] * s.batch_size
        entry["device_hours"] = device_hours(entry["flops"], YARDSTICK)
    return entry
