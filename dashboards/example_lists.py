"""Examples in their context as HTML: a token of an expert, a neuron or a feature; each opens its conversation there."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from workbench.dashboards.session import Session

_SPECIAL = re.compile(r"&lt;\|[a-z_]{1,20}\|&gt;")  # after HTML is escaped


def example(session: Session, row: Mapping[str, Any], note: str, *, strength: float | None = None) -> str:
    """Return a list item: the text before, the token and the text after, and a note, as `analysis, gate 0.41`.

    row: `sequence`, `position`, `before`, `token` and `after`. strength: of the token, from 0 to 1, for its colour.
    """
    before, after = _plain(str(row["before"])), _plain(str(row["after"]))
    return _item(session, row, f"{before}{_token(str(row['token']), strength, example=True)}{after}", note)


def coloured_example(
    session: Session, row: Mapping[str, Any], texts: Sequence[str], strengths: Sequence[float], note: str
) -> str:
    """Return a list item with the colour of every token by its strength, from 0 to 1; those of 0 have none.

    row: `sequence`, `position`, and `start`, the position of the first of `texts`; the example's own token has a frame.
    """
    own = int(row["position"]) - int(row["start"])
    parts = (
        _token(text, strength, example=number == own) if strength > 0 else _plain(text)
        for number, (text, strength) in enumerate(zip(texts, strengths, strict=True))
    )
    return _item(session, row, "".join(parts), note)


def list_of(items: Sequence[str]) -> str:
    """Return a list of examples."""
    return f"<ul class='wb-examples'>{''.join(items)}</ul>"


def _plain(text: str) -> str:
    """Return a text as HTML in which special tokens, as <|end|>, are less prominent and in one piece."""
    return _SPECIAL.sub(r"<span class='wb-special'>\g<0></span>", escape(text))


def _token(text: str, strength: float | None, *, example: bool) -> str:
    """Return a token as HTML, with a colour by its strength. example: it is the token that the item is about."""
    if strength is None:
        return f"<mark>{escape(text) or '▫'}</mark>"
    share = round(100 * min(1.0, max(0.0, strength)))
    own = " wb-own" if example else ""
    return f"<mark class='wb-shade{own}' style='--share:{share}%'>{escape(text) or '▫'}</mark>"


def _item(session: Session, row: Mapping[str, Any], text: str, note: str) -> str:
    sequence, position = str(row["sequence"]), str(row["position"])
    link = session.link("transcript", sequence=sequence, pin=position, position="", colour="expert")
    return f"<li><a href='{escape(link)}'>{text}</a> <span class='wb-muted'>{escape(note)}</span></li>"
