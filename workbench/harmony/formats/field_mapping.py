"""Rows of any shape whose fields are named by the user, or by a format that holds many conversations in one object.

A path leads to a value by the names of fields and the numbers of entries, joined by dots: `request.messages` or
`choices.0.text`. `.` is the row itself, and a path after `/` begins at the object that holds the rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from workbench.errors import InputError
from workbench.harmony.formats.row_fields import IMAGES, storable
from workbench.harmony.labels import ROLES
from workbench.harmony.messages import shown

NAMES = (
    "messages",
    "prompt",
    "response",
    "reasoning",
    "text",
    "system",
    "id",
    "prompt_id",
    "effort",
    "expected",
    "correct",
    "finish_reason",
)
_READ_AS = {"expected": "target"}  # the name under which readers of rows look for it, where it is another
_CONVERSATIONS = ({"messages"}, {"prompt", "response"}, {"text"})  # the names that make a conversation
_ABSENT = object()


@dataclass(frozen=True)
class FieldMapping:
    """Which values of an object are the fields of a conversation.

    fields: a path for each name of NAMES. rows: the path of a list in each object whose entries are the rows; "" if the
    object is a row. roles: harmony's role for each role that another program gave its messages.
    """

    fields: Mapping[str, str] = field(default_factory=dict)
    rows: str = ""
    roles: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the names and that they make a conversation.

        Raises:
            InputError: a name or a role is unknown, a path is empty, or the names do not make a conversation.
        """
        if wrong := [role for role in self.roles.values() if role not in ROLES]:
            raise InputError(f"--role …={wrong[0]}: choose from {', '.join(ROLES)}")
        if self.roles and not {"messages", "prompt"} & {*self.fields}:
            raise InputError("--role: name the field of the messages with --field messages=PATH")
        if unknown := [name for name in self.fields if name not in NAMES]:
            raise InputError(f"--field {unknown[0]}=…: choose from {', '.join(NAMES)}")
        if self.fields and not any(names <= {*self.fields} for names in _CONVERSATIONS):
            raise InputError("--field: name the field of messages, those of prompt and response, or that of text")
        if empty := [name for name, path in self.fields.items() if not path.removeprefix("/")]:
            raise InputError(f"--field {empty[0]}=: name the path of the field, such as {empty[0]}=request.{empty[0]}")

    def expanded(self, value: Any, where: str) -> Iterator[tuple[str, Any]]:
        """Yield each row of an object, with its place: under the names of NAMES, and all else as metadata.

        Without fields, the entries of the list are yielded as they are. What cannot be a row is an `InputError`.
        """
        if not self.rows:
            yield where, self._row(value, {}) if self.fields else value
            return
        entries = _at(value, self.rows)
        if not isinstance(entries, list):
            yield where, InputError(f"it has no list {self.rows}; {_fields_of(value)}")
            return
        around = _without(value, [self.rows]) if isinstance(value, Mapping) else {}
        for number, entry in enumerate(entries, 1):
            yield f"{where}, {self.rows} {number}", self._row(entry, around) if self.fields else entry

    def _row(self, entry: Any, around: Mapping[str, Any]) -> dict[str, Any] | InputError:
        values = {name: self._value(path, entry, around) for name, path in self.fields.items()}
        present = {name: value for name, value in values.items() if value is not _ABSENT and value is not None}
        if not any(names <= {*present} for names in _CONVERSATIONS):
            missing = next(name for name in self.fields if name not in present)
            return InputError(f"it has no {self.fields[missing]} ({missing}); {_fields_of(entry)}")
        inside = [path for path in self.fields.values() if path[0] not in "./"]
        rest = _without(entry, inside) if isinstance(entry, Mapping) else {}
        outside = _without(around, [path[1:] for path in self.fields.values() if path[0] == "/"])
        rest |= {"document": outside} if outside else {}
        images = {name: rest.pop(name) for name in IMAGES & {*rest}}
        meta, all_stored = storable(rest)
        return {
            **images,
            **{_READ_AS.get(name, name): self._with_roles(value) for name, value in present.items()},
            "meta": meta,
            "notes": [] if all_stored else ["fields_left_out"],
        }

    def _with_roles(self, value: Any) -> Any:
        """Return messages with harmony's roles, and anything else as it is."""
        if not self.roles or not isinstance(value, list) or not all(isinstance(one, Mapping) for one in value):
            return value
        return [{**one, "role": self.roles.get(one.get("role", ""), one.get("role"))} for one in value]

    def _value(self, path: str, entry: Any, around: Mapping[str, Any]) -> Any:
        if path == ".":
            return entry
        return _at(around, path[1:]) if path[0] == "/" else _at(entry, path)


def _at(value: Any, path: str) -> Any:
    """Return the value at a path, a marker if there is none. A field's own name may hold dots."""
    if isinstance(value, Mapping) and path in value:
        return value[path]
    for end in [i for i, character in enumerate(path) if character == "."]:
        first, rest = path[:end], path[end + 1 :]
        inner = _entry(value, first)
        if inner is not _ABSENT and (last := _at(inner, rest)) is not _ABSENT:
            return last
    return _entry(value, path)


def _entry(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        return value.get(name, _ABSENT)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes) and name.isdecimal():
        return value[int(name)] if int(name) < len(value) else _ABSENT
    return _ABSENT


def _without(value: Mapping[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    """Return an object without the values at paths of field names; lists stay as they are."""
    rest = dict(value)
    for path in paths:
        if path in rest:
            del rest[path]
            continue
        for end in [i for i, character in enumerate(path) if character == "."]:
            inner = rest.get(path[:end])
            if isinstance(inner, Mapping) and _at(inner, path[end + 1 :]) is not _ABSENT:
                rest[path[:end]] = _without(inner, [path[end + 1 :]])
                break
    return {name: inner for name, inner in rest.items() if inner not in (None, "", [], {})}


def _fields_of(value: Any) -> str:
    if not isinstance(value, Mapping):
        return f"it is {shown(value)}"
    return f"its fields are {', '.join(map(shown, list(value)[:20]))}"


def parse_pairs(option: str, pairs: Sequence[str]) -> dict[str, str]:
    """Return NAME=VALUE pairs of an option as an object.

    Raises:
        InputError: a pair has no `=`, or a name comes twice.
    """
    values: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or name in values:
            raise InputError(f"{option} {shown(pair)}: expected two parts with = between them, each name once")
        values[name] = value
    return values


# The findings of the red-teaming challenge for gpt-oss-20b, by the schema that its submissions had: a text with marks
# for each conversation.
FINDINGS = FieldMapping({"text": "."}, rows="harmony_response_walkthroughs")


def is_findings(value: Any) -> bool:
    """Return whether an object is one of these findings, with a text with marks."""
    texts = value.get(FINDINGS.rows) if isinstance(value, Mapping) else None
    return isinstance(texts, list) and any(isinstance(text, str) and "<|start|>" in text for text in texts)
