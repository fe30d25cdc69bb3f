"""A step of `workbench bench gpu --first`: experiments with nano on a device, compared with those on the CPU."""

import math
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

import workbench as wb
from workbench.errors import JobError
from workbench.experiments.registry import run_experiment

NAMES = ("attention-knockout", "circuits", "counterfactual-routing", "logit-attribution", "patching", "sink-ablation")
_SEQUENCES = 12
# Of the largest value of a variable. On an H100 most agreed within 0.001, p-values of attention-knockout within 0.003.
_TOLERANCE = 0.01


def experiments(device: str) -> dict[str, Any]:
    """Return the largest difference of every experiment's results in float32, relative to the variable's largest value.

    Raises:
        JobError: a difference is larger than allowed, or the results have another shape.
    """
    run = wb.open_run(Path(str(files("workbench.data") / "demo.zarr")))
    models = [wb.load("nano", device=where, dtype=torch.float32) for where in ("cpu", device)]
    errors: dict[str, dict[str, float]] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="only .* prompts")
        for name in NAMES:
            want, got = (run_experiment(name, model, run, sequences=_SEQUENCES) for model in models)
            errors[name] = differences(got, want)
    if wrong := {name: by for name, by in errors.items() if not max(by.values(), default=0.0) <= _TOLERANCE}:
        raise JobError(f"results on {device} differ from the CPU by more than {_TOLERANCE}, relatively: {wrong}")
    return {"largest": {name: max(by.values(), default=0.0) for name, by in errors.items()}, "allowed": _TOLERANCE}


def differences(got: dict[str, xr.Dataset], want: dict[str, xr.Dataset]) -> dict[str, float]:
    """Return the largest relative difference of every numeric variable that differs; infinite where shapes do."""
    errors: dict[str, float] = {}
    for title, dataset in want.items():
        for name, variable in dataset.variables.items():
            if variable.dtype.kind not in "fiub":
                continue
            a = np.asarray(got[title][name], dtype=np.float64)
            b = np.asarray(variable, dtype=np.float64)
            if a.shape != b.shape or not np.array_equal(np.isfinite(a), np.isfinite(b)):
                errors[f"{title}.{name}"] = math.inf
                continue
            both = np.isfinite(b)
            scale = float(np.abs(b[both]).max(initial=0.0)) or 1.0
            if error := float(np.abs(a[both] - b[both]).max(initial=0.0)) / scale:
                errors[f"{title}.{name}"] = error
    return errors
