"""The default figures leave out what has no number."""

import numpy as np
import xarray as xr

from workbench.figures import default


def test_a_variable_without_a_number_has_no_figure() -> None:
    ds = xr.Dataset(
        {"cosine": ("comparison", [0.8, np.nan]), "p": ("comparison", [np.nan, np.nan])},
        coords={"comparison": ["same prompt", "other prompts"]},
        attrs={"title": "Circuits"},
    )
    assert list(default.gallery({"similarity": ds})) == ["similarity_cosine"]
    ds["p"][0] = 0.01
    drawn = default.gallery({"similarity": ds})
    assert list(drawn) == ["similarity_cosine", "similarity_p"], "the negative control has a number"
    assert all(item.draw().data for item in drawn.values())


def test_the_axes_of_a_heat_map_have_the_labels_of_its_cells() -> None:
    names, layers = ["frame", "prompt", "final"], [3, 7]
    ds = xr.Dataset(
        {"share": (("channel", "layer", "feature"), np.arange(24.0).reshape(3, 2, 4))},
        coords={"channel": names, "layer": layers, "feature": [10, 11, 20, 21]},
        attrs={"title": "Features"},
    )
    cells = ds.isel(layer=0), ds.isel(feature=0).rename(layer="expert"), ds.isel(channel=0)
    for cell, rows, columns in zip(
        cells, (names, names, layers), ([10, 11, 20, 21], layers, [10, 11, 20, 21]), strict=True
    ):
        figure = default.figure(cell, "share")
        assert figure.layout.yaxis.ticktext == tuple(map(str, rows))
        assert figure.layout.xaxis.ticktext == tuple(map(str, columns))
        assert figure.data[0].customdata[1][0].tolist() == [str(rows[1]), str(columns[0])]
    many = ds.isel(layer=0).reindex(feature=np.arange(100))
    assert default.figure(many, "share").layout.xaxis.ticktext == tuple(map(str, range(0, 100, 7))), "some of many"
    other = ds.isel(layer=0).assign_coords(channel=["a", "b", "c"])
    assert default.figure(other, "share").layout.yaxis.ticktext == ("a", "b", "c"), "negative control: other labels"
