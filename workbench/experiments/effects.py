"""Effects of interventions: what a model predicts with an intervention, less what it predicts without it.

Two measures. The log-probability of given tokens (a transcript's answer, computed with the changed model) is
continuous, cheap and paired token by token. Accuracy of the answers that the changed model generates is the measure of
interest, in which an early error spreads. The sampling unit is the prompt, whose sequences are averaged; intervals and
tests are those of `workbench.studies.intervals`.

Reference: arXiv 2309.16042 and 2404.15255 on metrics for patching; OLMoE (arXiv 2409.02060) and `science.md` on
matching ablations by load.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from workbench import harmony
from workbench.capture.generation import final_text
from workbench.counting import count_of
from workbench.errors import InputError
from workbench.harmony.transcripts import Prompt, Transcript
from workbench.hooks.edits import Edit, TokenSet, applied
from workbench.hooks.interventions import ablate, forbid
from workbench.hooks.recorders import SequenceRecorder
from workbench.kernels.logits import logprob
from workbench.model.packing import FORWARD_TOKENS, pack, passes
from workbench.model.transformer import GptOss
from workbench.progress import progress
from workbench.studies.intervals import (
    MIN_PROMPTS,
    SMALLEST_EFFECT,
    MeanEffect,
    Method,
    mean_effect,
    share_interval,
)
from workbench.studies.statistics import false_discovery
from workbench.version import version

_SCORED_TOKENS = 512  # where an edit needs all scores of a pass, heads × tokens² of them, fewer tokens are faster
_LOGIT_ROWS = 512
Way = Literal["forbid", "zero", "renormalise", "resample"]


@torch.no_grad()
def logprobs(model: GptOss, rows: Sequence[Transcript], of: TokenSet, *edits: Edit) -> Float[np.ndarray, " sequence"]:
    """Return the log-probability in nats of each sequence's tokens in `of`, summed; NaN where it has none."""
    out = np.full(len(rows), np.nan)
    with applied(model, *edits):
        for batch in passes([len(row.tokens) for row in rows], _tokens_per_pass(model, edits)):
            tokens, lengths = pack([rows[i] for i in batch], model.device)
            out[batch] = pass_logprobs(model, model.residual(tokens, packed=lengths), tokens, len(batch), of)
    return out


@torch.no_grad()
def pass_logprobs(
    model: GptOss,
    residual: Float[Tensor, "1 pos d_model"],
    tokens: Int[Tensor, "1 pos"],
    n: int,
    of: TokenSet,
) -> Float[np.ndarray, " sequence"]:
    """Return `logprobs` of the n sequences of the model's last pass, from the stream after its last layer."""
    out = np.full(n, np.nan)
    assert model.context is not None
    predicted = model.context.mask(of)[0] & (model.context.positions[0].cpu() > 0)
    owners = model.context.sequence[0]
    for at in predicted.nonzero()[:, 0].split(_LOGIT_ROWS):
        values = logprob(model.logits(residual, at[None] - 1)[0], tokens[0, at]).double().cpu().numpy()
        for owner, value in zip(owners[at].tolist(), values, strict=True):
            out[owner] = value + (0.0 if np.isnan(out[owner]) else out[owner])
    return out


def answers(
    model: GptOss, prompts: Sequence[Prompt], effort: str, *edits: Edit, max_new_tokens: int = 256, batch: int = 64
) -> Bool[np.ndarray, " prompt"]:
    """Return whether the model, with the interventions, gives each prompt's answer at temperature 0.

    Raises:
        InputError: a prompt has no answer to compare with.
    """
    if nameless := [p.id for p in prompts if p.answer is None]:
        raise InputError(f"prompt {nameless[0]!r} has no answer to compare with")
    rendered = [harmony.render(p.messages, effort=effort, tokenizer=model.tokenizer, **p.options) for p in prompts]
    generated: list[list[int]] = []
    with applied(model, *edits):
        for start in range(0, len(rendered), batch):
            generated += model.generate(rendered[start : start + batch], max_new_tokens=max_new_tokens)
    rows = zip(prompts, rendered, generated, strict=True)
    return np.array([final_text([*ids, *new], model.tokenizer) == p.answer for p, ids, new in rows])


