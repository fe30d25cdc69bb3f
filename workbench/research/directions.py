"""The direction between two groups of tokens: the difference of their mean activations."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench import harmony
from workbench.errors import InputError
from workbench.harmony.transcripts import Transcript, read_transcripts
from workbench.hooks.names import full_name
from workbench.model.transformer import GptOss
from workbench.runs import Run
from workbench.studies import token_labels
from workbench.studies.token_labels import Selection


def direction(
    source: Run | GptOss,
    hook: str = "resid_post",
    layer: int = -1,
    *,
    a: Selection,
    b: Selection,
    transcripts: str | Path | Sequence[Transcript] | Run | None = None,
    sequences: Iterable[int] | None = None,
) -> Float[Tensor, " d"]:
    """Return mean(a) − mean(b) of an activation at two groups of tokens, float32 on the CPU.

    source: a run that recorded the activation, or a model, which runs `transcripts` (a file, rows, or a run).
    a, b: labels, as {"channel": "final", "effort": "high"}, a channel's name, or a token set. Every sequence weighs
    alike: its own mean counts once. sequences: numbers of those to use, so that others are held out.

    Raises:
        InputError: the activation was not recorded, a label is unknown, or a group has no token.
    """
    chosen = None if sequences is None else set(sequences)
    means = (
        _of_run(source, hook, layer, (a, b), chosen)
        if isinstance(source, Run)
        else _of_model(source, hook, layer, (a, b), transcripts, chosen)
    )
    for selection, vectors in zip((a, b), means, strict=True):
        if not vectors:
            raise InputError(
                f"no token has the labels {selection!r}: choose labels that the sequences have, as in run.messages"
            )
    first, second = (np.mean(vectors, axis=0) for vectors in means)
    return torch.from_numpy((first - second).astype(np.float32))


def _of_run(
    run: Run, hook: str, layer: int, pair: tuple[Selection, Selection], chosen: set[int] | None
) -> list[list[np.ndarray]]:
    """Return the means of each sequence at the tokens of both selections."""
    about = token_labels.recorded(run, hook)
    index = token_labels.layer_index(about, layer, int(run.model["n_layers"]))
    means: list[list[np.ndarray]] = [[], []]
    for labels, values in token_labels.blocks(run, about, index):
        there = np.isfinite(values).all(1)
        if chosen is not None:
            there &= np.isin(labels["sequence"], list(chosen))
        for vectors, selection in zip(means, pair, strict=True):
            meant = token_labels.mask(selection, labels, run.sequences) & there
            for number in np.unique(labels["sequence"][meant]):
                vectors.append(values[meant & (labels["sequence"] == number)].astype(np.float64).mean(0))
    return means


def _of_model(
    model: GptOss,
    hook: str,
    layer: int,
    pair: tuple[Selection, Selection],
    transcripts: str | Path | Sequence[Transcript] | Run | None,
    chosen: set[int] | None,
) -> list[list[np.ndarray]]:
    point = full_name((hook.removeprefix("hook_"), layer) if "." not in hook else (hook, layer), model.cfg.n_layers)
    means: list[list[np.ndarray]] = [[], []]
    for number, row in enumerate(rows_of(model, transcripts)):
        if chosen is not None and number not in chosen:
            continue
        ids = row.tokens.astype(np.int64)
        masks = [_mask(selection, ids, row, model) for selection in pair]
        if not any(mask.any() for mask in masks):
            continue
        with torch.no_grad():
            _, cache = model.run_with_cache(torch.from_numpy(ids)[None].to(model.device), names_filter=point)
        values = cache[point][0].flatten(1).double().cpu().numpy()
        for vectors, mask in zip(means, masks, strict=True):
            if mask.any():
                vectors.append(values[mask].mean(0))
    return means


def _mask(selection: Selection, ids: np.ndarray, row: Transcript, model: GptOss) -> np.ndarray:
    """Return the tokens of a transcript that a selection means; labels of sequences choose all or none of them."""
    selection = {"channel": selection} if isinstance(selection, str) else selection
    if isinstance(selection, harmony.TokenSet):
        return selection(ids)
    of_tokens = {k: v for k, v in selection.items() if k in ("role", "channel", "part", "position", "message")}
    known = {"effort": row.effort, "correct": row.correct, "prompt_id": row.prompt_id, "id": row.id, **row.meta}
    for name in selection.keys() - of_tokens.keys():
        wanted = selection[name]
        if known.get(name) not in ([wanted] if isinstance(wanted, str | int | bool) else wanted):
            return np.zeros(len(ids), dtype=bool)
    return harmony.token_set(tokenizer=model.tokenizer, **of_tokens)(ids)


def rows_of(model: GptOss, transcripts: str | Path | Sequence[Transcript] | Run | None) -> Sequence[Transcript]:
    """Return transcripts of a file, of a run, or as they are given.

    Raises:
        InputError: none are given, or no row of a file can be used.
    """
    if transcripts is None:
        raise InputError("a model needs transcripts=: a file of transcripts, rows of them, or a run")
    if isinstance(transcripts, Run):
        from workbench.experiments.from_run import transcripts as of_run  # late: the package is large

        return of_run(transcripts)
    if isinstance(transcripts, str | Path):
        rows, rejects = read_transcripts(transcripts, tokenizer=model.tokenizer, n_ctx=model.cfg.n_ctx)
        if not rows:
            raise InputError(f"{transcripts}: none of {len(rejects)} rows can be used; the first: {rejects[0].reason}")
        return rows
    return transcripts
