"""Token selections for attention knockout: whole messages, and the visible tokens that have read hidden ones.

A message is hidden completely only with its frame tokens: the `<|end|>` of an analysis message attends to all of its
content, so that the final answer can read the analysis there although the content itself is hidden. `message_tokens`
therefore selects whole messages, `<|start|>` to `<|end|>`; `readers` counts the tokens that stay visible and have
attended to the hidden ones.

Reference: Geva et al. 2023, arXiv 2304.14767 (attention knockout).
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import xarray as xr
from jaxtyping import Bool, Int

from workbench import harmony
from workbench.errors import InputError
from workbench.harmony.labels import PARTS
from workbench.harmony.token_sets import TokenSet
from workbench.harmony.transcripts import Transcript
from workbench.harmony.vocabulary import Tokenizer
from workbench.hooks.edits import TokenSet as TokenFunction
from workbench.model.transformer import GptOss

Hide = Literal["messages", "content"]
_CONTENT = PARTS.index("content")


def message_tokens(tokenizer: Tokenizer, *, role: str = "", channel: str = "", hide: Hide = "messages") -> TokenSet:
    """Return the tokens of all messages of a role or of an assistant's channel, or of their content alone.

    Raises:
        InputError: `hide` is neither "messages" nor "content".
    """
    if hide not in get_args(Hide):
        raise InputError(f"hide={hide!r}: use messages (frame tokens included) or content")

    def test(ids: Int[np.ndarray, " tokens"]) -> Bool[np.ndarray, " tokens"]:
        labels = harmony.label(ids, tokenizer=tokenizer)
        selected = [
            (not role or m.role == role) and (not channel or (m.role, m.channel) == ("assistant", channel))
            for m in labels.messages
        ]
        mask = np.array([*selected, False])[labels.message]
        return mask if hide == "messages" else mask & (labels.part == _CONTENT)

    which = " ".join(f"{name}={value}" for name, value in (("role", role), ("channel", channel)) if value)
    return TokenSet(f"{'messages' if hide == 'messages' else 'content'} of {which or 'all'}", test)


def readers(
    rows: Sequence[Transcript], queries: TokenFunction, keys: TokenFunction, tokenizer: Tokenizer
) -> dict[str, int]:
    """Count the visible tokens that have read hidden ones: how many over all sequences, by message and token.

    keys are hidden from queries. A token has read hidden keys if it follows one, is not a query itself and so attends
    to them; it is visible if it is not a key and a query follows. Layers without the knockout are not considered.
    """
    counts: Counter[str] = Counter()
    for row in rows:
        ids = row.tokens.astype(np.int64)
        is_query, is_key = queries(ids), keys(ids)
        follows_key = np.maximum.accumulate(is_key)
        precedes_query = np.maximum.accumulate(is_query[::-1])[::-1]
        reading = np.flatnonzero(follows_key & precedes_query & ~is_key & ~is_query)
        if len(reading):
            counts.update(_token_names(ids, reading, tokenizer))
    return dict(counts.most_common())


def _token_names(ids: Int[np.ndarray, " tokens"], at: Int[np.ndarray, " _"], tokenizer: Tokenizer) -> list[str]:
    """Return "<|end|> of assistant analysis", "content of tool", … for each of the positions."""
    labels = harmony.label(ids, tokenizer=tokenizer)
    special = set(tokenizer.special.values())
    names = []
    for i in at.tolist():
        message = labels.messages[labels.message[i]] if labels.message[i] >= 0 else None
        owner = (
            "no message" if message is None else " ".join(filter(None, (message.role or "assistant", message.channel)))
        )
        part = "content" if labels.part[i] == _CONTENT else "header"
        names.append(f"{tokenizer.token(int(ids[i])) if int(ids[i]) in special else part} of {owner}")
    return names


class Hidden(NamedTuple):
    """An attention knockout: in these layers the queries do not attend to the keys."""

    layers: list[int]
    queries: TokenFunction
    keys: TokenFunction


def add_readers(
    result: xr.Dataset, dim: str, rows: Sequence[Transcript], what: Mapping[str, Hidden], tokenizer: Tokenizer
) -> xr.Dataset:
    """Return the result with the visible tokens that have read hidden ones, for each knockout along `dim`.

    Adds the variable `readers` (mean number of such tokens a sequence; NaN where nothing is hidden), the attribute
    `readers` (JSON: knockout → name of the token → count over all sequences), and a sentence for the summary.
    """
    counts = {name: readers(rows, hidden.queries, hidden.keys, tokenizer) for name, hidden in what.items()}
    means = [sum(counts[name].values()) / len(rows) if name in counts else np.nan for name in result[dim].values]
    long_name = "visible tokens that have read hidden ones"
    attrs = {"long_name": long_name, "units": "tokens a sequence"}
    sentences = _sentences(counts, len(rows))
    return result.assign(readers=(dim, means, attrs)).assign_attrs(
        readers=json.dumps(counts), summary="\n".join([result.attrs["summary"], *sentences])
    )


def _sentences(counts: Mapping[str, dict[str, int]], sequences: int) -> list[str]:
    """State which visible tokens have read the hidden ones, knockouts with the same answer together."""
    by_answer: dict[str, list[str]] = {}
    for name, counted in counts.items():
        by_answer.setdefault(_describe(counted, sequences), []).append(name)
    return [f"{answer} ({'; '.join(names)})." for answer, names in by_answer.items()]


def _describe(counts: Mapping[str, int], sequences: int) -> str:
    if not counts:
        return "No visible token has read the hidden ones"
    which = ", ".join(f"{name} {n / sequences:.1f}" for name, n in list(counts.items())[:4])
    more = f" and {len(counts) - 4} other kinds" if len(counts) > 4 else ""
    total = sum(counts.values()) / sequences
    return f"{total:.1f} visible tokens a sequence have read the hidden ones, and may pass them on: {which}{more}"


def layer_kinds(model: GptOss) -> dict[str, list[int]]:
    """Return all layers, and where a model has both, those with full attention and those with a window."""
    layers = range(model.cfg.n_layers)
    kinds = {
        "all layers": list(layers),
        "full layers": [layer for layer in layers if model.cfg.windows[layer] is None],
        "window layers": [layer for layer in layers if model.cfg.windows[layer] is not None],
    }
    return {name: chosen for name, chosen in kinds.items() if chosen}
