"""Numbers with the noun that they count: "1 sentence", "16 sentences"."""


def count_of(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun, as in "1 sentence" and "1,024 sentences".

    plural: of the noun; with an "s" at its end if None.
    """
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {plural or noun + 's'}"


def plural_or_singular(number: int, plural: str) -> str:
    """Return a noun that is given in the plural, such as "units", as it is used with this number: "unit" with 1."""
    return plural if number != 1 else plural.removesuffix("es" if plural.endswith("sses") else "s")
