"""Branches of a chain of thought: the model continues from the beginning or end of any sentence of an analysis.

A *branch point* is a prefix of a transcript, perhaps changed, from which N continuations are sampled. Their ids are
written to a file row by row, so that the same call resumes; without a file they stay in memory.

    branches = sample(model, points, samples=50, temperature=1.0, store="run.branches.jsonl")

Reference: Bogdan et al. 2025, arXiv 2506.19143; arXiv 2510.27484.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from workbench import harmony
from workbench.errors import InputError
from workbench.harmony.transcripts import Transcript
from workbench.model.transformer import GptOss
from workbench.progress import progress
from workbench.row_output import KEY, RowOutput, stamp

Kind = Literal["continue", "forced", "filler", "removed"]
COMMAND = "branches"  # that wrote a file of branches
ROWS = 64  # continuations that are generated at once
_END = re.compile(r"[.?!;。！？；\n][\"'”’)\]]*\s*$")
_BEGIN = re.compile(r"\s|$")


@dataclass(frozen=True)
class Analysis:
    """A transcript, the sentences of its last analysis, and its final answer.

    cuts: positions at which sentences begin, and that at which the last one ends. header: the ids that close the
    analysis and open the final message.
    """

    row: Transcript
    cuts: list[int]
    header: list[int]
    answer: str

    @property
    def n_sentences(self) -> int:
        """Return the number of sentences."""
        return len(self.cuts) - 1

    def sentence(self, number: int) -> list[int]:
        """Return the ids of a sentence."""
        return [int(t) for t in self.row.tokens[self.cuts[number] : self.cuts[number + 1]]]

    def prefix(self, number: int) -> list[int]:
        """Return the ids before a sentence; before all of them for 0."""
        return [int(t) for t in self.row.tokens[: self.cuts[number]]]


@dataclass(frozen=True)
class BranchPoint:
    """A prefix to continue from: of which conversation, before which sentence, and what was changed."""

    conversation: str
    sentence: int
    kind: Kind
    ids: tuple[int, ...]

    @property
    def id(self) -> str:
        """Return the name of its row in a file."""
        return f"{self.conversation}#{self.kind}{self.sentence}"


def sentence_ends(texts: Sequence[str]) -> list[int]:
    """Return after which tokens a sentence ends, given the text of each token; always after the last.

    A sentence ends with a mark (. ? ! ; or a line break); after a full stop a space must follow, as in no number.
    """
    ends = []
    for i, text in enumerate(texts):
        following = texts[i + 1] if i + 1 < len(texts) else ""
        marked = _END.search(text) is not None
        if marked and text.rstrip("\"'”’)]").endswith(".") and not _BEGIN.match(following):
            marked = False
        if marked or i + 1 == len(texts):
            ends.append(i + 1)
    return ends


def analysis_of(row: Transcript, tokenizer: harmony.Tokenizer, most: int = 20) -> Analysis | None:
    """Return the sentences of a transcript's analysis; None if it has no analysis or no finished final message.

    most: an analysis with more sentences is divided into as many groups of consecutive sentences.
    """
    messages = harmony.label(row.tokens, tokenizer=tokenizer).messages
    if len(messages) < 2:
        return None
    analysis, final = messages[-2:]
    finished = final.channel == "final" and final.closed_by in ("return", "end")
    if not finished or analysis.channel != "analysis" or analysis.stop <= analysis.content:
        return None
    ids = [int(t) for t in row.tokens[analysis.content : analysis.stop]]
    ends = sentence_ends([tokenizer.decode([token]) for token in ids])
    if len(ends) > most:
        ends = [ends[int(i)] for i in np.linspace(0, len(ends) - 1, most + 1)[1:]]
    cuts = [analysis.content, *(analysis.content + end for end in ends)]
    header = [int(t) for t in row.tokens[analysis.stop : final.content]]
    text = tokenizer.decode([int(t) for t in row.tokens[final.content : final.stop]]).strip()
    return Analysis(row, cuts, header, text)


def branch_points(one: Analysis, edits: Sequence[Kind] = (), filler: int | None = None) -> list[BranchPoint]:
    """Return the branch points of a conversation: before every sentence and after the last, on policy and forced.

    continue: the model writes on. forced: the analysis is closed and the final message opened. Edits: `filler`
    replaces the sentence before the point by as many tokens `filler`; `removed` leaves it out and keeps the next one.

    Raises:
        InputError: `filler` is asked for without a token.
    """
    name, points = one.row.id, []
    for i in range(one.n_sentences + 1):
        prefix = one.prefix(i)
        points.append(BranchPoint(name, i, "continue", tuple(prefix)))
        points.append(BranchPoint(name, i, "forced", (*prefix, *one.header)))
        if "filler" in edits and i > 0:
            if filler is None:
                raise InputError("filler: give the id of the token that fills")
            ids = (*one.prefix(i - 1), *[filler] * len(one.sentence(i - 1)))
            points.append(BranchPoint(name, i, "filler", ids))
        if "removed" in edits and 0 < i < one.n_sentences:
            points.append(BranchPoint(name, i, "removed", (*one.prefix(i - 1), *one.sentence(i))))
    return points


Branches = dict[str, list[list[int]]]  # id of a branch point → the new ids of each sample


def sample(
    model: GptOss,
    points: Sequence[BranchPoint],
    *,
    samples: int = 50,
    temperature: float = 1.0,
    max_new_tokens: int = 512,
    seed: int = 0,
    store: str | Path | None = None,
) -> Branches:
    """Return the new ids of the sampled continuations of every branch point.

    store: a JSONL file that rows are appended to; those that it has of the same job are not generated again. A
    continuation depends on the seed, its branch point and its number alone.

    Raises:
        InputError: an option is not possible, a prefix leaves no room in the context, or `store` is another job's.
    """
    if samples < 2 or not temperature > 0:
        raise InputError(f"samples={samples} at temperature {temperature:g}: expected at least 2, above temperature 0")
    if too_long := [p.id for p in points if len(p.ids) >= model.cfg.n_ctx]:
        raise InputError(f"branch point {too_long[0]!r} leaves no room in the context of {model.cfg.n_ctx} tokens")
    about = {
        "model": model.checkpoint.digest,
        "samples": samples,
        "temperature": float(temperature),
        "max_new_tokens": max_new_tokens,
        "seed": seed,
    }
    found: Branches = {}
    with _rows(store) as rows:
        known = _known(rows, points, about) if rows is not None else {}
        missing = [p for p in points if p.id not in known]
        found |= known
        size = max(1, ROWS // samples)
        order = sorted(missing, key=lambda p: len(p.ids))
        with progress("branch", len(order), "branch points") as advance:
            for chosen in (order[start : start + size] for start in range(0, len(order), size)):
                seeds = [_seed(seed, p, n) for p in chosen for n in range(samples)]
                new = model.generate(
                    [list(p.ids) for p in chosen],
                    samples=samples,
                    temperature=temperature,
                    max_new_tokens=max_new_tokens,
                    seed=seeds,
                    return_type="new_tokens",
                )
                for i, point in enumerate(chosen):
                    found[point.id] = new[i * samples : (i + 1) * samples]
                    if rows is not None:
                        row = {"id": point.id, "prefix": list(point.ids), "branches": found[point.id]}
                        rows.write(stamp(row, COMMAND, **about))
                advance(len(chosen))
    return {p.id: found[p.id] for p in points}


@contextmanager
def _rows(store: str | Path | None) -> Iterator[RowOutput | None]:
    if store is None:
        yield None
        return
    with RowOutput(store, command=COMMAND) as rows:
        yield rows


def _known(rows: RowOutput, points: Sequence[BranchPoint], about: Mapping[str, Any]) -> Branches:
    """Return the branches that a file has of this job.

    Raises:
        InputError: a row of the file is another job's.
    """
    by_id = {p.id: p for p in points}
    found: Branches = {}
    for id, row in rows.known.items():
        for name, wanted in about.items():
            if (begun := row["meta"][KEY].get(name)) != wanted:
                raise InputError(
                    f"{rows.path} was begun with {name} {begun}, this call has {wanted}: name another file"
                )
        if id in by_id:
            if tuple(row["prefix"]) != by_id[id].ids:
                raise InputError(f"{rows.path} has the row {id!r} with another prefix: name another file")
            found[id] = row["branches"]
    return found


def _seed(seed: int, point: BranchPoint, number: int) -> int:
    """Return the seed of a continuation, which no other branch point shares."""
    text = f"{seed}\t{point.id}\t{point.ids}\t{number}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6])
