"""Columns of a long table share its width where several have long texts; otherwise each is as wide as its content."""

import pandas as pd

from workbench.dashboards import widgets


def test_two_columns_of_long_texts_share_the_width() -> None:
    rows = pd.DataFrame(
        {"layer": [1, 2], "label": ["a" * 60, "b"], "example": ['<a href="x">' + "c" * 90 + "</a>", ""]}
    )
    widths = widgets._shared_width(rows, ["label", "example"])
    assert sum(float(width.rstrip("%")) for width in widths.values()) > 99.5
    assert float(widths["layer"].rstrip("%")) < float(widths["label"].rstrip("%"))
    one = rows.assign(example='<a href="' + "x" * 90 + '">c</a>')
    assert widgets._shared_width(one, ["label", "example"]) == {}, "negative control: an address is not seen"
