"""Files that are whole or absent, never a part; and checksums, of files and of plain values."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .errors import RunFailed, full, is_full


@contextlib.contextmanager
def whole_file(path: Path, aside: Path) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` at the end: the old one or the new one, never a part.

    Where writing fails nothing is left of it; RunFailed where the disk is full.
    """
    try:
        with open(aside, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, path)
        _sync_folder(path.parent)
    except BaseException as e:
        aside.unlink(missing_ok=True)
        # torch.save fails over its unfinished archive while the disk's own error is on its way.
        for cause in (e, e.__context__):
            if is_full(cause):
                raise RunFailed(full(path)) from e
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """The file is the old one or the new one, never a part. RunFailed where the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path, path.with_name(f".{path.name}.{os.getpid()}.part")) as f:
        f.write(data)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def append_line(path: Path, line: bytes) -> None:
    """One write of one line under a lock: two processes never interleave, and a full disk leaves no part of it.

    A line that was left unfinished, by a process that was killed while it wrote, is set aside with a warning.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b", buffering=0) as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        before = _heal(path, f)
        if f.write(line) < len(line):  # the disk is full
            f.truncate(before)
            raise RunFailed(full(path))
        os.fsync(f.fileno())


def _heal(path: Path, f: BinaryIO) -> int:
    """Make the open ledger file end with a whole line, and return its length."""
    f.seek(0)
    content = f.read()
    body = content.rstrip()
    start = body.rfind(b"\n") + 1
    last = body[start:]
    if not is_torn(last):
        missing = b"" if content.endswith(b"\n") or not last else b"\n"
        return len(content) + f.write(missing)
    aside = path.with_suffix(".torn")
    with open(aside, "ab") as torn:
        torn.write(last + b"\n")
        torn.flush()
        os.fsync(torn.fileno())
    f.truncate(start)
    warnings.warn(f"the last line of {path} was never finished; it is set aside in {aside}", stacklevel=3)
    return start


def is_torn(line: bytes) -> bool:
    """Whether it is the beginning of a record, and not the whole of one."""
    try:
        json.loads(line)
    except ValueError:
        return line.startswith(b"{")
    return False


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest(value: Any) -> str:
    """12 hex digits that stand for a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:12]
