"""What many files are found to be, once: kept in runs/.listings for the next process.

It holds for as long as the folders or tar files that were read keep their size and time of change. A file that is
written over in place changes no folder: of some files the size is compared too.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..files import digest
from ..paths import home

LEAST = 20_000  # files that are worth it: fewer are listed in less than a second
LOOKS = 512  # files whose size is compared
SETTLED_NS = 2 * 10**9  # what changed so lately may change again at what a file system calls the same time


def folder() -> Path:
    return home() / "runs" / ".listings"


@dataclass
class Names(Sequence[str]):
    """Names of files as bytes in one tensor, which a loader's workers share; of a list each would have a copy."""

    letters: Tensor  # uint8, of all names
    ends: Tensor  # int64 (N,), where each ends in it
    chosen: Tensor | None = None  # which of them; None: all
    fingerprint: str | None = None  # over names and sizes, of all

    def __len__(self) -> int:
        return len(self.ends if self.chosen is None else self.chosen)

    def __getitem__(self, i: Any) -> Any:
        n = range(len(self))[i]
        if isinstance(n, range):
            return [self[j] for j in n]
        n = n if self.chosen is None else int(self.chosen[n])
        return os.fsdecode(self.letters[int(self.ends[n - 1]) if n else 0 : int(self.ends[n])].numpy().tobytes())

    def part(self, index: Tensor) -> Names:
        return Names(self.letters, self.ends, index if self.chosen is None else self.chosen[index])


@dataclass
class Listing:
    """Files under a folder, sorted, and the first folder in each name: its number in `tops`, "" where there is none."""

    files: Sequence[str]
    tops: list[str]
    top: Tensor  # int64 (N,)


def listing_of(files: Sequence[str], tops: list[str | None] | None = None) -> Listing:
    """Of files that are known; `tops`: instead of the first folder of each, where it is not None."""
    numbers: dict[str, int] = {}
    top = [f.split(os.sep, 1)[0] if os.sep in f else "" for f in files]
    top = [other or own for other, own in zip(tops, top, strict=True)] if tops else top
    of = [numbers.setdefault(t, len(numbers)) for t in top]
    return Listing(files, [*numbers], torch.tensor(of, dtype=torch.long))


def list_files(root: Path, walk: Callable[[], Iterable[tuple[str, list[str]]]]) -> Listing:
    """The files under `root` that `walk` finds: (folder, names in it), the folder relative to `root`, "" for itself.

    Processes that start together list once, where the disk has locks.
    """
    if known := _listed(root):
        return known
    with alone(root):
        if known := _listed(root):
            return known
        began = time.time_ns()
        walked = dict(walk())
        files = sorted(os.path.join(below, name) for below, names in walked.items() for name in names)
        listing = listing_of(files)
        if len(files) >= LEAST:
            _keep_files(root, began, [*walked], listing)
        return _listed(root) or listing


def _keep_files(root: Path, began: int, read: list[str], listing: Listing) -> None:
    files = listing.files
    sizes = [(root / f).stat().st_size for f in files]
    hashed, names = hashlib.sha256(), [os.fsencode(f) for f in files]
    for name, size in zip(names, sizes, strict=True):
        hashed.update(b"%s\0%d\n" % (name, size))  # as FolderImages.fingerprint
    arrays = {
        "letters": np.frombuffer(b"".join(names), np.uint8),
        "ends": np.cumsum([len(name) for name in names]),
        "sizes": np.array(sizes),
        "top": listing.top.numpy(),
    }
    keep("folder", root, read, began, arrays, {"fingerprint": hashed.hexdigest()[:12], "tops": listing.tops})


def _listed(root: Path) -> Listing | None:
    if (kept := recall("folder", root)) is None:
        return None
    arrays, facts = kept
    try:
        files = Names(arrays["letters"], arrays["ends"], fingerprint=facts["fingerprint"])
        some = np.linspace(0, len(files) - 1, min(LOOKS, len(files))).astype(int).tolist()
        same = all((root / files[i]).stat().st_size == arrays["sizes"][i] for i in some)
        return Listing(files, facts["tops"], arrays["top"]) if same else None
    except (OSError, KeyError):
        return None


def recall(kind: str, root: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return what was kept of `root`, (arrays, facts); None where nothing was, or what was read has changed since."""
    at = _place(kind, root)
    try:
        facts = json.loads((at / "facts.json").read_text())
        if _stamp(root, [path for path, *_ in facts["read"]]) != facts["read"]:
            return None
        return {path.stem: torch.from_numpy(np.load(path)) for path in at.glob("*.npy")}, facts
    except (OSError, ValueError, KeyError, EOFError):
        return None


def keep(
    kind: str, root: Path, read: list[str], began: int, arrays: dict[str, np.ndarray], facts: dict[str, Any]
) -> None:
    """Keep `arrays` and `facts` of what stands in the paths `read`, relative to `root`, since `began` (time.time_ns).

    Nothing is kept where one of these was changed just now, or the disk takes none.
    """
    at = _place(kind, root)
    aside = at.with_name(f".{at.name}.{os.getpid()}")
    try:
        stamp = _stamp(root, read)
        if max(changed for _, changed, _ in stamp) > began - SETTLED_NS:
            return
        aside.mkdir(parents=True)
        for name, array in arrays.items():
            np.save(aside / f"{name}.npy", array)
        (aside / "facts.json").write_text(json.dumps({**facts, "read": stamp}))
        shutil.rmtree(at, ignore_errors=True)
        aside.rename(at)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)


def clean() -> tuple[int, int]:
    """Remove what is kept; return (files, bytes)."""
    sizes = [path.stat().st_size for path in folder().rglob("*") if path.is_file()]
    shutil.rmtree(folder(), ignore_errors=True)
    return len(sizes), sum(sizes)


def _place(kind: str, root: Path) -> Path:
    return folder() / digest([kind, str(root.resolve())])


def _stamp(root: Path, read: list[str]) -> list[list[Any]]:
    stats = [(path, (root / path).stat()) for path in read]
    return [[path, s.st_mtime_ns, s.st_size] for path, s in stats]


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """One process at a time, where the disk has locks."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            descriptor = os.open(root, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
