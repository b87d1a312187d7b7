"""`python -m sslbench.study.cell`: one cell, as JSON on standard input, for a study that runs several at once."""

from __future__ import annotations

import json
import sys

from rich.console import Console

from ..errors import Interrupted, RunFailed, UserError
from .executor import do, from_json


def main() -> int:
    cell = from_json(json.load(sys.stdin))
    try:
        do(cell, Console(stderr=True, highlight=False, force_terminal=False))
    except (UserError, RunFailed, Interrupted, KeyboardInterrupt) as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2 if isinstance(e, UserError) else 1 if isinstance(e, RunFailed) else 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
