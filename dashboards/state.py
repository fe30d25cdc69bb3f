"""What a dashboard shows and what is chosen in it, without a widget: the registry of runs and a choice.

Run paths come from the command line only; a browser can choose among the names on the registry, nothing else.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import xarray as xr

from workbench.dashboards.study_jobs import Answer, Desk
from workbench.errors import InputError
from workbench.runs import Run, open_run
from workbench.runs.storage import LocalStorage, place
from workbench.studies import effort
from workbench.studies.comparison import EFFORTS
from workbench.studies.specialization import together


class Selection:
    """What is chosen, by name; it is the query string of every page, so that a link reopens the view.

    A page uses the names that it knows and hands the others on to the next page.
    """

    NAMES = (
        "run", "with", "channel", "effort", "task", "layer", "expert", "head", "measure", "figure", "order", "find", "sequence",
        "theme",
    )  # fmt: skip

    def __init__(self, query: Mapping[str, str]) -> None:
        self._chosen = {name: query[name] for name in self.NAMES if query.get(name)}

    def get(self, name: str, known: Sequence[str], default: str | None = None) -> str:
        """What was chosen if it is known, else the default, else the first that is known ("" if nothing is)."""
        asked = (self._chosen.get(name), default)
        return next((value for value in asked if value is not None and value in known), next(iter(known), ""))

    def text(self, name: str) -> str:
        """What was chosen, as it is."""
        return self._chosen.get(name, "")

    def put(self, **chosen: str) -> None:
        """Choose; an empty text takes back."""
        assert set(chosen) <= set(self.NAMES)
        self._chosen = {n: v for n, v in (self._chosen | chosen).items() if v}

    def query(self, **other: str) -> str:
        """For a link, with some of it otherwise."""
        return urlencode({n: v for n, v in (self._chosen | other).items() if v})


class RunRegistry:
    """The runs a dashboard was started with, and what was computed of them, once for each state of a run."""

    def __init__(self, paths: Sequence[str | Path], *, cache: Path | None = None) -> None:
        if not paths:
            raise InputError("name at least one run to show: workbench dashboard RUN.zarr")
        self._paths: dict[str, str | Path] = {}
        for path in paths:
            where = place(path)
            last = where.path.resolve().name if isinstance(where, LocalStorage) else str(where).rsplit("/", 1)[-1]
            name = last.removesuffix(".zarr")
            if name in self._paths:
                raise InputError(f"two runs are called {name!r}: {self._paths[name]} and {path}; rename one of them")
            self._paths[name] = path
        self._runs: dict[str, tuple[bytes, Run]] = {}
        self._made: dict[tuple[str, ...], tuple[str, Any]] = {}
        self._lock, self._locks = threading.Lock(), dict[tuple[str, ...], threading.Lock]()
        for name in self.names:
            self.run(name)  # a path that is no run is refused before anything is served
        self.desk = Desk(cache)

    @property
    def names(self) -> list[str]:
        """In the order of the command line."""
        return list(self._paths)

    def run(self, name: str) -> Run:
        """The run as it is now: one still being written grows between two calls; a finished one is opened once."""
        where = place(self._paths[name])
        if name in self._runs:
            root, run = self._runs[name]
            if where.exists("zarr.json") and where.read("zarr.json") == root:
                return run
        run = open_run(self._paths[name])
        if run.status == "complete":
            self._runs[name] = (where.read("zarr.json"), run)
        return run

    def study(self, study: str, *names: str) -> Callable[[], Answer]:
        """How to ask for a study of the run(s) as they are now; no answer waits.

        A run that still grows is not asked about anew with every unit: whoever wants the newer state asks for that.
        """
        runs = [self.run(name) for name in names]
        paths = [str(self._paths[name]) for name in names]
        lasting = all(run.status == "complete" for run in runs)
        return partial(self.desk.ask, study, paths, "-".join(run.digest for run in runs), lasting=lasting)

    def costs(self, name: str) -> dict[str, xr.Dataset]:
        """What effort costs and brings, from the tables alone; empty with fewer than two efforts."""
        run = self.run(name)

        def make() -> dict[str, xr.Dataset]:
            table = effort.sequences_of(run)
            known = [e for e in EFFORTS if e in set(table["effort"])]
            if len(known) < 2:
                return {}
            return {"cost": effort.cost(run, table, known), "gain": effort.gain(run, table, known)}

        found: dict[str, xr.Dataset] = self._once(("costs", name), run.digest, make)
        return found

    def pairs(self, name: str) -> xr.Dataset | None:
        """Co-activation and transitions, from sums alone; None where the run keeps none."""
        run = self.run(name)
        if not {"coactivation", "transition"} <= set(run.summaries):
            return None
        found: xr.Dataset = self._once(("pairs", name), run.digest, lambda: together(run))
        return found

    def _once(self, key: tuple[str, ...], digest: str, make: Callable[[], Any]) -> Any:
        """What was made for this state of the runs; sessions that ask at the same time wait for one computation."""
        with self._lock:
            own = self._locks.setdefault(key, threading.Lock())
        with own:
            known, found = self._made.get(key, ("", None))
            if known != digest:
                found = make()
                self._made[key] = (digest, found)
            return found
