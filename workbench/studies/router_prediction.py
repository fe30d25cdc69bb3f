"""The router prediction study: how well do tokens, bigrams, earlier experts and features predict a token's experts?

Predictors are fitted on four fifths of the prompts and predict the k experts of every token of the others: the most
frequent experts of the layer, of the token id, of the bigram (where it was seen in training, else of the token), those
that ridge regression gives from the experts of the layer before, and, where a run recorded one, from an activation or
the features of an autoencoder. The score is recall: the share of the k chosen experts that are among the k predicted.

Folds share most of the prompts that predictors are fitted on, so that the recalls of prompts are not independent. The
squared standard error is therefore that of the mean over prompts times 1 + folds / (folds - 1) (Nadeau & Bengio).

Reference: RouterInterp (features of sparse autoencoders predict routing, beside a bigram baseline); Nadeau & Bengio
2003, Inference for the Generalization Error; Bouckaert & Frank 2004 (cross-validation).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from workbench.counting import count_of
from workbench.errors import InputError
from workbench.registry import Study
from workbench.runs import Run
from workbench.studies import token_labels
from workbench.studies.difference_tests import paired_test
from workbench.studies.intervals import MIN_PROMPTS, few_prompts, within_bounds
from workbench.studies.probe_folds import ridge
from workbench.studies.probes import bigrams, previous_ids
from workbench.studies.result import Definition, dataset, provenance
from workbench.studies.run_index import index_of

STUDY = Study(
    name="router-prediction",
    title="Router prediction",
    question="How well do token, bigram, the experts of the layer before and recorded features predict routing?",
    requires=("routing",),
    compute="one pass over the run's tokens; ridge regressions of every layer, fitted five times",
    options={
        "hook": "Recorded activation or features to predict from (default: none).",
        "max_tokens": "Use at most this many tokens (default: 4000).",
    },
    page="router-prediction",
    order=49,
)
FOLDS = 5
_SHARED = np.sqrt(1 + FOLDS / (FOLDS - 1))  # times the standard error, as folds share the prompts they are fitted on
_CI = "95 %, Student's t over prompts, corrected for skewness and for folds that share training prompts"
DEFINITIONS = {
    "recall": Definition("recall of experts", "1", "|predicted k ∩ chosen k| / k, mean over prompts' means", ci=_CI),
    "beyond_bigram": Definition("recall beyond the bigram's", "1", "recall less that of the bigram, paired", ci=_CI),
    "q": Definition("q", "1", "Benjamini–Hochberg over layers and predictors: recall is that of the bigram", null="0"),
}
METHOD = (
    "Predictions of the k experts of tokens of held-out prompts (five folds). load: the layer's most frequent "
    "experts. token, bigram: the most frequent experts of the id or pair in training; a pair that was not seen falls "
    "back to the token, and that to the load. layer before, features: the k largest predictions of ridge regression. "
    "Recall is averaged within prompts, then over them; differences from the bigram are paired by prompt. Standard "
    "errors allow for training prompts that folds share (Nadeau & Bengio 2003)."
)
NOT_CONTROLLED = (
    "A token that is frequent is predicted better from its id. That features predict routing does not show that the "
    "router reads them: it reads the whole residual stream, and is linear in it after normalisation."
)


def study(run: Run, *, hook: str = "", max_tokens: int = 4000, seed: int = 0) -> dict[str, xr.Dataset]:
    """Return the recall of each predictor of routing by layer, and its difference from the bigram's.

    hook: a recorded hook point, each layer of which predicts the experts of the same layer.

    Raises:
        InputError: the run has sums only, fewer than five prompts, or did not record the hook point.
    """
    if not hasattr(run, "blocks"):
        raise InputError(
            "the prediction of the router needs the tokens of a run, and this run holds only sums: "
            "capture again with --record routing"
        )
    parts = [(b["id"], b["sequence"], b["experts"]) for b in run.blocks("id", "experts")]
    ids, sequence, experts = (np.concatenate([p[i] for p in parts], axis=1 if i == 2 else 0) for i in range(3))
    prompt = np.unique(index_of(run).prompts[0][sequence], return_inverse=True)[1]
    if (n := int(prompt.max()) + 1) < max(FOLDS, MIN_PROMPTS):
        raise InputError(f"{count_of(n, 'prompt')}: at least {max(FOLDS, MIN_PROMPTS)} are needed to hold some out")
    rng = np.random.default_rng(seed)
    sampled = np.sort(rng.permutation(len(ids))[:max_tokens])
    before = previous_ids(ids, sequence)[sampled]
    token = np.unique(ids[sampled], return_inverse=True)[1]
    pair = bigrams(ids[sampled].astype(np.int64), before)
    fold = rng.permutation(np.arange(n) % FOLDS)[prompt][sampled]
    features = _features(run, hook, sampled) if hook else {}
    n_experts = int(run.model["num_experts"])
    names = ["load", "token", "bigram", "layer before", *(["features"] if features else [])]
    recall = np.full((len(experts), len(names), n), np.nan)
    for layer, chosen in enumerate(experts[:, sampled].astype(np.int64)):
        x = {"layer before": _one_hot(experts[layer - 1, sampled].astype(np.int64), n_experts)} if layer else {}
        if layer in features:
            x["features"] = features[layer]
        hits = _recalls(_one_hot(chosen, n_experts), chosen.shape[1], token, pair, x, fold)
        for i, name in enumerate(names):
            if name in hits:
                counts = np.bincount(prompt[sampled], minlength=n)
                sums = np.bincount(prompt[sampled], hits[name], n)
                recall[layer, i] = np.divide(sums, counts, out=np.full(n, np.nan), where=counts > 0)
    return {"recall": _result(run, recall[..., ~np.isnan(recall[0, 0])], names, len(sampled), hook, max_tokens, seed)}


def _features(run: Run, hook: str, sampled: Int[np.ndarray, " row"]) -> dict[int, Float[np.ndarray, "row d"]]:
    about = token_labels.recorded(run, hook)
    features = {}
    for index, layer in enumerate(about.layers):
        parts, start = [], 0
        for columns, values in token_labels.blocks(run, about, index):
            parts.append(values[sampled[(sampled >= start) & (sampled < start + len(columns))] - start])
            start += len(columns)
        values = np.concatenate(parts)
        if np.isnan(values).any():
            raise InputError(f"{hook} was recorded for some tokens only: record it without options")
        features[int(layer)] = values
    return features


def _one_hot(chosen: Int[np.ndarray, "row slot"], n: int) -> Float[np.ndarray, "row expert"]:
    out = np.zeros((len(chosen), n), dtype=np.float32)
    out[np.arange(len(chosen))[:, None], chosen] = 1
    return out


def _recalls(
    truth: Float[np.ndarray, "row expert"],
    k: int,
    token: Int[np.ndarray, " row"],
    pair: Int[np.ndarray, " row"],
    x: Mapping[str, Float[np.ndarray, "row d"]],
    fold: Int[np.ndarray, " row"],
) -> dict[str, Float[np.ndarray, " row"]]:
    """Return the recall of every row, held out, by predictor."""
    recalls: dict[str, np.ndarray] = {name: np.zeros(len(truth)) for name in ("load", "token", "bigram", *x)}
    for number in range(FOLDS):
        train, test = fold != number, fold == number
        load = truth[train].mean(0)
        by_token = _frequencies(truth[train], token[train], int(token.max()) + 1, load)
        by_pair = _frequencies(truth[train], pair[train], int(pair.max()) + 1, None)
        seen = by_pair[pair[test]].sum(1, keepdims=True) > 0
        scores = {
            "load": np.broadcast_to(load, (int(test.sum()), len(load))),
            "token": by_token[token[test]],
            "bigram": np.where(seen, by_pair[pair[test]] + 1e-3 * by_token[token[test]], by_token[token[test]]),
        }
        # ridge scores are deviations from each expert's mean, and experts are ranked against each other
        scores |= {name: load + ridge(values[train], truth[train])(values[test]) for name, values in x.items()}
        for name, score in scores.items():
            best = np.argsort(-score, axis=1, kind="stable")[:, :k]
            recalls[name][test] = np.take_along_axis(truth[test], best, 1).mean(1)
    return recalls


def _frequencies(
    truth: Float[np.ndarray, "row expert"],
    category: Int[np.ndarray, " row"],
    n: int,
    prior: Float[np.ndarray, " expert"] | None,
) -> Float[np.ndarray, "category expert"]:
    """Return how often each category selects each expert; one pseudo-token of the prior, if there is one."""
    sums = np.zeros((n, truth.shape[1]))
    np.add.at(sums, category, truth)
    counts = np.bincount(category, minlength=n)[:, None]
    if prior is None:
        return np.divide(sums, counts, out=sums, where=counts > 0)
    return np.asarray((sums + prior) / (counts + 1))


def _result(
    run: Run,
    recall: Float[np.ndarray, "layer predictor prompt"],
    names: list[str],
    n_tokens: int,
    hook: str,
    max_tokens: int,
    seed: int,
) -> xr.Dataset:
    by_prompt = np.moveaxis(recall, 2, 0)
    tested, beyond = (_tested(v) for v in (by_prompt, by_prompt - by_prompt[:, :, [names.index("bigram")]]))
    cells = ("layer", "predictor")
    pairs = ((tested, "recall"), (beyond, "beyond_bigram"))
    ends = (("", "difference"), ("_low", "low"), ("_high", "high"))
    variables = {f"{name}{end}": (cells, np.asarray(one[key])) for one, name in pairs for end, key in ends}
    value, low, high = (variables[f"recall{end}"][1] for end, _ in ends)
    limits = within_bounds(value, low, high, recall.shape[2])
    variables |= {f"recall{end}": (cells, limit) for end, limit in zip(("_low", "_high"), limits, strict=True)}
    variables["q"] = (cells, np.asarray(beyond["q"]))
    attrs = provenance(STUDY.name, "Prediction of routing", run.digest, seed, {"hook": hook, "max_tokens": max_tokens})
    attrs |= {
        "rests_on": f"{n_tokens:,} tokens of {count_of(recall.shape[2], 'prompt')}",
        "prompts": recall.shape[2],
        "method": METHOD,
        "not_controlled": NOT_CONTROLLED,
    }
    result = dataset(variables, {"layer": np.arange(len(recall)), "predictor": names}, DEFINITIONS, attrs)
    result.attrs["summary"] = _summary(result)
    return result


def _tested(values: Float[np.ndarray, "prompt layer predictor"]) -> dict[str, Any]:
    """Return the tests of means over prompts that were held out in folds, with the standard error of these."""
    mean = values.mean(0)
    return paired_test(mean + _SHARED * (values - mean))


def _summary(result: xr.Dataset) -> str:
    lines = [f"{result.attrs['rests_on']}; recall of the experts of a token:"]
    if text := few_prompts(int(result.attrs["prompts"])):
        lines.append(f"Warning: {text}.")
    for layer in map(int, result["layer"].values):
        one = result.sel(layer=layer)
        known = [str(p) for p in one["predictor"].values if np.isfinite(float(one["recall"].sel(predictor=p)))]
        text = ", ".join(f"{p} {float(one['recall'].sel(predictor=p)):.3f}" for p in known)
        better = [
            p
            for p in known
            if float(one["q"].sel(predictor=p)) < 0.05 and float(one["beyond_bigram_low"].sel(predictor=p)) > 0
        ]
        lines.append(f"  layer {layer}: {text}; beyond the bigram: {', '.join(better) or 'none shown'}.")
    return "\n".join(lines)
