"""Counterfactual routing: one token takes other experts in one layer, and the next token is predicted again.

In every sequence one token before a token of the channel is rerouted, with as many experts as before (equal compute):
the strongest or the weakest chosen expert is replaced by the next-best one, or all are random, with the gate weights
that the router gave. Only the prediction at that token counts, so that no other rerouted token has an influence.

Reference: arXiv 2605.07260 (equal-compute alternative routes scored by the probability of the next token).
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.counting import count_of, signed, signed_interval
from workbench.errors import InputError
from workbench.harmony.labels import CHANNELS
from workbench.harmony.token_sets import token_set
from workbench.harmony.transcripts import Transcript
from workbench.hooks.edits import Edit, applied
from workbench.hooks.interventions import route
from workbench.kernels.logits import logprob
from workbench.model.packing import FORWARD_TOKENS, pack, passes
from workbench.model.transformer import GptOss
from workbench.registry import Experiment
from workbench.studies.intervals import MIN_PROMPTS, mean_effect, prompt_means
from workbench.studies.statistics import ALPHA, false_discovery

EXPERIMENT = Experiment(
    name="counterfactual-routing",
    title="Counterfactual routing",
    question="In which layers does the next token depend on the experts that a token takes, and do others do better?",
    compute="forward passes over the sequences: for each layer two, and one for each random route",
    cost={"layer_passes": 10},
    options={
        "routes": "Random routes for each layer, at least 2 (default: 8).",
        "channel": "Channel whose tokens are predicted: final (default) or analysis.",
    },
    order=125,
)
ROUTES = ("strongest expert replaced", "weakest expert replaced", "random experts")
METHOD = (
    "One token of each sequence, drawn at random among those that precede a token of the channel, takes another route "
    "in one layer. Change: log-probability in nats of the token that follows, with the other route less with the "
    "router's own; means over prompts, bootstrap-t intervals; q: Benjamini–Hochberg over layers and routes. 'Random "
    "experts' have the gate weights of the chosen ones, and are averaged over the random routes. better: share of "
    "random routes with a higher log-probability than the router's own; best: mean of the largest change among the "
    "random routes, which is above 0 also if routes differ by chance alone. Both are means over prompts, too."
)
NOT_CONTROLLED = (
    "Random experts take a token off the states that later layers have seen in training. The next token is the one "
    "that was written, whether or not it is right."
)


class _Positions:
    """One position of each of some known sequences, as a token set."""

    def __init__(self, rows: Sequence[Transcript], positions: Sequence[int]) -> None:
        self._known = {row.tokens.astype(np.int64).tobytes(): at for row, at in zip(rows, positions, strict=True)}

    def __call__(self, ids: Sequence[int] | Int[np.ndarray, " pos"]) -> Bool[np.ndarray, " pos"]:
        """Return a mask that is true at the sequence's position."""
        own = np.asarray(ids, dtype=np.int64)
        at = self._known.get(own.tobytes())
        if at is None:
            raise InputError(
                "a sequence was not among the given ones, so it has no position to reroute: pass the same sequences"
            )
        return np.arange(len(own)) == at


def drawn_positions(
    model: GptOss, rows: Sequence[Transcript], channel: str, rng: np.random.Generator
) -> tuple[list[Transcript], list[int]]:
    """Return the sequences with tokens in the channel, and a random position before one of those in each.

    Sequences with the tokens of an earlier one are left out, as they could not be distinguished.

    Raises:
        InputError: they are of fewer than five prompts.
    """
    members = token_set(tokenizer=model.tokenizer, channel=channel)
    drawn: dict[bytes, tuple[Transcript, int]] = {}
    for row in rows:
        at = np.flatnonzero(members(row.tokens.astype(np.int64)))
        at = at[at > 0]
        if len(at):
            drawn.setdefault(row.tokens.astype(np.int64).tobytes(), (row, int(rng.choice(at)) - 1))
    if (n := len({row.prompt_id for row, _ in drawn.values()})) < MIN_PROMPTS:
        raise InputError(f"{n} prompts have tokens of the {channel} channel, and {MIN_PROMPTS} are needed")
    return [row for row, _ in drawn.values()], [at for _, at in drawn.values()]


