"""Search in a run: tokens of an expert or of a head, and conversations by text."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from workbench import harmony
from workbench.harmony.labels import CHANNELS, FRAME
from workbench.runs import Run
from workbench.runs.conversations import tokenizer_of
from workbench.studies.quick_look import ALL

MOST_TOKENS = 300_000  # that a table of tokens is made from
_GRADES = {"correct": 1, "wrong": 0, "ungraded": -1}
_LENGTHS = ("longest", "shortest")  # orders of conversations by their tokens
_POSITION_BINS = 2.0 ** np.arange(18)


def vocabulary(run: Run) -> harmony.Tokenizer | None:
    """Return the tokenizer of a run, or None if it is not available."""
    return tokenizer_of(run.provenance.get("tokenizer", {}).get("digest", ""))


def shown(id: int, tokenizer: harmony.Tokenizer | None) -> str:
    """Return the text of a single token, or its id if there is no tokenizer."""
    return f"⟨{id}⟩" if tokenizer is None else tokenizer.decode([id])


def texts(ids: Sequence[int], tokenizer: harmony.Tokenizer | None) -> list[str]:
    """Return the text of every token; a character that several tokens share is given to the last of them."""
    pieces: list[str] = []
    open_: list[int] = []
    alone: dict[int, str] = {}
    for id in ids:
        if id not in alone:
            alone[id] = shown(id, tokenizer)
        open_.append(id)
        text = alone[id] if tokenizer is None or len(open_) == 1 else tokenizer.decode(open_)
        # four bytes are the longest character: what is open longer is not text
        if text.endswith("�") and len(open_) < 4:
            pieces.append("")
            continue
        pieces.append(text)
        open_ = []
    if open_ and tokenizer is not None:
        pieces[-1] = tokenizer.decode(open_)
    return pieces


@dataclass(frozen=True)
class TokenSelection:
    """The tokens of a channel, effort and task; `all` channels are all content, and `""` also the frame tokens."""

    channel: str = ""
    effort: str = ALL
    task: str = ALL

    def mask(self, run: Run, block: dict[str, np.ndarray]) -> Bool[np.ndarray, " token"]:
        """Return which tokens [token] of a block of the run are selected."""
        inside = np.ones(len(block["channel"]), dtype=bool)
        if self.channel == ALL:
            inside = block["channel"] != FRAME
        elif self.channel:
            inside = block["channel"] == CHANNELS.index(self.channel)
        for column, value in (("effort", self.effort), ("task", self.task)):
            if value != ALL:
                table = run.sequences[column]
                inside &= np.isin(block["sequence"], table.index[table == value])
        return inside


EVERYTHING = TokenSelection()


def head_tokens(
    run: Run,
    layer: int,
    head: int,
    text: Callable[[int], str],
    *,
    rows: int = 20,
    within: TokenSelection = EVERYTHING,
) -> pd.DataFrame:
    """Return tokens that are over-represented among those with high sink attention (top 10 %) in a head."""

    def chosen() -> Iterator[tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]]:
        edge = None
        for block in run.blocks("id", "sink", layer=layer):
            mass, inside = block["sink"][0][:, head].astype(np.float32), within.mask(run, block)
            if edge is None and inside.any():
                edge = float(np.quantile(mass[inside], 0.9))
            yield block, mass > (np.inf if edge is None else edge), inside

    return _overrepresented_tokens(chosen(), text, rows)


def _overrepresented_tokens(
    blocks: Iterator[tuple[dict[str, np.ndarray], Bool[np.ndarray, " token"], Bool[np.ndarray, " token"]]],
    text: Callable[[int], str],
    rows: int,
) -> pd.DataFrame:
    """Return tokens by the ratio of their frequency among the selected tokens to that among all tokens, if above 1."""
    seen = counted = 0
    every: Counter[int] = Counter()
    times: Counter[int] = Counter()
    example: dict[int, tuple[str, int, int]] = {}
    for block, matching, inside in blocks:
        ids, hit = block["id"], matching & inside
        every.update(ids[inside].tolist())
        times.update(ids[hit].tolist())
        for at in np.flatnonzero(hit)[:: max(1, int(hit.sum()) // 2000)]:
            if int(ids[at]) not in example:
                example[int(ids[at])] = _example(block, int(at), text)
        seen, counted = seen + len(ids), counted + int(inside.sum())
        if seen >= MOST_TOKENS:
            break
    share = sum(times.values()) / max(counted, 1)
    records = [
        (text(i), n, 100 * n / every[i], n / every[i] / share, *example.get(i, ("", -1, -1)))
        for i, n in times.items()
        if n >= 5 and n / every[i] > share
    ]
    columns = ["token", "occurrences", "share of occurrences (%)", "lift", "for example", "sequence", "position"]
    table = pd.DataFrame(records, columns=columns)
    return table.sort_values(["lift", "occurrences"], ascending=False).head(rows).round({columns[2]: 1, "lift": 2})


def _example(block: dict[str, np.ndarray], at: int, text: Callable[[int], str]) -> tuple[str, int, int]:
    """Return a token in brackets between its neighbours, with its sequence and its position in it."""
    ids, sequence = block["id"], block["sequence"]
    near = [i for i in range(max(0, at - 8), min(len(ids), at + 5)) if sequence[i] == sequence[at]]
    words = (f"[{text(int(ids[i]))}]" if i == at else text(int(ids[i])) for i in near)
    return "".join(words), int(sequence[at]), int(block["position"][at])


def head_by_position(
    run: Run, layer: int, head: int, *, within: TokenSelection = EVERYTHING
) -> Float[pd.DataFrame, "bin channel"]:
    """Return a head's mean sink attention by position (bins of doubling width) and channel.

    Only the first tokens of the run are read.
    """
    shape = (len(_POSITION_BINS), len(CHANNELS))
    sums, counts, seen = np.zeros(shape), np.zeros(shape), 0
    for block in run.blocks("sink", layer=layer):
        inside = within.mask(run, block)
        bins = np.searchsorted(_POSITION_BINS, np.maximum(block["position"], 1), side="right") - 1
        place = (bins[inside], block["channel"][inside])
        np.add.at(sums, place, block["sink"][0][inside, head].astype(np.float64))
        np.add.at(counts, place, 1)
        seen += len(block["position"])
        if seen >= MOST_TOKENS:
            break
    mean = np.divide(sums, counts, out=np.full(shape, np.nan), where=counts > 0)
    table = pd.DataFrame(mean, columns=list(CHANNELS), index=pd.Index(_POSITION_BINS.astype(int), name="position"))
    return table.dropna(how="all").dropna(axis=1, how="all")


def conversations(
    run: Run,
    *,
    task: str = ALL,
    effort: str = ALL,
    text: str = "",
    channel: str = ALL,
    expert: tuple[int, int] | None = None,
    kind: str = "",
    order: str = "",
) -> dict[str, int]:
    """Return conversations as label → number.

    kind: correct, wrong, ungraded or irregular; "" for all.

    text: contained in the id, the answer, or the tokens of the channel. expert: sort by the share of tokens (of the
    channel) that are routed to this (layer, expert), largest first. order: "longest" or "shortest" first, else as
    captured; the label states the share or the number of tokens that the list is sorted by.
    """
    table = run.sequences
    wanted = pd.Series(True, index=table.index)
    for column, value in (("task", task), ("effort", effort)):
        wanted &= True if value == ALL else table[column] == value
    if kind in _GRADES:
        wanted &= table["correct"] == _GRADES[kind]
    elif kind == "irregular":
        wanted &= table["flags"].astype(str).str.len() > 0 if "flags" in table else False
    share = _share_of_expert(run, channel, *expert) if expert else None
    if share is not None:
        wanted &= share.reindex(table.index) > 0
    if text:
        in_table = table["id"].str.contains(text, regex=False) | table["answer"].str.contains(text, regex=False)
        wanted &= in_table | table.index.isin(_containing_text(run, text, channel, set(table.index[wanted].tolist())))
    rows = table[wanted]
    if share is not None:
        rows = rows.loc[share.reindex(rows.index).sort_values(ascending=False, kind="stable").index]
    elif order in _LENGTHS:
        rows = rows.sort_values("length", ascending=order == "shortest", kind="stable")
    marks = {1: " ✓", 0: " ✗"}
    labels = [
        f"{i}{marks.get(right, '')}" for i, right in zip(rows["id"].tolist(), rows["correct"].tolist(), strict=True)
    ]
    if share is not None:
        labels = [f"{label}  {100 * share[number]:.1f} %" for label, number in zip(labels, rows.index, strict=True)]
    elif order in _LENGTHS:
        labels = [f"{label} ({length:,})" for label, length in zip(labels, rows["length"], strict=True)]
    return dict(zip(labels, rows.index.tolist(), strict=True))


def _share_of_expert(run: Run, channel: str, layer: int, expert: int) -> Float[pd.Series, " sequence"]:
    """Return the fraction of each sequence's tokens, of a channel or of all content, that chose an expert."""
    counts, tokens = (run.summary(name) for name in ("expert_count", "tokens"))
    within = [c for c in map(str, tokens["channel"].values) if c == channel or (channel == ALL and c != "frame")]
    chosen = counts.sel(channel=within, layer=layer).isel(expert=expert).sum("channel").values
    of = tokens.sel(channel=within).sum("channel").values
    return pd.Series(np.divide(chosen, of, out=np.zeros(len(of)), where=of > 0), index=tokens["sequence"].values)


def _containing_text(run: Run, text: str, channel: str, among: set[int]) -> list[int]:
    """Return sequences that contain a text, ignoring case."""
    words = vocabulary(run)
    if words is None:
        return []
    wanted, matches = text.lower(), list[int]()
    for block in run.blocks("id"):
        for number, ids, inside in _sequences(block):
            selected = ids if channel == ALL else ids[inside == CHANNELS.index(channel)]
            if number in among and wanted in words.decode(selected.tolist()).lower():
                matches.append(number)
    return matches


def _sequences(
    block: dict[str, np.ndarray],
) -> Iterator[tuple[int, Int[np.ndarray, " token"], Int[np.ndarray, " token"]]]:
    edges = np.flatnonzero(np.diff(block["sequence"])) + 1
    parts = (np.split(block[name], edges) for name in ("sequence", "id", "channel"))
    for sequence, ids, channel in zip(*parts, strict=True):
        if len(ids):
            yield int(sequence[0]), ids, channel
