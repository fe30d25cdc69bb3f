"""The probe's AUC is drawn by layer with the range of its folds, beside that of halves of the first channel."""

import numpy as np
import pytest
import xarray as xr

from workbench.figures import channels


def test_the_probe_is_drawn_beside_its_control() -> None:
    auc, half = np.array([0.6, 0.9, 0.95]), np.array([0.5, 0.52, 0.49])
    values = {"auc": auc, "auc_low": auc - 0.05, "auc_high": auc + 0.02, "auc_half": half}
    attrs = {"title": "Probe", "a": "analysis", "b": "final", "run_digest": "0123456789"}
    ds = xr.Dataset({k: ("layer", v) for k, v in values.items()}, {"layer": [0, 1, 2]}, attrs)
    items = channels.gallery({"probe": ds, "other": xr.Dataset()})
    assert list(items) == ["probe"]
    figure = items["probe"].draw()
    lines = {trace.name: np.array(trace.y) for trace in figure.data if trace.mode == "lines+markers"}
    assert lines.keys() == {"analysis against final", "halves of analysis"}
    np.testing.assert_array_equal(lines["analysis against final"], auc)
    np.testing.assert_array_equal(lines["halves of analysis"], half)
    folds = [y for trace in figure.data if trace.name == "folds" for y in trace.y if y is not None]
    assert (min(folds), max(folds)) == pytest.approx((0.55, 0.97))
