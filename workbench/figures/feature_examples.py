"""The figure of features by example: the share of each channel's tokens that have each feature."""

from collections.abc import Mapping
from functools import partial

import xarray as xr

from workbench.figures import default
from workbench.figures.gallery import Gallery, GalleryItem, numbers


def gallery(datasets: Mapping[str, xr.Dataset]) -> Gallery:
    """Return every figure of the study and the data of each."""
    ds = datasets["features"]
    return {"share": GalleryItem(partial(default.figure, ds, "share"), numbers(ds, "channel_feature"), ds)}