@torch.no_grad()
def next_logprobs(
    model: GptOss, rows: Sequence[Transcript], positions: Sequence[int], *edits: Edit
) -> Float[np.ndarray, " sequence"]:
    """Return the log-probability in nats of the token after one position of each sequence."""
    out = np.empty(len(rows))
    with applied(model, *edits):
        for batch in passes((len(row.tokens) for row in rows), FORWARD_TOKENS):
            tokens, lengths = pack([rows[i] for i in batch], model.device)
            residual = model.residual(tokens, packed=lengths)
            starts = np.cumsum([0, *lengths[:-1]])
            at = torch.tensor([int(start) + positions[i] for start, i in zip(starts, batch, strict=True)])
            logits = model.logits(residual, at[None])[0]
            out[batch] = logprob(logits, tokens[0, at.to(tokens.device) + 1]).double().cpu().numpy()
    return out


def replaced(rank: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a router without its choice of this rank (0: the strongest), for which the next-best expert enters.

    The router takes what it reads [batch pos d_model] and its logits [batch pos expert], and returns logits.
    """

    def other(x: Tensor, logits: Tensor) -> Tensor:
        chosen = logits.topk(rank + 1, -1).indices[..., -1:]
        return logits.scatter(-1, chosen, -torch.inf)

    return other


def random_experts(seed: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a router with the same logits [batch pos expert] in a random order: gate weights stay, experts change."""

    def other(x: Tensor, logits: Tensor) -> Tensor:
        rng = torch.Generator().manual_seed(seed)
        order = torch.rand(logits.shape, generator=rng).argsort(-1)
        return logits.gather(-1, order.to(logits.device))

    return other


def experiment(
    model: GptOss, rows: Sequence[Transcript], *, routes: int = 8, channel: str = "final", seed: int = 0
) -> dict[str, xr.Dataset]:
    """Return what other routes of one token change of the next token's log-probability, by layer.

    Variables over (which, layer): change, low, high, p, q; over layer: better, best.

    Raises:
        InputError: there are too few routes, the channel is unknown, or too few prompts have its tokens.
    """
    if routes < 2:
        raise InputError(f"routes={routes}: at least 2 random routes are needed")
    if channel not in ("analysis", "final"):
        raise InputError(f"channel={channel!r}: use analysis or final, of {', '.join(CHANNELS)}")
    rng = np.random.default_rng(seed)
    rows, positions = drawn_positions(model, rows, channel, rng)
    where, layers = _Positions(rows, positions), range(model.cfg.n_layers)
    base = next_logprobs(model, rows, positions)

    def changes(layer: int, function: Callable[[Tensor, Tensor], Tensor]) -> Float[np.ndarray, " sequence"]:
        return next_logprobs(model, rows, positions, route(layer, function, where)) - base

    last = model.cfg.experts_per_token - 1
    fixed = np.stack([[changes(layer, replaced(r)) for layer in layers] for r in (0, last)])
    random = np.stack(
        [[changes(layer, random_experts(seed + 1 + layer * routes + i)) for i in range(routes)] for layer in layers]
    )
    change_of = np.concatenate([fixed, random.mean(1)[None]])
    units = [row.prompt_id for row in rows]
    effect = mean_effect(change_of, units, seed=seed)
    cells = {name: (("which", "layer"), getattr(effect, name)) for name in ("change", "low", "high", "p")}
    result = xr.Dataset(
        {
            **cells,
            "q": (("which", "layer"), false_discovery(effect.p)),
            "better": ("layer", prompt_means((random > 0).mean(1), units).mean(-1)),
            "best": ("layer", prompt_means(random.max(1), units).mean(-1)),
        },
        coords={"which": list(ROUTES), "layer": list(layers)},
        attrs={
            "title": f"Other experts for one token before a token of {channel}",
            "units": "nat",
            "rests_on": f"{count_of(len(rows), 'token')} of {count_of(effect.prompts, 'prompt')}, "
            f"{count_of(routes, 'random route')}",
            "method": METHOD,
            "not_controlled": NOT_CONTROLLED,
        },
    )
    result.attrs["summary"] = _summary(result)
    return {"routes": result}


def _summary(result: xr.Dataset) -> str:
    lines = [f"{result.attrs['rests_on']}; change of the next token's log-probability, nats:"]
    for layer in map(int, result["layer"].values):
        parts = []
        for which in map(str, result["which"].values):
            one = result.sel(layer=layer, which=which)
            change, low, high, q = (float(one[name]) for name in ("change", "low", "high", "q"))
            parts.append(f"{which} {signed_interval(change, low, high, 3)}" + ("" if q <= ALPHA else ", not shown"))
        better, best = (float(result[name].sel(layer=layer)) for name in ("better", "best"))
        lines.append(
            f"  layer {layer}: {'; '.join(parts)}; {better:.0%} of random routes are better, best {signed(best, 3)}."
        )
    return "\n".join(lines)
