"""Steering: a direction between two kinds of tokens is added to the residual stream, by default of the final channel.

By default it is the direction from the analysis to the final channel; `a` and `b` name other tokens, such as those of
two roles, and `at` those that are steered. The direction is fitted on half of the prompts and applied to the other
half, in several doses. Every dose is ranked among the effects of at least 20 random directions of the same norm in the
same dose: what any push of this length does.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from workbench.counting import count_of, signed, signed_interval
from workbench.errors import InputError
from workbench.experiments.effects import pass_logprobs
from workbench.experiments.final_channel import answered_rows, final_tokens
from workbench.experiments.random_controls import MIN_CONTROLS, check_controls, family_p, rank
from workbench.experiments.sampling import halves
from workbench.harmony.token_sets import TokenSet, token_set
from workbench.harmony.transcripts import Transcript
from workbench.model.packing import FORWARD_TOKENS, pack, passes
from workbench.model.transformer import GptOss
from workbench.registry import Experiment
from workbench.studies.intervals import mean_effect, prompt_means
from workbench.studies.statistics import ALPHA
from workbench.studies.token_labels import TOKEN_LABELS, selection_of

EXPERIMENT = Experiment(
    name="steering",
    title="Steering along a direction between channels or roles",
    question="Does moving tokens along the direction between two channels, or two roles, change the answer more than "
    "random directions of the same norm?",
    compute="forward passes over half of the sequences, of the later half of layers for each of six doses, of the "
    "direction and of 20 random ones",
    cost={"passes": 33},
    options={
        "a": "Tokens that the direction leads to, as role=developer (default: channel=final).",
        "b": "Tokens that the direction leads away from (default: channel=analysis).",
        "at": "Tokens to which it is added (default: channel=final).",
        "controls": "Random directions of the same norm, at least 20 (default: 20).",
    },
    aliases=("steer",),
    order=170,
)
DOSES = (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0)  # times the distance between the channel means
METHOD = (
    "The direction is the difference of mean residual streams of two kinds of tokens (by default final and analysis) "
    "in the middle layer, fitted on half of each task's prompts and added at the chosen tokens (by default all final "
    "ones) of the other half, times the dose. Measured is the log-probability in nats of the final message, summed "
    "over its tokens, less that without steering; means over prompts, bootstrap-t intervals. The null of a dose is "
    "the distribution of the effects of random directions of the same norm in the same dose: rank p (two-sided, about "
    "the common median), p_family adjusted for all doses (single-step max-T), distance in standard deviations of the "
    "random directions. The rank holds the prompts fixed, and the interval the directions: where the interval "
    "includes zero, an effect beyond random directions is shown for these prompts only."
)


def experiment(
    model: GptOss,
    rows: Sequence[Transcript],
    *,
    a: str = "channel=final",
    b: str = "channel=analysis",
    at: str = "channel=final",
    controls: int = MIN_CONTROLS,
    seed: int = 0,
) -> dict[str, xr.Dataset]:
    """Return the dose curve of steering along the direction from b to a, beside that of random directions.

    a, b, at: tokens by channel, role and part, as "role=developer,part=content".

    Variables over (which, dose): change, low, high in nats a sequence, of the direction and of the mean of the random
    ones. Over dose: p, p_family and distance of the direction's rank; over (control, dose): random.

    Raises:
        InputError: fewer than 20 controls are asked for, a label is unknown, no sequence has such tokens, or too few
            prompts have a final message.
    """
    check_controls(controls)
    sides, where = (labelled_tokens(model, a), labelled_tokens(model, b)), labelled_tokens(model, at)
    train, test = halves(answered_rows(model, rows))
    test = answered_rows(model, test)
    layer = model.cfg.n_layers // 2
    point = f"blocks.{layer}.hook_resid_post"
    direction = _mean(model, train, point, sides[0]) - _mean(model, train, point, sides[1])
    if not float(direction.norm()):
        raise InputError(f"{a} and {b} have the same mean, so there is no direction between them: choose other tokens")
    if not any(where(row.tokens.astype(np.int64)).any() for row in test):
        raise InputError(f"no sequence has tokens in {where!r}")
    changes = _dose_effects(model, test, layer, where, [direction, *random_directions(direction, controls, seed)])
    units = [row.prompt_id for row in test]
    own_changes, random = changes[0], prompt_means(changes[1:], units).mean(-1)
    ranks = [rank(float(prompt_means(own_changes[i], units).mean()), random[:, i]) for i in range(len(DOSES))]
    effect = mean_effect(np.stack([own_changes, changes[1:].mean(0)]), units, seed=seed)
    cells = {name: (("which", "dose"), getattr(effect, name)) for name in ("change", "low", "high")}
    p = np.array([r.p for r in ranks])
    result = xr.Dataset(
        cells
        | {
            "p": ("dose", p),
            "p_family": ("dose", family_p(prompt_means(own_changes, units).mean(-1), random)),
            "distance": ("dose", [r.distance for r in ranks]),
        }
        | {"as_low": ("dose", [r.as_low for r in ranks]), "random": (("control", "dose"), random)},
        coords={"which": [_between(a, b), "mean of random directions"], "dose": list(DOSES)},
    )
    rests_on = f"{count_of(len(test), 'sequence')} of {count_of(effect.prompts, 'prompt')}"
    attrs = {
        "title": f"Steering {at} along {_between(a, b)} at {point}",
        "units": "nat",
        "method": METHOD,
        "rests_on": rests_on,
        "prompts": effect.prompts,
        "family": f"{len(DOSES)} doses",
        "norm": float(direction.norm()),
    }
    return {"direction": result.assign_attrs(attrs, summary=_summary(result, rests_on, controls))}


def channel_direction(model: GptOss, rows: Sequence[Transcript], point: str) -> Float[Tensor, " d"]:
    """Return the mean activation at a hook point over final tokens less that over analysis tokens.

    Raises:
        InputError: no sequence has tokens in one of the channels.
    """
    means = [_mean(model, rows, point, token_set(tokenizer=model.tokenizer, channel=c)) for c in ("analysis", "final")]
    return means[1] - means[0]


def random_directions(like: Float[Tensor, " d"], n: int, seed: int) -> list[Float[Tensor, " d"]]:
    """Return n random directions with the norm of another one, uniform over the sphere."""
    drawn = torch.randn((n, *like.shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    drawn *= like.norm().cpu().double() / drawn.norm(dim=-1, keepdim=True)
    return list(drawn.to(like))


def labelled_tokens(model: GptOss, text: str) -> TokenSet:
    """Return the tokens of labels written as text, such as "role=user,part=content".

    Raises:
        InputError: a label is unknown, or is not one of a token.
    """
    labels = selection_of(text)
    assert isinstance(labels, Mapping)
    if unknown := sorted(set(labels) - TOKEN_LABELS.keys()):
        raise InputError(f"{text!r}: {unknown[0]!r} is not a label of tokens: use {', '.join(TOKEN_LABELS)}")
    return token_set(tokenizer=model.tokenizer, **labels)


def _between(a: str, b: str) -> str:
    """Return the name of a direction, without the name of a label that both sides have."""
    sides = [text.partition("=") for text in (a, b)]
    plain = sides[0][0] == sides[1][0] and not any("," in text for text in (a, b))
    return f"{sides[0][2]} − {sides[1][2]}" if plain and sides[0][2] else f"({a}) − ({b})"


@torch.no_grad()
def _dose_effects(
    model: GptOss, rows: Sequence[Transcript], layer: int, where: TokenSet, directions: Sequence[Float[Tensor, " d"]]
) -> Float[np.ndarray, "direction dose sequence"]:
    """Return the change of the final message's log-probability by each direction in each dose, added after a layer.

    The layers up to that one are computed once.
    """
    final, later = final_tokens(model), range(layer + 1, model.cfg.n_layers)
    out = np.empty((len(directions), len(DOSES), len(rows)))
    for batch in passes((len(row.tokens) for row in rows), FORWARD_TOKENS):
        tokens, lengths = pack([rows[i] for i in batch], model.device)
        stream = model.residual(tokens, packed=lengths, layers=range(layer + 1))
        assert model.context is not None
        steered = model.context.mask(where)[..., None].to(stream.device)

        def scored(x: Tensor, tokens: Tensor = tokens, lengths: list[int] = lengths) -> Float[np.ndarray, " sequence"]:
            residual = model.residual(tokens, packed=lengths, layers=later, stream=x)
            return pass_logprobs(model, residual, tokens, len(lengths), final)

        base = scored(stream)
        for i, direction in enumerate(directions):
            for j, dose in enumerate(DOSES):
                out[i, j, batch] = scored(stream + (dose * direction).to(stream) * steered) - base
    return out


def _summary(result: xr.Dataset, rests_on: str, controls: int) -> str:
    """Return a sentence for each dose."""
    lines = [
        f"{rests_on}; change of the final message's log-probability, nats a sequence; {controls} random directions:"
    ]
    name = str(result["which"].values[0])
    for dose in result["dose"].values:
        one = result.sel(dose=dose)
        change, low, high = (float(one[name].values[0]) for name in ("change", "low", "high"))
        p, p_family = float(one["p"]), float(one["p_family"])
        differs = "more extreme than random directions" if p_family <= ALPHA else "not shown to differ from them"
        random = [float(v) for v in (one["change"].values[1], one["random"].min(), one["random"].max())]
        lines.append(
            f"  {dose:+g} × ({name}): {signed_interval(change, low, high, 2)}, random {signed(random[0], 2)} "
            f"({signed(random[1], 2)} to {signed(random[2], 2)}); {differs}: rank p {p:.3f}, {p_family:.3f} for all "
            f"doses, {signed(float(one['distance']), 1)} standard deviations."
        )
    return "\n".join(lines)


@torch.no_grad()
def _mean(model: GptOss, rows: Sequence[Transcript], point: str, where: TokenSet) -> Float[Tensor, " d"]:
    """Return the mean activation at a hook point over the tokens in a set."""
    total, n = torch.zeros(model.cfg.d_model, dtype=torch.float64), 0
    for row in rows:
        mask = torch.from_numpy(where(row.tokens.astype(np.int64)))
        if mask.any():
            ids = torch.from_numpy(row.tokens.astype(np.int64))[None].to(model.device)
            _, cache = model.run_with_cache(ids, names_filter=point)
            total += cache[point][0].cpu()[mask].double().sum(0)
            n += int(mask.sum())
    if not n:
        raise InputError(f"no sequence has tokens in {where!r}")
    return (total / n).float().to(model.device)
