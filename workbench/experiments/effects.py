"""What an intervention does to what a model says, sequence by sequence, with and without it.

Two measures. The log-probability of tokens that stand fixed (a transcript's answer, read by the changed model) is
smooth, cheap and paired token by token. Accuracy of what the changed model then says itself is what one cares about,
and lets an early slip spread. The sampling unit is the prompt, whose sequences are averaged.

Reference: arXiv 2309.16042 and 2404.15255 on metrics for patching; OLMoE (arXiv 2409.02060) and `science.md` on
matching ablations by load.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int, UInt8

from workbench import harmony
from workbench.capture.generation import final_text
from workbench.errors import InputError
from workbench.harmony.transcripts import Prompt, Transcript
from workbench.hooks.edits import Edit, TokenSet, applied
from workbench.hooks.interventions import ablate, forbid
from workbench.hooks.recorders import SequenceRecorder
from workbench.model.transformer import GptOss
from workbench.progress import progress
from workbench.studies.resampling import bootstrap_weights, percentile_interval
from workbench.version import version

_FORWARD_TOKENS = 4096
_SCORED_TOKENS = 512  # where an edit needs all scores of a pass, heads × tokens² of them, fewer tokens are faster
_LOGIT_ROWS = 512
MIN_PROMPTS, ENOUGH_PROMPTS = 5, 20  # fewer than MIN_PROMPTS are refused, fewer than ENOUGH_PROMPTS give a warning
Way = Literal["forbid", "zero", "renormalise", "resample"]


@torch.no_grad()
def logprobs(model: GptOss, rows: Sequence[Transcript], of: TokenSet, *edits: Edit) -> Float[np.ndarray, " sequence"]:
    """Log-probability in nats of each sequence's tokens in `of`, summed; NaN where it has none behind the first."""
    out = np.full(len(rows), np.nan)
    with applied(model, *edits):
        for batch in _batches(rows, _tokens_per_pass(model, edits)):
            lengths = [len(rows[i].tokens) for i in batch]
            tokens = torch.from_numpy(np.concatenate([rows[i].tokens for i in batch])).long()[None].to(model.device)
            residual = model.residual(tokens, packed=lengths)
            assert model.context is not None
            predicted = model.context.mask(of)[0] & (model.context.positions[0].cpu() > 0)
            owner = model.context.sequence[0]
            for at in predicted.nonzero()[:, 0].split(_LOGIT_ROWS):
                logits = model.logits(residual, at[None] - 1)[0]
                logp = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
                said = logp.gather(-1, tokens[0, at, None].to(logp.device))[:, 0].double().cpu().numpy()
                for sequence, value in zip(owner[at].tolist(), said, strict=True):
                    place = batch[sequence]
                    out[place] = value + (0.0 if np.isnan(out[place]) else out[place])
    return out


def answers(
    model: GptOss, prompts: Sequence[Prompt], effort: str, *edits: Edit, max_new_tokens: int = 256, batch: int = 64
) -> Bool[np.ndarray, " prompt"]:
    """Whether the model, so changed, gives each prompt's answer at temperature 0."""
    if nameless := [p.id for p in prompts if p.answer is None]:
        raise InputError(f"prompt {nameless[0]!r} has no answer to compare with")
    rendered = [harmony.render(p.messages, effort=effort, tokenizer=model.tokenizer, **p.options) for p in prompts]
    said: list[list[int]] = []
    with applied(model, *edits):
        for start in range(0, len(rendered), batch):
            said += model.generate(rendered[start : start + batch], max_new_tokens=max_new_tokens)
    rows = zip(prompts, rendered, said, strict=True)
    return np.array([final_text([*ids, *new], model.tokenizer) == p.answer for p, ids, new in rows])


def paired(
    change: Float[np.ndarray, "*cells sequence"], units: Sequence[str], *, n_boot: int = 2000, seed: int = 0
) -> tuple[Float[np.ndarray, " *cells"], Float[np.ndarray, " *cells"], Float[np.ndarray, " *cells"]]:
    """Mean over units (prompts) of a change per sequence, and its 95 % interval: bootstrap over units, percentile.

    Sequences without a value (NaN everywhere) take no part.
    """
    there = ~np.isnan(change.reshape(-1, change.shape[-1])).all(0)
    _, unit = np.unique(np.asarray(units)[there], return_inverse=True)
    if not there.any() or unit.max() < 1:
        raise InputError("an interval needs at least two prompts with a value")
    members = np.eye(unit.max() + 1)[unit]
    means = (change[..., there] @ members) / members.sum(0)
    weights = bootstrap_weights(means.shape[-1], n_boot, np.random.default_rng(seed))
    low, high = percentile_interval(np.moveaxis(means @ weights.T, -1, 0))
    return means.mean(-1), low, high


