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
