"""A gallery item draws and tabulates only when somebody asks."""

import pytest
import xarray as xr

from workbench.figures.gallery import GalleryItem, numbers


def test_the_table_is_that_of_its_dimensions() -> None:
    ds = xr.Dataset(
        {"load": (("layer", "expert"), [[0.1, 0.9], [0.5, 0.5]]), "total": ("layer", [1, 2])},
        {"layer": [0, 1], "expert": [0, 1]},
    )
    by_expert, by_layer = numbers(ds, "layer_expert")(), numbers(ds, "layer")()
    assert len(by_expert) == 4
    assert len(by_layer) == 2
    with pytest.raises(KeyError):
        numbers(ds, "expert")()


def test_nothing_is_drawn_before_it_is_asked_for() -> None:
    def draw(**options: object) -> None:
        raise AssertionError("drawn")

    item = GalleryItem(draw, draw, xr.Dataset())  # type: ignore[arg-type, return-value]
    with pytest.raises(AssertionError, match="drawn"):
        item.draw(theme="light")
