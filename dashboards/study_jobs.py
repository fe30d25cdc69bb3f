"""Run the studies of a dashboard in processes of their own, and cache their results by run, code and options.

A study of ten million tokens takes minutes and a gigabyte of memory, so the server does not compute it itself. A result
is stored as the files that `workbench study --out` writes, under the digest of the run and that of the code, and a
second session or a second server reads it from there.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache, cached_property, partial
from pathlib import Path
from typing import NamedTuple

import xarray as xr

import workbench
from workbench import registry
from workbench.bounded_json import parse_json, read_json
from workbench.child_processes import python
from workbench.errors import InputError
from workbench.runs import attention_file
from workbench.studies.result import load, save

_AT_ONCE = 2  # studies made at the same time; each takes a core
_CACHED_DAYS = 30
_IN_MEMORY = 64  # results; others are read again from their files, which takes less than a second
# pairs of experts are many (at 120b a hundred megabytes as text) and come from sums at once
_NOT_CACHED = ("together",)


class Answer(NamedTuple):
    """The state of a study: its datasets, the reason why there are none, or the seconds since it was started."""

    datasets: dict[str, xr.Dataset] | None = None
    reason: str = ""
    seconds: float = 0.0


class StudyJobs:
    """Studies that run in processes of their own. Ask again for a study to learn whether it is finished."""

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self._folder = Path(folder) if folder is not None else cache_folder()
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="study")
        self._made: dict[tuple[str, str], tuple[float, Future[dict[str, xr.Dataset]]]] = {}
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()

    def ask(
        self,
        study: str,
        paths: Sequence[str],
        digest: str,
        *,
        exclude: str = "",
        lasting: bool = True,
        options: Mapping[str, int] | None = None,
    ) -> Answer:
        """Return the state of the study of the run(s) at these paths, and start it if needed.

        digest: of the runs, without the excluded sequences. exclude: flags of sequences to leave out. lasting: whether
        the runs are complete. options: of the study, numbers only: they are part of the name of the cached result.
        """
        name = "-".join([study, *(f"{option}-{int(value)}" for option, value in sorted((options or {}).items()))])
        make = partial(self._get, study, name, paths, digest, exclude, lasting, dict(options or {}))
        return self._state((name, digest), make)

    def read_stored(self, study: str, paths: Sequence[str], digest: str) -> None:
        """Read the result of the study of the complete run(s) if it is stored, so that no visitor waits for it."""
        if (self._folder / f"{digest}-{_code()}" / study).exists():
            self.ask(study, paths, digest)

    def attention(self, path: str, digest: str, model: str, sequence: int, layers: str) -> Answer:
        """Return the state of the attention patterns of a sequence, and start `workbench attention` if needed.

        The run's own digest and the model's are compared by that command. layers: as in its option; "" for all.
        """
        name = f"attention-{hashlib.sha256(model.encode()).hexdigest()[:8]}-{sequence}-{layers or 'all'}.npz"
        return self._state((name, digest), partial(self._attention, path, digest, model, sequence, layers, name))

    def graph_ablation(self, graph: Path, model: str, nodes: Sequence[str], saes: Sequence[Path] = ()) -> Answer:
        """Return the state of ablations of a graph's nodes, and start `workbench graph-ablation` if needed.

        The dataset `ablation` has `measured` [node], and the attribute `together`, in logits. saes: folders of the
        autoencoders of nodes that are features.
        """
        digest = hashlib.sha256(graph.read_bytes()).hexdigest()[:32]
        words = [model, *nodes, *map(str, saes)]
        asked = hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]
        name = f"graph-ablation-{asked}.json"
        make = partial(self._graph_ablation, graph, digest, model, list(nodes), list(saes), name)
        return self._state((name, digest), make)

    def feature_ablation(self, path: str, digest: str, model: str, folder: Path, feature: int) -> Answer:
        """Return the state of the ablation of a feature, and start `workbench feature-ablation` if needed.

        The dataset `ablation` is that of `workbench.experiments.feature_ablation.measure`. digest: of the run. folder:
        of the autoencoder, whose digest is compared by that command.
        """
        asked = hashlib.sha256("\n".join([model, str(folder)]).encode()).hexdigest()[:16]
        name = f"feature-ablation-{asked}-{feature}"
        return self._state((name, digest), partial(self._feature_ablation, path, digest, model, folder, feature, name))

    def _state(self, key: tuple[str, str], make: Callable[[], dict[str, xr.Dataset]]) -> Answer:
        """Return the state of a piece of work, and start it if needed."""
        with self._lock:
            known = self._made.pop(key, None)  # and put at the end again
            started, work = (time.monotonic(), self._pool.submit(make)) if known is None else known
            self._made[key] = started, work
            finished = [other for other, (_, result) in self._made.items() if result.done()]
            for oldest in finished[: max(0, len(self._made) - _IN_MEMORY)]:
                del self._made[oldest]
        if not work.done():
            return Answer(seconds=time.monotonic() - started)
        error = work.exception()
        if error is None:
            return Answer(work.result())
        with self._lock:
            if not isinstance(error, InputError) and self._made.get(key) == (started, work):
                del self._made[key]  # the next request tries again
        return Answer(reason=str(error) or type(error).__name__)

    @cached_property
    def _temporary(self) -> "tempfile.TemporaryDirectory[str]":
        """Return the folder for studies of runs in progress: made when it is needed, removed when the process ends."""
        return tempfile.TemporaryDirectory(prefix="workbench-studies-", ignore_cleanup_errors=True)

    def close(self) -> None:
        """End the running job."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in list(self._running):
            process.kill()
        if "_temporary" in self.__dict__:
            self._temporary.cleanup()

    def _get(
        self,
        study: str,
        name: str,
        paths: Sequence[str],
        digest: str,
        exclude: str,
        lasting: bool,
        options: dict[str, int],
    ) -> dict[str, xr.Dataset]:
        folder = self._folder if lasting else Path(self._temporary.name)
        cached = folder / f"{digest}-{_code()}" / name
        if not cached.exists():
            self._make(study, paths, exclude, cached, options)
        os.utime(cached.parent)
        return load(cached)[study]

    def _make(self, study: str, paths: Sequence[str], exclude: str, cached: Path, options: dict[str, int]) -> None:
        """Let a process write the results into a temporary folder, which it renames when it is complete.

        It needs no server for that: a study goes on if this one is killed, and the next one has its result.
        """
        cached.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=cached.parent, ignore_cleanup_errors=True) as made:
            values = json.dumps(options)
            self._run("-m", "workbench.dashboards.study_jobs", study, made, str(cached), exclude, values, *paths)

    def _run(self, *arguments: str) -> None:
        """Run Python with these arguments in a process of its own.

        Raises:
            InputError: the process refused its input.
        """
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        process = subprocess.Popen(
            python(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
        )
        self._running.add(process)
        _, messages = process.communicate()
        self._running.discard(process)
        if process.returncode == 2:
            raise InputError(messages.strip().splitlines()[-1].removeprefix("workbench: "))
        if process.returncode:
            print(messages, file=sys.stderr)
            raise RuntimeError(f"the process ended with {process.returncode}; the server's log has the details")

    def _cached(self, digest: str, name: str, command: Callable[[str], Sequence[str]]) -> Path:
        """Return the result of this name of a run or graph, which a command of `workbench` makes if it is not there.

        command: returns the words of the command that writes the result to a path.
        """
        cached = self._folder / f"{digest}-{_code()}" / name
        if not cached.exists():
            cached.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(dir=cached.parent, ignore_cleanup_errors=True) as made:
                out = f"{made}/{name}"
                self._run("-m", "workbench.cli", *command(out))
                try:
                    os.replace(out, cached)
                except OSError:
                    if not cached.exists():  # another server may have made it
                        raise
        os.utime(cached.parent)
        return cached

    def _attention(
        self, path: str, digest: str, model: str, sequence: int, layers: str, name: str
    ) -> dict[str, xr.Dataset]:
        chosen = ["--layers", layers] if layers else []

        def command(out: str) -> list[str]:
            return ["attention", "--model", model, "--out", out, *chosen, "--", path, str(sequence)]

        return {"attention": attention_file.read(self._cached(digest, name, command))}

    def _graph_ablation(
        self, graph: Path, digest: str, model: str, nodes: list[str], saes: list[Path], name: str
    ) -> dict[str, xr.Dataset]:
        chosen = [word for node in nodes for word in ("--node", node)]
        chosen += [word for folder in saes for word in ("--sae", str(folder))]

        def command(out: str) -> list[str]:
            return ["graph-ablation", "--model", model, "--out", out, *chosen, "--", str(graph)]

        info = read_json(self._cached(digest, name, command))["metadata"]["info"]
        values = [info["measured"][node] for node in nodes]
        together = float(info["measured_together"]["value"])
        return {"ablation": xr.Dataset({"measured": ("node", values)}, {"node": nodes}, {"together": together})}

    def _feature_ablation(
        self, path: str, digest: str, model: str, folder: Path, feature: int, name: str
    ) -> dict[str, xr.Dataset]:
        def command(out: str) -> list[str]:
            options = ["--model", model, "--sae", str(folder), "--out", out]
            return ["feature-ablation", *options, "--", path, str(feature)]

        return load(self._cached(digest, name, command))["feature-ablation"]


def cache_folder() -> Path:
    """Return `gpt-oss-workbench/studies` in the user's cache; remove results that were not used for a month."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt-oss-workbench" / "studies"
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="workbench-studies-"))
    for entry in root.iterdir():
        with suppress(OSError):  # another server may have removed it
            if time.time() - entry.stat().st_mtime > _CACHED_DAYS * 86400:
                shutil.rmtree(entry, ignore_errors=True)
    return root


@cache
def _code() -> str:
    """Return the digest of the code that makes studies: another version's results are not taken for ours."""
    sha = hashlib.sha256()
    package = Path(workbench.__file__).parent
    specs = [importlib.util.find_spec(record.module) for record in registry.studies()]  # other packages' too
    others = {Path(spec.origin) for spec in specs if spec is not None and spec.origin is not None}
    for path in sorted({*(package / "studies").glob("*.py"), *(package / "runs").glob("*.py"), *others}):
        sha.update(path.read_bytes())
    return sha.hexdigest()[:12]


def _main() -> None:
    from workbench.runs import open_run
    from workbench.studies import run_study

    study, made, cached, exclude, options, *paths = sys.argv[1:]
    os.nice(10)  # the server and the browser that waits come first
    try:
        results = run_study(study, *(open_run(path, exclude=exclude) for path in paths), **parse_json(options))
        save({name: ds for name, ds in results.items() if name not in _NOT_CACHED}, f"{made}/out")
        try:
            os.rename(f"{made}/out", cached)
        except OSError:
            if not os.path.exists(cached):  # another server may have made it
                raise
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    _main()
