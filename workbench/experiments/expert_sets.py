"""Sets of experts that routing associates with a group of sequences, against random sets of the same load.

The random sets are the null (see `random_controls`): a group's experts matter more than others of their load if their
effect is extreme among those of at least 20 random sets. The achieved match of load is a result too. Groups that cannot
be tested stay in the result, named with the reason.
"""

import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Int

from workbench.counting import count_of, signed
from workbench.errors import InputError
from workbench.experiments.effects import load_matched, load_of, logprobs, routed_slots
from workbench.experiments.final_channel import answered_rows, final_tokens, generated_tokens
from workbench.experiments.random_controls import CONTROLS, MIN_CONTROLS, Rank, check_controls, rank
from workbench.harmony.token_sets import TokenSet
from workbench.harmony.transcripts import Transcript
from workbench.hooks.edits import Edit
from workbench.model.transformer import GptOss
from workbench.studies.intervals import MIN_PROMPTS, mean_effect, prompt_means
from workbench.studies.statistics import ALPHA, false_discovery

Cells = list[tuple[int, int]]  # (layer, expert)
Change = Callable[[int, list[int], TokenSet], Edit]
WHICH = ("named, own group", "random of equal load, own group", "named less random, own group", "named, other groups")
TOLERANCES = (0.05, 0.1, 0.15, 0.25, 0.4, 0.5)  # of the load of a random set; the first that has enough sets is used
MATCHED = 0.25  # the mean load of the random sets may be off by so much before the summary states it
_SIZE = 6  # experts of a named set
METHOD = (
    "Log-probability in nats of the final message, summed over its tokens, with the intervention less without, on the "
    "run's own tokens; means over prompts. The null is the distribution of the effects of random sets of as many "
    "experts in the same layers with about the same load on the group's generated tokens, none of them named: rank p "
    "(two-sided, about the common median), and distance in standard deviations of the random sets. q: "
    "Benjamini–Hochberg over the groups. Intervals over prompts (bootstrap-t) hold the random sets fixed and decide "
    "nothing."
)


class SetEffects(NamedTuple):
    """The named experts of a group and their random sets, with what each does to the log-probability of sequences."""

    own_set: Cells
    sets: list[Cells]
    on_own: Float[np.ndarray, " sequence"]
    on_others: Float[np.ndarray, " sequence"]
    random: Float[np.ndarray, "set sequence"]


def group_of(row: Transcript) -> str:
    """Return the group for which experts are named: the domain of a task, or the task."""
    return str(row.meta.get("domain") or row.meta.get("task") or "all")


def named_experts(model: GptOss, rows: Sequence[Transcript], group: str, size: int = _SIZE) -> Cells:
    """Return the experts whose load on a group's generated tokens exceeds most their load on those of the others."""
    own = np.array([group_of(row) == group for row in rows])
    return _largest_excess(routed_slots(model, rows, generated_tokens(model)), own, size)


def _largest_excess(
    slots: Int[np.ndarray, "sequence layer expert"], own: Bool[np.ndarray, " sequence"], n: int
) -> Cells:
    excess = np.nan_to_num(load_of(slots[own])) - np.nan_to_num(load_of(slots[~own]))
    largest = np.unravel_index(np.argsort(-excess, axis=None)[:n], excess.shape)
    return [(int(layer), int(expert)) for layer, expert in zip(*largest, strict=True)]


def matched_sets(load: Float[np.ndarray, "layer expert"], own_set: Cells, n: int, seed: int) -> list[Cells]:
    """Return n random sets of the load of the named experts, at the first tolerance that has as many.

    Where the widest has fewer than n it gives as many as there are, and none where these are too few to be a null.
    """
    for tolerance in TOLERANCES:
        try:
            return load_matched(load, own_set, n, seed=seed, tolerance=tolerance)
        except InputError:
            continue
    try:
        return load_matched(load, own_set, MIN_CONTROLS, seed=seed, tolerance=TOLERANCES[-1])
    except InputError:
        return []


