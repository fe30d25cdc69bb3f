"""The runs of a dashboard and the selection, without widgets.

The paths of runs come from the command line only; a browser selects among their names.
"""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pandas as pd
import xarray as xr

from workbench.dashboards.stored_results import StoredResults, stored_beside
from workbench.dashboards.study_jobs import Answer, StudyJobs
from workbench.errors import InputError
from workbench.harmony.messages import EFFORTS
from workbench.registry import studies
from workbench.runs import Run, open_run
from workbench.runs.storage import LocalStorage, storage_at
from workbench.studies import effort, expert_labels, feature_labels
from workbench.studies.specialization import coactivation

_LARGE = 1_000_000  # tokens


class Selection:
    """The selected values by name. They are the query string of every page, so a link opens the same view again.

    A page uses its own names and passes the others on to the next page.
    """

    NAMES = (
        "run",
        "with",
        "channel",
        "effort",
        "task",
        "layer",
        "expert",
        "head",
        "measure",
        "figure",
        "order",
        "find",
        "kind",
        "sequence",
        "theme",
        "exclude",
        "colour",
        "position",
        "pin",
        "experiment",
        "graph",
        "threshold",
        "edges",
        "ablated",
        "pins",
        "groups",
        "labels",
        "subgraph",
        "node",
        "token",
        "neuron",
        "feature",
        "quantity",
        "words",
    )

    def __init__(self, query: Mapping[str, str]) -> None:
        self._chosen = {name: query[name] for name in self.NAMES if query.get(name)}

    def get(self, name: str, known: Sequence[str], default: str | None = None) -> str:
        """Return the selected value if it is known, else the default, else the first known value, else ""."""
        asked = (self._chosen.get(name), default)
        return next((value for value in asked if value is not None and value in known), next(iter(known), ""))

    def text(self, name: str) -> str:
        """Return the selected value as it is."""
        return self._chosen.get(name, "")

    def put(self, **chosen: str) -> None:
        """Change the selection; an empty text removes a value."""
        assert set(chosen) <= set(self.NAMES)
        self._chosen = {n: v for n, v in (self._chosen | chosen).items() if v}

    @property
    def values(self) -> dict[str, str]:
        """Return the selected values by name."""
        return dict(self._chosen)

    def query(self, **other: str) -> str:
        """Return the query string for a link, with some values replaced."""
        return urlencode({n: v for n, v in (self._chosen | other).items() if v}, errors="replace")


