"""Texts that appear at the pointer: signed numbers are written here, as plotly gives a number that rounds to 0 a sign.

A template names a signed number as `%{x:+.2f}` or `%{customdata[1]:+.3g}`; `write_signed_numbers` replaces it by text.
"""

import re
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Shaped

_SIGNED = re.compile(r"%\{(?P<name>[xyz]|customdata\[(?P<column>\d+)\]):\+\.(?P<digits>\d)(?P<kind>[fg])\}")


def write_signed_numbers(figure: go.Figure) -> go.Figure:
    """Replace signed numbers in the hover templates of a figure by text: 0.00 has no sign, and NaN is a dash.

    The texts are further columns of `customdata`; the numbers stay where they are.
    """
    for trace in figure.data:
        template = getattr(trace, "hovertemplate", None)
        if not isinstance(template, str) or not (matches := list(_SIGNED.finditer(template))):
            continue
        columns = [] if trace["customdata"] is None else [_objects(trace["customdata"])]
        width = columns[0].shape[-1] if columns else 0
        for number, match in enumerate(matches):
            own = match["column"]
            values = np.asarray(trace[match["name"]], dtype=np.float64) if own is None else columns[0][..., int(own)]
            columns.append(signed_texts(values, int(match["digits"]), match["kind"])[..., None])
            template = template.replace(match[0], f"%{{customdata[{width + number}]}}", 1)
        trace.update(customdata=np.concatenate(columns, axis=-1), hovertemplate=template)
    return figure


def _objects(values: Any) -> Shaped[np.ndarray, "*any"]:
    """Return values as objects with None for NaN, as equal figures would not be equal with NaN among objects."""
    objects = np.array(values, dtype=object)
    objects[pd.isna(objects)] = None
    return objects


def signed_texts(values: Shaped[np.ndarray, "*any"], digits: int, kind: str = "f") -> Shaped[np.ndarray, "*any"]:
    """Return numbers with their signs as text; one that is rounded to zero has none. kind: f or g, as in a format."""
    numbers = np.asarray(values).astype(np.float64)  # None becomes NaN
    texts = np.char.mod(f"%+.{digits}{kind}", numbers).astype(object)
    rounded = numbers.round(digits) if kind == "f" else numbers
    texts[rounded == 0] = f"{0:.{digits}{kind}}"
    texts[np.isnan(numbers)] = "–"
    return texts
