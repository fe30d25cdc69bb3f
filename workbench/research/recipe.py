"""Recipes: an experiment on a prompt as one small document, with interventions that compile to the library's edits.

    recipe = Recipe(user="12+7", interventions=(Intervention("forbid", cells=((1, 5),)),))
    with applied(model, *recipe.edits(model)):
        model.generate([recipe.prompt_ids(model)], **recipe.options)

A recipe is the prompt, how the answer is sampled, and a list of interventions, each with the tokens that it acts on;
`workbench.research.intervention` lists their kinds. The live page stores it in its address, `workbench apply` runs it,
and `wb.answers(recipe=…)` applies its interventions to other prompts. `to_json` writes it and `from_json` reads it
back; `docs/howto/live.md` describes the fields.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from workbench import harmony
from workbench.bounded_json import parse_json, read_json
from workbench.errors import InputError
from workbench.harmony.grammar import marked_ids
from workbench.harmony.messages import EFFORTS
from workbench.harmony.transcripts import Transcript
from workbench.hooks.edits import Edit
from workbench.model.sampling import Sampling
from workbench.model.transformer import GptOss
from workbench.research.intervention import (
    CELL_KINDS,
    DIRECTIONS,
    KINDS,
    Intervention,
    Scope,
    checked_fields,
    plain_fields,
    read_intervention,
)
from workbench.research.intervention_edits import check_intervention, edits_of
from workbench.research.steering_sources import SteeringSources

__all__ = ["CELL_KINDS", "DIRECTIONS", "KINDS", "Intervention", "Recipe", "Scope"]

VERSION = 1
MAX_BYTES = 200_000  # of a document
MAX_INTERVENTIONS = 32
MAX_TURNS = 100


@dataclass(frozen=True)
class Recipe:
    """A prompt, how its answer is sampled, and interventions.

    history: earlier turns, as pairs of user message and final answer. begin: the text, with harmony's marks, that
    answers begin with. expected: the known answer, with which final answers are compared. model: the checkpoint it was
    made for, as `wb.load` takes it.
    """

    user: str = ""
    developer: str = ""
    effort: str = "medium"
    begin: str = ""
    history: tuple[tuple[str, str], ...] = ()
    expected: str = ""
    model: str = "nano"
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0
    max_new_tokens: int = 256
    samples: int = 1
    interventions: tuple[Intervention, ...] = ()

    def messages(self, user: str = "") -> list[dict[str, str]]:
        """Return the messages of the prompt, with another last user message if one is given."""
        turns = [{"role": "developer", "content": self.developer}] if self.developer else []
        for asked, answered in self.history:
            turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        return [*turns, {"role": "user", "content": user or self.user}]

    def prompt_ids(self, model: GptOss) -> list[int]:
        """Return the ids of the prompt, and of what the answer begins with."""
        return [*self._prompt(model), *marked_ids(self.begin, model.tokenizer)]

    def _prompt(self, model: GptOss, user: str = "", effort: str = "") -> list[int]:
        return harmony.render(self.messages(user), effort=effort or self.effort, tokenizer=model.tokenizer)

    def prompt_of(self, model: GptOss) -> Callable[[str, str], list[int]]:
        """Return a function of a user message and an effort (empty: the recipe's) that returns the prompt's ids."""
        return partial(self._prompt, model)

    @property
    def options(self) -> dict[str, Any]:
        """Return the options of `generate` and `generate_stream`."""
        names = ("temperature", "top_k", "top_p", "min_p", "seed", "max_new_tokens", "samples")
        options = {name: getattr(self, name) for name in names}
        return {name: value for name, value in options.items() if value is not None}

    @property
    def needs_directions(self) -> bool:
        """Return whether an intervention steers between channels, for which `edits` needs transcripts."""
        return any(one.needs_answer for one in self.interventions)

    def check_other_prompts(self) -> None:
        """Check that the interventions can be applied to other prompts than the recipe's own.

        Raises:
            InputError: one patches states from another prompt, which are those of this prompt's positions.
        """
        if any(one.kind == "patch" for one in self.interventions):
            raise InputError(
                "a recipe with a patch applies to its own prompt only: remove the intervention 'patch', or use "
                "`workbench study patching` for many prompts"
            )

    def edits(
        self,
        model: GptOss,
        transcripts: Sequence[Transcript] | None = None,
        *,
        sources: SteeringSources | None = None,
    ) -> list[Edit]:
        """Return the edits of all interventions in their order.

        transcripts: from whose tokens the means of channels are taken; the live page takes the original answer.
        sources: the vectors and autoencoders that interventions name.

        Raises:
            InputError: the model lacks a layer or an expert, a direction has no tokens, or a source is not known.
        """
        return [edit for one in self.interventions for edit in self.edits_of(one, model, transcripts, sources=sources)]

    def edits_of(
        self,
        one: Intervention,
        model: GptOss,
        transcripts: Sequence[Transcript] | None = None,
        *,
        sources: SteeringSources | None = None,
    ) -> list[Edit]:
        """Return the edits of one intervention on this prompt; see `edits`.

        Raises:
            InputError: as `edits`.
        """
        edits = edits_of(one, model, transcripts, sources or SteeringSources(), self.prompt_of(model))
        for edit in edits:
            edit.points(model)  # refuses what the model lacks
        return edits

    def check(self, one: Intervention, model: GptOss, sources: SteeringSources | None = None) -> None:
        """Check an intervention against the model and this prompt, without a pass over any tokens.

        Raises:
            InputError: the model lacks what it names, a source is not known, or the other prompt has another length.
        """
        check_intervention(one, model, sources or SteeringSources(), self.prompt_of(model))

    def to_json(self, *, indent: int | None = 2) -> str:
        """Return the recipe as JSON; fields that have their defaults are left out."""
        return json.dumps({"recipe": VERSION, **plain_fields(self)}, ensure_ascii=False, indent=indent)

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """Return the recipe of a JSON text.

        Raises:
            InputError: the text is not a recipe, or a field is unknown or not valid.
        """
        if (size := len(text.encode("utf-8", "surrogatepass"))) > MAX_BYTES:
            raise InputError(f"a recipe has at most {MAX_BYTES:,} bytes, this one has {size:,}")
        return cls._read(parse_json(text, max_depth=8))

    @classmethod
    def from_file(cls, path: Path) -> "Recipe":
        """Return the recipe of a JSON file.

        Raises:
            InputError: the file is not a recipe, or cannot be read.
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
        try:
            json.dumps(document, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise InputError("a text of the recipe has half a surrogate pair, which is no character") from error
        values = checked_fields(cls, {name: value for name, value in document.items() if name != "recipe"}, "recipe")
        listed = values.get("interventions", [])
        if len(listed) > MAX_INTERVENTIONS:
            raise InputError(f"a recipe has at most {MAX_INTERVENTIONS} interventions, this one has {len(listed)}")
        values["interventions"] = tuple(read_intervention(one) for one in listed)
        values["history"] = _read_history(values.get("history", []))
        recipe = cls(**values)
        if recipe.effort not in EFFORTS:
            raise InputError(f"effort {recipe.effort!r}: choose from {', '.join(EFFORTS)}")
        if recipe.max_new_tokens < 1 or not 1 <= recipe.samples <= 256 or not 0 <= recipe.seed < 2**31:
            raise InputError("max_new_tokens counts from 1, samples from 1 to 256, seed from 0 to 2147483647")
        Sampling.of(recipe.temperature, do_sample=None, top_k=recipe.top_k, top_p=recipe.top_p, min_p=recipe.min_p)
        return recipe


def _read_history(turns: list[Any]) -> tuple[tuple[str, str], ...]:
    """Return the earlier turns of a document.

    Raises:
        InputError: there are too many, or one is not a pair of texts.
    """
    if len(turns) > MAX_TURNS:
        raise InputError(f"a recipe has at most {MAX_TURNS} earlier turns, this one has {len(turns)}")
    for turn in turns:
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise InputError(f"history: {turn!r:.60} is not a pair of texts, [user message, final answer]")
    return tuple((asked, answered) for asked, answered in turns)
