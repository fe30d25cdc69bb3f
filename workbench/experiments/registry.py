"""Run an experiment by its name: a model and a run of it in, datasets with effects and their intervals out.

Every experiment is one module with a record and `experiment(model, rows, *, seed)` (see `workbench.registry`). Results
describe themselves as those of studies do (method, what is not controlled, summary) and are saved the same way.
"""

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import xarray as xr

from workbench import registry
from workbench.errors import InputError
from workbench.experiments.branch_hosts import HostModel
from workbench.experiments.final_channel import METHOD, NOT_CONTROLLED
from workbench.experiments.from_run import transcripts
from workbench.experiments.sampling import composition, spread
from workbench.harmony.transcripts import Transcript
from workbench.model.transformer import GptOss
from workbench.outputs import refuse_inputs
from workbench.runs import Run
from workbench.studies.comparison import prompt_ids
from workbench.studies.intervals import MIN_PROMPTS
from workbench.studies.result import name_few_prompts
from workbench.studies.run_index import ambiguous_warning, duplicates_warning, index_of
from workbench.version import version

OUTPUTS = {"store", "save"}  # options that name a file or folder to write
SEQUENCES = 200  # about this many, of prompts spread over tasks and efforts


def run_experiment(
    name: str, model: GptOss | HostModel, run: Run, *, sequences: int = SEQUENCES, seed: int = 0, **options: Any
) -> dict[str, xr.Dataset]:
    """Return the datasets of an experiment on about `sequences` sequences of the run.

    model: one at a host, for an experiment that only generates; which checkpoint it serves cannot be checked.

    Raises:
        InputError: no experiment has this name or option, the run lacks what it needs, was captured from another
            checkpoint than the model's, or the experiment needs the weights and the model is at a host.
    """
    record = registry.find(name)
    if not isinstance(record, registry.Experiment):
        raise InputError(f"{name} is a study and needs no model: use workbench.studies.run_study")
    record.check_recorded(run)
    if isinstance(model, HostModel):
        if not record.host:
            raise InputError(f"{record.name} needs the weights: leave --host out, and load the model")
    elif run.checkpoint["digest"] != model.checkpoint.digest:
        raise InputError(f"{run.path} was captured from another checkpoint than {model.checkpoint.path}: load that one")
    experiment = record.load().experiment
    options = record.checked_options(experiment, options)
    for output in OUTPUTS & record.options.keys():
        if options.get(output):
            refuse_inputs(Path(options[output]), [run.path])
    rows, merged = independent_rows(run, chosen_sequences(run, model.cfg.n_ctx, sequences))
    results: dict[str, xr.Dataset] = experiment(model, rows, seed=seed, **_store(record, run, options), **options)
    for title, result in results.items():
        result.attrs |= {
            "study": record.name,
            "title": result.attrs.get("title", title),
            "run_digest": run.digest,
            **({"excluded": run.exclusion} if run.exclusion else {}),
            "seed": seed,
            "checkpoint_digest": model.checkpoint.digest,
            "workbench_version": version(),
            "parameters": json.dumps({"sequences": len(rows), **options}),
            "command": command(record.name, model, sequences, seed, options),
            "sample": json.dumps(composition(rows)),
        }
        if merged:
            result.attrs["duplicate_prompts"] = merged
            result.attrs["summary"] = f"{duplicates_warning(merged)}\n{result.attrs['summary']}"
        if ambiguous := index_of(run).ambiguous_ids:
            result.attrs["ambiguous_prompt_ids"] = ambiguous
            result.attrs["summary"] = f"{ambiguous_warning(ambiguous)}\n{result.attrs['summary']}"
        name_few_prompts(result, len({row.prompt_id for row in rows}))
        result.attrs.setdefault("method", METHOD)
        result.attrs.setdefault("not_controlled", NOT_CONTROLLED)
    return results


def command(name: str, model: GptOss | HostModel, sequences: int, seed: int, options: Mapping[str, Any]) -> str:
    """Return the command that makes the same results; RUN, MODEL and URL stand for the reader's."""
    words = ["workbench", "study", name, "RUN", "--model", "MODEL", "--sequences", str(sequences), "--seed", str(seed)]
    if isinstance(model, HostModel):
        words += ["--host", "URL"]
    elif model.dtype != torch.bfloat16:
        words += ["--dtype", str(model.dtype).removeprefix("torch.")]
    for option, value in options.items():
        words += ["--option", f"{option}={value}"]
    return shlex.join(words)


def _store(record: registry.Experiment, run: Run, options: Mapping[str, Any]) -> dict[str, str]:
    """Return the file of samples beside a run, for an experiment that has one and is not told another."""
    path = Path(str(run.path))
    if "store" not in record.options or "store" in options or not os.access(path.parent, os.W_OK):
        return {}
    return {"store": f"{path}.branches.jsonl"}


def chosen_sequences(run: Run, n_ctx: int, most: int) -> list[int]:
    """Return about `most` sequences that fit the context: all those of prompts spread over tasks and efforts.

    There are sequences of five prompts at least, as an interval needs them.

    Raises:
        InputError: no sequence fits the context of the model.
    """
    table = run.sequences[run.sequences["length"] <= n_ctx]
    if not len(table):
        raise InputError(f"{run.path} holds no sequence yet that fits the model's context")
    prompts = prompt_ids(table)
    rows = table.assign(prompt=prompts).groupby("prompt", sort=False)
    strata = [(_task(rows_of_prompt), *sorted(set(rows_of_prompt["effort"]))) for _, rows_of_prompt in rows]
    names = prompts.drop_duplicates()
    selected = names.iloc[spread(strata, max(MIN_PROMPTS, most * len(names) // len(table)))]
    return [int(n) for n in table.index[prompts.isin(selected)]]


def independent_rows(run: Run, sequences: Sequence[int]) -> tuple[list[Transcript], int]:
    """Return sequences of a run, and how many of their prompts repeat the tokens of others under another id.

    Those have the id of the first of their kind, so that they are one sampling unit.
    """
    rows, number = transcripts(run, sequences), index_of(run).prompts[0]
    first: dict[int, str] = {}
    merged = [
        replace(row, prompt_id=first.setdefault(int(number[sequence]), row.prompt_id))
        for sequence, row in zip(sequences, rows, strict=True)
    ]
    return merged, len({row.prompt_id for row in rows}) - len(first)


def _task(table: pd.DataFrame) -> str:
    """Return the task of a prompt's sequences, or the domain where no task is known."""
    first = table.iloc[0]
    return str(first.get("task") or first.get("domain") or "")
