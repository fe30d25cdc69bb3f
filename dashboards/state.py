"""What a dashboard shows and what is chosen in it, without a widget: the shelf of runs and a selection.

Run paths come from the command line only; a browser can choose among the names on the shelf, nothing else.
"""

import importlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import xarray as xr

from workbench.errors import InputError
from workbench.runs import Run, open_run
from workbench.runs.place import Folder, place
from workbench.studies import effort, run_study
from workbench.studies.design import EFFORTS


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
        self._paths: dict[str, str | Path] = {}
        for path in paths:
            where = place(path)
            last = where.path.resolve().name if isinstance(where, Folder) else str(where).rsplit("/", 1)[-1]
            name = last.removesuffix(".zarr")
            if name in self._paths:
                raise InputError(f"two runs are called {name!r}: {self._paths[name]} and {path}; rename one of them")
            self._paths[name] = path
        self._studies: dict[tuple[str, ...], tuple[str, Any]] = {}
        self._lock, self._locks = threading.Lock(), dict[tuple[str, ...], threading.Lock]()
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
        """A study's datasets for the run as it is now."""
        run = self.run(name)
        found: dict[str, xr.Dataset] = self._once((study, name), run.digest, lambda: run_study(study, run))
        return found

    def costs(self, name: str) -> dict[str, xr.Dataset]:
        """What effort costs and brings, from the tables alone: quick, however long the run."""
        run = self.run(name)

        def make() -> dict[str, xr.Dataset]:
            table = effort.sequences_of(run)
            known = [e for e in EFFORTS if e in set(table["effort"])]
            if len(known) < 2:
                return {}
            return {"cost": effort.cost(run, table, known), "gain": effort.gain(run, table, known)}

        found: dict[str, xr.Dataset] = self._once(("costs", name), run.digest, make)
        return found

    def comparison(self, name: str, other: str) -> dict[str, xr.Dataset]:
        """Two runs compared as they are now."""
        a, b = self.run(name), self.run(other)
        found: dict[str, xr.Dataset] = self._once(
            ("compare", name, other), a.digest + b.digest, lambda: run_study("compare", a, b)
        )
        return found

    def gallery(self, study: str, name: str) -> tuple[dict[str, go.Figure], dict[str, pd.DataFrame]]:
        """A study's figures and the numbers behind each."""
        datasets, digest = self.study(study, name), self.run(name).digest
        module = importlib.import_module(f"workbench.figures.{study}")
        found: tuple[dict[str, go.Figure], dict[str, pd.DataFrame]] = self._once(
            ("gallery", study, name), digest, lambda: module.gallery(datasets)
        )
        return found

    def _once(self, key: tuple[str, ...], digest: str, make: Callable[[], Any]) -> Any:
        """What was made for this state of the runs; sessions that ask at the same time wait for one computation."""
        with self._lock:
            own = self._locks.setdefault(key, threading.Lock())
        with own:
            known, found = self._studies.get(key, ("", None))
            if known != digest:
                found = make()
                self._studies[key] = (digest, found)
            return found
