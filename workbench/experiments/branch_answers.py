"""The answers of the branches of one conversation, and which continuations write a replaced sentence again."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from workbench import harmony
from workbench.capture.generation import final_text
from workbench.experiments.branch_hosts import HostModel
from workbench.experiments.branch_importance import commitment, similarity
from workbench.experiments.branching import Analysis, Branches, BranchPoint, Kind, sample, sentence_ends
from workbench.model.transformer import GptOss
from workbench.studies.intervals import wilson

_UNFINISHED = "(unfinished)"


class Answered:
    """A conversation with the answers of its branches, as category numbers; 0 is its own answer.

    similar: edit similarity from which a sentence counts as the one that it replaces.
    """

    def __init__(
        self,
        tokenizer: harmony.Tokenizer,
        one: Analysis,
        points: Sequence[BranchPoint],
        branches: Branches,
        similar: float,
    ) -> None:
        self.one, self.similar, self._tokenizer, self._codes = one, similar, tokenizer, {one.answer: 0}
        self.answers: dict[tuple[Kind, int], np.ndarray] = {}
        self.alike: dict[int, np.ndarray] = {}  # whether a continuation's first sentence is like the one it replaces
        self.continued: dict[int, list[list[int]]] = {}  # prefix and continuation from before every sentence
        for point in points:
            full = [[*point.ids, *ids] for ids in branches[point.id]]
            self.answers[point.kind, point.sentence] = np.array([self.code(ids) for ids in full])
            if point.kind == "continue" and point.sentence < one.n_sentences:
                own = one.sentence(point.sentence)
                firsts = [self._first(ids, len(own)) for ids in branches[point.id]]
                self.alike[point.sentence] = np.array([is_alike(own, first, similar) for first in firsts])
                self.continued[point.sentence] = full
        self.texts = [tokenizer.decode(one.sentence(i)).strip() for i in range(one.n_sentences)]

    def code(self, ids: Sequence[int]) -> int:
        """Return the category of the answer of a whole sequence."""
        text = final_text(np.asarray(ids), self._tokenizer)
        return self._codes.setdefault(_UNFINISHED if text is None else text, len(self._codes))

    def sides(self, number: int) -> tuple[Int[np.ndarray, " kept"], Int[np.ndarray, " other"]]:
        """Return the answers with the sentence kept or rewritten alike, and those with another in its place."""
        before, alike = self.answers["continue", number], self.alike[number]
        return np.concatenate([self.answers["continue", number + 1], before[alike]]), before[~alike]

    def expected(self) -> int | None:
        """Return the category of the expected text; −1 where no branch gave it, None where it is not known."""
        return None if self.one.row.answer is None else self._codes.get(self.one.row.answer, -1)

    def forced(self, number: int) -> tuple[float, float, float]:
        """Return the share of the own answer, with its interval, when the analysis is closed before a sentence."""
        own = (self.answers["forced", number] == 0).astype(np.float64)
        share, low, high = wilson(own, len(own))
        return float(share), float(low), float(high)

    def boundary(self) -> int | None:
        """Return after how many sentences the most frequent forced answer is the own one and stays so; None: never."""
        points = range(self.one.n_sentences + 1)
        modes = [Counter(self.answers["forced", i].tolist()).most_common(1)[0][0] == 0 for i in points]
        return commitment(modes) if modes[-1] else None

    def found_again(self, number: int, ids: Sequence[int], start: int) -> int | None:
        """Return where a sequence has a sentence like this one at or after a position, within its analysis."""
        own, end = self.one.sentence(number), self.one.header[0]
        rest = [int(t) for t in ids[start:]]
        rest = rest[: rest.index(end)] if end in rest else rest
        at = 0
        for stop in sentence_ends([self._tokenizer.decode([token]) for token in rest]) if rest else []:
            if is_alike(own, rest[at:stop], self.similar):
                return start + at
            at = stop
        return None

    def _first(self, ids: Sequence[int], length: int) -> list[int]:
        """Return the first sentence of a continuation, or as many tokens where the unit is the token."""
        if self.one.unit == "token":
            own, end = [int(t) for t in ids[:length]], self.one.header[0]
            return own[: own.index(end)] if end in own else own
        return first_sentence(self._tokenizer, ids, self.one.header[0])


def is_alike(a: list[int], b: list[int], similar: float) -> bool:
    """Return whether two sentences have at least this edit similarity."""
    if abs(len(a) - len(b)) > (1 - similar) * max(len(a), len(b)) + 1e-9:
        return False
    return a == b if similar == 1 else similarity(a, b) >= similar


def first_sentence(tokenizer: harmony.Tokenizer, ids: Sequence[int], end: int) -> list[int]:
    """Return the first sentence that a continuation writes; it also ends with the token that ends the analysis."""
    own = [int(t) for t in ids]
    own = own[: own.index(end)] if end in own else own
    texts: list[str] = []
    for i, token in enumerate(own):
        texts.append(tokenizer.decode([token]))
        ends = sentence_ends([*texts, *([tokenizer.decode([own[i + 1]])] if i + 1 < len(own) else [])])
        if ends[0] <= i + 1:
            return own[: ends[0]]
    return own


@dataclass
class _Chain:
    """A continuation from before a sentence, which is sampled again wherever it writes the sentence.

    again: where it does; None: nowhere.
    """

    number: int
    ids: list[int]
    again: int | None
    resamplings: int = 0


@dataclass(frozen=True)
class Suppressed:
    """Continuations that never write a sentence again: their answers, and how hard it was to keep it out.

    returned: of continuations with another sentence in its place, the share that writes it later. resamplings: mean
    number until it stays out, or until the rounds end.
    """

    answers: Int[np.ndarray, " sample"]
    returned: float
    resamplings: float


def suppressed(
    model: GptOss | HostModel, conversations: Sequence[Answered], rounds: int, options: dict[str, Any]
) -> dict[tuple[int, int], Suppressed]:
    """Return the continuations without each sentence, by conversation and sentence.

    A continuation that writes the sentence (or one like it) is sampled again from before that, at most `rounds` times;
    those that still have it are left out. options: of `sample`.
    """
    chains = {
        (i, number): _chains(one, number)
        for i, one in enumerate(conversations)
        if one.one.unit == "sentence"
        for number in range(one.one.n_sentences)
    }
    returned = {key: _returned(conversations[key[0]].alike[key[1]], own) for key, own in chains.items()}
    for round_ in range(rounds):
        points = {}
        for (i, number), own in chains.items():
            for chain in (chain for chain in own if chain.again is not None):
                ids = tuple(chain.ids[: chain.again])
                part = f".{chain.number}.{round_ + 1}"
                points[i, number, chain.number] = BranchPoint(conversations[i].one.row.id, number, "again", ids, part)
        new = sample(model, list(points.values()), **options | {"samples": 1}) if points else {}
        for (i, number, which), point in points.items():
            chain = chains[i, number][which]
            chain.ids = [*point.ids, *new[point.id][0]]
            chain.again, chain.resamplings = conversations[i].found_again(number, chain.ids, len(point.ids)), round_ + 1
    return {
        (i, number): Suppressed(
            np.array([conversations[i].code(chain.ids) for chain in own if chain.again is None], dtype=np.int64),
            returned[i, number],
            float(np.mean([chain.resamplings for chain in own])),
        )
        for (i, number), own in chains.items()
    }


def _chains(one: Answered, number: int) -> list[_Chain]:
    start = len(one.one.prefix(number))
    continued = one.continued[number]
    return [_Chain(n, ids, one.found_again(number, ids, start)) for n, ids in enumerate(continued)]


def _returned(alike: Bool[np.ndarray, " sample"], chains: Sequence[_Chain]) -> float:
    other = [chain.again is not None for chain, same in zip(chains, alike, strict=True) if not same]
    return float(np.mean(other)) if other else float("nan")
