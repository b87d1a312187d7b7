"""`sslbench report --missing`: the commands that would fill the papers' tables, and about what they cost."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from ..data import known_size
from ..errors import UserError
from ..ledger import Record
from ..method import methods
from ..plan import SHARE, device_hours
from ..pretrain import compose, length
from ..recipe import Recipe, digest, recipe_files
from ..train.job import run_name
from ..train.meter import flops_per_image
from .papers import contradiction, measured_for, paper_tables, plugin_of, protocol_of, read_paper, tuned_epochs
from .tables import newest

YARDSTICK = "A100"
_UNKNOWN: dict[str, Any] = {"eval": [], "flops": None, "device_hours": None, "note": ""}
_counted: dict[str, float] = {}  # FLOPs of an image, by what they depend on


def missing(names: list[str], records: list[Record], console: Console) -> list[dict[str, Any]]:
    """Print and return [{"table", "pretrain" (a command), "eval" (commands), "flops", "device_hours", "note"}, ...].

    One entry a pre-training and table, for the methods of this suite; nothing where all its numbers are measured. The
    cost is of the pre-training alone, its FLOPs at `plan`'s share of an A100's peak: not measured.
    """
    out = []
    for name in names or [n for n in paper_tables() if not n.endswith("_text")]:
        found = _of_table(name, records)
        if found:
            console.print(f"[bold]{name}[/]")
        for entry in found:
            cost = "" if entry["flops"] is None else f"    # about {entry['device_hours']:,.0f} {YARDSTICK} hours"
            console.print(f"  {entry['pretrain']}{cost}", markup=False)
            if entry["note"]:
                console.print(f"    # {entry['note']}", markup=False)
            for command in entry["eval"]:
                console.print(f"    {command}", markup=False)
        out += found
    if out:
        console.print(
            f"\nHours: FLOPs at {SHARE:.0%} of one {YARDSTICK}'s peak; `sslbench plan` measures on this machine."
        )
    return out


def _of_table(name: str, records: list[Record]) -> list[dict[str, Any]]:
    frame, newest_records = read_paper(name), newest(records)
    open_lines = [
        line
        for _, line in frame.iterrows()
        if plugin_of(line) in methods() and protocol_of(line) and not measured_for(line, frame, newest_records)
    ]
    if open_lines and name in recipe_files("ablations"):  # its rows differ in settings that only its recipe knows
        command = f"sslbench ablate {name} --scale paper"
        return [{"table": name, "pretrain": command, **_UNKNOWN}]
    commands: dict[tuple[str, str, str, str], list[str]] = {}
    notes: dict[tuple[str, str, str, str], str] = {}
    for line in open_lines:
        key = (plugin_of(line), line["arch"], line["pretrain_data"].replace("_", "-"), line["epochs"])
        commands.setdefault(key, []).extend(_evaluation(line))
        if line["note"].startswith("epochs"):  # the paper contradicts itself in what the command takes from it
            notes[key] = contradiction(line["note"])
    return [
        {**_entry(name, *key, list(dict.fromkeys(evals))), "note": notes.get(key, "")}
        for key, evals in commands.items()
    ]


def _evaluation(line: Any) -> list[str]:
    """The commands behind a printed number; RUN is put in later."""
    protocol, data = protocol_of(line), line["dataset"].replace("_", "-")
    assert protocol is not None
    command, recipe = protocol
    if command == "eval robustness":  # of the newest fine-tuned run, which this makes
        tune = protocol_of({**line, "metric": "finetune_top1", "dataset": "imagenet"})
        assert tune is not None
        return [
            f"sslbench {tune[0]} RUN --recipe {tune[1]} --data imagenet",
            f"sslbench {command} --data folder:{data}",
        ]
    tuned = f" --set science.epochs={n}" if (n := tuned_epochs(line["condition"])) else ""
    where = "" if command.startswith("transfer") else f" --data {data}"
    return [f"sslbench {command} RUN --recipe {recipe}{where}{tuned}"]


def _entry(table: str, method: str, arch: str, data: str, epochs: str, evals: list[str]) -> dict[str, Any]:
    own = f"{method}/{table}_{data}"  # a recipe for this table alone, where its settings are not the method's usual
    own = own if own in recipe_files() else ""
    try:
        science = {"arch": arch, "data": {"spec": data}, "epochs": float(epochs) if epochs else None}
        recipe = compose(method, recipe=own or None, science=science)
    except UserError:  # an arch that the paper does not print, or that is not of the suite
        return {"table": table, "pretrain": f"sslbench pretrain {method} --data {data}", **_UNKNOWN}
    run = f"runs/{run_name(recipe)}"
    known = known_size(data) is not None
    flops = _flops(recipe) * length(recipe)[2] * recipe.science.batch_size if known else None
    return {
        "table": table,
        "pretrain": f"sslbench pretrain {method} {f'--recipe {own}' if own else f'--arch {arch}'} --data {data}"
        + (f" --epochs {epochs}" if epochs else ""),
        "eval": [command.replace("RUN", run) for command in evals],
        "flops": flops,
        "device_hours": None if flops is None else device_hours(flops, YARDSTICK),
    }


def _flops(recipe: Recipe) -> float:
    """flops_per_image, counted once: many tables ask for the same."""
    s = recipe.science
    key = digest([s.method, s.arch, s.data.image_size])
    if key not in _counted:
        _counted[key] = flops_per_image(recipe)
    return _counted[key]