def effects(
    model: GptOss,
    rows: Sequence[Transcript],
    interventions: Mapping[str, Edit | Sequence[Edit]],
    of: TokenSet,
    *,
    n_boot: int = 2000,
    seed: int = 0,
) -> xr.Dataset:
    """How much each intervention changes the log-probability of the tokens in `of`: mean over prompts, with interval.

    Variables over `intervention`: change, low, high (nats a sequence), and over `sequence` too: each.
    """
    base = logprobs(model, rows, of)
    each = np.stack(
        [
            logprobs(model, rows, of, *([edit] if isinstance(edit, Edit) else edit)) - base
            for edit in interventions.values()
        ]
    )
    change, low, high = paired(each, [row.prompt_id for row in rows], n_boot=n_boot, seed=seed)
    return xr.Dataset(
        {
            "change": ("intervention", change),
            "low": ("intervention", low),
            "high": ("intervention", high),
            "each": (("intervention", "sequence"), each),
            "base": ("sequence", base),
        },
        coords={"intervention": list(interventions), "sequence": [row.id for row in rows]},
        attrs=_about(model, "effects", rows, of, n_boot, seed),
    )


def expert_ablations(
    model: GptOss,
    rows: Sequence[Transcript],
    of: TokenSet,
    *,
    where: TokenSet | None = None,
    way: Way = "forbid",
    group: Callable[[Transcript], str] = lambda row: row.meta.get("task", ""),
    n_boot: int = 2000,
    seed: int = 0,
) -> xr.Dataset:
    """Each expert taken away alone, and what that does to the tokens in `of`; beside it how much it was used there.

    where: at which tokens it is taken away and its load counted; all of them if None. Variables over
    (layer, expert, group): change, low, high in nats a sequence, and share, of the layer's slots, its load.
    """
    groups = np.array([group(row) for row in rows])
    names, units = sorted(set(groups)), np.array([row.prompt_id for row in rows])
    shape = (model.cfg.n_layers, model.cfg.num_experts)
    base, each = logprobs(model, rows, of), np.empty((*shape, len(rows)))
    with progress("ablate", shape[0] * shape[1], "experts") as advance:
        for layer, expert in np.ndindex(*shape):
            edit = forbid(layer, [expert], where) if way == "forbid" else ablate(layer, [expert], where, way)
            each[layer, expert] = logprobs(model, rows, of, edit) - base
            advance(1)
    cells = np.stack(
        [np.stack(paired(each[..., groups == g], units[groups == g], n_boot=n_boot, seed=seed)) for g in names], -1
    )
    load = np.stack(
        [expert_load(model, [r for r, g in zip(rows, groups, strict=True) if g == name], where) for name in names], -1
    )
    dims = ("layer", "expert", "group")
    return xr.Dataset(
        {name: (dims, values) for name, values in zip(("change", "low", "high", "share"), (*cells, load), strict=True)},
        coords={"layer": range(shape[0]), "expert": range(shape[1]), "group": names},
        attrs=_about(model, f"expert ablation ({way})", rows, of, n_boot, seed),
    )


def expert_load(
    model: GptOss, rows: Sequence[Transcript], where: TokenSet | None = None
) -> Float[np.ndarray, "layer expert"]:
    """Share of each layer's routed slots that each expert receives, over the tokens in `where`; NaN without any."""
    counts = np.zeros((model.cfg.n_layers, model.cfg.num_experts))
    for row, chosen in zip(rows, routing(model, rows), strict=True):
        meant = np.ones(len(row.tokens), dtype=bool) if where is None else where(row.tokens.astype(np.int64))
        for layer, of_layer in enumerate(chosen):
            counts[layer] += np.bincount(of_layer[meant].ravel(), minlength=counts.shape[1])
    total = counts.sum(1, keepdims=True)
    return np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0)


