"""Which chunks a run must have by its layout: all of its tables, and those of every committed unit.

Jobs of every schema write all chunks, also those that hold nothing but the fill value. zarr reads a chunk that is
missing as fill values, so a missing file must be an error even where no checksum lists it.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from workbench.bounded_json import parse_json
from workbench.runs.schema import ArraySpec, Layout, Spec, Unit, arrays
from workbench.runs.storage import Storage

FLAG = b"\x01"  # content of the file that commits a unit
MAX_METADATA_BYTES = 2**30  # of a manifest, and of a zarr.json
_TABLES = ("sequences/", "messages/")


class ExpectedFiles:
    """The layout of a run's files, read when it is needed.

    It reads files of the run itself, never through zarr, whose event loop waits for it.
    """

    def __init__(self, storage: Storage, attributes: Mapping[str, Any]) -> None:
        self._storage, self._attributes = storage, attributes
        self._complete = attributes["status"] == "complete"

    def must_exist(self, key: str) -> bool:
        """Return whether the file is a chunk of a table, of a committed unit, or of the totals of a finished run."""
        array, separator, index = key.partition("/c/")
        if not separator:
            return False
        if array.startswith(_TABLES):
            return True
        if array.startswith("totals/"):
            return self._complete
        spec = self._specs.get(array)
        return spec is not None and self._is_committed(self._unit(spec, int(index.split("/")[spec.axis])))

    def _metadata(self, key: str) -> bytes:
        return self._storage.read(key, MAX_METADATA_BYTES)

    @cached_property
    def _layout(self) -> Layout:
        """Return the units, without the sequences' offsets and lengths: all that the shapes of arrays depend on."""
        about = parse_json(self._metadata("units/committed/zarr.json"))["attributes"]
        columns = zip(about["starts"], about["capacities"], about["sequences"], strict=True)
        units = (Unit(i, start, capacity, tuple(range(n))) for i, (start, capacity, n) in enumerate(columns))
        return Layout(self._attributes["unit_tokens"], tuple(units), (), ())

    @cached_property
    def _specs(self) -> dict[str, ArraySpec]:
        return arrays(self._attributes["model"], Spec.from_json(self._attributes["spec"]), self._layout)

    def _is_committed(self, unit: int) -> bool:
        if self._complete:
            return True
        try:
            return self._storage.read(f"units/committed/c/{unit}")[-1:] == FLAG  # schema 1 writes it as a zstd frame
        except OSError:
            return False

    def _unit(self, spec: ArraySpec, index: int) -> int:
        if "token" not in spec.dims:
            return index
        starts = [unit.start for unit in self._layout.units]
        return int(np.searchsorted(starts, index * spec.per_unit, side="right")) - 1