def accuracy(right: Bool[np.ndarray, " prompt"], prompts: Sequence[str] | None = None) -> tuple[float, float, float]:
    """Return the share of right answers and its 95 % interval (Wilson), which stays within 0 and 1.

    prompts: the prompt of every answer, where a prompt has several.

    Raises:
        InputError: the answers are of fewer than five prompts.
    """
    names = [str(i) for i in range(len(right))] if prompts is None else prompts
    share, low, high = share_interval(np.asarray(right, dtype=np.float64), names)
    return float(share), float(low), float(high)


def paired(
    change: Float[np.ndarray, "*cells sequence"],
    units: Sequence[str],
    *,
    method: Method = "bootstrap-t",
    n_boot: int = 2000,
    seed: int = 0,
) -> tuple[Float[np.ndarray, " *cells"], Float[np.ndarray, " *cells"], Float[np.ndarray, " *cells"]]:
    """Return the mean over prompts (`units`) of a change per sequence, and its 95 % interval (see `mean_effect`).

    Sequences without a value (NaN everywhere) take no part; where no prompt differs from another there is no interval.

    Raises:
        InputError: fewer than five prompts have a value; fewer than twenty give a warning.
    """
    effect = mean_effect(change, units, method=method, n_boot=n_boot, seed=seed)
    return effect.change, effect.low, effect.high


def effects(
    model: GptOss,
    rows: Sequence[Transcript],
    interventions: Mapping[str, Edit | Sequence[Edit]],
    of: TokenSet,
    *,
    smallest_effect: float = SMALLEST_EFFECT,
    n_boot: int = 2000,
    seed: int = 0,
) -> xr.Dataset:
    """Return how much each intervention changes the log-probability of the tokens in `of`: means over prompts.

    Variables over `intervention`: change, low, high (nats a sequence), p, q (Benjamini–Hochberg over the
    interventions) and equivalent (the effect is smaller than `smallest_effect`, two one-sided tests); over `sequence`
    too: each.

    Raises:
        InputError: the sequences are of fewer than five prompts.
    """
    base = logprobs(model, rows, of)
    changes = np.stack(
        [
            logprobs(model, rows, of, *([edit] if isinstance(edit, Edit) else edit)) - base
            for edit in interventions.values()
        ]
    )
    units = [row.prompt_id for row in rows]
    effect = mean_effect(changes, units, smallest_effect=smallest_effect, n_boot=n_boot, seed=seed)
    return xr.Dataset(
        {
            **{name: ("intervention", values) for name, values in _tested(effect).items()},
            "each": (("intervention", "sequence"), changes),
            "base": ("sequence", base),
        },
        coords={"intervention": list(interventions), "sequence": [row.id for row in rows]},
        attrs=_about(model, "effects", rows, of, n_boot, seed)
        | {
            "smallest_effect": smallest_effect,
            "family": f"{len(interventions)} interventions",
            "prompts": effect.prompts,
        },
    )


