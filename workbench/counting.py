"""Numbers as sentences and tables state them: "1 sentence", "16 sentences", "+0.31", "0.00"."""

import math


def count_of(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun, as in "1 sentence" and "1,024 sentences".

    plural: of the noun; with an "s" at its end if None.
    """
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {plural or noun + 's'}"


def plural_or_singular(number: int, plural: str) -> str:
    """Return a noun that is given in the plural, such as "units", as it is used with this number: "unit" with 1."""
    return plural if number != 1 else plural.removesuffix("es" if plural.endswith("sses") else "s")


def signed(value: float, decimals: int, kind: str = "f") -> str:
    """Return a number with its sign, as in "+0.31" and "-2.00"; one that is rounded to zero has none: "0.00".

    kind: f for decimals, g for significant digits, % for a percentage with this many decimals.
    """
    text = f"{value:+.{decimals}{kind}}"
    is_zero = math.isfinite(value) and not any(digit in text for digit in "123456789")
    return text[1:] if is_zero or math.isnan(value) else text


def signed_interval(value: float, low: float, high: float, decimals: int, kind: str = "f") -> str:
    """Return a number with its interval, as in "+0.31 [-0.02, +0.64]", or without one that is NaN; see `signed`."""
    text, ends = signed(value, decimals, kind), (signed(low, decimals, kind), signed(high, decimals, kind))
    return text if math.isnan(low) else f"{text} [{', '.join(ends)}]"
