"""Examples in their context as HTML: a token of an expert, a neuron or a feature; each opens its conversation there.

The tokens of a list are below each other, so that what they share is easy to see: a line has the note, the text
before the token, the token, and the text after it. What does not fit into the line is in its title.
"""

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
    before, token, after = (str(row[name]) for name in ("before", "token", "after"))
    line = _line(_plain(before), _token(token, strength, example=True), _plain(after))
    return _item(session, row, line, note, f"{before}{token}{after}")


def coloured_example(
    session: Session, row: Mapping[str, Any], texts: Sequence[str], strengths: Sequence[float], note: str
) -> str:
    """Return a list item with the colour of every token by its strength, from 0 to 1; those of 0 have none.

    row: `sequence`, `position`, and `start`, the position of the first of `texts`; the example's own token has a frame.
    """
    own = int(row["position"]) - int(row["start"])
    parts = [
        _token(text, strength, example=number == own) if strength > 0 or number == own else _plain(text)
        for number, (text, strength) in enumerate(zip(texts, strengths, strict=True))
    ]
    line = _line("".join(parts[:own]), "".join(parts[own : own + 1]), "".join(parts[own + 1 :]))
    return _item(session, row, line, note, "".join(texts))


def list_of(items: Sequence[str]) -> str:
    """Return a list of examples."""
    return f"<ul class='wb-examples'>{''.join(items)}</ul>"


def _plain(text: str) -> str:
    """Return a text as HTML in which special tokens, as <|end|>, are less prominent and in one piece."""
    return _SPECIAL.sub(r"<span class='wb-special'>\g<0></span>", escape(text.replace("\n", "↵")))


def _token(text: str, strength: float | None, *, example: bool) -> str:
    """Return a token as HTML, with a colour by its strength. example: it is the token that the item is about."""
    text = text.replace("\n", "↵")
    if strength is None:
        return f"<mark>{escape(text) or '▫'}</mark>"
    share = round(100 * min(1.0, max(0.0, strength)))
    own = " wb-own" if example else ""
    return f"<mark class='wb-shade{own}' style='--share:{share}%'>{escape(text) or '▫'}</mark>"


def _line(before: str, token: str, after: str) -> str:
    return (
        f"<span class='wb-before'><span>{before}</span></span><span>{token}</span><span class='wb-after'>{after}</span>"
    )


def _item(session: Session, row: Mapping[str, Any], line: str, note: str, text: str) -> str:
    sequence, position = str(row["sequence"]), str(row["position"])
    link = session.link("transcript", sequence=sequence, pin=position, position="", colour="expert")
    value = f"<span class='wb-muted'>{escape(note)}</span>"
    return f"<li>{value}<a href='{escape(link)}' title='{escape(text)}'>{line}</a></li>"
