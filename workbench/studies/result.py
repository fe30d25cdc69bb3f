"""The result of a study: a dataset with its method and summary, and the files that hold it.

Every variable carries `long_name`, `units` and `definition`, and where they apply `ci` and `null`; every dataset
carries its provenance, its `method`, what is `not_controlled` and its `summary`.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from workbench.bounded_json import read_json
from workbench.errors import InputError
from workbench.outputs import write_files
from workbench.studies.intervals import MIN_PROMPTS, few_prompts
from workbench.version import version

Variables = dict[str, tuple[tuple[str, ...], np.ndarray]]  # name → dimensions and values
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")
_INTERVAL = re.compile(r"[+-][\d.]+%? \[[+-]?[\d.]+%?, [+-]?[\d.]+%?\]")  # as `counting.signed_interval` writes it


@dataclass(frozen=True)
class Definition:
    """What a variable is, so that nobody has to guess the unit, the averaging order or the base of a logarithm."""

    long_name: str
    units: str
    definition: str
    ci: str = ""
    null: str = ""

    def attrs(self) -> dict[str, str]:
        """Return the non-empty parts, as attributes."""
        return {name: text for name, text in vars(self).items() if text}


def dataset(
    variables: Mapping[str, tuple[tuple[str, ...], np.ndarray]],
    coords: Mapping[str, Any],
    definitions: Mapping[str, Definition],
    attrs: Mapping[str, Any],
) -> xr.Dataset:
    """Return a dataset of variables, name → (dims, values [*dims]), with their definitions.

    Every variable has a definition, but for the limits of an interval: those of `load` are called `load_low` and
    `load_high` and are described by the definition of `load`.
    """
    data = {name: (dims, values, _definition(name, definitions).attrs()) for name, (dims, values) in variables.items()}
    return xr.Dataset(data, coords=dict(coords), attrs=dict(attrs))


def _definition(name: str, definitions: Mapping[str, Definition]) -> Definition:
    """Return the definition of a variable, or that of a limit of another variable's interval."""
    of, _, end = name.rpartition("_")
    if name in definitions or of not in definitions or end not in ("low", "high"):
        return definitions[name]
    limit = "lower limit" if end == "low" else "upper limit"
    value = definitions[of]
    return Definition(f"{value.long_name}, {limit}", value.units, f"{limit} of {of}", ci=value.ci)


