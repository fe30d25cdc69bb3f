"""The registry of studies and experiments, which is read without importing them.

A study (of finished runs) or an experiment (a model on the sequences of a run) is one module that holds one record:

    STUDY = Study(name="routing", title="Routing", question="Which experts process which tokens?")

    def study(run, *, seed=0) -> dict[str, xarray.Dataset]: ...

or `EXPERIMENT = Experiment(...)` with `experiment(model, rows, *, seed)`. The command line and its help, the report,
paper figures, dashboard pages, tables of the documentation, `wb.studies` and `wb.figures` read these records.

Records contain literals only and are read from the source code of their modules, so that listing them imports no torch
and runs no code of a study. Modules of other packages are found through the entry point group `workbench.studies`.
"""

import ast
import importlib
import importlib.abc
import importlib.util
import inspect
import pkgutil
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from workbench.errors import InputError

GROUP = "workbench.studies"  # the entry point group of studies and experiments in other packages
_PACKAGES = ("workbench.studies", "workbench.experiments")
# what records a quantity, where it is not `--record` with its name
_REMEDIES = {
    "host_routing": "--routing host",
    "activations": "--record resid_post",
    "neurons": "--record routing --record neurons",
    "features": "--record features:FOLDER",
}
_LARGEST = 10**9  # of an option: a count that no machine could hold
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")  # a name becomes part of file names and of addresses


