"""`sslbench report --compare A B`: is one better than the other, protocol by protocol, and how sure is that?"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from ..errors import UserError, nearest
from ..evaluate.told import PUBLIC
from ..ledger import Record
from ..stats import normal_difference, paired_difference
from .tables import MAIN_METRICS, by_run_seed, cell_of, training_images

# Numbers that may be compared: the same images, scored by the same rules.
Key = tuple[str, str, str, str, str]  # dataset, fingerprint, protocol name, protocol hash, metric


def compare(a: str, b: str, records: list[Record], console: Console) -> dict[str, Any]:
    """Print and return {"a", "b", "rows": [{dataset, protocol, metric, seeds, a, b, difference, half_width, p, test}]}.

    A and B each name one recipe: a run (its other seeds count too), a method, or a recipe hash. Over the seeds that
    both have: Student's paired t test. With one seed in common the images are the sample: a z test of two accuracies,
    as if they were on different images, which is cautious since they are on the same.
    """
    left, right = _select(a, records), _select(b, records)
    rows = []
    for key in sorted(left.keys() & right.keys()):
        cells = cell_of(left[key]), cell_of(right[key])
        of_a, of_b = (cell.by_seed() for cell in cells)
        seeds = sorted(of_a.keys() & of_b.keys())
        if not seeds:
            continue
        x, y = ([side[s] for s in seeds] for side in (of_a, of_b))
        half: float | None
        if len(seeds) > 1:
            difference, half, p = paired_difference(x, y)
            test = f"paired t, {len(seeds)} seeds"
        else:
            errors = [by_run_seed(cell.records)[seeds[0]][0].stderr for cell in cells]
            difference, half, p = normal_difference(x[0], errors[0], y[0], errors[1])
            test = "z, 1 seed"
        means = [math.fsum(side) / len(seeds) for side in (x, y)]
        rows.append(
            {
                "dataset": key[0],
                "protocol": key[2],
                "metric": key[4],
                "seeds": seeds,
                "a": means[0],
                "b": means[1],
                "difference": difference,
                "half_width": half,
                "p": p,
                "test": test,
            }
        )
    if not rows:
        raise UserError(f"{a} and {b} have no number under the same protocol, on the same images, with the same seed")
    _show(a, b, rows, console)
    return {"a": a, "b": b, "rows": rows}


def _select(name: str, records: list[Record]) -> dict[Key, list[Record]]:
    """The records of what is named, by what they may be compared with."""
    of_key: dict[Key, list[Record]] = defaultdict(list)
    recipes: dict[tuple[str, str, str], str] = {}
    run_name, images = name.rstrip("/").rpartition("/")[2], training_images(records)
    wanted = _without_seed(run_name)
    of_run = {images[r.id] for r in records if r.pretrain.run == run_name}
    for r in sorted(records, key=lambda r: r.created):
        run = _without_seed(r.pretrain.run or "")
        if "milestone" in r.condition:
            continue
        if wanted not in (named(r), r.pretrain.recipe_hash, run) or r.metric not in (*MAIN_METRICS, "top1"):
            continue
        if of_run and images[r.id] not in of_run:  # a set in another folder of the same name
            continue
        recipes[r.arch, r.pretrain.recipe_hash or "", images[r.id]] = r.pretrain.run or r.method
        of_key[r.dataset, r.data_fingerprint, r.protocol.name, r.protocol.hash, r.metric].append(r)
    if not of_key:
        known = sorted({named(r) for r in records} | {r.pretrain.run for r in records if r.pretrain.run})
        raise UserError(
            f"the ledger has no number of '{name}'{nearest(name, known)}; name a run, a method or a recipe hash"
        )
    if len(recipes) > 1:
        names = [_without_seed(run) for run in recipes.values()]
        names = names if len(set(names)) == len(names) else [*recipes.values()]
        raise UserError(f"'{name}' is {len(recipes)} recipes in the ledger; name one by its run: {', '.join(names)}")
    return of_key


def named(r: Record) -> str:
    """`mae`, or `mae (public weights)`: weights of others are no seed of a run of ours."""
    return f"{r.method} ({PUBLIC})" if r.public else r.method


def _without_seed(run: str) -> str:
    return re.sub(r"_s\d+$", "", run)


def _show(a: str, b: str, rows: list[dict[str, Any]], console: Console) -> None:
    console.print(f"A {a}\nB {b}\n", markup=False)
    table = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for head in ("data", "protocol", "A", "B", "A - B", "p", "test"):
        table.add_column(head, justify="left" if head in ("data", "protocol", "test") else "right")
    for r in rows:
        interval = f"{r['difference']:+.1f}" + ("" if r["half_width"] is None else f" ± {r['half_width']:.1f}")
        p = "" if r["p"] is None else f"{r['p']:.3f}" if r["p"] >= 0.001 else "<0.001"
        table.add_row(r["dataset"], r["protocol"], f"{r['a']:.1f}", f"{r['b']:.1f}", interval, p, r["test"])
    console.print(table, soft_wrap=False)
