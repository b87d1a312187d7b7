"""Where things lie: what ships with the package, where a user's data is, and where output goes."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from .errors import UserError


def bundled(name: str) -> Path:
    """A folder that ships with the suite (`methods`, `recipes`, `results/paper`), in a wheel or in a checkout."""
    package = Path(__file__).resolve().parent
    for root in (package / "bundled", package.parent):
        if (root / name).is_dir():
            return root / name
    raise UserError(f"the installation is incomplete: no folder '{name}' beside {package}; reinstall sslbench")


@functools.cache
def recipe_files(kind: str = "pretrain") -> Mapping[str, Path]:
    """Bundled recipes by name: `ocl/vit_l16_imagenet` in pretrain/, `knn` in eval/. Listed once a process."""
    root = bundled("recipes") / kind
    files = sorted(root.rglob("*.yaml"))
    return MappingProxyType({p.relative_to(root).with_suffix("").as_posix(): p for p in files})


def home() -> Path:
    """The folder that `runs/` and `results/` are written to: `$SSLBENCH_HOME`, or the current folder."""
    return Path(os.environ.get("SSLBENCH_HOME") or ".").expanduser()


def inspected(weights_sha256: str) -> Path:
    """Where `inspect` puts its page of public weights, which have no run folder, and where a report looks for it."""
    return home() / "results" / "inspect" / weights_sha256[:16]


def data_root() -> Path | None:
    """The folder in which a bare name of a data set is looked up: `$SSLBENCH_DATA`."""
    root = os.environ.get("SSLBENCH_DATA")
    return Path(root).expanduser() if root else None


def expand(word: str) -> str:
    """A word of a command line with `~/` and `~user/` as a shell has them, also where it leaves them alone.

    It does so after the `=` of an option and after the `:`, `+` or `@` of a data SPEC: `--out=~/x`, `npz:~/x`.
    """
    return re.sub(r"(?<![^=:+@])~[\w.-]*(?=/)", lambda found: os.path.expanduser(found[0]), word)