def _tested(effect: MeanEffect) -> dict[str, np.ndarray]:
    """Return change, low, high, p, q and equivalent, q over all of the cells."""
    fields = {name: getattr(effect, name) for name in ("change", "low", "high", "p")}
    return fields | {"q": false_discovery(effect.p), "equivalent": effect.equivalent}


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
    """Return the effect of ablating each expert alone on the tokens in `of`, beside the expert's load there.

    where: at which tokens it is ablated and its load counted; all of them if None. Variables over
    (layer, expert, group): change, low, high in nats a sequence, p, q (Benjamini–Hochberg over all cells), and share,
    its load as a share of the layer's slots. Groups of fewer than five prompts have NaN, and the attribute
    `not_tested` names them.

    Raises:
        InputError: layers of the model have different numbers of experts.
    """
    if model.cfg.layer_experts is not None:
        raise InputError(
            "this experiment ablates every expert of every layer, and needs layers of equally many: this model has "
            f"{min(model.cfg.layer_experts)} to {model.cfg.num_experts}; name experts, as in hooks.interventions.forbid"
        )
    groups = np.array([group(row) for row in rows])
    names, units = sorted(set(groups)), np.array([row.prompt_id for row in rows])
    shape = (model.cfg.n_layers, model.cfg.num_experts)
    base, changes = logprobs(model, rows, of), np.empty((*shape, len(rows)))
    with progress("ablate", shape[0] * shape[1], "experts") as advance:
        for layer, expert in np.ndindex(*shape):
            edit = forbid(layer, [expert], where) if way == "forbid" else ablate(layer, [expert], where, way)
            changes[layer, expert] = logprobs(model, rows, of, edit) - base
            advance(1)
    cells = {name: np.full((*shape, len(names)), np.nan) for name in ("change", "low", "high", "p")}
    not_tested = {}
    for i, name in enumerate(names):
        prompts = len(set(units[groups == name][~np.isnan(base[groups == name])]))
        if prompts < MIN_PROMPTS:
            not_tested[name] = f"{count_of(prompts, 'prompt')}, {MIN_PROMPTS} are needed"
            continue
        effect = mean_effect(changes[..., groups == name], units[groups == name], n_boot=n_boot, seed=seed)
        for field, values in cells.items():
            values[..., i] = getattr(effect, field)
    cells["q"] = false_discovery(cells["p"])
    cells["share"] = np.stack(
        [expert_load(model, [r for r, g in zip(rows, groups, strict=True) if g == name], where) for name in names], -1
    )
    dims = ("layer", "expert", "group")
    return xr.Dataset(
        {name: (dims, values) for name, values in cells.items()},
        coords={"layer": range(shape[0]), "expert": range(shape[1]), "group": names},
        attrs=_about(model, f"expert ablation ({way})", rows, of, n_boot, seed)
        | {"not_tested": json.dumps(not_tested), "family": f"{np.isfinite(cells['p']).sum()} experts and groups"},
    )


def expert_load(
    model: GptOss, rows: Sequence[Transcript], where: TokenSet | None = None
) -> Float[np.ndarray, "layer expert"]:
    """Return each expert's share of its layer's routed slots over the tokens in `where`; NaN without any."""
    return load_of(routed_slots(model, rows, where))


def load_of(slots: Int[np.ndarray, "sequence layer expert"]) -> Float[np.ndarray, "layer expert"]:
    """Return the load over all of the sequences, pooled over their tokens."""
    counts = slots.sum(0).astype(np.float64)
    total = counts.sum(1, keepdims=True)
    return np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0)


def routed_slots(
    model: GptOss, rows: Sequence[Transcript], where: TokenSet | None = None
) -> Int[np.ndarray, "sequence layer expert"]:
    """Return how many slots of each sequence's tokens in `where` are routed to each expert."""
    counts = np.zeros((len(rows), model.cfg.n_layers, model.cfg.num_experts), dtype=np.int64)
    for i, (row, chosen) in enumerate(zip(rows, routing(model, rows), strict=True)):
        selected = np.ones(len(row.tokens), dtype=bool) if where is None else where(row.tokens.astype(np.int64))
        for layer, of_layer in enumerate(chosen):
            counts[i, layer] = np.bincount(of_layer[selected].ravel(), minlength=counts.shape[2])
    return counts


@torch.no_grad()
def routing(model: GptOss, rows: Sequence[Transcript]) -> list[UInt8[np.ndarray, "layer pos slot"]]:
    """Return the experts that every token of every sequence goes to."""
    points = [f"blocks.{layer}.mlp.hook_expert_indices" for layer in range(model.cfg.n_layers)]
    recorder = SequenceRecorder(model, dict.fromkeys(points, torch.uint8))
    out = []
    with model.hooks(fwd_hooks=recorder.fwd_hooks):
        for batch in passes((len(row.tokens) for row in rows), FORWARD_TOKENS):
            tokens, lengths = pack([rows[i] for i in batch], model.device)
            model.residual(tokens, packed=lengths)
            out += [np.stack([records[name].numpy() for name in points]) for records in recorder.take()]
    return out


