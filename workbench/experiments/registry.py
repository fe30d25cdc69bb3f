"""The experiments by name: a model and a run of it in, datasets with effects and their intervals out.

Each explains itself as a study does (method, what is not controlled, a summary in plain words), and is saved the same
way. All changes are paired: the same tokens, with and without the intervention; the sampling unit is the prompt.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr

import workbench
from workbench.errors import InputError
from workbench.experiments import chain_of_thought
from workbench.experiments.attribution import by_expert, logit_parts
from workbench.experiments.effects import effects, expert_load, load_matched, logprobs, paired
from workbench.experiments.from_run import transcripts
from workbench.harmony.token_sets import TokenSet, token_set
from workbench.harmony.transcripts import Transcript
from workbench.hooks.edits import Edit
from workbench.hooks.interventions import forbid, force, knockout, remove_sinks, reweight, scale_sinks, steer
from workbench.model.transformer import GptOss
from workbench.runs import Run

NAMES = ("cot", "ablate", "force", "reweight", "silence", "knockout", "steer", "patch", "attribution")
SEQUENCES = 200  # at most, of prompts spread evenly over the run
CONTROLS = 20  # load-matched random sets
_SIZE = 6  # experts of a named set

METHOD = (
    "Log-probability in nats of the final message, summed over its tokens, with the intervention less without, on the "
    "run's own tokens; means over prompts, percentile bootstrap over prompts. Nothing is called an effect whose interval "
    "includes zero."
)
NOT_CONTROLLED = (
    "An intervention takes the model off the states it was trained in; beside it stands the same intervention on controls "
    "where there are any. Accuracy of newly generated answers may change less, or more, than log-probability."
)


def run_experiment(
    name: str, model: GptOss, run: Run, *, sequences: int = SEQUENCES, seed: int = 0
) -> dict[str, xr.Dataset]:
    """One experiment on sequences of the run; the model must be the one that was captured."""
    if name not in NAMES:
        raise InputError(f"no experiment is called {name!r}; the experiments are {', '.join(NAMES)}")
    if run.checkpoint["digest"] != model.checkpoint.digest:
        raise InputError(f"{run.path} was captured from another checkpoint than {model.checkpoint.path}: load that one")
    rows = transcripts(run, _chosen(run, model.cfg.n_ctx, sequences))
    made = _EXPERIMENTS[name](model, rows, seed)
    for title, result in made.items():
        result.attrs |= {
            "study": name, "title": result.attrs.get("title", title), "run_digest": run.digest, "seed": seed,
            "checkpoint_digest": model.checkpoint.digest, "workbench_version": workbench.__version__,
            "parameters": json.dumps({"sequences": len(rows)}),
        }  # fmt: skip
        result.attrs.setdefault("method", METHOD)
        result.attrs.setdefault("not_controlled", NOT_CONTROLLED)
    return made


def _chosen(run: Run, n_ctx: int, most: int) -> list[int]:
    """Sequences of prompts spread evenly over the run, a prompt's all together, about `most` of them."""
    table = run.sequences[run.sequences["length"] <= n_ctx]
    if not len(table):
        raise InputError(f"{run.path} holds no sequence yet that fits the model's context")
    prompts = table["prompt_id"].where(table["prompt_id"] != "", table["id"])
    names = prompts.drop_duplicates()
    wanted = max(2, min(len(names), most * len(names) // len(table)))
    kept = names.iloc[np.unique(np.linspace(0, len(names) - 1, wanted).round().astype(int))]
    return [int(n) for n in table.index[prompts.isin(kept)]]


def _final(model: GptOss) -> TokenSet:
    return token_set(tokenizer=model.tokenizer, channel="final")


def _written(model: GptOss) -> TokenSet:
    return token_set(tokenizer=model.tokenizer, channel=["analysis", "final"])


def _effects(
    model: GptOss, rows: Sequence[Transcript], what: Mapping[str, Edit | Sequence[Edit]], seed: int, title: str
) -> xr.Dataset:
    rows = _answered(model, rows)
    result = effects(model, rows, what, _final(model), seed=seed)
    return result.assign_attrs(title=title, summary=words(result), method=METHOD)


def _answered(model: GptOss, rows: Sequence[Transcript]) -> list[Transcript]:
    final = _final(model)
    found = [row for row in rows if final(row.tokens.astype(np.int64)).any()]
    if len({row.prompt_id for row in found}) < 2:
        raise InputError("fewer than two prompts of the run have a final message: there is no answer to measure")
    return found


def words(result: xr.Dataset) -> str:
    """Effects in plain words, largest first."""
    order = np.argsort(-np.abs(result["change"].values))
    lines = [f"{result.attrs['rests_on']}; change of the final message's log-probability, nats a sequence:"]
    for i in order:
        one = result.isel(intervention=int(i))
        low, high = float(one["low"]), float(one["high"])
        said = f"{float(one['change']):+.2f} [{low:+.2f}, {high:+.2f}]"
        lines.append(f"  {one['intervention'].item()}: {said if low * high > 0 else f'no effect shown, {said}'}")
    return "\n".join(lines)


def group_of(row: Transcript) -> str:
    """What experts are named for: the domain of a task, or the task."""
    return str(row.meta.get("domain") or row.meta.get("task") or "all")


def named_experts(model: GptOss, rows: Sequence[Transcript], group: str, size: int = _SIZE) -> list[tuple[int, int]]:
    """The experts whose share of what a group writes exceeds most their share of what the others write."""
    written = _written(model)
    own, others = ([r for r in rows if (group_of(r) == group) is side] for side in (True, False))
    excess = np.nan_to_num(expert_load(model, own, written)) - np.nan_to_num(expert_load(model, others, written))
    return [
        (int(layer), int(e))
        for layer, e in zip(*np.unravel_index(np.argsort(-excess, axis=None)[:size], excess.shape), strict=True)
    ]


def _sets(
    model: GptOss, rows: Sequence[Transcript], seed: int
) -> dict[str, tuple[list[tuple[int, int]], list[list[tuple[int, int]]]]]:
    """For each group its named experts, and load-matched random ones."""
    groups = sorted({group_of(row) for row in rows})
    found = {}
    for group in groups if len(groups) > 1 else []:
        named = named_experts(model, rows, group)
        own = [r for r in rows if group_of(r) == group]
        load = np.nan_to_num(expert_load(model, own, _written(model)))
        for tolerance in (0.15, 0.25, 0.4, 0.6):
            try:
                found[group] = named, load_matched(load, named, CONTROLS, seed=seed, tolerance=tolerance)
                break
            except InputError:
                continue
    if not found:
        raise InputError(
            "the run's sequences name no two groups (meta: domain or task) whose experts could be compared"
        )
    return found


def _change_sets(
    model: GptOss, rows: Sequence[Transcript], seed: int, change: Callable[[int, list[int], TokenSet], Edit], title: str
) -> dict[str, xr.Dataset]:
    """Named experts against random ones of like load, on the group they are named for and on the others."""
    rows, written, of = _answered(model, rows), _written(model), _final(model)

    def edits(cells: Sequence[tuple[int, int]]) -> list[Edit]:
        return [change(layer, [e for c, e in cells if c == layer], written) for layer in sorted({c for c, _ in cells})]

    base = logprobs(model, rows, of)
    units = np.array([row.prompt_id for row in rows])
    groups = np.array([group_of(row) for row in rows])
    names, table, texts = [], [], []
    for group, (named, random_sets) in _sets(model, rows, seed).items():
        change_named = logprobs(model, rows, of, *edits(named)) - base
        change_random = np.stack([logprobs(model, rows, of, *edits(cells)) - base for cells in random_sets])
        own = groups == group
        parts = {
            "named, own group": change_named[own], "random of equal load, own group": change_random[:, own].mean(0),
            "named less random, own group": change_named[own] - change_random[:, own].mean(0),
            "named, other groups": change_named[~own],
        }  # fmt: skip
        row = [paired(v, units[own] if "own" in n else units[~own], seed=seed) for n, v in parts.items()]
        rank = float((change_random[:, own].mean(1) <= change_named[own].mean()).mean())
        names.append(group)
        table.append(np.array(row))
        said = ", ".join(f"{layer}.{e}" for layer, e in named)
        value, low, high = (float(v) for v in row[2])
        differs = "hurts more than" if high < 0 else "hurts less than" if low > 0 else "is not shown to differ from"
        texts.append(
            f"{group} (experts {said}): {float(row[0][0]):+.2f} nats [{float(row[0][1]):+.2f}, {float(row[0][2]):+.2f}] on its own "
            f"prompts, random experts of equal load {float(row[1][0]):+.2f}; it {differs} those: {value:+.2f} [{low:+.2f}, "
            f"{high:+.2f}]; {rank:.0%} of {len(random_sets)} random sets hurt as much. On the others {float(row[3][0]):+.2f}."
        )
    values = np.stack(table)
    result = xr.Dataset(
        {n: (("group", "which"), values[..., i]) for i, n in enumerate(("change", "low", "high"))},
        coords={"group": names, "which": list(parts)},
    )
    return {"experts": result.assign_attrs(title=title, summary="\n".join(texts), units="nat")}


def _cot(model: GptOss, rows: Sequence[Transcript], seed: int) -> dict[str, xr.Dataset]:
    result = chain_of_thought.study(model, rows, seed=seed)
    lines = [f"{result.attrs['rests_on']}; accuracy with the whole analysis {result.attrs['accuracy']:.3f}."]
    for change in map(str, result["change"].values):
        one = {str(k): float(v) for k, v in result.sel(change=change).data_vars.items()}
        moved = one["logprob_low"] * one["logprob_high"] > 0
        lines.append(
            f"{change}: {one['same']:.0%} of answers stay the same [{one['same_low']:.0%}, {one['same_high']:.0%}]; log-probability "
            + ("" if moved else "not shown to change, ")
            + f"{one['logprob']:+.2f} nats [{one['logprob_low']:+.2f}, {one['logprob_high']:+.2f}]."
        )
    lines.append(
        f"Area over the curve of early answering: {float(result['area']):.3f} [{float(result['area_low']):.3f}, {float(result['area_high']):.3f}]."
    )
    method = chain_of_thought.__doc__ or ""
    return {
        "thought": result.assign_attrs(
            title="Is the answer made by the thought?",
            summary="\n".join(lines),
            method=" ".join(method.split("Reference:")[0].split()),
        )
    }


def _silence(model: GptOss, rows: Sequence[Transcript], seed: int) -> dict[str, xr.Dataset]:
    layers = list(range(model.cfg.n_layers))
    windowed = [i for i in layers if model.cfg.windows[i] is not None]
    full = [i for i in layers if model.cfg.windows[i] is None]
    what: dict[str, Edit | Sequence[Edit]] = {
        "no sinks": remove_sinks(layers),
        "sinks halved": scale_sinks(layers, 0.5),
    }
    what |= {"no sinks, full layers": remove_sinks(full)} if full else {}
    what |= {"no sinks, window layers": remove_sinks(windowed)} if windowed else {}
    what |= {f"no sinks, layer {layer}": remove_sinks([layer]) for layer in layers}
    return {"sinks": _effects(model, rows, what, seed, "Answers without attention sinks")}


def _knockout(model: GptOss, rows: Sequence[Transcript], seed: int) -> dict[str, xr.Dataset]:
    def tokens(**asked: Any) -> TokenSet:
        return token_set(tokenizer=model.tokenizer, **asked)

    layers = list(range(model.cfg.n_layers))
    kinds = {
        "all layers": layers,
        "full layers": [i for i in layers if model.cfg.windows[i] is None],
        "window layers": [i for i in layers if model.cfg.windows[i] is not None],
    }
    thinking, behind, asked = tokens(channel="analysis"), tokens(message=-1), tokens(role="user")
    thoughtful = [t.row for t in chain_of_thought.thoughts(model, rows)]
    what: dict[str, Edit | Sequence[Edit]] = {}
    for kind, chosen in kinds.items():
        if chosen:
            what[f"final does not see analysis, {kind}"] = knockout(chosen, behind, thinking)
            what[f"final does not see the user, {kind}"] = knockout(chosen, behind, asked)
    what["analysis does not see the user, all layers"] = knockout(layers, thinking, asked)
    return {"attention": _effects(model, thoughtful, what, seed, "Attention between channels knocked out")}


def _steer(model: GptOss, rows: Sequence[Transcript], seed: int) -> dict[str, xr.Dataset]:
    """Along the direction from analysis to final: channel means over half of the prompts, effect on the other half."""
    rows = _answered(model, rows)
    prompts = sorted({row.prompt_id for row in rows})
    fit = set(prompts[::2])
    train, test = [r for r in rows if r.prompt_id in fit], [r for r in rows if r.prompt_id not in fit]
    layer = model.cfg.n_layers // 2
    point = f"blocks.{layer}.hook_resid_post"
    means = [_mean(model, train, point, token_set(tokenizer=model.tokenizer, channel=c)) for c in ("analysis", "final")]
    direction = means[1] - means[0]
    random = torch.randn(direction.shape, generator=torch.Generator().manual_seed(seed))
    random = (random * direction.norm().cpu() / random.norm()).to(direction)
    where = token_set(tokenizer=model.tokenizer, channel="final")
    what: dict[str, Edit | Sequence[Edit]] = {}
    for scale in (-1.0, -0.5, 0.5, 1.0):
        what[f"{scale:+g} × (final − analysis)"] = steer(point, direction, scale, where)
        what[f"{scale:+g} × a random direction as long"] = steer(point, random, scale, where)
    return {
        "direction": _effects(
            model, test, what, seed, f"Steering the final message along the channel direction at {point}"
        )
    }


@torch.no_grad()
def _patch(model: GptOss, rows: Sequence[Transcript], seed: int) -> dict[str, xr.Dataset]:
    """The prompt's states at another effort put in, layer by layer: where the effort is carried.

    Pairs are the same prompt at two efforts with prompts of equal length; all its positions behind the first that
    differs are patched at once, and the written tokens' log-probability is read.
    """
    by_prompt: dict[str, dict[str, Transcript]] = {}
    for row in rows:
        by_prompt.setdefault(row.prompt_id, {}).setdefault(row.effort, row)
    pairs = [
        (own, other)
        for found in by_prompt.values()
        for own in found.values()
        for other in found.values()
        if own.effort != other.effort and own.n_prompt == other.n_prompt
        and not np.array_equal(own.tokens[: own.n_prompt], other.tokens[: own.n_prompt])
    ]  # fmt: skip
    if len({own.prompt_id for own, _ in pairs}) < 2:
        raise InputError("fewer than two prompts were answered at two efforts with prompts of equal length")
    layers = range(model.cfg.n_layers)
    points = [f"blocks.{layer}.hook_resid_post" for layer in layers]
    written, kinds = _written(model), sorted({f"{other.effort} into {own.effort}" for own, other in pairs})
    changes: dict[str, list[np.ndarray]] = {kind: [] for kind in kinds}
    units: dict[str, list[str]] = {kind: [] for kind in kinds}
    for own, other in pairs:
        n = own.n_prompt
        first = int(np.flatnonzero(own.tokens[:n] != other.tokens[:n])[0])
        theirs = torch.from_numpy(other.tokens[:n].astype(np.int64))[None].to(model.device)
        _, cache = model.run_with_cache(theirs, names_filter=lambda name: name in points)
        ids = torch.from_numpy(own.tokens.astype(np.int64))[None].to(model.device)
        at = torch.from_numpy(np.flatnonzero(written(own.tokens.astype(np.int64)))).to(model.device)
        if not len(at):
            continue
        base = _said(model, ids, at, [])
        each = []
        for point in points:
            each.append(_said(model, ids, at, [(point, partial(_put, cache[point], first))]) - base)
        kind = f"{other.effort} into {own.effort}"
        changes[kind].append(np.array(each))
        units[kind].append(own.prompt_id)
    kinds = [kind for kind in kinds if len(set(units[kind])) > 1]
    parts = [paired(np.stack(changes[kind], -1), units[kind], seed=seed) for kind in kinds]
    variables = {
        n: (("which", "layer"), np.stack([p[i] for p in parts])) for i, n in enumerate(("change", "low", "high"))
    }
    result = xr.Dataset(variables, coords={"which": kinds, "layer": list(layers)})
    lines = []
    for kind in kinds:
        one = result.sel(which=kind)
        layer = int(np.argmin(one["change"].values))
        cell = one.isel(layer=layer)
        low, high = float(cell["low"]), float(cell["high"])
        shown = "" if low * high > 0 else "no effect shown, "
        lines.append(
            f"{kind}: most in layer {layer}, {shown}{float(cell['change']):+.2f} nats on what was written [{low:+.2f}, {high:+.2f}]."
        )
    method = (
        "The prompt's residual stream behind a layer replaced by that of the same prompt at another effort; " + METHOD
    )
    title = "Where in the prompt's states the effort is carried"
    return {"effort": result.assign_attrs(title=title, summary="\n".join(lines), method=method, units="nat")}


def _put(source: torch.Tensor, first: int, x: torch.Tensor, hook: Any) -> torch.Tensor:
    """x with its positions from `first` to the source's end as the source has them."""
    return torch.cat([x[:, :first], source[:, first:], x[:, source.shape[1] :]], 1)


def _said(model: GptOss, ids: torch.Tensor, at: torch.Tensor, hooks: list[tuple[str, Any]]) -> float:
    """Summed log-probability of the tokens at these places."""
    with model.hooks(fwd_hooks=hooks):
        residual = model.residual(ids)
    logp = model.logits(residual, at[None] - 1)[0].float().log_softmax(-1)
    return float(logp.gather(-1, ids[0, at, None].to(logp.device)).sum())


@torch.no_grad()
def _mean(model: GptOss, rows: Sequence[Transcript], point: str, where: TokenSet) -> torch.Tensor:
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


def _attribution(model: GptOss, rows: Sequence[Transcript], seed: int) -> dict[str, xr.Dataset]:
    """Which experts and heads write the first token of the answer: exact parts of its logit, mean over prompts."""
    found = chain_of_thought.thoughts(model, rows) or []
    if not found:
        raise InputError("no sequence has an analysis and a closed final message: there is no answer to attribute")
    experts, heads = [], []
    for thought in found[:100]:
        ids = torch.from_numpy(thought.row.tokens.astype(np.int64))[None, : thought.content + 1].to(model.device)
        parts = logit_parts(model, ids[:, :-1], at=[thought.content - 1], of=int(ids[0, -1]))
        experts.append(by_expert(parts).squeeze().values)
        heads.append(parts["heads"].squeeze().values)
    units = [t.row.prompt_id for t in found[:100]]
    made = {}
    for name, dims, each in (("experts", ("layer", "expert"), experts), ("heads", ("layer", "head"), heads)):
        value, low, high = paired(np.moveaxis(np.nan_to_num(np.stack(each)), 0, -1), units, seed=seed)
        result = xr.Dataset({"change": (dims, value), "low": (dims, low), "high": (dims, high)})
        top = np.argsort(-np.abs(value), axis=None)[:5]
        said = ", ".join("{}.{} ({:+.2f})".format(*np.unravel_index(i, value.shape), value.flat[i]) for i in top)
        text = f"Largest parts of the logit of the answer's first token, mean over {len(set(units))} prompts (layer.{dims[1]}): {said}."
        made[name] = result.assign_attrs(
            title=f"Parts of the answer's logit: {name}", summary=text, units="logit",
            method="Exact decomposition of a logit with the final norm's scale frozen; parts sum to the logit.",
            not_controlled="A part is what was written, not what would be missing: later layers may compensate.",
        )  # fmt: skip
    return made


_EXPERIMENTS: dict[str, Callable[[GptOss, Sequence[Transcript], int], dict[str, xr.Dataset]]] = {
    "cot": _cot,
    "ablate": lambda m, r, s: _change_sets(m, r, s, forbid, "Experts named by routing, forbidden"),
    "force": lambda m, r, s: _change_sets(
        m, r, s, lambda layer, e, t: force(layer, e[:1], t), "Experts named by routing, forced"
    ),
    "reweight": lambda m, r, s: _change_sets(
        m, r, s, lambda layer, e, t: reweight(layer, e, 0.5, t), "Experts named by routing, gates halved"
    ),
    "silence": _silence,
    "knockout": _knockout,
    "steer": _steer,
    "patch": _patch,
    "attribution": _attribution,
}
