"""`sslbench bench --targets`: what the suite promises of its speed, measured here and written down in results/.

results/speed.json holds one row a target and a device that it was measured on, results/speed.md shows them. What was
measured on other hardware stays; a target that was measured nowhere is a blank that says why.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from .. import provenance
from ..device import bf16_is_fast, bf16_unit, default_device
from ..errors import UserError
from ..files import write_atomically, write_json
from ..paths import home
from .bench import beside, measure, recipe_of

# The code as it runs beside today's timm, whose attention is one fused kernel; the control spells attention out, as the
# timm that the code was written for did. That one does not import beside today's torch.
Figure = Literal["times MAE's code", "times MAE's code, attention spelt out", "of MAE's FLOP/s", "images/s"]


@dataclass(frozen=True)
class Target:
    method: str
    arch: str
    figure: Figure
    at_least: float | None  # None: a control
    on: str  # CPU, or what the GPU's name contains
    batch: int

    @property
    def name(self) -> str:
        return f"{self.method} {self.arch}, {self.figure}"


MAE_ON_CPU = {"vit_b16": (64, 1.45), "vit_ti4": (256, 1.5)}  # on a CPU: the batch, and how far ahead MAE is to be
OTHERS = ("dino", "ibot", "ijepa", "siameseim", "cmae", "simmim", "lejepa", "crossmae")  # at vit_ti4 only
TARGETS = [
    *(
        target
        for arch, (batch, ahead) in MAE_ON_CPU.items()
        for target in (
            Target("mae", arch, "times MAE's code", ahead, "CPU", batch),
            Target("mae", arch, "times MAE's code, attention spelt out", None, "CPU", batch),
        )
    ),
    *(
        Target(method, arch, "of MAE's FLOP/s", 0.9, "CPU", batch)
        for arch, (batch, _) in MAE_ON_CPU.items()
        for method in ("ocl", "asl", "ccmim", "macrl", "mocov3")
    ),
    *(Target(method, "vit_ti4", "of MAE's FLOP/s", 0.9, "CPU", 256) for method in OTHERS),
    Target("ocl", "vit_l16", "images/s", 2141, "H200", 256),
    Target("ocl", "vit_b16", "images/s", 5500, "H200", 512),
    Target("mae", "vit_l16", "images/s", 3200, "H200", 256),
]


def measure_targets(reference: Path | None, seconds: float, console: Console) -> dict[str, Any]:
    """Measure the targets of this machine's hardware, write both files, and return {"rows"}, as speed.json has them.

    reference: a clone of MAE's published code; without it the comparisons with it stay as they were.
    """
    if reference is not None and not (reference / "models_mae.py").is_file():
        raise UserError(f"--reference {reference} holds no models_mae.py; clone github.com/facebookresearch/mae there")
    folder = home() / "results"
    old = [row for row in _read(folder / "speed.json") if row["measured"] is not None]
    device = default_device().type
    here = "CPU" if device == "cpu" else str(provenance.hardware(device)["device"])
    rows: list[dict[str, Any]] = []
    rates = _Rates(seconds, here != "CPU")
    for target in TARGETS:
        known = [row for row in old if row["target"] == target.name]
        blank = {"target": target.name, "at_least": target.at_least, "on": target.on, "measured": None}
        if target.on not in here:
            rows += known or [blank | {"why": f"no {target.on} at hand"}]
        elif not bf16_is_fast(device):  # a slow or emulated product says nothing of bf16
            rows += known or [blank | {"why": "this CPU multiplies bf16 matrices no faster than float32"}]
        elif target.figure.startswith("times") and reference is None:
            rows += known or [blank | {"why": "no clone of MAE's code given (--reference)"}]
        else:
            row = blank | _measured(target, rates, reference) | _provenance(device, seconds)
            rows += [r for r in known if r["hardware"] != row["hardware"]] + [row]
            aim = "a control" if target.at_least is None else f"target {target.at_least:g}"
            console.print(f"{target.name}: {row['measured']:.2f} ({aim})")
    write_json(folder / "speed.json", rows)
    write_atomically(folder / "speed.md", page(rows).encode())
    console.print(f"wrote {folder / 'speed.json'} and {folder / 'speed.md'}")
    return {"rows": rows}


KEPT = ("measured", "images_per_s", "against_images_per_s", "matmul_share", "matmul_peak_gflops", "peak_memory_gib",
        "data_wait", "batch", "precision", "compile")  # fmt: skip


class _Rates:
    """Measured rows of bench."""

    def __init__(self, seconds: float, compiled: bool) -> None:
        self.seconds, self.compiled = seconds, compiled
        self.mae: dict[str, dict[str, Any]] = {}  # the latest of each arch

    def recipe(self, target: Target, method: str) -> Any:
        return recipe_of(method, target.arch, target.batch, "bf16", self.compiled, [])

    def of(self, target: Target, method: str) -> dict[str, Any]:
        return measure(self.recipe(target, method), self.seconds)

    def between(self, target: Target) -> tuple[dict[str, Any], float]:
        """The method's row, and MAE's GFLOP/s around it, for the machine's speed drifts."""
        before = self.mae.get(target.arch) or self.of(target, "mae")
        row = self.of(target, target.method)
        after = self.mae[target.arch] = self.of(target, "mae")
        return row, (before["images_per_s"] + after["images_per_s"]) / 2 * after["gflop_per_image"]


