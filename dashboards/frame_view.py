"""Store the selection inside a frame (a conversation, a graph, attention patterns) in the page's address.

The frame posts a message with its choices, the script of page.html puts them into a hidden text field as JSON, and the
field's callback stores those that have a known name and a harmless value.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import panel as pn

from workbench.bounded_json import parse_json
from workbench.dashboards.session import Session
from workbench.errors import InputError

_VALUE = re.compile(r"[\w .:|%-]{0,900}")


def chosen_view(text: str, names: Sequence[str]) -> dict[str, str]:
    """Return the choices in a message of a frame by name; whatever a frame does not send is left out."""
    try:
        view = parse_json(text[:4000])
    except InputError:
        return {}
    if not isinstance(view, dict):
        return {}
    return {name: str(value) for name, value in view.items() if name in names and _VALUE.fullmatch(str(value))}


def view_input(
    session: Session, names: Sequence[str], stored: Callable[[dict[str, str]], None] | None = None
) -> pn.widgets.TextInput:
    """Return the hidden text field that the script of page.html fills. stored: called after the choices are stored."""
    field = pn.widgets.TextInput(css_classes=["wb-view"], visible=False)

    def changed(event: Any) -> None:
        view = chosen_view(str(event.new), names)
        session.put(**view)
        if stored is not None:
            stored(view)

    field.param.watch(changed, "value")
    return field
