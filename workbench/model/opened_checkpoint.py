"""A validated checkpoint of any format: what `open_checkpoint` returns."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from workbench import harmony
from workbench.errors import InputError
from workbench.harmony.vocabulary import Tokenizer
from workbench.model.config import Config
from workbench.model.lazy_tensors import Tensors

_EXPONENT = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}  # the bits of an infinity: no finite value has as many


@dataclass(frozen=True)
class Checkpoint:
    """A validated checkpoint. notes: what was ignored in it; ignore_fields: the config fields declared harmless.

    path: the folder, or the file. tokenizer: reads the tokenizer.
    """

    path: Path
    cfg: Config
    layout: str
    experts: str
    tensors: Tensors
    digest: str
    tokenizer: Callable[[], Tokenizer] = field(default=harmony.tokenizer, compare=False)
    notes: tuple[str, ...] = ()
    ignore_fields: tuple[str, ...] = ()

    def check_values(self, chunk: int = 1 << 24) -> None:
        """Read every weight once, `chunk` values at a time.

        Raises:
            InputError: a tensor holds NaN or infinity, or a packed one the scale byte 255.
        """
        for name in self.tensors:
            if name.endswith(".blocks"):  # every nibble is a number
                continue
            tensor = self.tensors[name]
            for start, values in zip(count(0, chunk), tensor.flatten().split(chunk), strict=False):
                if _has_no_number(name, values):
                    self._refuse(name, tensor.shape, start, values)

    def _refuse(self, name: str, shape: torch.Size, start: int, values: Tensor) -> None:
        packed = name.endswith(".scales")
        first = int((values == 255 if packed else ~torch.isfinite(values)).nonzero()[0, 0])
        place = [int(i) for i in torch.unravel_index(torch.tensor(start + first), shape)]
        what = "scale byte 255, which is NaN" if packed else str(float(values[first]))
        raise InputError(
            f"{self.path}: tensor {self.tensors.entries[name].stored!r} ({name}) is not finite at {place}: {what}; "
            "the weights are damaged, download or export them again"
        )


def _has_no_number(name: str, values: Tensor) -> bool:
    """Return whether some value is NaN or infinite; for 16-bit floats from their bits, which is four times faster."""
    if name.endswith(".scales"):
        return bool(values.max() == 255)
    if values.dtype in _EXPONENT:
        return bool((values.view(torch.int16) & 0x7FFF).max() >= _EXPONENT[values.dtype])
    return not bool(torch.isfinite(values).all())
