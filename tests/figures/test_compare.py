"""The agreement of two runs is a line for each channel that has tokens, by layer."""

import numpy as np
import xarray as xr

from workbench.figures import compare


def test_agreement_is_drawn_by_layer_for_channels_with_tokens() -> None:
    values = np.array([[0.9, 0.8], [0.7, 0.6], [1.0, 1.0]])
    dims = ("channel", "layer")
    variables = {f"agreement{end}": (dims, values + d) for end, d in (("", 0), ("_low", -0.1), ("_high", 0.0))}
    coords = {"channel": ["analysis", "final", "frame"], "layer": [0, 1]}
    ds = xr.Dataset(variables | {"tokens": ("channel", [50, 0, 70])}, coords, {"title": "Two runs", "run_digest": "01"})
    items = compare.gallery({"agreement": ds})
    lines = [trace for trace in items["agreement"].draw().data if trace.mode == "lines+markers"]
    assert [line.name for line in lines] == ["analysis"], "final has no tokens, and the frame is not a channel"
    np.testing.assert_array_equal(lines[0].y, values[0])
    assert compare.gallery({"other": ds.drop_vars("agreement")} | {"agreement": xr.Dataset()}) == {}
