"""One conversation as a page of its own: tokens coloured by what was recorded of them, replayed while experts light up.

The page is a document in a sandboxed frame. Texts go into it as JSON whose `<` are escaped, and onto the screen as text
nodes: nothing in a transcript can be run.
"""

import base64
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr

from workbench import harmony
from workbench.counting import count_of
from workbench.dashboards.search import texts, vocabulary
from workbench.dashboards.theme import BORDER
from workbench.errors import InputError
from workbench.figures.template import THEMES, ThemeName
from workbench.harmony.labels import CHANNELS, FRAME
from workbench.runs import Run

PageTheme = ThemeName | Literal["auto"]  # auto: that of the reader's browser
_PAGE = Path(__file__).with_name("conversation.html")
HEIGHT = 760
VIEW = ("colour", "layer", "expert", "position", "pin")  # what can be chosen in the frame
_MEASURED = ("effect", "low", "high", "q", "forced")  # of a sentence, by the experiment sentence-importance
_NUMBER = re.compile(r"[0-9]{1,9}")
_RANGE = re.compile(r"([0-9]{1,9})-([0-9]{1,9})")


def frame(
    run: Run,
    sequence: int,
    tokenizer: harmony.Tokenizer | None,
    theme: PageTheme = "light",
    view: Mapping[str, str] | None = None,
    sentences: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Return HTML of the frame with the conversation in it.

    view: what is chosen in it at first, see `VIEW`; `find` is a text that is searched. sentences: what `sentences_of`
    returned.
    """
    return (
        f'<iframe title="conversation" sandbox="allow-scripts" style="width:100%;height:{HEIGHT}px;{BORDER}" '
        f'srcdoc="{html.escape(document(run, sequence, tokenizer, theme, view, sentences), quote=True)}"></iframe>'
    )


def document(
    run: Run,
    sequence: int,
    tokenizer: harmony.Tokenizer | None,
    theme: PageTheme = "light",
    view: Mapping[str, str] | None = None,
    sentences: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Return the conversation as one HTML document that loads nothing from the network. See `frame`."""
    page_data = data_of(run, sequence, tokenizer) | {"sentences": list(sentences)}
    colours = {name: dict(one.channel) for name, one in THEMES.items()}
    page_data |= {"theme": theme, "colours": colours, "view": dict(view or {})}
    data = json.dumps(page_data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return _PAGE.read_text(encoding="utf-8").replace("__DATA__", data)


def shared_page(run: Run, sequences: Sequence[int], theme: PageTheme = "light") -> str:
    """Return one HTML file with these conversations: the replay of one, or a list of titles that open."""
    tokenizer = vocabulary(run)
    if len(sequences) == 1:
        return document(run, sequences[0], tokenizer, theme)
    table = run.sequences
    parts = []
    for number in sequences:
        row = table.loc[number]
        title = html.escape(f"{row['id']!s}, effort {row['effort']!s}")
        parts.append(f"<details><summary>{title}</summary>{frame(run, number, tokenizer, theme)}</details>")
    name = html.escape(f"{count_of(len(sequences), 'conversation')} of run {run.digest}")
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title><h1>{name}</h1>'
    return head + "\n".join(parts)


def conversation_file(run: Run, id: str | int, theme: PageTheme = "light") -> bytes:
    """Return one HTML file with a conversation by its id or number, or with a range of numbers as in "0-4".

    Raises:
        InputError: the run has no such sequence.
    """
    numbers = [id] if isinstance(id, int) and id in run.sequences.index else sequence_numbers(run, str(id))
    return shared_page(run, numbers, theme).encode()


def sequence_numbers(run: Run, text: str) -> list[int]:
    """Return the sequences that an id, a number or a range such as "0-4" names.

    Raises:
        InputError: the run has no such sequence.
    """
    table = run.sequences
    if text in set(table["id"]):
        return [int(table.index[table["id"] == text][0])]
    match = _RANGE.fullmatch(text)
    first, last = (
        (int(match[1]), int(match[2])) if match else (int(text), int(text)) if _NUMBER.fullmatch(text) else (0, -1)
    )
    known = set(table.index)
    if last < first or first not in known or last not in known or not set(range(first, last + 1)) <= known:
        some = ", ".join(table["id"][:3])
        raise InputError(
            f"{text!r} is not in {run.path}: it has {count_of(len(table), 'sequence')}, numbered from 0, such as {some}"
        )
    return list(range(first, last + 1))


def data_of(run: Run, sequence: int, tokenizer: harmony.Tokenizer | None) -> dict[str, Any]:
    """Return the data of a conversation that the page shows; numbers are rounded to the precision that can be seen."""
    tokens = run.sequence(sequence).compute()
    ids = tokens["id"].values.tolist()
    message, channel = tokens["message"].values, tokens["channel"].values
    table = run.messages[run.messages["sequence"] == sequence].reset_index(drop=True)
    heads, bands, irregular = {"-1": ""}, {"-1": "frame"}, dict[str, str]()
    for number, row in table.iterrows():
        heading = [
            row["role"] or row["author"],
            row["channel"],
            f"to {row['recipient']}" if row["recipient"] else "",
            row["content_type"],
        ]
        heads[str(number)] = " · ".join(str(s) for s in heading if s)
        flags = [*str(row.get("flags", "")).split(), *(["cut off"] if row["closed_by"] == "truncated" else [])]
        if flags:
            irregular[str(number)] = ", ".join(flags).replace("_", " ")
        inside = channel[(message == number) & (channel != FRAME)]
        bands[str(number)] = CHANNELS[int(inside[0])] if len(inside) else "frame"
    return {
        "ids": ids,
        "texts": texts(ids, tokenizer),
        "message": message.tolist(),
        "channel": channel.tolist(),
        "channels": list(CHANNELS),
        "heads": heads,
        "bands": bands,
        "irregular": irregular,
        "n_prompt": int(run.sequences["n_prompt"][sequence]),
        "n_layers": run.model["n_layers"],
        "n_experts": run.model["num_experts"],
        "slots": tokens["experts"].shape[-1] if "experts" in tokens else 0,
        "experts": _bytes(tokens["experts"].values) if "experts" in tokens else "",
        "gates": _bytes(255 * tokens["gates"].values.astype(float)) if "gates" in tokens else "",
        "sink": _bytes(255 * tokens["sink"].values.astype(float).mean(-1)) if "sink" in tokens else "",
        "norms": {
            a.hook: {"layers": list(a.layers), "values": _norms(tokens[a.hook].sel(layer=list(a.layers)))}
            for a in run.spec.activations
            if a.hook in tokens
        },
        "logprob": _numbers(tokens["logprob"].values),
        "entropy": _numbers(tokens["entropy"].values),
    }


def sentences_of(results: Mapping[str, xr.Dataset], id: str) -> list[dict[str, Any]]:
    """Return what the experiment sentence-importance measured of each sentence of a conversation; empty without.

    results: its datasets. Results of earlier versions do not state where a sentence is, and give nothing.
    """
    ds = results.get("sentences")
    if ds is None or not {"start", "stop", *_MEASURED} <= set(ds.data_vars) or "conversation" not in ds.coords:
        return []
    own = ds.isel(sentence=np.flatnonzero(ds["conversation"].values.astype(str) == id))
    return [
        {name: int(own[name].values[i]) for name in ("start", "stop", "kept", "other")}
        | {name: number if math.isfinite(number := float(own[name].values[i])) else None for name in _MEASURED}
        for i in range(own.sizes["sentence"])
    ]


def _bytes(values: np.ndarray) -> str:
    """Return a byte for each value, in base64.

    24 layers of ten thousand tokens are then a megabyte; as decimal numbers they are nine.
    """
    return base64.b64encode(np.round(values).astype(np.uint8).tobytes()).decode()


def _norms(values: xr.DataArray) -> list[list[float | None]]:
    """Return Euclidean norms [layer, token] of a recorded activation."""
    flat = values.values.reshape(*values.shape[:2], -1).astype(float)
    return [_numbers(row) for row in np.linalg.norm(flat, axis=-1)]


def _numbers(values: np.ndarray) -> list[float | None]:
    """Rounded, null where nothing was recorded; empty where nothing was recorded of any token."""
    if not np.isfinite(values).any():
        return []
    return [round(float(v), 3) if np.isfinite(v) else None for v in values]
