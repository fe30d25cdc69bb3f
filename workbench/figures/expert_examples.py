"""Figures of experts by example: over-represented tokens with their intervals, and the mean position of each expert."""

from collections.abc import Mapping
from functools import partial

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from workbench.figures import default
from workbench.figures.gallery import Gallery, GalleryItem, numbers
from workbench.figures.intervals import rows
from workbench.figures.template import ThemeName

N_ROWS = 20  # tokens in the figure of over-represented ones


def overrepresented_tokens(ds: xr.Dataset, *, theme: ThemeName = "light") -> go.Figure:
    """Draw the tokens of the largest lower limits of the log-odds, with their intervals, over all experts."""
    table = strongest_tokens(ds)
    return rows(
        table,
        "token_log_odds",
        "name",
        title="Over-represented tokens",
        subtitle="log-odds in prompts the token was not chosen in; 95 % intervals over prompts",
        x_title="log-odds (nat)",
        theme=theme,
    )


def strongest_tokens(ds: xr.Dataset) -> xr.Dataset:
    """Return the tokens of the largest lower limits of the log-odds, along the dimension `name`."""
    flat = ds[["token_log_odds", "token_log_odds_low", "token_log_odds_high", "token_text"]].stack(
        name=("layer", "expert", "token_rank"), create_index=False
    )
    order = np.argsort(-np.nan_to_num(flat["token_log_odds_low"].values, nan=-np.inf), kind="stable")[:N_ROWS]
    top = flat.isel(name=order[np.isfinite(flat["token_log_odds_low"].values[order])])
    places = zip(top["token_text"].values, top["layer"].values, top["expert"].values, strict=True)
    names = [f"{str(text)!r}, layer {layer} expert {expert}" for text, layer, expert in places]
    return top.drop_vars(["layer", "expert", "token_text"], errors="ignore").assign_coords(name=names)


def gallery(datasets: Mapping[str, xr.Dataset]) -> Gallery:
    """Return every figure of the study and the data of each."""
    ds = datasets["examples"]
    items = {"position": GalleryItem(partial(default.figure, ds, "position"), numbers(ds, "layer_expert"), ds)}
    if np.isfinite(ds["token_log_odds_low"].values).any():
        table = numbers(ds, "layer_expert_token_rank")
        items = {"overrepresented_tokens": GalleryItem(partial(overrepresented_tokens, ds), table, ds)} | items
    return items
