"""Examples in their context as HTML: a token of an expert, a neuron or a feature; each opens its conversation there."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from workbench.dashboards.session import Session


def example(session: Session, row: Mapping[str, Any], note: str, *, strength: float | None = None) -> str:
    """Return a list item: the text before, the token and the text after, and a note, as `analysis, gate 0.41`.

    row: `sequence`, `position`, `before`, `token` and `after`. strength: of the token, from 0 to 1, for its colour.
    """
    before, after = escape(str(row["before"])), escape(str(row["after"]))
    return _item(session, row, f"{before}{_token(str(row['token']), strength)}{after}", note)


def coloured_example(
    session: Session, row: Mapping[str, Any], texts: Sequence[str], strengths: Sequence[float], note: str
) -> str:
    """Return a list item with the colour of every token by its strength, from 0 to 1; those of 0 have none."""
    pairs = zip(texts, strengths, strict=True)
    text = "".join(_token(text, strength) if strength > 0 else escape(text) for text, strength in pairs)
    return _item(session, row, text, note)


def list_of(items: Sequence[str]) -> str:
    """Return a list of examples."""
    return f"<ul class='wb-examples'>{''.join(items)}</ul>"


def _token(text: str, strength: float | None) -> str:
    if strength is None:
        return f"<mark>{escape(text) or '▫'}</mark>"
    share = round(100 * min(1.0, max(0.0, strength)))
    return f"<mark class='wb-shade' style='--share:{share}%'>{escape(text) or '▫'}</mark>"


def _item(session: Session, row: Mapping[str, Any], text: str, note: str) -> str:
    sequence, position = str(row["sequence"]), str(row["position"])
    link = session.link("transcript", sequence=sequence, pin=position, position="", colour="expert")
    return f"<li><a href='{escape(link)}'>{text}</a> <span class='wb-muted'>{escape(note)}</span></li>"
