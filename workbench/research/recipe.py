"""Recipes: an experiment on a prompt as one small document, with interventions that compile to the library's edits.

    recipe = Recipe(user="12+7", interventions=(Intervention("forbid", cells=((1, 5),)),))
    with applied(model, *recipe.edits(model)):
        model.generate([recipe.prompt_ids(model)], **recipe.options)

A recipe is the prompt, how the answer is sampled, and a list of interventions, each with the tokens that it acts on.
The live page stores it in its address, `workbench apply` runs it, and `wb.answers(recipe=…)` applies its interventions
to other prompts. `to_json` writes it and `from_json` reads it back; `docs/howto/live.md` describes the fields.

| kind | needs | strength |
|---|---|---|
| forbid | cells: experts masked before the top-k choice | – |
| force | cells: experts that the router always chooses | – |
| reweight | cells: experts whose gate weights are multiplied | factor |
| scale_sinks | layers: sink probabilities are multiplied | factor |
| steer | layers, toward, away: adds mean(toward) − mean(away) of the residual stream | multiple of the difference |
| knockout | layers, keys: tokens that the scope's tokens cannot attend to | – |
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from workbench import harmony
from workbench.bounded_json import parse_json, read_json
from workbench.errors import InputError
from workbench.harmony.grammar import marked_ids
from workbench.harmony.labels import CHANNELS, ROLES
from workbench.harmony.messages import EFFORTS
from workbench.harmony.transcripts import Transcript
from workbench.hooks import interventions as library
from workbench.hooks.edits import Edit
from workbench.model.sampling import Sampling
from workbench.model.transformer import GptOss
from workbench.research.directions import direction

VERSION = 1
CELL_KINDS = ("forbid", "force", "reweight")
KINDS = (*CELL_KINDS, "scale_sinks", "steer", "knockout")
DIRECTIONS = ("analysis", "commentary", "final", "prompt")  # channels whose means a direction is made of
MAX_BYTES = 200_000  # of a document
MAX_INTERVENTIONS = 32


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
    """One intervention; the module lists the kinds. cells: pairs of layer and expert."""

    kind: str
    cells: tuple[tuple[int, int], ...] = ()
    layers: tuple[int, ...] = ()
    strength: float = 1.0
    toward: str = "final"
    away: str = "analysis"
    scope: Scope = field(default_factory=Scope)
    keys: Scope = field(default_factory=Scope)

    def describe(self) -> str:
        """Return the intervention in words."""
        cells = ", ".join(f"L{layer} E{expert}" for layer, expert in self.cells)
        layers = "layer " + ", ".join(map(str, self.layers))
        what = {
            "forbid": f"forbid {cells}",
            "force": f"force {cells}",
            "reweight": f"gates of {cells} × {self.strength:g}",
            "scale_sinks": f"sinks of {layers} × {self.strength:g}",
            "steer": f"steer {layers} by {self.strength:g} × ({self.toward} − {self.away})",
            "knockout": f"hide {self.keys.describe()} in {layers}",
        }[self.kind]
        return f"{what}; acts on {self.scope.describe()}"


@dataclass(frozen=True)
class Recipe:
    """A prompt, how its answer is sampled, and interventions. begin: the text, with harmony's marks, that answers
    begin with; model: the checkpoint it was made for, as `wb.load` takes it."""

    user: str = ""
    developer: str = ""
    effort: str = "medium"
    begin: str = ""
    model: str = "nano"
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0
    max_new_tokens: int = 256
    samples: int = 1
    interventions: tuple[Intervention, ...] = ()

    def prompt_ids(self, model: GptOss) -> list[int]:
        """Return the ids of the prompt, and of what the answer begins with."""
        messages = [{"role": "developer", "content": self.developer}] if self.developer else []
        messages.append({"role": "user", "content": self.user})
        ids = harmony.render(messages, effort=self.effort, tokenizer=model.tokenizer)
        return [*ids, *marked_ids(self.begin, model.tokenizer)]

    @property
    def options(self) -> dict[str, Any]:
        """Return the options of `generate` and `generate_stream`."""
        names = ("temperature", "top_k", "top_p", "min_p", "seed", "max_new_tokens", "samples")
        options = {name: getattr(self, name) for name in names}
        return {name: value for name, value in options.items() if value is not None}

    @property
    def needs_directions(self) -> bool:
        """Return whether an intervention steers, for which `edits` needs transcripts."""
        return any(one.kind == "steer" for one in self.interventions)

    def edits(self, model: GptOss, transcripts: Sequence[Transcript] | None = None) -> list[Edit]:
        """Return the edits of all interventions in their order.

        transcripts: from whose tokens the means of a direction are taken; the live page takes the original answer.

        Raises:
            InputError: the model lacks a layer or an expert, or a direction has no tokens.
        """
        found = [edit for one in self.interventions for edit in _edits(one, model, transcripts)]
        for edit in found:
            edit.points(model)  # refuses what the model lacks
        return found

    def to_json(self, *, indent: int | None = 2) -> str:
        """Return the recipe as JSON; fields that have their defaults are left out."""
        return json.dumps({"recipe": VERSION, **_plain(self)}, ensure_ascii=False, indent=indent)

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """Return the recipe of a JSON text.

        Raises:
            InputError: the text is no recipe, or a field is unknown or not valid.
        """
        if len(text.encode()) > MAX_BYTES:
            raise InputError(f"a recipe has at most {MAX_BYTES:,} bytes, this one has {len(text.encode()):,}")
        return cls._read(parse_json(text, max_depth=8))

    @classmethod
    def from_file(cls, path: Path) -> "Recipe":
        """Return the recipe of a JSON file.

        Raises:
            InputError: the file is no recipe, or cannot be read.
        """
        try:
            return cls._read(read_json(path, max_bytes=MAX_BYTES, max_depth=8))
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}; give the path of a recipe") from error

    @classmethod
    def _read(cls, document: Any) -> "Recipe":
        if not isinstance(document, dict) or document.get("recipe") != VERSION:
            raise InputError(f'a recipe is a JSON object with "recipe": {VERSION}, as the live page saves it')
        values = _checked(cls, {name: value for name, value in document.items() if name != "recipe"}, "recipe")
        listed = values.get("interventions", [])
        if len(listed) > MAX_INTERVENTIONS:
            raise InputError(f"a recipe has at most {MAX_INTERVENTIONS} interventions, this one has {len(listed)}")
        values["interventions"] = tuple(_intervention(one) for one in listed)
        recipe = cls(**values)
        if recipe.effort not in EFFORTS:
            raise InputError(f"effort {recipe.effort!r}: choose from {', '.join(EFFORTS)}")
        if recipe.max_new_tokens < 1 or not 1 <= recipe.samples <= 256 or not 0 <= recipe.seed < 2**31:
            raise InputError("max_new_tokens counts from 1, samples from 1 to 256, seed from 0 to 2147483647")
        Sampling.of(recipe.temperature, do_sample=None, top_k=recipe.top_k, top_p=recipe.top_p, min_p=recipe.min_p)
        return recipe


def _edits(one: Intervention, model: GptOss, transcripts: Sequence[Transcript] | None) -> list[Edit]:
    """Return the edits of an intervention: of cells one for each layer."""
    tokens = one.scope.token_set(model.tokenizer)
    layers: dict[int, list[int]] = {}
    for layer, expert in one.cells:
        layers.setdefault(layer, []).append(expert)
    if one.kind == "forbid":
        return [library.forbid(layer, experts, tokens) for layer, experts in sorted(layers.items())]
    if one.kind == "force":
        return [library.force(layer, experts, tokens) for layer, experts in sorted(layers.items())]
    if one.kind == "reweight":
        return [library.reweight(layer, experts, one.strength, tokens) for layer, experts in sorted(layers.items())]
    if one.kind == "scale_sinks":
        return [library.scale_sinks(one.layers, one.strength, tokens=tokens)]
    if one.kind == "knockout":
        return [library.knockout(one.layers, tokens, one.keys.token_set(model.tokenizer))]
    if transcripts is None:
        raise InputError("a recipe that steers needs transcripts, from which the means of channels are taken")
    toward, away = {"channel": one.toward}, {"channel": one.away}
    return [
        library.steer(
            f"blocks.{layer}.hook_resid_post",
            direction(model, "resid_post", layer, a=toward, b=away, transcripts=transcripts),
            one.strength,
            tokens,
        )
        for layer in one.layers
    ]


def _intervention(document: Any) -> Intervention:
    """Return a checked intervention."""
    values = _checked(Intervention, document, "intervention")
    for name in ("scope", "keys"):
        if name in values:
            values[name] = _scope(values[name])
    for name in ("cells", "layers"):
        values[name] = tuple(tuple(v) if isinstance(v, list) else v for v in values.get(name, ()))
    if values.get("kind") not in KINDS:
        raise InputError(f"intervention kind {values.get('kind')!r}: choose from {', '.join(KINDS)}")
    one = Intervention(**values)
    numbers = [n for cell in one.cells if isinstance(cell, tuple) for n in cell] + list(one.layers)
    pairs = all(isinstance(cell, tuple) and len(cell) == 2 for cell in one.cells)
    if not pairs or not all(type(n) is int and 0 <= n < 10_000 for n in numbers) or len(numbers) > 10_000:
        raise InputError("cells are pairs [layer, expert] and layers are a list, of whole numbers from 0")
    needed = "cells" if one.kind in CELL_KINDS else "layers"
    if not getattr(one, needed):
        raise InputError(f"the intervention {one.kind!r} names no {needed}: add at least one")
    if not {one.toward, one.away} <= set(DIRECTIONS) or one.toward == one.away:
        raise InputError(f"toward and away are two of {', '.join(DIRECTIONS)}; got {one.toward!r} and {one.away!r}")
    if not math.isfinite(one.strength) or (one.kind in ("reweight", "scale_sinks") and one.strength < 0):
        raise InputError(
            f"strength {one.strength!r} of {one.kind!r}: expected a finite number, a factor from 0 upwards"
        )
    return one


def _scope(document: Any) -> Scope:
    values = _checked(Scope, document, "scope")
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


def _checked(kind: type, document: Any, what: str) -> dict[str, Any]:
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


def _plain(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that differ from their defaults."""
    default = type(value)("forbid") if isinstance(value, Intervention) else type(value)()
    found: dict[str, Any] = {}
    for f in fields(value):
        own = getattr(value, f.name)
        if own == getattr(default, f.name) and f.name != "kind":
            continue
        if isinstance(own, Scope):
            own = _plain(own)
        elif isinstance(own, tuple):
            own = [_plain(v) if isinstance(v, Intervention) else list(v) if isinstance(v, tuple) else v for v in own]
        found[f.name] = own
    return found