def _measured(target: Target, rates: _Rates, reference: Path | None) -> dict[str, Any]:
    if target.figure == "of MAE's FLOP/s":
        row, mae = rates.between(target)
        row["measured"] = row["images_per_s"] * row["gflop_per_image"] / mae
    elif target.figure == "images/s":
        row = rates.of(target, target.method)
        row["measured"] = row["images_per_s"]
    else:
        row = rates.of(target, target.method)
        command = (
            f"env TIMM_FUSED_ATTN={int('spelt' not in target.figure)} {sys.executable} -m sslbench.commands.reference "
            f"{reference} {target.arch} --batch-size {target.batch} --seconds {rates.seconds}"
        )
        row |= beside(row, rates.recipe(target, target.method), rates.seconds, command)
        row["measured"] = row["ratio"]
    return {k: row[k] for k in KEPT if k in row}


def _provenance(device: str, seconds: float) -> dict[str, Any]:
    hardware = dict(provenance.hardware(device))
    if device == "cpu":
        hardware["bf16"] = bf16_unit()
    return {
        "hardware": hardware,
        "versions": {k: provenance.versions()[k] for k in ("python", "torch", "timm", "sslbench")},
        "commit": provenance.code()["commit"],
        "command": f"sslbench bench --targets --reference mae --seconds {seconds:g}",
        "date": provenance.now(),
    }


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        return json.loads(path.read_text())
    except ValueError as e:
        raise UserError(f"{path} is not readable ({e}); remove it, or bring back the committed one") from None


def page(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Speed",
        "",
        "Whole training steps in bf16, views to weights; the median counts. Theirs: MAE's published code beside the",
        "timm named below, in turn with ours; and, a control without a target, the same with its attention spelt out",
        "instead of timm's fused kernel. Share: of the machine's own peak of a bf16 matrix product. To measure again:",
        "`git clone https://github.com/facebookresearch/mae`, then the command below; rows of other hardware stay.",
        "",
        "| what | target | measured | images/s | theirs | share | GiB | batch | where |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    notes: list[str] = []
    for row in rows:
        cells = [row["target"], "" if row["at_least"] is None else f"≥ {row['at_least']:,g}"]
        if row["measured"] is None:
            cells += ["", "", "", "", "", "", f"{row['on']}: not measured, {row['why']}"]
        else:
            note = _note(row)
            if note not in notes:
                notes.append(note)
            against = row.get("against_images_per_s")
            cells += [
                _round(row["measured"]),
                _round(row["images_per_s"]),
                _round(against) if against else "",
                f"{row['matmul_share']:.0%}",
                f"{row['peak_memory_gib']:.1f}",
                str(row["batch"]),
                f"[{notes.index(note) + 1}]",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"{i}. {note}" for i, note in enumerate(notes, 1)), ""]
    return "\n".join(lines)


def _note(row: dict[str, Any]) -> str:
    hardware, versions = row["hardware"], ", ".join(f"{k} {v}" for k, v in row["versions"].items())
    unit = f" ({hardware['bf16']})" if hardware.get("bf16") else ""
    return (
        f"{hardware['device']}{unit}, {hardware['threads']} threads; {versions}, "
        f"commit {(row['commit'] or 'unknown')[:7]}; {row['date'][:10]}; `{row['command']}`"
    )


def _round(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.1f}" if x >= 5 else f"{x:.2f}"
