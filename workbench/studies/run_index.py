"""The index of a run: the prompts of its sequences and its tokens counted by cell, each in one pass over the tokens.

A cell holds the tokens of one sequence, channel, half of the channel, and stratum. Every comparison of every study is
computed from these counts (`workbench.studies.matching`). A stratum is a range of positions or one token id.

    index = index_of(wb.open_run("run.zarr"))
    index.cells("position").tokens     # number of tokens of every cell
"""

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Int

from workbench.counting import count_of
from workbench.errors import InputError
from workbench.harmony.labels import CHANNELS, ROLES
from workbench.progress import progress
from workbench.studies.comparison import in_second_half, prompt_numbers, prompts

Control = Literal["none", "position", "token"]
Block = Mapping[str, np.ndarray]
SLACK = 4  # positions that a stratum may span whatever their ratio
WIDEST = 1.1  # last over first position of a stratum
_LONGEST = 1 << 20  # positions
MAX_TOKEN_IDS = 1 << 20  # more than any vocabulary has
_LARGE = 1_000_000  # tokens from which a pass reports its progress


@runtime_checkable
class TokenRun(Protocol):
    """What a study of single tokens needs of a run."""

    @property
    def digest(self) -> str: ...

    @property
    def sequences(self) -> pd.DataFrame: ...

    @property
    def model(self) -> Mapping[str, Any]: ...

    def blocks(self, *names: str) -> Iterator[Block]: ...


def token_blocks(run: TokenRun, label: str, *names: str) -> Iterator[Block]:
    """Yield the blocks of a run, with a progress bar or lines where it is large."""
    total = int(run.sequences["length"].sum()) if "length" in run.sequences else 0
    if total < _LARGE:
        yield from run.blocks(*names)
        return
    with progress(label, total, "tokens") as advance:
        for block in run.blocks(*names):
            yield block
            advance(len(block["sequence"]))


@dataclass(frozen=True)
class Cells:
    """The tokens of a run by sequence, channel, half of the channel, and stratum; cells without a token are absent."""

    code: Int[np.ndarray, " cell"]
    sequence: Int[np.ndarray, " cell"]
    channel: Int[np.ndarray, " cell"]
    half: Int[np.ndarray, " cell"]
    stratum: Int[np.ndarray, " cell"]
    tokens: Int[np.ndarray, " cell"]


