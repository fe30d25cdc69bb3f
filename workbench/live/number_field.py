"""A text field for a number: what it holds is checked when it is read, so that nothing a viewer wrote is replaced."""

import re
from typing import Any

import panel as pn

from workbench.errors import InputError

_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")
_DECIMAL = re.compile(r"[+-]?([0-9]{1,18}(\.[0-9]*)?|\.[0-9]+)(e[+-]?[0-9]{1,3})?", re.IGNORECASE)
_SHOWN = 40  # characters of a wrong text in an error


class NumberField:
    """A labelled text field for a number from `low` to `high`. integer: the number has no decimals.

    empty: what an empty field means; without it an empty field is refused.
    """

    def __init__(
        self,
        label: str,
        value: float | None,
        *,
        low: float,
        high: float,
        integer: bool = False,
        empty: float | None = None,
        placeholder: str = "",
        width: int = 110,
    ) -> None:
        self.label, self.low, self.high, self._integer, self._empty = label, low, high, integer, empty
        self.widget = pn.widgets.TextInput(label=label, placeholder=placeholder, max_length=1000, width=width)
        self.put(value)

    def put(self, value: float | None) -> None:
        """Show a number, or nothing for None."""
        self.widget.value = "" if value is None else str(value) if self._integer else f"{value:.15g}"

    def read(self) -> float:
        """Return the number, or what an empty field means.

        Raises:
            InputError: the field is empty or holds no number, or one outside the range.
        """
        text = str(self.widget.value).strip()
        if not text and self._empty is not None:
            return self._empty
        pattern = _WHOLE if self._integer else _DECIMAL
        number: Any = None
        if pattern.fullmatch(text):
            number = int(text) if self._integer else float(text)
        if number is None or not self.low <= number <= self.high:
            shown = "is empty" if not text else f"{text[:_SHOWN]!r}"
            kind = "whole number" if self._integer else "number"
            raise InputError(f"{self.label} {shown}: expected a {kind} {self._range()}")
        return float(number) if not self._integer else int(number)

    def _range(self) -> str:
        low, high = (f"{end:,}" if abs(end) < 1e15 else f"{end:g}".replace("e+", "e") for end in (self.low, self.high))
        return f"from {low} to {high}"
