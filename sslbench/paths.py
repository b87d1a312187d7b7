"""Where things lie: what ships with the package, and where a user's output goes."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import UserError


def bundled(name: str) -> Path:
    """A folder that ships with the suite (`methods`, `recipes`, `results/paper`), in a wheel or in a checkout."""
    package = Path(__file__).resolve().parent
    for root in (package / "bundled", package.parent):
        if (root / name).is_dir():
            return root / name
    raise UserError(f"the installation is incomplete: no folder '{name}' beside {package}; reinstall sslbench")


def home() -> Path:
    """The folder that `runs/` and `results/` are written to: `$SSLBENCH_HOME`, or the current folder."""
    return Path(os.environ.get("SSLBENCH_HOME") or ".")