def change_experts(
    model: GptOss, rows: Sequence[Transcript], seed: int, change: Change, title: str, *, controls: int = CONTROLS
) -> dict[str, xr.Dataset]:
    """Return the effect of changing each group's named experts, ranked among random sets of the same load.

    Variables over (group, which): change, low, high in nats a sequence. Over group: p, q and distance of the rank,
    random_sets, load_ratio with its least and largest, and prompts. Over (group, set): random, random_load_ratio. The
    attribute `not_tested` has the groups without a test, with the reason.

    Raises:
        InputError: fewer than 20 controls are asked for, or the sequences are of one group.
    """
    check_controls(controls)
    rows = answered_rows(model, rows)
    groups = np.array([group_of(row) for row in rows])
    names = sorted(set(groups))
    if len(names) < 2:
        raise InputError("the run's sequences are of one group (meta: domain or task): there are no others to compare")
    units, base = np.array([row.prompt_id for row in rows]), logprobs(model, rows, final_tokens(model))
    slots = routed_slots(model, rows, generated_tokens(model))
    results, not_tested = [], {}
    for name in names:
        own = groups == name
        own_set, load = _largest_excess(slots, own, _SIZE), np.nan_to_num(load_of(slots[own]))
        prompts = len(set(units[own]))
        sets = matched_sets(load, own_set, controls, seed) if prompts >= MIN_PROMPTS else []
        if prompts < MIN_PROMPTS:
            not_tested[name] = f"{count_of(prompts, 'prompt')}, {MIN_PROMPTS} are needed"
        elif not sets:
            not_tested[name] = f"fewer than {MIN_CONTROLS} random sets have its load within {TOLERANCES[-1]:.0%}"
        tested = measure(model, rows, own, base, own_set, sets, change)
        results.append(_result(tested, load, units[own], units[~own], controls, seed))
    result = xr.concat(results, "group").assign_coords(group=names)
    result["q"] = ("group", false_discovery(result["p"].values))
    attrs = {
        "title": title,
        "units": "nat",
        "method": METHOD,
        "not_tested": json.dumps(not_tested),
        "family": f"{count_of(len(names) - len(not_tested), 'group')}",
    }
    return {"experts": result.assign_attrs(attrs, summary="\n".join(_summary(result, not_tested)))}


def measure(
    model: GptOss,
    rows: Sequence[Transcript],
    own: Bool[np.ndarray, " sequence"],
    base: Float[np.ndarray, " sequence"],
    own_set: Cells,
    sets: list[Cells],
    change: Change,
) -> SetEffects:
    """Return the effect of changing the named experts on all sequences, and of each random set on the group's own."""
    written, of = generated_tokens(model), final_tokens(model)
    own_rows = [row for row, mine in zip(rows, own, strict=True) if mine]

    def edits(cells: Cells) -> list[Edit]:
        return [change(layer, [e for c, e in cells if c == layer], written) for layer in sorted({c for c, _ in cells})]

    on_all = logprobs(model, rows, of, *edits(own_set)) - base
    random = np.empty((len(sets), len(own_rows)))
    for i, cells in enumerate(sets):
        random[i] = logprobs(model, own_rows, of, *edits(cells)) - base[own]
    return SetEffects(own_set, sets, on_all[own], on_all[~own], random)