def provenance(study: str, title: str, digest: str, seed: int, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return attributes from which a dataset can be made again."""
    return {
        "study": study,
        "title": title,
        "run_digest": digest,
        "workbench_version": version(),
        "seed": seed,
        "parameters": json.dumps(dict(parameters)),
    }


def name_few_prompts(result: xr.Dataset, n: int) -> None:
    """Add a warning to the summary of a result that rests on fewer than 20 prompts, in all (n) or in some cells.

    Attributes of the result: `prompts`, if intervals are over fewer prompts than n; `intervals_over`, where they are
    over something else than prompts.
    """
    summary = str(result.attrs.get("summary", ""))
    if "only" in summary and "prompts: intervals of fewer" in summary:
        return
    if result.attrs.get("intervals_over", "prompts") != "prompts":
        return
    text = few_prompts(min(int(result.attrs.get("prompts", n)), n))
    if not text and "prompts" in result and "paired" not in result.attrs:
        counts = result["prompts"].values
        least = int(counts[counts >= MIN_PROMPTS].min(initial=n))  # cells with fewer have no interval
        text = few_prompts(least) and f"some cells rest on few prompts, the smallest on {least} ({few_prompts(least)})"
    if text:
        result.attrs["summary"] = f"{summary}\nWarning: {text}."


def tables(result: xr.Dataset) -> dict[str, pd.DataFrame]:
    """Return a table for each set of dimensions (`layer_expert`, …), one row for each cell, missing cells as NaN."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, variable in result.data_vars.items():
        groups.setdefault(tuple(map(str, variable.dims)), []).append(str(name))
    return {
        "_".join(dims): result[names].to_dataframe(dim_order=list(dims)).reset_index()
        for dims, names in groups.items()
        if dims
    }


def _is_formula(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(_FORMULA_STARTS) and not _INTERVAL.fullmatch(value)


def csv_text(table: pd.DataFrame) -> str:
    """Return a table as CSV, in which spreadsheets take no text for a formula.

    Texts that begin with =, +, -, @ or a control character get a ' in front, except numbers with their interval; JSON
    files beside it have the text itself.

    Reference: OWASP, CSV injection.
    """
    safe = table.copy()
    for column in safe.columns[[not pd.api.types.is_numeric_dtype(dtype) for dtype in safe.dtypes]]:
        texts = safe[column]
        risky = texts.map(_is_formula)
        if risky.any():
            safe[column] = texts.astype(object).where(~risky.astype(bool), "'" + texts.astype(str))
    return safe.to_csv(index=False, lineterminator="\n")


def summary(datasets: Mapping[str, xr.Dataset]) -> str:
    """Return the summaries of studies with their methods and what they do not control."""
    parts = [f"{name}: {result.attrs['title']}\n{result.attrs['summary']}" for name, result in datasets.items()]
    for heading, attribute in (("Method", "method"), ("Not controlled", "not_controlled")):
        texts = dict.fromkeys(result.attrs[attribute] for result in datasets.values())
        parts.append("\n".join(f"{heading}. {text}" for text in texts))
    first = next(iter(datasets.values())).attrs
    source = f"run {first['run_digest']}" if "run_digest" in first else f"checkpoint {first['checkpoint_digest']}"
    parts.append(f"From {source}, workbench {first['workbench_version']}, seed {first['seed']}.")
    return "\n\n".join(parts) + "\n"


def save(
    datasets: Mapping[str, xr.Dataset],
    out_dir: str | os.PathLike[str],
    *,
    inputs: Iterable[str | Path] = (),
    overwrite: bool = False,
) -> list[Path]:
    """Write `STUDY_NAME.json` and a CSV for each table, and `STUDY.txt`; each file appears complete or not at all.

    inputs: paths that the results were made of, which are never replaced. overwrite: replace results of the same names.
    The JSON has everything, with NaN as null, in the form that `xarray.Dataset.from_dict` reads.
    """
    return write_files(files_of(datasets), out_dir, command="study", inputs=inputs, overwrite=overwrite)


def files_of(datasets: Mapping[str, xr.Dataset]) -> dict[str, str]:
    """Return the files of results by name: JSON and CSV of each dataset, and a text for each study (see `save`)."""
    files: dict[str, str] = {}
    for name, result in datasets.items():
        stem = f"{result.attrs['study']}_{name}"
        files[f"{stem}.json"] = json.dumps(_plain(result.to_dict()), indent=1, allow_nan=False) + "\n"
        for dims, table in tables(result).items():
            files[f"{stem}_{dims}.csv"] = csv_text(table)
    for study in dict.fromkeys(result.attrs["study"] for result in datasets.values()):
        files[f"{study}.txt"] = summary({name: ds for name, ds in datasets.items() if ds.attrs["study"] == study})
    return files


def load(folder: str | os.PathLike[str]) -> dict[str, dict[str, xr.Dataset]]:
    """Return results that `workbench study … --out` wrote, by study and name; other files are ignored.

    Raises:
        InputError: the folder holds no results.
    """
    studies: dict[str, dict[str, xr.Dataset]] = {}
    for path in sorted(Path(folder).glob("*.json")):
        if not path.is_file():  # a folder, or a link that leads nowhere
            continue
        try:
            ds = from_json(read_json(path))
            study = str(ds.attrs["study"])
        except (ValueError, KeyError, TypeError):
            continue
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
        studies.setdefault(study, {})[path.stem.removeprefix(f"{study}_")] = ds
    if not studies:
        raise InputError(f"{folder} holds no results: write some with `workbench study NAME RUN --out {folder}`")
    return studies


def from_json(content: Mapping[str, Any]) -> xr.Dataset:
    """Return the dataset that a JSON object of `save` holds."""
    return xr.Dataset.from_dict(_numbers(content))


def _numbers(value: Any) -> Any:
    """null, which stands for a missing number in JSON, as NaN."""
    if isinstance(value, dict):
        return {k: (v if k in ("attrs", "dims") else _numbers(v)) for k, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    return math.nan if value is None else value


def _plain(value: Any) -> Any:
    """Return nested dicts and lists that JSON can hold; NaN becomes null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    return None if isinstance(value, float) and math.isnan(value) else value