class RunIndex:
    """Prompts and cells of a run, each computed in one pass over its tokens and shared by all comparisons."""

    def __init__(self, run: TokenRun) -> None:
        self.run = run
        self._cells: dict[tuple[str, str], Cells] = {}

    @cached_property
    def prompts(self) -> tuple[Int[np.ndarray, " sequence"], int]:
        """Return the number of every sequence's prompt (−1: not written), and how many prompts repeat another's tokens.

        Prompts under different ids whose tokens are equal are one sampling unit: they are not independent.
        """
        number = prompt_numbers(self.run.sequences)
        return merge_duplicates(number, self._prompt_tokens[0])

    @cached_property
    def ambiguous_ids(self) -> int:
        """Return how many prompt ids have sequences with different prompts, beyond the effort word; 0 without roles."""
        tokens, roles = self._prompt_tokens
        texts: dict[int, set[bytes]] = {}
        for sequence, prompt in enumerate(prompt_numbers(self.run.sequences)):
            if roles and prompt >= 0 and (text := tokens.get(sequence)):
                texts.setdefault(int(prompt), set()).add(text)
        return sum(len(different) > 1 for different in texts.values())

    @cached_property
    def _prompt_tokens(self) -> tuple[dict[int, bytes], bool]:
        """Return ids and roles of the prompts, without the effort word, by sequence, and whether roles are known."""
        for names in (("id", "role"), ("id",)):
            try:
                return self._read_prompts(*names), len(names) > 1
            except (KeyError, InputError):
                continue
        return {}, False

    def _read_prompts(self, *names: str) -> dict[int, bytes]:
        """Return the prompt tokens of every sequence by these names, without the effort word if roles are known.

        An effort word is a token of the system message that all sequences of one effort have and no others: the same
        question at another effort is the same prompt, also where it has another id there.
        """
        pieces: dict[int, list[np.ndarray]] = {}
        table = self.run.sequences
        n_prompt = dict(zip(table.index, table["n_prompt"], strict=True)) if "n_prompt" in table else {}
        for block in token_blocks(self.run, "prompts", *names):
            for sequence, at in _runs(block["sequence"]):
                own = block["channel"][at] == CHANNELS.index("prompt")
                own &= block["position"][at] < (n_prompt.get(sequence) or _LONGEST)  # later ones are results of tools
                values = np.stack([block[name][at][own].astype(np.int64) for name in names], -1)
                pieces.setdefault(sequence, []).append(values)
        prompts = {sequence: np.concatenate(part) for sequence, part in pieces.items()}
        if "role" in names:
            words = _effort_words(prompts, self.run.sequences["effort"])
            for sequence, values in prompts.items():
                word = (values[:, 1] == ROLES.index("system")) & np.isin(values[:, 0], words)
                prompts[sequence] = values[~word]
        return {sequence: values.tobytes() for sequence, values in prompts.items()}

    def cells(self, kind: Control, finite: str = "") -> Cells:
        """Return the cells whose strata are of one kind, of tokens whose quantity `finite` is known."""
        if (kind, finite) not in self._cells:
            codes: list[np.ndarray] = []
            counts: list[np.ndarray] = []
            for block in token_blocks(self.run, "count tokens", *reads(kind, finite)):
                code, known = cell_codes(block, kind, finite)
                unique, n = np.unique(code[known], return_counts=True)
                codes.append(unique)
                counts.append(n)
            self._cells[kind, finite] = _collect(codes, counts)
        return self._cells[kind, finite]


_INDICES: dict[int, tuple[weakref.ref[Any], str, RunIndex]] = {}


def _effort_words(prompts: Mapping[int, np.ndarray], efforts: pd.Series) -> list[int]:
    """Return the ids in system messages, [token, (id, role)] of sequences, that tell an effort from all others."""
    common: dict[str, set[int]] = {}
    seen: dict[str, set[int]] = {}
    for sequence, values in prompts.items():
        ids = set(values[values[:, 1] == ROLES.index("system"), 0].tolist())
        effort = str(efforts[sequence])
        common[effort] = common.get(effort, ids) & ids
        seen.setdefault(effort, set()).update(ids)
    return (
        [
            word
            for effort, ids in common.items()
            for word in ids
            if not any(word in seen[o] for o in seen if o != effort)
        ]
        if len(seen) > 1
        else []
    )


def index_of(run: TokenRun) -> RunIndex:
    """Return the index of a run, made at the first call and again when what is visible of the run has changed."""
    stored = _INDICES.get(id(run))
    if stored is None or stored[0]() is not run or stored[1] != run.digest:
        key = id(run)
        reference = weakref.ref(run, lambda _: _INDICES.pop(key, None))
        # the index must not keep the run alive, which would keep the index
        stored = _INDICES[key] = (reference, run.digest, RunIndex(weakref.proxy(run)))
    return stored[2]


def merge_duplicates(
    number: Int[np.ndarray, " sequence"], prompt_tokens: Mapping[int, bytes]
) -> tuple[Int[np.ndarray, " sequence"], int]:
    """Give prompts with a sequence whose prompt has the same tokens one number; return how many were merged."""
    first: dict[bytes, int] = {}
    parent = np.arange(int(number.max(initial=-1)) + 1)

    def root(one: int) -> int:
        while parent[one] != one:
            one = int(parent[one])
        return one

    for sequence, text in prompt_tokens.items():
        if not text or number[sequence] < 0:
            continue
        own = root(int(number[sequence]))
        parent[own] = root(first.setdefault(text, own))
    roots = np.array([root(one) for one in range(len(parent))], dtype=np.int64)
    unique_roots, renumbered = np.unique(roots, return_inverse=True)
    return np.where(number >= 0, renumbered[number] if len(roots) else number, -1), len(roots) - len(unique_roots)


