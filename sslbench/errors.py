"""The two ways a command can end badly: the user's input (exit 2) or the run itself (exit 1)."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import shutil
from collections.abc import Iterable
from typing import Any


class Failure(Exception):
    """A command ends badly. answer: what `--json` gives all the same, such as the runs that did not fail."""

    def __init__(self, message: str, answer: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.answer = answer


class UserError(Failure):
    """The input is wrong. The message says what, where, and what to do; exit status 2."""


class RunFailed(Failure):
    """The run failed although the input was fine; the run folder says why; exit status 1."""


class Interrupted(Exception):
    """The run was stopped from outside and can be resumed; exit status 130. requeue: by a cluster, to go on later."""

    def __init__(self, message: str, requeue: bool = False) -> None:
        super().__init__(message)
        self.requeue = requeue


def is_full(error: BaseException | None) -> bool:
    """Whether it says that the disk, a quota on it or the largest allowed file is used up."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


# A path that cannot be used, whose kind Python has no class for.
UNUSABLE = (errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENXIO, errno.ENODEV, errno.EOPNOTSUPP)


def is_unusable(error: OSError) -> bool:
    """Whether it says that a path cannot be read or written as it is: the user's to mend."""
    known = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
    return error.filename is not None and (isinstance(error, known) or error.errno in UNUSABLE)


def full(what: str | os.PathLike[str]) -> str:
    """The message for it."""
    return (
        f"no room on the disk (or in its quota) to write {what}; make some, then give the same command again: "
        f"a training goes on from its newest checkpoint"
    )


def lost_loader(error: BaseException) -> str | None:
    """The message for a process that decodes images and was killed, or could not hand its images over; None for else.

    The words are torch's: it raises a bare RuntimeError for most of it.
    """
    text = str(error)
    if is_full(error) and isinstance(error, OSError) and error.filename is None:  # perhaps a semaphore in there
        with contextlib.suppress(OSError):
            text = "" if shutil.disk_usage("/dev/shm").free > 2**16 else "shared memory(shm)"
    elif not isinstance(error, RuntimeError) or not ("DataLoader worker" in text or "shared memory(shm)" in text):
        return None
    again = "Then give the same command again: a training goes on from its newest checkpoint"
    if any(word in text for word in ("shared memory(shm)", "Bus error", "No space left")):
        return (
            "no room in /dev/shm, through which the processes that decode images hand over their batches: make it "
            f"larger (in a container: docker run --shm-size=8g), or decode without it: --set machine.workers=0. {again}"
        )
    if any(word in text for word in ("killed by signal", "exited unexpectedly")):
        return (
            f"a process that decodes images has died ({' '.join(text.split())[:120]}), most often because the machine "
            f"ran out of memory: use fewer, such as --set machine.workers=1. {again}"
        )
    return None


def nearest(word: str, known: Iterable[str]) -> str:
    """`'; did you mean X?'`, or what is known where nothing is near and that is no long list."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(known)}" if 0 < len(known) <= 100 else ""
