"""The attention page: the pattern of each head over one conversation, with the learned sink as a column of its own.

Patterns are not part of a run: a layer of n tokens has n² numbers for each head. They are computed from the model when
the page is opened, by `workbench attention` in a process of its own, and kept in the user's cache.
"""

import base64
import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import panel as pn
import xarray as xr

from workbench import harmony
from workbench.dashboards import content, search, widgets
from workbench.dashboards.frame_view import view_input
from workbench.dashboards.session import Page, Session, box
from workbench.dashboards.theme import BORDER
from workbench.errors import InputError
from workbench.figures.template import ThemeName
from workbench.runs import Run
from workbench.runs.attention_file import MAX_VALUES

_PAGE = Path(__file__).with_name("attention.html")
HEIGHT = 820
VIEW = ("layer", "head", "token")  # what can be chosen in the frame
_LISTED = 500  # conversations in the list
_READABLE = 128  # tokens of the conversation that is shown first, at most
_LEAST_TOKENS = 128  # of a window that all layers of a conversation must fit, or one layer is computed at a time


def attention(session: Session) -> Page:
    """Return the page: patterns of the heads of a layer over a conversation, computed when they are asked for.

    Raises:
        InputError: no unit of the run is committed yet.
    """
    run = session.run
    if run.sequences.empty:
        raise InputError("the run contains no complete conversation yet: wait until the first unit is committed")
    pick = _conversations(session)
    layer = widgets.select(
        "Layer", layers := [str(i) for i in range(run.model["n_layers"])], session.choice.get("layer", layers)
    )
    layer.visible = not _all_layers_fit(run)
    shown = box()
    view = view_input(session, VIEW)

    def show(*_: Any) -> None:
        if pick.value is None:
            return
        before = session.choice.text("sequence")
        if before != str(pick.value):
            session.put(sequence=str(pick.value), **({"token": ""} if before else {}))
        if layer.visible:
            session.put(layer=str(layer.value))
        number = int(pick.value)
        link = session.link("transcript", sequence=str(number))
        about = f"{content.about_sequence(session.run, number)}<a href='{html.escape(link)}'>Conversation</a>"
        shown[:] = [widgets.html(about), widgets.guarded(lambda: _patterns(session, number, str(layer.value)))]

    show()
    for widget in (pick, layer):
        widget.param.watch(show, "value")
    return Page([pick, layer], [shown, view])


def _conversations(session: Session) -> pn.widgets.Select:
    table = session.run.sequences
    known = dict(list(search.conversations(session.run).items())[:_LISTED])
    linked = session.choice.text("sequence")
    number = int(linked) if linked.isdecimal() and int(linked) in table.index else None
    if number is not None and number not in known.values():
        known = {f"{table['id'].to_dict()[number]!s} (linked)": number, **known}
    lengths = table["length"].to_dict()
    readable = [n for n in known.values() if lengths[n] <= _READABLE]
    first = number if number is not None else max(readable or known.values(), key=lambda n: int(lengths[n]))
    return widgets.list_box("Conversation", known, first)


def _all_layers_fit(run: Run) -> bool:
    return bool(run.model["n_layers"] * run.model["n_heads"] * _LEAST_TOKENS**2 <= MAX_VALUES)


def _patterns(session: Session, number: int, layer: str) -> Any:
    run = session.run
    if not session.registry.model(session.name):
        text = (
            f"Attention patterns are computed from the model, and this run was captured from "
            f"{run.checkpoint['name']!r}: start the dashboard with `--model MODEL`, a folder or file with that model."
        )
        return widgets.alert(text, "info")
    all_layers = _all_layers_fit(run)
    ask = session.registry.attention(session.name, number, "" if all_layers else layer)

    def show(results: Mapping[str, xr.Dataset]) -> list[Any]:
        view = {name: session.choice.text(name) for name in VIEW if session.choice.text(name)}
        text = frame(run, number, results["attention"], search.vocabulary(run), session.theme, view)
        return [pn.pane.HTML(text, height=HEIGHT + 10, sizing_mode="stretch_width")]

    cost = "one forward pass, and the time to load the model" + ("" if all_layers else ", for each layer")
    note = widgets.html(
        f"<p class='wb-muted'>Computed from the model for this conversation ({cost}); the result is cached.</p>"
    )
    texts = {"work": "Computing attention patterns", "failed": "The attention patterns cannot be computed"}
    return pn.Column(widgets.awaited(ask, show, **texts), note, sizing_mode="stretch_width")


def frame(
    run: Run,
    number: int,
    patterns: xr.Dataset,
    tokenizer: harmony.Tokenizer | None,
    theme: ThemeName = "light",
    view: Mapping[str, str] | None = None,
) -> str:
    """Return HTML of the frame with the patterns of a sequence. view: what is chosen in it at first, see `VIEW`."""
    data = pattern_data(run, number, patterns, tokenizer) | {"theme": theme, "view": dict(view or {})}
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    page = html.escape(_PAGE.read_text(encoding="utf-8").replace("__DATA__", text), quote=True)
    return (
        f'<iframe title="attention patterns" sandbox="allow-scripts" style="width:100%;height:{HEIGHT}px;{BORDER}" '
        f'srcdoc="{page}"></iframe>'
    )


def pattern_data(run: Run, number: int, patterns: xr.Dataset, tokenizer: harmony.Tokenizer | None) -> dict[str, Any]:
    """Return what the page draws: texts of the window's tokens, and each head's probabilities in steps of 1/65535.

    Columns of a row: sink, earlier tokens, then the tokens of the window.
    """
    start, stop = int(patterns["query"][0]), int(patterns["query"][-1]) + 1
    tokens = run.sequence(number)[["id", "message"]].compute()
    ids = tokens["id"].values.tolist()
    pieces = search.texts(ids, tokenizer)
    # [layer, head, query, 2 + key]
    rows = np.concatenate(
        [patterns[["sink", "earlier"]].to_array("column").transpose(..., "column").values, patterns["pattern"].values],
        axis=-1,
    )
    windows = run.model.get("windows") or [None] * run.model["n_layers"]
    return {
        "texts": pieces[start:stop],
        "message": tokens["message"].values[start:stop].tolist(),
        "start": start,
        "total": len(ids),
        "layers": patterns["layer"].values.tolist(),
        "windows": [windows[layer] for layer in patterns["layer"].values.tolist()],
        "n_heads": patterns.sizes["head"],
        "rows": base64.b64encode(np.round(65535 * rows.clip(0, 1)).astype("<u2").tobytes()).decode(),
    }
