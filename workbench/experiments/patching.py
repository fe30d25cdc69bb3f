"""Activation patching of reasoning effort: the prompt's states at another effort replace its own, by token and layer.

The same prompt at two efforts differs in the effort word alone. Its states are exchanged for one class of tokens at a
time, at the embedding and after each layer: the effort word, the tokens that directly follow it, and the rest of the
prompt. States before the effort word are the same and are left alone. At the embedding the effort word carries
everything and the others nothing; the increment of a layer is what it adds to, or takes from, what the layer before it
carried.

What is scored: the log-probability in nats, summed, that the model gives to the tokens it generated at its own effort
(the content of analysis and final channels, with the run's own tokens before them), patched less unpatched. It falls as
the patched states make the transcript of the own effort less likely; it does not measure whether a transcript of the
other effort becomes likelier.

Reference: arXiv 2309.16042 and 2404.15255 on activation patching.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from workbench.counting import count_of, signed_interval
from workbench.errors import InputError
from workbench.experiments.final_channel import generated_tokens
from workbench.harmony.transcripts import Transcript
from workbench.kernels.logits import logprob
from workbench.model.transformer import GptOss
from workbench.registry import Experiment
from workbench.studies.intervals import MIN_PROMPTS, mean_effect
from workbench.studies.statistics import ALPHA, false_discovery

EXPERIMENT = Experiment(
    name="patching",
    title="Patching reasoning effort",
    question="At which tokens of the prompt, and at which layer, do its states carry the reasoning effort?",
    compute="forward passes over the sequences: one for each class of tokens and layer, for each pair of efforts",
    cost={"layer_passes": 9},
    aliases=("patch",),
    order=180,
)
NEIGHBOURS = 4  # tokens directly after the effort word
CLASSES = {
    "effort_word": "the effort word",
    "neighbours": f"the {NEIGHBOURS} tokens after the effort word",
    "rest": "the rest of the prompt",
}
METHOD = " ".join((__doc__ or "").split("Reference:")[0].split()) + (
    " Means over prompts, bootstrap-t intervals; q: Benjamini–Hochberg over the pairs of efforts and layers of a class."
)
Pair = tuple[Transcript, Transcript]


@torch.no_grad()
def experiment(model: GptOss, rows: Sequence[Transcript], *, seed: int = 0) -> dict[str, xr.Dataset]:
    """Return for each class of tokens what its states at another effort change, at the embedding and by layer.

    Variables over (which, layer), which being "high into low" and so on: change, low, high in nats a sequence, q, and
    the increment over the layer before with its interval. Pairs have prompts of equal length.

    Raises:
        InputError: fewer than five prompts were answered at two efforts with prompts of equal length.
    """
    kinds: dict[str, list[Pair]] = {}
    for own, other in effort_pairs(model, rows):
        kinds.setdefault(f"{other.effort} into {own.effort}", []).append((own, other))
    few = {kind: n for kind, pairs in kinds.items() if (n := len({own.prompt_id for own, _ in pairs})) < MIN_PROMPTS}
    kinds = {kind: pairs for kind, pairs in sorted(kinds.items()) if kind not in few}
    if not kinds:
        raise InputError(f"fewer than {MIN_PROMPTS} prompts were answered at two efforts with prompts of equal length")
    changes = {kind: np.stack([_changes(model, *pair) for pair in pairs], -1) for kind, pairs in kinds.items()}
    units = {kind: [own.prompt_id for own, _ in pairs] for kind, pairs in kinds.items()}
    left_out = [f"Not tested: {kind}, of {count_of(n, 'prompt')}; {MIN_PROMPTS} are needed." for kind, n in few.items()]
    return {
        name: _result(title, {kind: change[i] for kind, change in changes.items()}, units, seed, left_out)
        for i, (name, title) in enumerate(CLASSES.items())
    }


def effort_pairs(model: GptOss, rows: Sequence[Transcript]) -> list[Pair]:
    """Return the pairs (own, other) of the same prompt at two efforts, with prompts of equal length that differ.

    Every sequence is the own one; of the other effort, whose prompt alone is read, the first.
    """
    written = generated_tokens(model)
    by_prompt: dict[str, dict[str, list[Transcript]]] = {}
    for row in rows:
        if written(row.tokens.astype(np.int64)).any():
            by_prompt.setdefault(row.prompt_id, {}).setdefault(row.effort, []).append(row)
    return [
        (own, other)
        for efforts in by_prompt.values()
        for sequences in efforts.values()
        for own in sequences
        for others in efforts.values()
        for other in others[:1]
        if own.n_prompt == other.n_prompt
        and not np.array_equal(own.tokens[: own.n_prompt], other.tokens[: own.n_prompt])
    ]


def token_classes(own: Transcript, other: Transcript) -> list[Int[np.ndarray, " _"]]:
    """Return the positions of each class of CLASSES in the prompt of a pair."""
    n = own.n_prompt
    differs = np.flatnonzero(own.tokens[:n] != other.tokens[:n])
    later = np.setdiff1d(np.arange(differs[0], n), differs)
    near = later[(later > differs[-1]) & (later <= differs[-1] + NEIGHBOURS)]
    return [differs, near, np.setdiff1d(later, near)]


def _changes(model: GptOss, own: Transcript, other: Transcript) -> Float[np.ndarray, "kind depth"]:
    """Return the change by patching each class at each depth: all as rows of one batch, the first one unpatched."""
    points = ["hook_embed", *(f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers))]
    theirs = torch.from_numpy(other.tokens[: own.n_prompt].astype(np.int64))[None].to(model.device)
    _, cache = model.run_with_cache(theirs, names_filter=lambda name: name in points)
    classes = token_classes(own, other)

    def patch_rows(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        for i, positions in enumerate(classes):
            row, at = 1 + i * len(points) + points.index(hook.name), torch.from_numpy(positions).to(x.device)
            x[row, at] = cache[hook.name][0, at].to(x)
        return x

    batch = 1 + len(classes) * len(points)
    ids = torch.from_numpy(own.tokens.astype(np.int64)).to(model.device).expand(batch, -1)
    scored = torch.from_numpy(np.flatnonzero(generated_tokens(model)(own.tokens.astype(np.int64)))).to(model.device)
    with model.hooks(fwd_hooks=[(point, patch_rows) for point in points]):
        residual = model.residual(ids)
    logits = model.logits(residual, (scored - 1).expand(batch, -1))
    total = logprob(logits, ids[:, scored]).double().sum(-1).cpu().numpy()
    return np.asarray((total[1:] - total[0]).reshape(len(classes), len(points)))


def _result(
    tokens: str,
    changes: dict[str, Float[np.ndarray, "depth pair"]],
    units: dict[str, list[str]],
    seed: int,
    left_out: list[str],
) -> xr.Dataset:
    """Return the dataset of one class of tokens."""
    effects = {kind: mean_effect(change, units[kind], seed=seed) for kind, change in changes.items()}
    steps = {
        kind: mean_effect(np.diff(change, axis=0, prepend=0), units[kind], seed=seed)
        for kind, change in changes.items()
    }
    cells = {name: np.stack([getattr(f, name) for f in effects.values()]) for name in ("change", "low", "high", "p")}
    cells["q"] = false_discovery(cells["p"])
    for name, field in (("increment", "change"), ("increment_low", "low"), ("increment_high", "high")):
        cells[name] = np.stack([getattr(f, field) for f in steps.values()])
    depths = ["embedding", *map(str, range(cells["change"].shape[1] - 1))]
    result = xr.Dataset(
        {name: (("which", "layer"), values) for name, values in cells.items()},
        coords={"which": list(changes), "layer": depths},
    )
    prompts = {kind: f.prompts for kind, f in effects.items()}
    lines = [_sentence(result.sel(which=kind), kind, prompts[kind]) for kind in changes]
    attrs = {"units": "nat", "method": METHOD, "family": f"{cells['p'].size} pairs of efforts and layers"}
    title = f"Reasoning effort patched at {tokens}"
    return result.assign_attrs(attrs, title=title, summary="\n".join([*lines, *left_out]))


def _sentence(one: xr.Dataset, kind: str, prompts: int) -> str:
    """State where a pair of efforts changes most, and which layer adds most to it."""
    if not (one["q"] <= ALPHA).any():
        return f"{kind} ({count_of(prompts, 'prompt')}): no effect shown at any layer."
    depth, step = int(np.argmax(np.abs(one["change"].values))), int(np.argmax(np.abs(one["increment"].values)))
    cell, added = one.isel(layer=depth), one.isel(layer=step)
    return (
        f"{kind} ({count_of(prompts, 'prompt')}): most at {_depth(cell)}, {_interval(cell, 'change', 'low', 'high')} "
        f"nats on what was generated; the largest increment at {_depth(added)}, "
        f"{_interval(added, 'increment', 'increment_low', 'increment_high')}."
    )


def _depth(cell: xr.Dataset) -> str:
    name = str(cell["layer"].item())
    return f"the {name}" if name == "embedding" else f"layer {name}"


def _interval(cell: xr.Dataset, *names: str) -> str:
    value, low, high = (float(cell[name]) for name in names)
    return signed_interval(value, low, high, 2)
