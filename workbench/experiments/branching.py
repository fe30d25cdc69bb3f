"""Branches of a chain of thought: the model continues from any sentence or token of an analysis.

A *branch point* is a prefix of a transcript, perhaps changed, from which N continuations are sampled. Their ids are
written to a file row by row, so that the same call resumes; without a file they stay in memory. The model is one that
is loaded, or one at a host (`branch_hosts.HostModel`).

    points = token_points(row, range(row.n_prompt, len(row.tokens)))
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
from workbench.experiments.branch_edits import EditKind, Editor
from workbench.experiments.branch_hosts import HostModel
from workbench.harmony.transcripts import Transcript
from workbench.model.transformer import GptOss
from workbench.progress import progress
from workbench.row_output import KEY, RowOutput, stamp

Kind = Literal["continue", "forced", "again"] | EditKind
Unit = Literal["sentence", "token"]
COMMAND = "branches"  # that wrote a file of branches
ROWS = 64  # continuations that are generated at once
_END = re.compile(r"[.?!;。！？；\n][\"'”’)\]]*\s*$")
_BEGIN = re.compile(r"\s|$")


@dataclass(frozen=True)
class Analysis:
    """A transcript, the sentences of its last analysis, and its final answer.

    cuts: positions at which sentences begin, and that at which the last one ends. header: the ids that close the
    analysis and open the final message. unit: whether "sentences" are groups of sentences, or of tokens.
    """

    row: Transcript
    cuts: list[int]
    header: list[int]
    answer: str
    unit: Unit = "sentence"

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
    """A prefix to continue from: of which conversation, before which sentence (or token), and what was changed.

    part: distinguishes several points of one sentence.
    """

    conversation: str
    sentence: int
    kind: Kind
    ids: tuple[int, ...]
    part: str = ""

    @property
    def id(self) -> str:
        """Return the name of its row in a file."""
        return f"{self.conversation}#{self.kind}{self.sentence}{self.part}"


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


def analysis_of(
    row: Transcript, tokenizer: harmony.Tokenizer, most: int = 20, unit: Unit = "sentence"
) -> Analysis | None:
    """Return the sentences of a transcript's analysis; None if it has no analysis or no finished final message.

    most: an analysis with more sentences is divided into as many groups of consecutive sentences. unit: "token" makes
    every token a sentence.
    """
    messages = harmony.label(row.tokens, tokenizer=tokenizer).messages
    if len(messages) < 2:
        return None
    analysis, final = messages[-2:]
    finished = final.channel == "final" and final.closed_by in ("return", "end")
    if not finished or analysis.channel != "analysis" or analysis.stop <= analysis.content:
        return None
    ids = [int(t) for t in row.tokens[analysis.content : analysis.stop]]
    by_token = list(range(1, len(ids) + 1))
    ends = by_token if unit == "token" else sentence_ends([tokenizer.decode([token]) for token in ids])
    if len(ends) > most:
        ends = [ends[int(i)] for i in np.linspace(0, len(ends) - 1, most + 1)[1:]]
    cuts = [analysis.content, *(analysis.content + end for end in ends)]
    header = [int(t) for t in row.tokens[analysis.stop : final.content]]
    text = tokenizer.decode([int(t) for t in row.tokens[final.content : final.stop]]).strip()
    return Analysis(row, cuts, header, text, unit)


def token_points(row: Transcript, positions: Sequence[int]) -> list[BranchPoint]:
    """Return a branch point before each of these tokens of a transcript, of whatever channel.

    Raises:
        InputError: a position is not within the transcript after its first token.
    """
    if wrong := [at for at in positions if not 0 < at <= len(row.tokens)]:
        raise InputError(f"position {wrong[0]}: {row.id} has {len(row.tokens)} tokens; expected 1 to {len(row.tokens)}")
    ids = tuple(int(t) for t in row.tokens)
    return [BranchPoint(row.id, int(at), "continue", ids[:at], "t") for at in positions]


def branch_points(one: Analysis, edits: Sequence[EditKind] = (), editor: Editor | None = None) -> list[BranchPoint]:
    """Return the branch points of a conversation: before every sentence and after the last, on policy and forced.

    continue: the model writes on. forced: the analysis is closed and the final message opened. Edits replace the
    sentence before the point, where they are possible; `removed` leaves it out and keeps the next one.

    Raises:
        InputError: edits are asked for without an editor.
    """
    if edits and editor is None:
        raise InputError(f"edits {', '.join(edits)}: give an editor")
    name, points = one.row.id, []
    for i in range(one.n_sentences + 1):
        prefix = one.prefix(i)
        points.append(BranchPoint(name, i, "continue", tuple(prefix)))
        points.append(BranchPoint(name, i, "forced", (*prefix, *one.header)))
        for kind in edits if i > 0 and editor is not None else ():
            assert editor is not None
            edited = editor(kind, one.sentence(i - 1))
            after = one.sentence(i) if kind == "removed" and i < one.n_sentences else []
            if edited is not None and (edited or after):
                points.append(BranchPoint(name, i, kind, (*one.prefix(i - 1), *edited, *after)))
    return points


Branches = dict[str, list[list[int]]]  # id of a branch point → the new ids of each sample


def sample(
    model: GptOss | HostModel,
    points: Sequence[BranchPoint],
    *,
    samples: int = 50,
    temperature: float = 1.0,
    max_new_tokens: int = 512,
    seed: int = 0,
    store: str | Path | None = None,
) -> Branches:
    """Return the new ids of the sampled continuations of every branch point.

    store: a JSONL file that rows are appended to; samples that it has of the same job are not generated again, and more
    are added to them: of two rows of a point the last one counts. A continuation of a loaded model depends on the seed,
    its branch point and its number alone.

    Raises:
        InputError: an option is not possible, a prefix leaves no room in the context, or `store` is another job's.
    """
    if samples < 1 or not temperature > 0:
        raise InputError(f"samples={samples} at temperature {temperature:g}: expected at least 1, above temperature 0")
    if too_long := [p.id for p in points if len(p.ids) >= model.cfg.n_ctx]:
        raise InputError(f"branch point {too_long[0]!r} fills the context of {model.cfg.n_ctx} tokens: shorten it")
    about = {
        "model": model.checkpoint.digest,
        "temperature": float(temperature),
        "max_new_tokens": max_new_tokens,
        "seed": seed,
    }
    if isinstance(model, GptOss):
        about["dtype"] = str(model.dtype).removeprefix("torch.")
    with _rows(store) as rows:
        branches = _known(rows, points, about) if rows is not None else {}
        left = sorted((p for p in points if len(branches.get(p.id, [])) < samples), key=lambda p: len(p.ids))
        with progress("branch", len(left), "branch points") as advance:
            for chosen, begun in _batches(left, branches, samples, getattr(model, "concurrency", 0)):
                new = model.generate(
                    [list(p.ids) for p in chosen],
                    samples=samples - begun,
                    temperature=temperature,
                    max_new_tokens=max_new_tokens,
                    seed=[_seed(seed, p, n) for p in chosen for n in range(begun, samples)],
                    return_type="new_tokens",
                )
                for i, point in enumerate(chosen):
                    branches[point.id] = branches.get(point.id, []) + new[i * (samples - begun) :][: samples - begun]
                    if rows is not None:
                        row = {"id": point.id, "prefix": list(point.ids), "branches": branches[point.id]}
                        rows.write(stamp(row, COMMAND, **about))
                advance(len(chosen))
    return {p.id: branches[p.id][:samples] for p in points}


def _batches(
    left: Sequence[BranchPoint], branches: Branches, samples: int, concurrency: int
) -> Iterator[tuple[list[BranchPoint], int]]:
    """Yield points that are sampled at once, and how many samples each of them has. concurrency: of a host, else 0."""
    for begun in sorted({len(branches.get(p.id, [])) for p in left}):
        own = [p for p in left if len(branches.get(p.id, [])) == begun]
        size = concurrency or max(1, ROWS // (samples - begun))
        for start in range(0, len(own), size):
            yield own[start : start + size], begun


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
    branches: Branches = {}
    for id, row in rows.known.items():
        for name, wanted in about.items():
            if (begun := row["meta"][KEY].get(name)) != wanted:
                raise InputError(
                    f"{rows.path} was started with {name} {begun}, and this call has {wanted}: choose another file"
                )
        if id in by_id:
            if tuple(row["prefix"]) != by_id[id].ids:
                raise InputError(f"{rows.path} has the row {id!r} with another prefix: choose another file")
            branches[id] = row["branches"]
    return branches


def _seed(seed: int, point: BranchPoint, number: int) -> int:
    """Return the seed of a continuation, which no other branch point shares."""
    text = f"{seed}\t{point.id}\t{point.ids}\t{number}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6])