def independent_prompts(run: TokenRun) -> Int[np.ndarray, " sequence"]:
    """Return the number of every sequence's prompt, duplicates merged; −1 where it is not written."""
    return index_of(run).prompts[0]


def merged_prompts(run: object, tokens: xr.DataArray) -> tuple[Int[np.ndarray, " sequence"], int]:
    """Return the prompt number of every sequence of a run's sums, duplicates merged, and how many were merged."""
    own = prompts(tokens)
    if not isinstance(run, TokenRun):
        return own, 0
    number, merged = index_of(run).prompts
    if not merged:
        return own, 0
    of_id = dict(zip(run.sequences["id"], number[run.sequences.index], strict=True))
    return np.array([of_id[name] for name in tokens["id"].values]), merged


def duplicates_warning(merged: int) -> str:
    """Return the warning that prompts repeat others; empty if none does."""
    if not merged:
        return ""
    return (
        f"Warning: {count_of(merged, 'prompt repeats', 'prompts repeat')} the tokens of others under "
        f"another id; they count as one prompt."
    )


def ambiguous_warning(n: int) -> str:
    """Return the warning that sequences of one prompt id have different prompts; empty if none has."""
    if not n:
        return ""
    return (
        f"Warning: the sequences of {n} prompt id{'s' if n > 1 else ''} have different prompts, so that differences "
        "within a prompt are not those of one question: give each question its own prompt_id."
    )


def reads(kind: Control, finite: str) -> tuple[str, ...]:
    """Return the recorded quantities that the cells of a run need."""
    return (*(("id",) if kind == "token" else ()), *((finite,) if finite else ()))


def cell_codes(
    block: Block, kind: Control, finite: str
) -> tuple[Int[np.ndarray, " token"], Bool[np.ndarray, " token"]]:
    """Return the code of every token's cell, and which tokens are known."""
    channel = block["channel"].astype(np.int64)
    half = np.zeros(len(channel), dtype=np.int64)
    for present in np.unique(channel):
        inside = channel == present
        half[inside] = in_second_half(block["sequence"], inside)[inside]
    stratum = block["id"].astype(np.int64) if kind == "token" else _STRATUM[block["position"]]
    code = ((block["sequence"].astype(np.int64) * len(CHANNELS) + channel) * 2 + half) * MAX_TOKEN_IDS + stratum
    known = np.isfinite(block[finite]) if finite else np.ones(len(code), dtype=bool)
    return code, known


def _strata_of_positions() -> Int[np.ndarray, " position"]:
    """Return the stratum of every position: at most `SLACK` positions or a factor of `WIDEST` wide."""
    first = [0]
    while first[-1] < _LONGEST:
        first.append(max(first[-1] + SLACK, int(WIDEST * first[-1])))
    return np.searchsorted(first, np.arange(_LONGEST), side="right") - 1


_STRATUM = _strata_of_positions()


def _runs(sequence: Int[np.ndarray, " token"]) -> Iterator[tuple[int, slice]]:
    """Yield each sequence number of a block with its tokens, which stand together."""
    starts = np.flatnonzero(np.diff(sequence, prepend=-2))
    for start, stop in zip(starts, [*starts[1:], len(sequence)], strict=True):
        yield int(sequence[start]), slice(int(start), int(stop))


def _collect(codes: list[np.ndarray], counts: list[np.ndarray]) -> Cells:
    code, of = np.unique(np.concatenate(codes) if codes else np.zeros(0, np.int64), return_inverse=True)
    tokens = np.bincount(of, np.concatenate(counts) if counts else None, len(code)).astype(np.int64)
    rest, stratum = np.divmod(code, MAX_TOKEN_IDS)
    rest, half = np.divmod(rest, 2)
    sequence, channel = np.divmod(rest, len(CHANNELS))
    return Cells(code, sequence, channel, half, stratum, tokens)
