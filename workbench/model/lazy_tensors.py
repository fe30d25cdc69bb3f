"""The one interface of all checkpoint formats: canonical names to tensors that are read when they are used."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from workbench.kernels.ggml import GgmlMxfp4

PUBLISHED_PRECISION = ("BF16", "F32", "MXFP4")


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file. stored: its name there; precision: its type there, such as BF16, MXFP4 or Q8_0.

    decode: of a quantised tensor, reads it as another floating-point type without a float32 copy of it. in_place: of
    the blocks and scales of packed experts, their matrices as the file holds them, if the CPU kernels read these.
    """

    stored: str
    shape: tuple[int, ...]
    precision: str
    read: Callable[[], Tensor]
    decode: Callable[[torch.dtype], Tensor] | None = None
    in_place: Callable[[], GgmlMxfp4] | None = None

    def read_as(self, dtype: torch.dtype) -> Tensor:
        """Return the tensor [...], converted to `dtype` if it holds floating-point numbers."""
        if self.decode is not None:
            return self.decode(dtype)
        tensor = self.read()
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    def rows(self, start: int, stop: int) -> "LazyTensor":
        """Return the rows from `start` to `stop` as a tensor of their own."""
        return replace(
            self,
            shape=(stop - start, *self.shape[1:]),
            read=lambda: self.read()[start:stop],
            decode=None if self.decode is None else lambda dtype: self.read_as(dtype)[start:stop],
        )


class Tensors(Mapping[str, Tensor]):
    """Canonical name → tensor, read when it is accessed. `entries` describes each without reading it."""

    def __init__(self, entries: Mapping[str, LazyTensor]) -> None:
        self.entries = dict(entries)

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor by its canonical name, in the shape [...] of the config."""
        return self.entries[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def other_precision(self) -> dict[str, list[str]]:
        """Return the stored types that the published checkpoints do not use, each with the names of its tensors."""
        names_by_precision: dict[str, list[str]] = {}
        for name, entry in self.entries.items():
            if entry.precision not in PUBLISHED_PRECISION:
                names_by_precision.setdefault(entry.precision, []).append(name)
        return names_by_precision
