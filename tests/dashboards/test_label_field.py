"""A label that was typed is stored, and one that cannot be stored names the reason."""

import errno
from pathlib import Path

import pytest

from workbench.dashboards.label_field import label_field
from workbench.errors import InputError


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (None, "Saved in run.labels.jsonl."),
        (InputError("line 3: expected an <object>"), "The label was not saved: line 3: expected an &lt;object&gt;"),
        (OSError(errno.EROFS, "Read-only file system"), "cannot be written (Read-only file system)"),
    ],
)
def test_a_label_is_saved_or_the_reason_is_shown(error: Exception | None, message: str) -> None:
    stored = list[str]()

    def store(label: str) -> Path:
        if error is not None:
            raise error
        stored.append(label)
        return Path("/runs/run.labels.jsonl")

    (field, save), shown = label_field("Label of this expert", "old", store)
    field.value = "digits"
    assert shown.object == ""
    save.clicks += 1
    assert message in shown.object
    assert stored == ([] if error else ["digits"])
