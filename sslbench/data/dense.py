"""Sets of photographs with dense labels by --data: found, opened with both splits, named, and checked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..paths import data_root
from .instances import number_alike, open_coco
from .label_maps import open_ade20k
from .labelled import Labelled
from .names import data_name

READERS = {"coco": open_coco, "ade20k": open_ade20k}
# Images of the sets that the papers print numbers of, which alone bear their names.
OFFICIAL = {"coco": (118_287, 5_000), "ade20k": (20_210, 2_000)}
USUAL = {"coco": ["coco"], "ade20k": ["ADEChallengeData2016", "ade20k"]}  # folders under $SSLBENCH_DATA
LAYOUTS = {
    "coco": "annotations/instances_{train,val}2017.json, train2017/, val2017/",
    "ade20k": "images/{training,validation}/, annotations/{training,validation}/ and, of other classes than ADE20K's, "
    "a list of them, classes.txt",
}


def find_data(kind: str, data: str | None) -> Path:
    """The data set's folder: --data, that name under $SSLBENCH_DATA, or its usual name there."""
    root = data_root()
    names = [data.removeprefix(f"{kind}:")] if data else USUAL[kind]
    places = [Path(n).expanduser() for n in names if data] + [root / n for n in names if root]
    folder = next((p for p in places if p.is_dir()), None)
    if folder is None:
        looked = f"looked for {', '.join(map(str, places))}" if places else "SSLBENCH_DATA is not set"
        raise UserError(f"no {kind} data set ({looked}); point to it with --data DIR, which holds {LAYOUTS[kind]}")
    return folder


def open_dense(kind: str, root: Path) -> tuple[Labelled, Labelled]:
    """Train and val, their classes numbered alike. What is wrong is in their `faults`; UserError: another layout."""
    train, val = (READERS[kind](root, split) for split in ("train", "val"))
    if kind == "coco" and not train.faults + val.faults:
        number_alike(train, val)
    train.name = val.name = _name(kind, root, train, val)
    return train, val


def _name(kind: str, root: Path, train: Labelled, val: Labelled) -> str:
    """What the ledger calls the set: its folder, and `coco` or `ade20k` only where it is all of that."""
    if not train.own and (len(train), len(val)) == OFFICIAL[kind]:
        return kind
    folder = root if kind == "coco" else train.images.parents[1]
    name = folder.resolve().name
    return f"own-{data_name(name)}" if data_name(name).casefold() in OFFICIAL else name


def check_labels(spec: str) -> dict[str, Any]:
    """{"faults", "said", "missing"} of `coco:DIR` or `ade20k:DIR`; {} of other sets."""
    kind, _, where = spec.partition(":")
    if kind not in READERS:
        return {}
    root = Path(where).expanduser() if where else Path(os.environ["SSLBENCH_DATA"]) / kind
    try:
        splits = open_dense(kind, root)
    except UserError as e:  # enough to pre-train
        return {"faults": [], "said": [], "missing": str(e)}
    return {
        "faults": [fault for split in splits for fault in split.faults],
        "said": [said for split in splits for said in split.said],
        "missing": "",
    }
