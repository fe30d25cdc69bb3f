"""One intervention of a recipe as a document: its kind, what it acts on, and its checks.

| kind | needs | strength |
|---|---|---|
| forbid | cells: experts masked before the top-k choice | – |
| force | cells: experts that the router always chooses | – |
| reweight | cells: experts whose gate weights are multiplied | factor |
| scale_sinks | layers, heads: sink probabilities are multiplied | factor |
| scale_heads | layers, heads: outputs of heads are multiplied, 0 ablates them | factor |
| steer | layers, toward, away: adds mean(toward) − mean(away) of the stream, of channels or efforts | multiple |
| vector | layers, source: adds a saved vector, by the name that the program was given for it | multiple |
| feature | source, feature: adds the decoder vector of an SAE's feature, at its own hook or at layers | multiple |
| patch | layers, source: residual stream of the prompt with another user message, or at another effort | – |
| knockout | layers, heads, keys: tokens that the scope's tokens cannot attend to | – |

Layers mean the residual stream after them. Without heads every head is meant.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from workbench import harmony
from workbench.errors import InputError
from workbench.harmony.labels import CHANNELS, ROLES
from workbench.harmony.messages import EFFORTS

CELL_KINDS = ("forbid", "force", "reweight")
HEAD_KINDS = ("scale_sinks", "scale_heads", "knockout")
STEERING_KINDS = ("steer", "vector", "feature")
FACTOR_KINDS = ("reweight", "scale_sinks", "scale_heads")  # their strength is a factor from 0 upwards
STRENGTH_KINDS = (*FACTOR_KINDS, *STEERING_KINDS)
MAX_STRENGTH = 1e30  # activations times a larger one are not finite in float32 and bfloat16
KINDS = (*CELL_KINDS, "scale_sinks", "scale_heads", *STEERING_KINDS, "patch", "knockout")
CHANNEL_DIRECTIONS = ("analysis", "commentary", "final", "prompt")  # channels whose means a direction is made of
DIRECTIONS = (*CHANNEL_DIRECTIONS, *EFFORTS)


@dataclass(frozen=True)
class Scope:
    """The tokens that an intervention acts on: those of these channels and roles, at positions from start to stop.

    Without a channel or a role every one is meant. Positions count from 0, `stop` is not included.
    """

    channel: tuple[str, ...] = ()
    role: tuple[str, ...] = ()
    start: int = 0
    stop: int | None = None

    def token_set(self, tokenizer: harmony.Tokenizer) -> harmony.TokenSet | None:
        """Return the token set, or None for every token."""
        if self == Scope():
            return None
        at = slice(self.start, self.stop) if self.start or self.stop is not None else None
        return harmony.token_set(tokenizer=tokenizer, channel=self.channel or None, role=self.role or None, position=at)

    def describe(self) -> str:
        """Return the scope in words."""
        parts = [" and ".join(self.channel), " and ".join(self.role)]
        if self.start or self.stop is not None:
            parts.append(f"positions {self.start} to {'the end' if self.stop is None else self.stop - 1}")
        return ", ".join(filter(None, parts)) or "all tokens"


@dataclass(frozen=True)
class Intervention:
    """One intervention; the module lists the kinds. cells: pairs of layer and expert.

    source: the name of a vector or an SAE, or the user message of the other prompt (empty: the same message).
    source_effort: reasoning effort of the other prompt (empty: the same effort).
    """

    kind: str
    cells: tuple[tuple[int, int], ...] = ()
    layers: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    strength: float = 1.0
    toward: str = "final"
    away: str = "analysis"
    source: str = ""
    source_effort: str = ""
    feature: int = 0
    scope: Scope = field(default_factory=Scope)
    keys: Scope = field(default_factory=Scope)

    @property
    def needs_answer(self) -> bool:
        """Return whether it steers between channels, whose means are taken from an answer."""
        return self.kind == "steer" and self.toward in CHANNEL_DIRECTIONS

    def describe(self) -> str:
        """Return the intervention in words."""
        cells = ", ".join(f"L{layer} E{expert}" for layer, expert in self.cells)
        layers = "layer " + ", ".join(map(str, self.layers)) if self.layers else "the SAE's layer"
        if self.heads:
            layers += ", head " + ", ".join(map(str, self.heads))
        heads = layers if self.heads else f"all heads of {layers}"
        what = {
            "forbid": f"forbid {cells}",
            "force": f"force {cells}",
            "reweight": f"gates of {cells} × {self.strength:g}",
            "scale_sinks": f"sinks of {layers} × {self.strength:g}",
            "scale_heads": f"outputs of {heads} × {self.strength:g}" if self.strength else f"ablate {heads}",
            "steer": f"steer {layers} by {self.strength:g} × ({self.toward} − {self.away})",
            "vector": f"steer {layers} by {self.strength:g} × vector {self.source!r}",
            "feature": f"steer {layers} by {self.strength:g} × feature {self.feature} of {self.source!r}",
            "patch": f"patch {layers} from {self._other_prompt()}",
            "knockout": f"hide {self.keys.describe()} in {layers}",
        }[self.kind]
        return f"{what}; acts on {self.scope.describe()}"

    def _other_prompt(self) -> str:
        message = f"the prompt {self.source[:40]!r}" if self.source else "the same prompt"
        return message + (f" at {self.source_effort} effort" if self.source_effort else "")


def read_intervention(document: Any) -> Intervention:
    """Return the intervention of a JSON object.

    Raises:
        InputError: a field is unknown or not valid, or one that the kind needs is missing.
    """
    values = checked_fields(Intervention, document, "intervention")
    for name in ("scope", "keys"):
        if name in values:
            values[name] = _read_scope(values[name])
    for name in ("cells", "layers", "heads"):
        values[name] = tuple(tuple(v) if isinstance(v, list) else v for v in values.get(name, ()))
    if values.get("kind") not in KINDS:
        raise InputError(f"intervention kind {values.get('kind')!r}: choose from {', '.join(KINDS)}")
    one = Intervention(**values)
    _check_numbers(one)
    _check_direction(one)
    low = 0.0 if one.kind in FACTOR_KINDS else -MAX_STRENGTH
    if not low <= one.strength <= MAX_STRENGTH:  # NaN is refused, too
        raise InputError(f"strength {one.strength!r} of {one.kind!r}: expected a number from {low:g} to 1e30")
    return one


def _check_numbers(one: Intervention) -> None:
    indices = [*one.layers, *one.heads]
    numbers = [n for cell in one.cells if isinstance(cell, tuple) for n in cell] + indices
    pairs = all(isinstance(cell, tuple) and len(cell) == 2 for cell in one.cells)
    if not pairs or not all(type(n) is int and 0 <= n < 10_000 for n in numbers) or len(numbers) > 10_000:
        raise InputError("cells are pairs [layer, expert]; layers and heads are lists, of whole numbers from 0")
    needed = "cells" if one.kind in CELL_KINDS else "layers"
    if not getattr(one, needed) and one.kind != "feature":  # an SAE's folder names its own hook point
        raise InputError(f"the intervention {one.kind!r} names no {needed}: add at least one")
    if one.heads and one.kind not in HEAD_KINDS:
        raise InputError(f"the intervention {one.kind!r} has no heads: remove them, or use {', '.join(HEAD_KINDS)}")
    if one.feature < 0:
        raise InputError(f"feature {one.feature}: features are counted from 0")


def _check_direction(one: Intervention) -> None:
    pair, families = (one.toward, one.away), (CHANNEL_DIRECTIONS, EFFORTS)
    if one.toward == one.away or not any(set(pair) <= set(family) for family in families):
        raise InputError(
            f"toward and away are two of {', '.join(CHANNEL_DIRECTIONS)}, or two of {', '.join(EFFORTS)}; "
            f"got {one.toward!r} and {one.away!r}"
        )
    if one.kind in ("vector", "feature") and not one.source:
        raise InputError(f"the intervention {one.kind!r} names no source: give the name of a vector or an SAE")
    if one.source_effort and one.source_effort not in EFFORTS:
        raise InputError(f"source_effort {one.source_effort!r}: choose from {', '.join(EFFORTS)}, or leave it out")
    if one.kind == "patch" and not one.source and not one.source_effort:
        raise InputError(
            "the intervention 'patch' names no other prompt: give another user message (source), an effort "
            "(source_effort), or both"
        )


def _read_scope(document: Any) -> Scope:
    values = checked_fields(Scope, document, "scope")
    for name, known in (("channel", CHANNELS), ("role", ROLES)):
        values[name] = tuple(values.get(name, ()))
        if wrong := [v for v in values[name] if v not in known]:
            raise InputError(f"{name} {wrong[0]!r} in a scope: choose from {', '.join(known)}")
    scope = Scope(**values)
    if scope.start < 0 or (scope.stop is not None and scope.stop <= scope.start):
        raise InputError(
            f"a scope has positions from {scope.start} to {scope.stop}: expected 0 or more, stop above start"
        )
    return scope


def checked_fields(kind: type, document: Any, what: str) -> dict[str, Any]:
    """Return the fields of a document, each of the type that the class has for it.

    Raises:
        InputError: a field is unknown or of another type.
    """
    if not isinstance(document, Mapping):
        raise InputError(f"a{'n' if what[0] == 'i' else ''} {what} is a JSON object, got {document!r:.60}")
    types = {f.name: f.type.__name__ if isinstance(f.type, type) else str(f.type) for f in fields(kind)}
    for name, value in document.items():
        if name not in types:
            raise InputError(f"{what}: {name!r} is unknown; the fields are {', '.join(types)}")
        wanted = types[name]
        if wanted.startswith("tuple"):
            right = isinstance(value, list)
        elif wanted.startswith("float"):
            right = isinstance(value, int | float) and not isinstance(value, bool)
        elif wanted.startswith("int"):
            right = type(value) is int
        else:
            right = isinstance(value, str if wanted.startswith("str") else dict)
        if not right and not (value is None and wanted.endswith("None")):
            raise InputError(f"{what}: {name} is {value!r:.60}, expected {wanted.replace('tuple', 'list')}")
    floats = [name for name, value in document.items() if types[name].startswith("float") and value is not None]
    return dict(document) | {name: float(document[name]) for name in floats}


def plain_fields(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that differ from their defaults."""
    default = type(value)("forbid") if isinstance(value, Intervention) else type(value)()
    fields_by_name: dict[str, Any] = {}
    for f in fields(value):
        own = getattr(value, f.name)
        if own == getattr(default, f.name) and f.name != "kind":
            continue
        if isinstance(own, Scope):
            own = plain_fields(own)
        elif isinstance(own, tuple):
            own = [
                plain_fields(v) if isinstance(v, Intervention) else list(v) if isinstance(v, tuple) else v for v in own
            ]
        fields_by_name[f.name] = own
    return fields_by_name
