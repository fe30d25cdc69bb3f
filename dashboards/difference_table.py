"""The table beside a map of differences: each expert or head with both sides, the difference and its interval."""

from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from workbench.counting import signed
from workbench.dashboards import widgets
from workbench.figures.gallery import GalleryItem

# columns of a comparison's numbers, by the two names that studies give them: a, b, difference, limits, verdict
_COLUMNS = (
    ("mean_a", "mean_b", "difference", "low", "high", "different"),
    ("share_a", "share_b", "difference", "difference_low", "difference_high", "expert_different"),
)
_PAGES = {"expert": "experts", "head": "sinks"}  # that show one cell in detail


def differences(numbers: pd.DataFrame, source: xr.Dataset) -> pd.DataFrame:
    """Return a row for each expert or head of a comparison, the largest difference a − b first; empty for others.

    numbers: of a figure, one row for each cell. source: the dataset that the figure draws, with its sides a and b.
    """
    columns = next((names for names in _COLUMNS if set(names) <= set(numbers)), None)
    kind = next((name for name in _PAGES if name in numbers), None)
    if columns is None or kind is None or not {"a", "b"} <= source.attrs.keys():
        return pd.DataFrame()
    mean_a, mean_b, difference, low, high, different = (numbers[name] for name in columns)
    table = pd.DataFrame(
        {
            "layer": numbers["layer"],
            kind: numbers[kind],
            f"{source.attrs['a']} (%)": (100 * mean_a).round(2),
            f"{source.attrs['b']} (%)": (100 * mean_b).round(2),
            "difference (points)": (100 * difference).round(2),
            "95 % interval": [
                f"[{signed(100 * a, 2)}, {signed(100 * b, 2)}]" if np.isfinite([a, b]).all() else "–"
                for a, b in zip(low, high, strict=True)
            ],
            "differs": np.where(different.astype(bool), "yes", "not shown"),
        }
    )
    known = table[np.isfinite(table["difference (points)"])]
    return known.sort_values("difference (points)", ascending=False, kind="stable").reset_index(drop=True)


def difference_table(session: Any, item: GalleryItem, name: str) -> list[Any]:
    """Return the table of a figure of differences, whose rows open the page of their expert or head; none for others.

    session: of the page. name: of the file that the table is saved in.
    """
    rows = differences(item.table(), item.source)
    if rows.empty:
        return []
    kind = str(rows.columns[1])
    links = [
        session.link(_PAGES[kind], layer=str(layer), **{kind: str(cell)})
        for layer, cell in zip(rows["layer"], rows[kind], strict=True)
    ]
    a, b = item.source.attrs["a"], item.source.attrs["b"]
    note = f"{a} − {b}, sorted by the difference; a heading sorts by its column, and a row opens its {kind}"
    return [widgets.table(f"Differences by {kind}", rows, f"{name}-table", {kind: links}, note=note)]
