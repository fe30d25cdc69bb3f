"""Galleries: figures that are drawn when they are opened, each with its data."""

from collections.abc import Callable
from typing import NamedTuple

import pandas as pd
import plotly.graph_objects as go
import xarray as xr

from workbench.studies.result import tables


class GalleryItem(NamedTuple):
    """A figure not yet drawn, its numbers not yet put in a table, and the dataset both come from."""

    draw: Callable[..., go.Figure]  # takes theme=
    table: Callable[[], pd.DataFrame]
    source: xr.Dataset


Gallery = dict[str, GalleryItem]


def numbers(ds: xr.Dataset, dims: str) -> Callable[[], pd.DataFrame]:
    """Return the table over these dimensions (`layer_expert`), made when asked for."""
    return lambda: tables(ds)[dims]
