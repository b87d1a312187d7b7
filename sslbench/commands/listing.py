"""`sslbench list` and `sslbench data`: what there is."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from ..errors import UserError, nearest
from ..paths import bundled, data_root, home, recipe_files


def listing(what: str, console: Console) -> list[dict[str, Any]]:
    kinds = {"methods": _methods, "recipes": _recipes, "archs": _archs, "tables": _tables, "runs": _runs}
    if what not in kinds:
        raise UserError(f"nothing called '{what}' to list{nearest(what, kinds)}")
    rows = kinds[what]()
    show(rows, console)
    if not rows:
        console.print(f"no {what} yet")
    return rows


def show(rows: list[dict[str, Any]], console: Console, title: str | None = None) -> None:
    """Rows as a table that wraps in 80 columns."""
    if not rows:
        return
    table = RichTable(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for i, (key, value) in enumerate(rows[0].items()):
        justify: Any = "right" if isinstance(value, int | float) else "left"
        # What a row is called is to be copied: never cut, never broken.
        table.add_column(key.replace("_", " "), justify=justify, no_wrap=i == 0, overflow="fold")
    for row in rows:
        words = ("" if v is None else v for v in row.values())
        table.add_row(*(f"{v:,}" if isinstance(v, int) and not isinstance(v, bool) else str(v) for v in words))
    console.print(table, soft_wrap=False)


def _methods() -> list[dict[str, Any]]:
    read = [(path.stem, _read(path)) for path in bundled("methods").glob("*.py")]
    if entry_points(group="sslbench.methods") or not all(row for _, row in read):
        read = _imported()
    return [{"method": name, **row} for name, row in sorted(read, key=lambda r: (r[1]["kind"] != "hybrid", r[0]))]


def _read(path: Path) -> dict[str, Any]:
    """What `list methods` says of a method's file, as it is written: importing it takes torch, and seconds.

    {} where that takes more than reading: the class has another base than Method, or no literals.
    """
    tree = ast.parse(path.read_text())
    classes = [c for c in tree.body if isinstance(c, ast.ClassDef) and "Method" in map(ast.unparse, c.bases)]
    if len(classes) != 1:
        return {}
    said = {
        target.id: line.value
        for line in classes[0].body
        if isinstance(line, ast.Assign)
        for target in line.targets
        if isinstance(target, ast.Name)
    }
    try:
        hybrid = "hybrid" in said and ast.literal_eval(said["hybrid"])
        presets = said.get("presets", ast.Dict([ast.Constant("paper")], []))
        names = [ast.literal_eval(key) for key in presets.keys if key] if isinstance(presets, ast.Dict) else []
    except ValueError:
        return {}
    return _row(hybrid, names, ast.get_docstring(tree) or "") if names else {}


def _imported() -> list[tuple[str, dict[str, Any]]]:
    from ..method import methods

    return [(name, _row(c.hybrid, c.presets, sys.modules[c.__module__].__doc__ or "")) for name, c in methods().items()]


def _row(hybrid: bool, presets: Iterable[str], doc: str) -> dict[str, Any]:
    return {
        "kind": "hybrid" if hybrid else "control",
        "presets": ", ".join(presets),
        "what": doc.split("\n")[0],
    }


def _recipes() -> list[dict[str, Any]]:
    rows = []
    for kind in ("pretrain", "eval", "transfer", "studies"):
        for name, path in recipe_files(kind).items():
            head = path.read_text().splitlines()[0].removeprefix("# ")
            rows.append({"recipe": name, "kind": kind, "command": head})
    return rows


def _archs() -> list[dict[str, Any]]:
    from ..vit import ARCHS, parameters_of

    return [
        {"arch": name, "blocks": a.depth, "dim": a.dim, "heads": a.heads, "patch": a.patch, "image": a.image,
         "parameters": parameters_of(name)}
        for name, a in ARCHS.items()
    ]  # fmt: skip


def _tables() -> list[dict[str, Any]]:
    from ..study.printed import paper_tables, read_paper

    rows = []
    for name in paper_tables():
        frame = read_paper(name)
        metrics = list(dict.fromkeys(frame["metric"]))
        more = f" and {len(metrics) - 3} more" if len(metrics) > 3 else ""
        rows.append(
            {"table": name, "numbers": int((frame["value"] != "").sum()), "metrics": ", ".join(metrics[:3]) + more}
        )
    return rows


def _runs() -> list[dict[str, Any]]:
    from ..train.folder import read_run

    rows = []
    for path in sorted((home() / "runs").glob("*/run.json")):
        try:
            run = read_run(path.parent)
        except UserError:
            run = {"status": "unreadable"}
        rows.append({"run": path.parent.name, "status": run.get("status"), "step": run.get("step"),
                     "of": run.get("steps_total"), "updated": run.get("updated")})  # fmt: skip
    return rows


def show_check(spec: str, console: Console) -> dict[str, Any]:
    from ..data.check import check

    checked = check(spec)
    for split, f in checked["splits"].items():
        size = " x ".join(map(str, f["median_size"] or []))
        console.print(f"{split}: {f['images']:,} images, {f['classes']} classes, median size {size}, "
                      f"fingerprint {f['fingerprint']}, {len(f['corrupt'])} unreadable")  # fmt: skip
        for path in f["corrupt"]:
            console.print(f"  cannot be read: {path}", markup=False)
    if checked["missing"]:
        console.print(f"enough to pre-train, not to evaluate: {checked['missing']}", markup=False)
    labels = checked.get("labels", {"faults": [], "said": [], "missing": ""})
    for said in (*labels["said"], *(f"`sslbench transfer` would refuse {fault}" for fault in labels["faults"])):
        console.print(said, markup=False)
    if labels["missing"]:
        console.print(f"no labels for `sslbench transfer`: {labels['missing']}", markup=False)
    if not checked["ok"] and not labels["faults"]:
        console.print("more than 0.1 % of a split cannot be read: a run would stop. Replace or remove those files")
    return checked


def show_splits(spec: str, console: Console) -> list[dict[str, Any]]:
    from ..data import open_split

    rows = []
    for split in ("train", "val"):
        try:
            images = open_split(spec, split)
        except UserError as e:
            if split == "train":
                raise
            console.print(f"no val split: {e}", markup=False)
            continue
        labels = "no labels" if images.labels is None else f"{len(images.classes)} classes"
        rows.append({"split": split, "images": len(images), "labels": labels, "fingerprint": images.fingerprint})
    show(rows, console)
    return rows


def show_data(console: Console) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"spec": "builtin", "what": "4,000 + 1,000 CIFAR-10 images that ship with the suite"},
        {"spec": "npz:PATH", "what": "images uint8 (N, H, W, 3), labels; PATH_train.npz and PATH_test.npz"},
        {"spec": "folder:DIR", "what": "DIR/train/CLASS/IMAGE and DIR/val/CLASS/IMAGE"},
        {"spec": "imagenet:DIR", "what": "the same, with ImageNet-1K's 1000 classes"},
        {"spec": "coco:DIR", "what": "DIR/train2017/*.jpg, DIR/val2017/*.jpg, without labels"},
        {"spec": "ade20k:DIR", "what": "DIR/images/training/*.jpg, DIR/images/validation/*.jpg, without labels"},
        {"spec": "wds:DIR", "what": "WebDataset's shards, DIR/*train*.tar and DIR/*val*.tar, of KEY.jpg and KEY.cls"},
        {"spec": "hfds:NAME", "what": "a data set of Hugging Face's hub, or a folder by save_to_disk (extra `hf`)"},
        {"spec": "packed:DIR", "what": "any of these, as `sslbench data pack SPEC --out DIR` writes it: quick to read"},
        {"spec": "A+B", "what": "several of these as one, without labels"},
    ]
    root = data_root()
    if root and root.is_dir():
        rows += [
            {"spec": p.name.removesuffix("_train.npz"), "what": f"{p}"}
            for p in sorted(root.iterdir())
            if p.is_dir() or p.name.endswith("_train.npz")
        ]
    show(rows, console)
    if not root:
        console.print("\nSSLBENCH_DATA is not set; with it, a bare name is looked up in that folder")
    return rows
