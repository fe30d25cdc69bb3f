"""Experiments on a device are compared with those on the CPU; a wrong model on the device is an error."""

from typing import Any

import numpy as np
import pytest
import xarray as xr

import workbench as wb
from workbench.bench import first_experiments
from workbench.errors import JobError


def test_experiments_on_a_device_are_compared_with_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_experiments, "NAMES", ("logit-attribution",))
    assert first_experiments.experiments("cpu")["largest"] == {"logit-attribution": 0.0}
    load, loaded = wb.load, []

    def broken(*args: Any, **options: Any) -> Any:
        """The negative control: the model on the device has a slightly wrong router."""
        loaded.append(load(*args, **options))
        if len(loaded) == 2:
            loaded[1].blocks[1].ln2.weight.data *= 1.1
        return loaded[-1]

    monkeypatch.setattr(wb, "load", broken)
    with pytest.raises(JobError, match=r"results on cpu differ from the CPU by more than 0.01, relatively: .*logit"):
        first_experiments.experiments("cpu")


def test_differences_are_relative_and_other_shapes_or_missing_values_are_infinite() -> None:
    want = {"a": xr.Dataset({"x": ("i", [1.0, np.nan, -4.0]), "name": ("i", ["p", "q", "r"])})}

    def difference(values: list[float]) -> dict[str, float]:
        return first_experiments.differences({"a": xr.Dataset({"x": ("i", values)})}, want)

    assert difference([1.0, np.nan, -4.0]) == {}
    assert difference([1.0, np.nan, -4.1]) == {"a.x": pytest.approx(0.025)}
    assert difference([1.0, 0.0, -4.0]) == {"a.x": np.inf}
    assert difference([1.0, np.nan]) == {"a.x": np.inf}