@torch.no_grad()
def routing(model: GptOss, rows: Sequence[Transcript]) -> list[UInt8[np.ndarray, "layer pos slot"]]:
    """The experts that every token of every sequence goes to."""
    points = [f"blocks.{layer}.mlp.hook_expert_indices" for layer in range(model.cfg.n_layers)]
    recorder = SequenceRecorder(model, dict.fromkeys(points, torch.uint8))
    out = []
    with model.hooks(fwd_hooks=recorder.fwd_hooks):
        for batch in _batches(rows, _FORWARD_TOKENS):
            tokens = torch.from_numpy(np.concatenate([rows[i].tokens for i in batch])).long()[None]
            model.residual(tokens.to(model.device), packed=[len(rows[i].tokens) for i in batch])
            out += [np.stack([kept[name].numpy() for name in points]) for kept in recorder.take()]
    return out


class RoutedTo:
    """The tokens that a plain pass sends to an expert, as a token set of these sequences and their beginnings."""

    def __init__(self, rows: Sequence[Transcript], routes: Sequence[np.ndarray], layer: int, expert: int) -> None:
        hits = [(chosen[layer] == expert).any(-1) for chosen in routes]
        self._known = [(row.tokens.astype(np.int64), hit) for row, hit in zip(rows, hits, strict=True)]

    def __call__(self, ids: Sequence[int] | Int[np.ndarray, " pos"]) -> Bool[np.ndarray, " pos"]:
        ids = np.asarray(ids)
        for known, hit in self._known:
            if np.array_equal(known[: len(ids)], ids):
                return hit[: len(ids)]
        raise InputError("a sequence that was not among those whose routing was taken has no known routing")


def load_matched(
    load: Float[np.ndarray, "layer expert"],
    chosen: Sequence[tuple[int, int]],
    n: int,
    *,
    seed: int = 0,
    tolerance: float = 0.25,
) -> list[list[tuple[int, int]]]:
    """n random sets of as many experts in the same layers, none of them chosen, of together about the same load.

    tolerance: how far a set's load may be off, as a fraction; refused where such sets are too rare to be drawn.
    """
    rng, wanted = np.random.default_rng(seed), sum(load[cell] for cell in chosen)
    layers = sorted({layer for layer, _ in chosen})
    size = {layer: [e for c, e in chosen if c == layer] for layer in layers}
    sets: list[list[tuple[int, int]]] = []
    for _ in range(200 * n):
        drawn = [
            (layer, int(e))
            for layer in layers
            for e in rng.choice(np.setdiff1d(np.arange(load.shape[1]), size[layer]), len(size[layer]), replace=False)
        ]
        if abs(sum(load[cell] for cell in drawn) - wanted) <= tolerance * wanted and sorted(drawn) not in sets:
            sets.append(sorted(drawn))
        if len(sets) == n:
            return sets
    raise InputError(
        f"only {len(sets)} of {n} sets have a load within {tolerance:.0%} of {wanted:.3f}: choose fewer experts, or "
        "a larger tolerance"
    )


def _about(
    model: GptOss, study: str, rows: Sequence[Transcript], of: TokenSet, n_boot: int, seed: int
) -> dict[str, str | int]:
    """What a dataset says of itself: what was measured, on what, how sure."""
    prompts = len({row.prompt_id for row in rows})
    return {
        "study": study,
        "units": "nat",
        "definition": f"change of a sequence's summed log-probability of its tokens in {of!r}; mean over prompts",
        "ci": f"95 %, percentile, {n_boot} bootstrap draws of prompts",
        "rests_on": f"{len(rows)} sequences of {prompts} prompts",
        "checkpoint_digest": getattr(model.checkpoint, "digest", "random weights"),
        "workbench_version": version(),
        "seed": seed,
    }


def _tokens_per_pass(model: GptOss, edits: Sequence[Edit]) -> int:
    """Return how many tokens to pack into one pass with these edits."""
    names = [name for edit in edits for name, _ in edit.points(model)]
    opens_scores = any(name.endswith(("hook_attn_scores", "hook_pattern")) for name in names)
    return min(_FORWARD_TOKENS, _SCORED_TOKENS) if opens_scores else _FORWARD_TOKENS


def _batches(rows: Sequence[Transcript], most: int) -> Iterator[list[int]]:
    """Consecutive rows of together at most `most` tokens; a longer one alone."""
    batch: list[int] = []
    for i, row in enumerate(rows):
        if batch and sum(len(rows[j].tokens) for j in batch) + len(row.tokens) > most:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