@dataclass(frozen=True)
class Record:
    """The fields that the records of studies and experiments share.

    requires: recorded quantities that a run must have, each perhaps with alternatives ("sinks or sink_sums").
    options: keyword options of the function beside `seed`, each with its help text.
    figures: the module whose `gallery(datasets)` draws the results; empty for figures drawn from the dataset's axes.
    aliases: other names the command line accepts, hidden from its help.

    Raises:
        InputError: a name or the question does not have the required form.
    """

    name: str
    title: str
    question: str
    requires: tuple[str, ...] = ()
    compute: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    figures: str = ""
    aliases: tuple[str, ...] = ()
    order: int = 100  # in lists: small numbers first, then by name
    module: str = ""  # where it is; filled in by the registry

    def __post_init__(self) -> None:
        for name in (self.name, *self.aliases):
            if not _NAME.fullmatch(name):
                raise InputError(f"{name!r} cannot be a name: use lower-case letters, digits and single hyphens")
        if not self.title or not self.question.endswith("?"):
            raise InputError(f"the record {self.name!r} needs a title, and a question that ends in a question mark")

    @property
    def attribute(self) -> str:
        """Return the name as an attribute of `wb.studies` and `wb.figures`."""
        return self.name.replace("-", "_")

    def load(self) -> ModuleType:
        """Import the module of the study or experiment."""
        return importlib.import_module(self.module)

    def load_figures(self) -> ModuleType:
        """Import the module whose `gallery` draws the results."""
        return importlib.import_module(self.figures or "workbench.figures.default")

    def checked_options(self, function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options for the function of the study or experiment; numbers become floats or text where needed.

        Raises:
            InputError: it has no option of this name, or the value has another type than the option's default or is
                absurdly large.
        """
        known, checked = inspect.signature(function).parameters, {}
        for name, value in options.items():
            if name not in known or known[name].kind is not inspect.Parameter.KEYWORD_ONLY:
                raise InputError(f"{self.name} has no option {name!r}; it has {', '.join(('seed', *self.options))}")
            wanted = type(known[name].default)
            checked[name] = float(value) if wanted is float and type(value) is int else value
            if wanted is str and type(value) in (int, float):  # doses=1 on the command line is read as a number
                checked[name] = f"{value:g}"
            if isinstance(value, int) and abs(value) > _LARGEST:
                raise InputError(f"{self.name}: option {name}={value!r}: expected a number of at most {_LARGEST:,}")
            if known[name].default is not None and not isinstance(checked[name], wanted):
                raise InputError(f"{self.name}: option {name}={value!r}: expected a value of type {wanted.__name__}")
        return checked

    def check_recorded(self, run: Any) -> None:
        """Check that the run recorded what is needed.

        Raises:
            InputError: a required quantity was not recorded.
        """
        recorded: list[str] | None = getattr(run, "recorded", None)
        if recorded is None:  # runs in memory, as of workbench.studies.synthetic, do not list it
            return
        for needed in self.requires:
            choices = needed.split(" or ")
            has_activation = "activations" in choices and any(name.startswith("hook_") for name in recorded)
            if not has_activation and not set(choices) & set(recorded):
                remedy = _REMEDIES.get(choices[0], f"--record {choices[0]}")
                raise InputError(
                    f"{self.name} needs a run that recorded {needed}, and {getattr(run, 'path', 'this one')} recorded "
                    f"{', '.join(recorded)}: capture again with {remedy}"
                )


@dataclass(frozen=True)
class Study(Record):
    """A study: `study(run, …)` returns labelled datasets, from one run or, with runs=2, from two.

    page: the dashboard page that shows it, by default one of its own; the first study of a page gives it its title.
    main_figures: names of figures for the main text of a paper; the others belong to the supplement.
    """

    runs: int = 1
    page: str = ""
    main_figures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Work:
    """What an experiment computes with its default options: passes over its sequences, and tokens that it generates.

    layer_passes, width_passes: passes without and with gradients, times the number of layers and the width of the
    model. new_tokens: whatever the number of sequences is; sequence_new_tokens: of each sequence.
    """

    passes: float = 0
    layer_passes: float = 0
    gradient_passes: float = 0
    width_passes: float = 0
    new_tokens: float = 0
    sequence_new_tokens: float = 0


@dataclass(frozen=True)
class Experiment(Record):
    """An experiment: `experiment(model, rows, *, seed)` returns labelled datasets.

    host: whether the model may be one at an OpenAI-compatible host. cost: the fields of `Work`, by name.
    """

    figures: str = "workbench.figures.experiments"
    host: bool = False
    cost: Mapping[str, float] = field(default_factory=dict)

    @property
    def work(self) -> Work | None:
        """Return what it computes, or None if the record does not say."""
        return Work(**self.cost) if self.cost else None


_KINDS = {"Study": Study, "Experiment": Experiment}


def record_in(source: str, module: str) -> Record | None:
    """Return the record that a module's source code assigns at its top level, or None.

    Raises:
        InputError: the record contains something that is not a literal, or an unknown field.
    """
    if not any(f"= {kind}(" in source for kind in _KINDS):
        return None
    for node in ast.parse(source).body:
        value = node.value if isinstance(node, ast.Assign) else None
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in _KINDS:
            try:
                fields = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in value.keywords}
                return replace(_KINDS[value.func.id](**fields), module=module)
            except (TypeError, ValueError) as error:
                raise InputError(
                    f"the record of {module} cannot be read: {error}; only literals are allowed"
                ) from error
    return None


def _read(module: str) -> Record | None:
    spec = importlib.util.find_spec(module)
    source = spec.loader.get_source(module) if spec and isinstance(spec.loader, importlib.abc.InspectLoader) else None
    return record_in(source or "", module)


def _built_in() -> Iterator[Record]:
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        for info in pkgutil.iter_modules(spec.submodule_search_locations if spec else None):
            record = _read(f"{package}.{info.name}")
            if record is not None:
                yield record


def _installed(taken: set[str]) -> Iterator[Record]:
    """Records of other packages; what is wrong with one is a warning, so that it does not block the others."""
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.value):
        try:
            record = _read(point.value)
        except (ImportError, SyntaxError, InputError) as error:
            warnings.warn(f"skipped the study {point.name!r} of {point.value}: {error}", stacklevel=2)
            continue
        if record is None:
            warnings.warn(f"skipped the study {point.name!r}: no record in {point.value}", stacklevel=2)
        elif names := taken & {record.name, *record.aliases}:
            warnings.warn(f"skipped {point.value}: the name {min(names)!r} is taken", stacklevel=2)
        else:
            taken |= {record.name, *record.aliases}
            yield record


@cache
def records() -> tuple[Record, ...]:
    """Return all records, in the order of lists; `records.cache_clear()` after installing a package."""
    built_in = list(_built_in())
    taken = {name for record in built_in for name in (record.name, *record.aliases)}
    return tuple(sorted([*built_in, *_installed(taken)], key=lambda record: (record.order, record.name)))


def studies(runs: int | None = None) -> tuple[Study, ...]:
    """Return the studies; runs: only those of this many runs."""
    return tuple(r for r in records() if isinstance(r, Study) and runs in (None, r.runs))


def experiments() -> tuple[Experiment, ...]:
    """Return the experiments."""
    return tuple(r for r in records() if isinstance(r, Experiment))


def find(name: str) -> Record:
    """Return the record with this name or alias.

    Raises:
        InputError: there is none.
    """
    for record in records():
        if name in (record.name, *record.aliases):
            return record
    known = ", ".join(record.name for record in records())
    raise InputError(f"study or experiment {name!r} does not exist; choose from {known}")


def attributes() -> dict[str, Record]:
    """Return the records by the name they have as attributes of `wb.studies` and `wb.figures`."""
    return {record.attribute: record for record in records()}
