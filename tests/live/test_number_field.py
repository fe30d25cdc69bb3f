"""Fields for numbers: what they accept, and what they refuse."""

import pytest

from workbench.errors import InputError
from workbench.live.number_field import NumberField


@pytest.mark.parametrize(
    ("text", "number"), [("0", 0), ("10", 10), ("0.5", 0.5), (" .25 ", 0.25), ("1e0", 1), ("+2.", 2)]
)
def test_a_number_in_the_range_is_read(text: str, number: float) -> None:
    field = NumberField("Strength", 1, low=0, high=10)
    field.widget.value = text
    assert field.read() == number


@pytest.mark.parametrize(
    "text", ["", " ", "abc", "-1", "10.5", "nan", "inf", "1e400", "0,5", "0.5x", "--1", "1 2", "٣", "9" * 5000]
)
def test_other_texts_are_refused_in_one_line_and_stay_in_the_field(text: str) -> None:
    field = NumberField("Strength", 1, low=0, high=10)
    field.widget.value = text
    with pytest.raises(InputError, match=r"^Strength (is empty|'.*'): expected a number from 0 to 10$") as refused:
        field.read()
    assert len(str(refused.value)) < 120
    assert field.widget.value == text


def test_whole_numbers_have_no_decimals_and_an_empty_field_can_have_a_meaning() -> None:
    field = NumberField("From position", None, low=0, high=100, integer=True, empty=0)
    assert (field.widget.value, field.read()) == ("", 0)
    field.put(7)
    assert (field.widget.value, field.read()) == ("7", 7)
    for text in ("1.5", "1e1", "101"):
        field.widget.value = text
        with pytest.raises(InputError, match="expected a whole number from 0 to 100"):
            field.read()
