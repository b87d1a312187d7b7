"""Code of a user's own, by `path/to/file.py:NAME`: a method's class, a set of images, an evaluation."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import UserError, nearest
from .files import digest

SPEC = re.compile(r"(.+\.py):([A-Za-z_]\w*)")


def is_plugin(spec: str) -> bool:
    """Whether it reads `path/to/file.py:NAME`."""
    return SPEC.fullmatch(spec) is not None


def load_plugin(spec: str, what: str) -> Any:
    """What is called NAME in that file. UserError, which says `what` was wanted: there is no such file or name."""
    path, _, name = spec.rpartition(":")
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"no file {path}, from which {what} '{name}' is to come")
    module = import_file(file.resolve(), what)
    if not hasattr(module, name):
        raise UserError(f"no {what} '{name}' in {path}{nearest(name, vars(module))}")
    return getattr(module, name)


def import_file(path: Path, what: str) -> ModuleType:
    """The file as a module, read once a process. UserError, which says `what` does not load: it raises."""
    module_name = f"sslbench_{path.stem}_{digest(str(path))}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec and spec.loader
        sys.modules[module_name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as e:
            del sys.modules[module_name]
            raise UserError(f"the {what} in {path} does not load: {type(e).__name__}: {e}") from e
    return sys.modules[module_name]