def _result(
    tested: SetEffects,
    load: Float[np.ndarray, "layer expert"],
    own: np.ndarray,
    others: np.ndarray,
    controls: int,
    seed: int,
) -> xr.Dataset:
    """Return the variables of one group; a group without random sets has no intervals and no test."""
    change, low, high = np.full((3, len(WHICH)), np.nan)
    random, ratio = np.full((2, controls), np.nan)
    ranked, n = Rank(float("nan"), float("nan"), float("nan"), 0), len(tested.sets)
    change[0], change[3] = (
        prompt_means(values, units).mean() for values, units in ((tested.on_own, own), (tested.on_others, others))
    )
    if n:
        random[:n] = prompt_means(tested.random, own).mean(-1)
        ratio[:n] = [
            sum(load[cell] for cell in cells) / sum(load[cell] for cell in tested.own_set) for cells in tested.sets
        ]
        ranked, mean_random = rank(change[0], random[:n]), tested.random.mean(0)
        for i, values in enumerate((tested.on_own, mean_random, tested.on_own - mean_random)):
            change[i], low[i], high[i] = mean_effect(values, own, seed=seed)[:3]
        if len(set(others)) >= MIN_PROMPTS:
            change[3], low[3], high[3] = mean_effect(tested.on_others, others, seed=seed)[:3]
    scalars = {
        "p": ranked.p,
        "distance": ranked.distance,
        "random_sets": n,
        "as_low": ranked.as_low,
        "load_ratio": np.mean(ratio[:n]) if n else np.nan,
        "load_ratio_low": np.min(ratio[:n]) if n else np.nan,
        "load_ratio_high": np.max(ratio[:n]) if n else np.nan,
        "prompts": len(set(own)),
    }
    return xr.Dataset(
        {name: ("which", values) for name, values in (("change", change), ("low", low), ("high", high))}
        | {"random": ("set", random), "random_load_ratio": ("set", ratio)}
        | {name: ((), value) for name, value in scalars.items()},
        coords={
            "which": list(WHICH),
            "set": range(controls),
            "experts": ", ".join(f"{layer}.{expert}" for layer, expert in tested.own_set),
        },
    )


def _summary(result: xr.Dataset, not_tested: dict[str, str]) -> list[str]:
    """Return a sentence for each group, and one for the groups that cannot be tested."""
    lines = []
    for name in map(str, result["group"].values):
        one = result.sel(group=name)
        own, random, less, others = (float(v) for v in one["change"].values)
        experts = one["experts"].item()
        if name in not_tested:
            lines.append(f"{name} (experts {experts}): cannot be tested, {not_tested[name]}; {signed(own, 2)} nats.")
            continue
        low, high = (float(one[edge].values[0]) for edge in ("low", "high"))
        q, n = float(one["q"]), int(one["random_sets"])
        differs = f"{'hurts more' if less < 0 else 'hurts less'} than" if q <= ALPHA else "is not shown to differ from"
        lines.append(
            f"{name} (experts {experts}): {signed(own, 2)} nats [{signed(low, 2)}, {signed(high, 2)}] on its own "
            f"prompts, {n} random sets of {float(one['load_ratio']):.2f} times its load "
            f"({float(one['load_ratio_low']):.2f} to {float(one['load_ratio_high']):.2f}) {signed(random, 2)}; it "
            f"{differs} those: rank p {float(one['p']):.3f}, q {q:.3f}, {signed(float(one['distance']), 1)} standard "
            f"deviations; {int(one['as_low'])} of {n} random sets hurt as much. On the others {signed(others, 2)}."
        )
        if abs(float(one["load_ratio"]) - 1) > MATCHED:
            lines.append("  Load is not matched: a difference from these sets may be one of load.")
    lines += _too_few_sets(result["random_sets"].values)
    if not_tested:
        lines.append(
            f"{len(not_tested)} of {count_of(result.sizes['group'], 'group')} cannot be tested: "
            f"{', '.join(not_tested)}."
        )
    return lines


def _too_few_sets(random_sets: Int[np.ndarray, " group"]) -> list[str]:
    """Return a warning if one group alone cannot have q below 0.05, however extreme it is among its random sets."""
    tested = random_sets[random_sets > 0]
    smallest = len(tested) / (tested.max(initial=0) + 1)
    if not len(tested) or smallest <= ALPHA:
        return []
    return [
        f"Warning: with {tested.max()} random sets, a group that alone differs has q of at least {smallest:.3f} and "
        f"cannot be shown to differ: use at least {int(np.ceil(len(tested) / ALPHA)) - 1} controls."
    ]
