"""A field for a label that is written to a file beside the run, with a button that saves it."""

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import panel as pn

from workbench.dashboards import widgets
from workbench.errors import InputError
from workbench.studies.label_files import MAX_LABEL

_WIDTH = {"sizing_mode": "stretch_width", "max_width": 760}


def label_field(title: str, label: str, store: Callable[[str], Path], *, placeholder: str = "") -> pn.Column:
    """Return a field with a label, a button that saves it, and a line that states whether it was saved.

    store: writes the label that was typed, and returns the path of the file.
    """
    field = pn.widgets.TextInput(label=title, value=label, placeholder=placeholder, max_length=MAX_LABEL, **_WIDTH)
    save = pn.widgets.Button(label="Save label", width=110, margin=(22, 5, 5, 5))
    message = widgets.html("")

    def clicked(_: Any) -> None:
        try:
            path = store(str(field.value_input or field.value))
        except InputError as error:
            text = f"The label was not saved: {error}"
        except OSError as error:
            text = f"The label was not saved: the run's folder cannot be written ({error.strerror})."
        else:
            text = f"Saved in {path.name}."
        message.object = f"<p role='status' class='wb-muted'>{escape(text)}</p>"

    save.on_click(clicked)
    return pn.Column(pn.Row(field, save, sizing_mode="stretch_width"), message, sizing_mode="stretch_width")