class RoutedTo:
    """The tokens that a pass without interventions sends to an expert, as a token selection of known sequences.

    Raises:
        InputError: a sequence is not among those whose routing was recorded.
    """

    def __init__(self, rows: Sequence[Transcript], routes: Sequence[np.ndarray], layer: int, expert: int) -> None:
        """Store where the routes of each sequence [layer pos slot] contain the expert."""
        hits = [(chosen[layer] == expert).any(-1) for chosen in routes]
        self._known = [(row.tokens.astype(np.int64), hit) for row, hit in zip(rows, hits, strict=True)]

    def __call__(self, ids: Sequence[int] | Int[np.ndarray, " pos"]) -> Bool[np.ndarray, " pos"]:
        ids = np.asarray(ids)
        for known, hit in self._known:
            if np.array_equal(known[: len(ids)], ids):
                return hit[: len(ids)]
        raise InputError("the routing of a sequence was not recorded: record the routing of these sequences first")


def load_matched(
    load: Float[np.ndarray, "layer expert"],
    chosen: Sequence[tuple[int, int]],
    n: int,
    *,
    seed: int = 0,
    tolerance: float = 0.25,
) -> list[list[tuple[int, int]]]:
    """Return n random sets of as many experts in the same layers, none of them chosen, with about the same load.

    tolerance: how far the load of a set, summed over its experts, may be off, as a fraction.

    Raises:
        InputError: fewer than n such sets were found among 200 · n random ones.
    """
    sets, loads = _random_sets(load, chosen, 200 * n, seed)
    wanted = sum(load[cell] for cell in chosen)
    close = np.flatnonzero(np.abs(loads - wanted) <= tolerance * wanted)[:n]
    if len(close) < n:
        raise InputError(
            f"only {len(close)} of {n} random sets have a load within {tolerance:.0%} of {wanted:.3f}: "
            "choose fewer experts, or a larger tolerance"
        )
    return [[(int(layer), int(expert)) for layer, expert in sets[i]] for i in close]


def _random_sets(
    load: Float[np.ndarray, "layer expert"], chosen: Sequence[tuple[int, int]], n: int, seed: int
) -> tuple[Int[np.ndarray, "set cell 2"], Float[np.ndarray, " set"]]:
    """Return up to n different random sets of (layer, expert) with as many experts in each layer, and their loads."""
    rng, parts = np.random.default_rng(seed), []
    for layer in sorted({layer for layer, _ in chosen}):
        own = [expert for other, expert in chosen if other == layer]
        others = np.setdiff1d(np.arange(load.shape[1]), own)
        if len(others) < len(own):
            raise InputError(
                f"{len(own)} of {load.shape[1]} experts of layer {layer} are selected, so few are left "
                "for controls: select fewer"
            )
        drawn = np.sort(others[np.argsort(rng.random((n, len(others))), axis=1)[:, : len(own)]], axis=1)
        parts.append(np.stack([np.full_like(drawn, layer), drawn], -1))
    sets = np.concatenate(parts, axis=1)
    _, first = np.unique(sets.reshape(n, -1), axis=0, return_index=True)
    sets = sets[np.sort(first)]
    return sets, load[sets[..., 0], sets[..., 1]].sum(1)


def _about(
    model: GptOss, study: str, rows: Sequence[Transcript], of: TokenSet, n_boot: int, seed: int
) -> dict[str, str | int]:
    """Return the attributes of a result: definition, interval, sample and provenance."""
    prompts = len({row.prompt_id for row in rows})
    return {
        "study": study,
        "units": "nat",
        "definition": f"change of a sequence's summed log-probability of its tokens in {of!r}; mean over prompts",
        "ci": f"95 %, bootstrap-t, {n_boot} bootstrap draws of prompts",
        "rests_on": f"{count_of(len(rows), 'sequence')} of {count_of(prompts, 'prompt')}",
        "checkpoint_digest": getattr(model.checkpoint, "digest", "random weights"),
        "workbench_version": version(),
        "seed": seed,
    }


def _tokens_per_pass(model: GptOss, edits: Sequence[Edit]) -> int:
    """Return how many tokens to pack into one pass with these edits."""
    names = [name for edit in edits for name, _ in edit.points(model)]
    opens_scores = any(name.endswith(("hook_attn_scores", "hook_pattern")) for name in names)
    return min(FORWARD_TOKENS, _SCORED_TOKENS) if opens_scores else FORWARD_TOKENS
