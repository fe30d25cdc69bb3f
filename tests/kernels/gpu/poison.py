"""Memory that shows what a kernel left unwritten."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on empty tensors are full of NaN, or of 99."""

    def poisoned(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def fill(*args: object, **options: object) -> Tensor:
            made = empty(*args, **options)
            return made.fill_(math.nan if made.is_floating_point() else 99)

        return fill

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
