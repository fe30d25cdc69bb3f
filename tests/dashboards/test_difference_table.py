"""A table of differences has the numbers of its figure, the largest first, and a link for each expert."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from tests.conftest import DATA
from workbench.dashboards.difference_table import difference_table, differences
from workbench.dashboards.session import Session
from workbench.dashboards.state import RunRegistry, Selection
from workbench.figures.gallery import GalleryItem

SIDES = xr.Dataset(attrs={"a": "analysis", "b": "final"})


@pytest.fixture
def numbers() -> pd.DataFrame:
    return pd.DataFrame(
        {"layer": [0, 0, 1], "expert": [0, 1, 0], "mean_a": [0.1, 0.3, 0.2], "mean_b": [0.2, 0.1, 0.2]}
        | {"difference": [-0.1, 0.2, np.nan], "low": [-0.15, 0.1, np.nan], "high": [-0.05, 0.3, np.nan]}
        | {"q": [0.01, 0.001, np.nan], "different": [True, False, False]}
    )


def test_the_largest_difference_is_first_and_cells_without_one_are_left_out(numbers: pd.DataFrame) -> None:
    table = differences(numbers, SIDES)
    assert table["expert"].tolist() == [1, 0]
    assert table["difference (points)"].tolist() == [20.0, -10.0]
    assert table["analysis (%)"].tolist() == [30.0, 10.0]
    assert table["95 % interval"].tolist() == ["[+10.00, +30.00]", "[-15.00, -5.00]"]
    assert table["differs"].tolist() == ["not shown", "yes"]
    assert differences(numbers.drop(columns="low"), SIDES).empty, (
        "negative control: another kind of numbers has no table"
    )


def test_a_row_opens_its_expert(numbers: pd.DataFrame) -> None:
    session = Session(RunRegistry([DATA / "demo.zarr"]), Selection({}), lambda: None)
    item = GalleryItem(lambda **_: None, numbers.copy, SIDES)  # type: ignore[arg-type, return-value]
    (card,) = difference_table(session, item, "x")
    text = str(card[-1][0].object)
    assert "experts?layer=0&amp;expert=1" in text
    assert text.index("expert=1") < text.index("expert=0")
