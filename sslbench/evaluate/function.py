"""An evaluation of a user's own: a function from frozen features to which images of val are right.

    def centroid(train, train_labels, val, val_labels, seed):
        ...
        return predicted == val_labels

`sslbench eval path/to/file.py:centroid RUN`. Features are float32 (N, D), labels int64 (N,), the answer booleans (M,).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..errors import UserError
from ..plugin import load_plugin
from ..strict import Strict


class Function(Strict):
    """The protocol: its hash has the text of the file, so that numbers of another version have another column."""

    protocol: Literal["function"]
    function: str = Field("", exclude=True)  # path/to/file.py:NAME; where it lies is no part of the hash
    name: str = ""
    source: str = ""  # 12 hex digits of the file's text
    pool: Literal["cls", "mean", "mean_all"] | None = None  # None: the method's own

    @model_validator(mode="after")
    def _read(self) -> Function:
        if not self.function:  # the recipe as it is shipped
            return self
        path, _, name = self.function.rpartition(":")
        load_plugin(self.function, "evaluation")
        self.name, self.source = name, hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()[:12]
        return self

    def right(self, train: Tensor, train_labels: Tensor, val: Tensor, val_labels: Tensor, seed: int) -> Tensor:
        """Booleans (M,): which images of val are right. UserError: the function returns something else."""
        if not self.function:
            raise UserError("say which function evaluates: sslbench eval path/to/file.py:NAME")
        answer = load_plugin(self.function, "evaluation")(train, train_labels, val, val_labels, seed)
        if not isinstance(answer, Tensor) or answer.dtype != torch.bool or answer.shape != val_labels.shape:
            got = f"{answer.dtype} {tuple(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__
            raise UserError(
                f"{self.function} is to say which of the {len(val_labels)} images are right, as a tensor of booleans "
                f"({len(val_labels)},), found {got}"
            )
        return answer.cpu()
