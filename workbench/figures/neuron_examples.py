"""The figure of neurons by example: the largest activation of each neuron, by channel."""

from collections.abc import Mapping
from functools import partial

import xarray as xr

from workbench.figures import default
from workbench.figures.gallery import Gallery, GalleryItem, numbers


def gallery(datasets: Mapping[str, xr.Dataset]) -> Gallery:
    """Return every figure of the study and the data of each."""
    ds = datasets["neurons"]
    return {"largest": GalleryItem(partial(default.figure, ds, "largest"), numbers(ds, "channel_neuron"), ds)}