class RunRegistry:
    """The runs that a dashboard was started with, and results computed once for each state of a run.

    editable: labels of experts can be changed. model: from which attention patterns are computed on request; nano is
    always at hand. autoencoders: their folders by the digest that a capture records.

    Raises:
        InputError: no run is named, or two runs have the same name.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        cache: Path | None = None,
        model: str = "",
        autoencoders: Mapping[str, Path] | None = None,
        editable: bool = True,
    ) -> None:
        if not paths:
            raise InputError("no run was given: give at least one, as in `workbench dashboard RUN.zarr`")
        self._paths: dict[str, str | Path] = {}
        self._model, self.editable, self._autoencoders = model, editable, dict(autoencoders or {})
        for path in paths:
            storage = storage_at(path)
            last = (
                Path(os.path.realpath(storage.path)).name
                if isinstance(storage, LocalStorage)
                else str(storage).rsplit("/", 1)[-1]
            )
            name = last.removesuffix(".zarr")
            if name in self._paths:
                raise InputError(f"two runs have the name {name!r}: {self._paths[name]} and {path}; rename one of them")
            self._paths[name] = path
        self._runs: dict[tuple[str, str], tuple[bytes, Run]] = {}
        self._made: dict[tuple[str, ...], tuple[str, Any]] = {}
        self._lock, self._locks = threading.Lock(), dict[tuple[str, ...], threading.Lock]()
        for name in self.names:
            self.run(name)  # a path that is not a run is refused before anything is served
        self.jobs = StudyJobs(cache)

    @property
    def names(self) -> list[str]:
        """Return the names of the runs in the order of the command line."""
        return list(self._paths)

    def run(self, name: str, exclude: str = "") -> Run:
        """Return the run in its current state. A run in progress is opened again; a complete one is opened once.

        exclude: flags of sequences to leave out, as in `Run.excluding`.
        """
        storage = storage_at(self._paths[name])
        if (name, exclude) in self._runs:
            root, run = self._runs[name, exclude]
            if storage.exists("zarr.json") and storage.read("zarr.json") == root:
                return run
        run = open_run(self._paths[name], exclude=exclude)
        if run.status == "complete":
            self._runs[name, exclude] = (storage.read("zarr.json"), run)
        return run

    def stored(self, name: str) -> StoredResults:
        """Return the results that are stored beside a run; none beside a run in an object store."""
        storage = storage_at(self._paths[name])
        if not isinstance(storage, LocalStorage):
            return StoredResults()
        return stored_beside(storage.path, self.run(name).digest)

    def study(
        self, study: str, *names: str, exclude: str = "", options: Mapping[str, int] | None = None
    ) -> Callable[[], Answer]:
        """Return a function that asks for a study of the run(s) in their current state, without waiting for it.

        A run in progress is not studied again after every unit: open the page again for the newer state.
        """
        runs = [self.run(name, exclude) for name in names]
        paths = [str(self._paths[name]) for name in names]
        lasting = all(run.status == "complete" for run in runs)
        digest = "-".join(run.content_digest for run in runs)
        more = {"options": options} if options else {}
        return partial(self.jobs.ask, study, paths, digest, exclude=exclude, lasting=lasting, **more)

    def read_stored_studies(self, name: str) -> None:
        """Read the results of the studies of a complete run that are stored."""
        run = self.run(name)
        for record in studies(runs=1):
            self.jobs.read_stored(record.name, [str(self._paths[name])], run.content_digest)

    @property
    def served_model(self) -> str:
        """Return the model that the dashboard was started with, which the page Live runs, or ""."""
        return self._model

    def model(self, name: str) -> str:
        """Return the model that can be loaded for a run, or "" if none is known; its digest is not compared yet."""
        return self._model or ("nano" if self.run(name).checkpoint["name"] == "nano" else "")

    def attention(self, name: str, sequence: int, layers: str = "") -> Callable[[], Answer]:
        """Return a function that asks for the attention patterns of a sequence, without waiting for them."""
        run = self.run(name)
        path = str(self._paths[name])
        return partial(self.jobs.attention, path, run.content_digest, self.model(name), sequence, layers)

    def graph_ablation(
        self, name: str, graph: Path, nodes: Sequence[str], *, features: bool = False
    ) -> Callable[[], Answer]:
        """Return a function that asks for the measured effects of ablating nodes of a graph beside a run.

        features: whether some of them are features, for which the autoencoders are needed.
        """
        saes = self.autoencoders if features else []
        return partial(self.jobs.graph_ablation, graph, self.model(name), list(nodes), saes)

    @property
    def autoencoders(self) -> list[Path]:
        """Return the folders of the autoencoders that the dashboard was started with."""
        return list(self._autoencoders.values())

    def autoencoder(self, name: str, hook: str) -> Path | None:
        """Return the folder of the autoencoder whose features a run recorded at a hook point, if it was given."""
        known = {lists.hook: lists.digest for lists in self.run(name).spec.features}
        return self._autoencoders.get(known.get(hook, ""))

    def feature_ablation(self, name: str, folder: Path, feature: int) -> Callable[[], Answer]:
        """Return a function that asks for the effects of ablating a feature of the autoencoder in a folder."""
        run, path = self.run(name), str(self._paths[name])
        return partial(self.jobs.feature_ablation, path, run.content_digest, self.model(name), folder, feature)

    def automatic_feature_labels(self, name: str, quantity: str, index: int, exclude: str = "") -> list[str]:
        """Return the automatic label of each feature of a recorded quantity, see `feature_labels.automatic`."""
        run = self.run(name, exclude)
        key = ("feature-labels", name, exclude, quantity, str(index))
        labels: list[str] = self._once(key, run.content_digest, lambda: feature_labels.automatic(run, quantity, index))
        return labels

    def put_feature_label(self, name: str, quantity: str, layer: int, feature: int, label: str) -> Path:
        """Write the label of a feature into the file beside the run, and return its path.

        Raises:
            InputError: labels cannot be changed here, or the file of labels is damaged.
        """
        self._check_editable()
        with self._lock:
            return feature_labels.put(self.run(name), quantity, layer, feature, label)

    def put_label(self, name: str, examples: xr.Dataset, layer: int, expert: int, label: str) -> Path:
        """Write the label of an expert into the file beside the run, and return its path.

        examples: from which the labels of all experts are made if there is no file yet.

        Raises:
            InputError: labels cannot be changed here, or the file of labels is damaged.
        """
        self._check_editable()
        with self._lock:  # two sessions do not lose each other's labels
            run = self.run(name)
            labels = expert_labels.read(run)
            rows = expert_labels.automatic(examples) if labels is None else labels
            own = (rows["layer"] == layer) & (rows["expert"] == expert)
            if not own.any():
                added = expert_labels.automatic(examples)
                rows = pd.concat([rows, added[(added["layer"] == layer) & (added["expert"] == expert)]])
                own = (rows["layer"] == layer) & (rows["expert"] == expert)
            rows.loc[own, "label"] = label
            return expert_labels.write(run, rows)

    def _check_editable(self) -> None:
        if not self.editable:
            raise InputError(
                "labels cannot be changed here: the dashboard can be reached from other machines; "
                "start it on 127.0.0.1 to edit labels"
            )

    def costs(self, name: str, exclude: str = "") -> dict[str, xr.Dataset]:
        """Return accuracy and reasoning length by effort from the tables alone; empty with fewer than two efforts."""
        run = self.run(name, exclude)

        def make() -> dict[str, xr.Dataset]:
            table, known = effort.sequences_of(run), self.efforts(name, exclude)
            if len(known) < 2:
                return {}
            return {"cost": effort.cost(run, table, known), "gain": effort.gain(run, table, known)}

        results: dict[str, xr.Dataset] = self._once(("costs", name, exclude), run.content_digest, make)
        return results

    def ask_costs(self, name: str, exclude: str = "") -> Callable[[], Answer]:
        """Return a function that asks for `costs`: of a large run those of its effort study, which is not waited for.

        They need every prompt of the run, which takes long where there are millions of tokens.
        """
        if self.is_large(name):
            return self.study("effort", name, exclude=exclude)
        return lambda: Answer(self.costs(name, exclude))

    def efforts(self, name: str, exclude: str = "") -> list[str]:
        """Return the reasoning efforts of a run's sequences."""
        known = set(self.run(name, exclude).sequences["effort"])
        return [effort for effort in EFFORTS if effort in known]

    def is_large(self, name: str) -> bool:
        """Return whether a pass over the tokens of a run is too long to wait for."""
        return int(self.run(name).sequences["length"].sum()) > _LARGE

    def pairs(self, name: str, exclude: str = "") -> xr.Dataset | None:
        """Return co-activation and transitions from sums, or None if the run has none."""
        run = self.run(name, exclude)
        if not {"coactivation", "transition"} <= set(run.summaries):
            return None
        pairs: xr.Dataset = self._once(("pairs", name, exclude), run.content_digest, lambda: coactivation(run))
        return pairs

    def _once(self, key: tuple[str, ...], digest: str, make: Callable[[], Any]) -> Any:
        """Return a result for this state of the runs; concurrent sessions wait for one computation."""
        with self._lock:
            own = self._locks.setdefault(key, threading.Lock())
        with own:
            known, result = self._made.get(key, ("", None))
            if known != digest:
                result = make()
                self._made[key] = (digest, result)
            return result
