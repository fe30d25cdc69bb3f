"""One conversation as a page of its own: tokens coloured by what was recorded of them, replayed while experts light up.

The page is a document in a sandboxed frame. Texts go into it as JSON whose `<` are escaped, and onto the screen as text
nodes: nothing that a transcript says can be run.
"""

import html
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import workbench
from workbench import harmony
from workbench.figures.template import LIGHT
from workbench.harmony.labels import CHANNELS
from workbench.runs import Run

_PAGE = Path(__file__).with_name("transcript.html")
HEIGHT = 760


def frame(run: Run, sequence: int, tokenizer: harmony.Tokenizer | None) -> str:
    """HTML of the frame with the conversation in it."""
    data = json.dumps(data_of(run, sequence, tokenizer), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    page = _PAGE.read_text(encoding="utf-8").replace("__DATA__", data)
    return (
        f'<iframe title="conversation" sandbox="allow-scripts" style="width:100%;height:{HEIGHT}px;border:0" '
        f'srcdoc="{html.escape(page, quote=True)}"></iframe>'
    )


def data_of(run: Run, sequence: int, tokenizer: harmony.Tokenizer | None) -> dict[str, Any]:
    """What the page shows of a conversation; numbers rounded to what can be seen."""
    tokens = run.sequence(sequence).compute()
    ids = tokens["id"].values.tolist()
    texts = [shown(i, tokenizer) for i in ids]
    message, channel = tokens["message"].values, tokens["channel"].values
    table = run.messages[run.messages["sequence"] == sequence].reset_index(drop=True)
    heads, bands = {"-1": ""}, {"-1": "frame"}
    for number, row in table.iterrows():
        said = [row["role"] or row["author"], row["channel"], f"to {row['recipient']}" if row["recipient"] else ""]
        heads[str(number)] = " · ".join(str(s) for s in said if s)
        inside = channel[(message == number) & (channel != CHANNELS.index("frame"))]
        bands[str(number)] = CHANNELS[int(inside[0])] if len(inside) else "frame"
    return {
        "ids": ids, "texts": texts, "message": message.tolist(), "channel": channel.tolist(), "channels": list(CHANNELS),
        "heads": heads, "bands": bands, "colours": dict(LIGHT.channel), "n_layers": run.model["n_layers"],
        "n_experts": run.model["num_experts"],
        "experts": tokens["experts"].values.tolist() if "experts" in tokens else [],
        "gates": np.round(tokens["gates"].values.astype(float), 3).tolist() if "gates" in tokens else [],
        "sink": np.round(tokens["sink"].values.astype(float).mean(-1), 3).tolist() if "sink" in tokens else [],
        "logprob": _numbers(tokens["logprob"].values), "entropy": _numbers(tokens["entropy"].values),
    }  # fmt: skip


def _numbers(values: np.ndarray) -> list[float | None]:
    """Rounded, null where nothing was recorded; empty where nothing was recorded of any token."""
    if not np.isfinite(values).any():
        return []
    return [round(float(v), 3) if np.isfinite(v) else None for v in values]


def shown(id: int, tokenizer: harmony.Tokenizer | None) -> str:
    """A token's text; its number where nobody knows the vocabulary."""
    return f"⟨{id}⟩" if tokenizer is None else tokenizer.decode([id])


@cache
def tokenizer_of(digest: str) -> harmony.Tokenizer | None:
    """The vocabulary that a run was made with: o200k_harmony, nano's, or none that we have."""
    nano = Path(workbench.__file__).parent / "data" / "nano"
    for source in (None, nano):
        known = harmony.tokenizer(source)
        if known.digest == digest:
            return known
    return None
