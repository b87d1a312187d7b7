"""Photographs with boxes and masks, or with label maps: what was found of a split, and all that is wrong, before a run.

instances.py reads COCO's format, label_maps.py ADE20K's, dense.py opens either. What can be mended without a doubt is,
and `said` says so. Needs none of the mm libraries.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from .photographs import Facts, turned

Size = tuple[int, int]  # width, height
NAMED = 3  # examples of each fault that a message gives


@dataclass
class Labelled:
    """A split as it was found. faults: what is wrong, a sentence a kind; said: what was mended or decided."""

    source: Path  # the instance file, or the folder of label maps
    images: Path  # the folder that the photographs' names begin at
    files: list[Path]  # the photographs, and behind them their label maps where there are such
    tree: dict[str, Any] = field(default_factory=dict)  # COCO's file, mended
    turned: frozenset[str] = frozenset()  # photographs whose labels are for the picture as its EXIF tag turns it
    faults: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)  # names, in the order of the class numbers
    own: bool = False  # whether the classes are the set's own, not those of COCO or ADE20K
    name: str = ""  # of the set

    def __len__(self) -> int:
        """Return how many images there are."""
        return len(self.files) if self.source.is_file() else len(self.files) // 2

    @property
    def pairs(self) -> list[tuple[Path, Path]]:
        """(photograph, label map) of every image."""
        return [*zip(self.files[: len(self)], self.files[len(self) :], strict=True)]

    @property
    def fingerprint(self) -> str:
        """12 hex digits: of an instance file's content; of label maps over every file's name and size, and over the
        classes where they are the set's own."""
        if self.source.is_file():
            with open(self.source, "rb") as f:
                return hashlib.file_digest(f, "sha256").hexdigest()[:12]
        listing = "".join(f"{p.parent.name}/{p.name}\0{p.stat().st_size}\n" for p in self.files)
        listing += "\n".join(self.classes) if self.own else ""
        return hashlib.sha256(listing.encode()).hexdigest()[:12]


class Findings:
    """What was found, by kind, and where."""

    def __init__(self) -> None:
        self.at: dict[str, list[str]] = defaultdict(list)

    def add(self, what: str, where: object) -> None:
        self.at[what].append(str(where))

    def __bool__(self) -> bool:
        return bool(self.at)

    def sentences(self, source: Path) -> list[str]:
        return [f"{source}: {what} ({some(at)})" for what, at in self.at.items()]


def some(names: list[str]) -> str:
    """`a, b, c and 4 more`"""
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED:,} more" if len(names) > NAMED else "")


def accept(*splits: Labelled) -> None:
    """UserError with every fault of the splits, in one message."""
    if faults := [fault for split in splits for fault in split.faults]:
        raise UserError(f"{'; '.join(faults)}. Mend these or leave them out: `sslbench data check` looks again")


def orient(
    split: Labelled,
    files: list[Path],
    facts: list[Facts | str],
    labelled: Iterable[tuple[str, Size | None]],
    wrong: Findings,
) -> None:
    """Which way each photograph is up: as it is stored, the convention of both sets, unless only its EXIF tag makes it
    of the size that its labels are for. A photograph that is neither is a fault.

    labelled: of each photograph who says what size, and that size, None where it is not known."""
    as_tagged, undecided = set(), Findings()
    for path, fact, (who, size) in zip(files, facts, labelled, strict=True):
        if isinstance(fact, str):
            if fact != "is not there":
                wrong.add("photographs that cannot be read", f"{path} {fact}")
            continue
        stored, orientation = (fact[0], fact[1]), fact[2]
        if size is None:
            continue
        if size == stored:
            if orientation != 1 and turned(stored, orientation) == stored:
                undecided.add("photographs that an EXIF tag turns, their labels maybe not: taken as stored", path)
        elif size == turned(stored, orientation):
            as_tagged.add(str(path))
        else:
            sizes = f"{path} has {stored[0]} x {stored[1]}, {who} {size[0]} x {size[1]}"
            wrong.add("photographs of another size than their labels", sizes)
    split.turned = frozenset(as_tagged)
    if as_tagged:
        split.said.append(
            f"{split.source}: {len(as_tagged):,} photographs are turned as their EXIF tag says, as their labels are"
        )
    split.said += undecided.sentences(split.source)
