"""What a dashboard shows and what is chosen in it, without a widget: the shelf of runs and a selection.

Run paths come from the command line only; a browser can choose among the names on the shelf, nothing else.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import xarray as xr

from workbench.errors import InputError
from workbench.runs import Run, open_run
from workbench.studies import run_study


@dataclass(frozen=True)
class Selection:
    """What a page shows; its fields are the page's query string."""

    run: str
    channel: str
    effort: str

    def query(self) -> dict[str, str]:
        """For the address bar."""
        return asdict(self)


def choose(query: Mapping[str, str], options: Mapping[str, Sequence[str]]) -> Selection:
    """A selection from a query string; what it names that does not exist becomes the first option."""
    return Selection(
        **{n: query[n] if query.get(n) in known else next(iter(known), "") for n, known in options.items()}
    )


class Shelf:
    """The runs a dashboard was started with, and their studies, computed once for each state of a run."""

    def __init__(self, paths: Sequence[str | Path]) -> None:
        if not paths:
            raise InputError("name at least one run to show: workbench dashboard RUN.zarr")
        self._paths: dict[str, Path] = {}
        for path in map(Path, paths):
            name = path.resolve().name.removesuffix(".zarr")
            if name in self._paths:
                raise InputError(f"two runs are called {name!r}: {self._paths[name]} and {path}; rename one of them")
            self._paths[name] = path
        self._studies: dict[tuple[str, str], tuple[str, dict[str, xr.Dataset]]] = {}
        self._lock = threading.Lock()
        for name in self.names:
            self.run(name)  # a path that is no run is refused before anything is served

    @property
    def names(self) -> list[str]:
        """In the order of the command line."""
        return list(self._paths)

    def run(self, name: str) -> Run:
        """The run as it is now: one still being written grows between two calls."""
        return open_run(self._paths[name])

    def study(self, study: str, name: str) -> dict[str, xr.Dataset]:
        """A study's datasets for the run as it is now; sessions that ask at the same time wait for one computation."""
        run = self.run(name)
        with self._lock:
            digest, found = self._studies.get((study, name), ("", {}))
            if digest != run.digest:
                found = run_study(study, run)
                self._studies[study, name] = (run.digest, found)
            return found
