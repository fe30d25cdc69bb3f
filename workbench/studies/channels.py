"""The channels study: what differs between analysis and final, beyond their positions.

Routing and sinks are compared over all tokens and at equal position, and beside the difference that the two halves of
the analysis have among themselves. Recorded activations are described by their channel means and by how well a linear
probe distinguishes the channels in sequences that it was not fitted on.

References: Hewitt & Liang 2019 (control tasks); Kornblith et al. 2019 and Murphy et al. 2024 (debiased CKA).
"""

import zlib
from collections.abc import Mapping

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from workbench.errors import InputError
from workbench.harmony.labels import CHANNELS
from workbench.registry import Study
from workbench.studies import probes
from workbench.studies.comparison import in_second_half
from workbench.studies.contrast import Plan, contrasts
from workbench.studies.result import Definition, dataset, provenance
from workbench.studies.run_index import TokenRun, independent_prompts, token_blocks

STUDY = Study(
    name="channels",
    title="Analysis vs. final",
    question="How do the analysis and the final channel differ beyond the positions of their tokens?",
    requires=("routing or sinks or activations",),
    compute="several passes over the run's tokens; probes where activations were recorded",
    figures="workbench.figures.channels",
    main_figures=("routing_sizes", "routing_analysis_vs_final_volcano"),
    page="channels",
    order=30,
)
PROBE_TOKENS = 4000  # at most, of a layer
_FOLDS = probes.FOLDS
PERMUTATIONS = 20
_PERMUTED_TOKENS = 1000  # at most, as every permutation costs the square of the tokens

DEFINITIONS = {
    "cosine": Definition("cosine of channel means", "1", "between mean activations of a and b, prompts weighing alike"),
    "distance": Definition(
        "distance of channel means", "1", "norm of their difference over the root mean square deviation within channels"
    ),
    "auc": Definition("probe AUC", "1", "logistic probe of channel a against b, held out by prompt, mean over folds"),
    "auc_low": Definition("probe AUC, lowest fold", "1", "smallest AUC of the folds"),
    "auc_high": Definition("probe AUC, highest fold", "1", "largest AUC of the folds"),
    "auc_half": Definition(
        "probe AUC of halves", "1", "the same probe, fitted to distinguish the halves of the analysis"
    ),
    "auc_control": Definition("control task AUC", "1", "the same probe on a random label for each token type"),
    "selectivity": Definition("selectivity", "1", "AUC less that of the control task (Hewitt & Liang 2019)"),
    "auc_token": Definition("token identity AUC", "1", "predicted from the token alone, held out by prompt"),
    "auc_position": Definition("position AUC", "1", "predicted from the position alone, in twenty bins"),
    "auc_bigram": Definition("bigram AUC", "1", "predicted from the token and the one before it"),
    "cka": Definition("debiased linear CKA", "1", "between layers' centred activations, unbiased HSIC; may be below 0"),
    "cka_permuted": Definition(
        "CKA of permuted prompts", "1", f"mean of {PERMUTATIONS} permutations of one layer's prompts: the bias of cka"
    ),
    "cka_robust": Definition(
        "outlier-robust CKA", "1", "cka of tokens scaled to length 1 about the median, so that none dominates"
    ),
    "tokens": Definition("tokens", "tokens", "tokens that take part"),
}
METHOD = (
    "Probes are logistic regressions on standardised activations, folds split by prompt; selectivity subtracts "
    "the AUC on a control task, a random label for each token type. Baselines predict the channel from the token, its "
    "position and its bigram alone. Distances are in units of the spread within channels. Tokens of a prompt resemble "
    "each other, so that even the debiased CKA of unrelated activations is above 0. Beside it stands its mean over "
    "permutations, in which the tokens of every prompt are compared with those of another."
)
NOT_CONTROLLED = "A probe may read position or words; its halves of the analysis show how much of that there is."


def study(run: TokenRun, *, seed: int = 0) -> dict[str, xr.Dataset]:
    """Compare analysis with final and first with second halves: routing, sinks, and recorded activations.

    Raises:
        InputError: the run has no single tokens, or nothing to compare channels by.
    """
    if not isinstance(run, TokenRun):
        raise InputError(
            "the channels study needs a run's single tokens, and this run has only sums: "
            "capture again with --record routing"
        )
    datasets: dict[str, xr.Dataset] = {}
    left_out = []
    for what, label in (("experts", "routing"), ("sink", "sinks")):
        planned = {
            f"{label}_analysis_vs_final": Plan("channel", "analysis", "final"),
            f"{label}_halves_of_analysis": Plan("half", "first", "second", "analysis"),
        }
        try:
            compared, refused = contrasts(run, what, planned, study="channels", seed=seed)
        except InputError as error:  # this quantity was not recorded
            compared, refused = {}, {name: str(error) for name in planned}
        datasets |= compared
        left_out += [f"Skipped: a comparison of {label}, as {reason}." for reason in dict.fromkeys(refused.values())]
    hooks = [a.hook for a in getattr(getattr(run, "spec", None), "activations", ()) if a.reduce == "raw"]
    for hook in hooks:
        try:
            datasets[f"geometry_{hook.removeprefix('hook_')}"] = geometry(run, hook, "analysis", "final", seed=seed)
        except InputError as error:
            left_out.append(f"Skipped: {hook}, as {error}.")
    if not datasets:
        raise InputError(
            " ".join(left_out)
            or "the run has no recorded quantity by which channels can be compared: record routing or sinks"
        )
    first = next(iter(datasets.values()))
    first.attrs["summary"] = "\n".join([first.attrs["summary"], _beside_halves(datasets), *left_out]).strip()
    return datasets


def _beside_halves(datasets: Mapping[str, xr.Dataset]) -> str:
    """Return sentences on whether analysis and final differ by more than the halves of analysis."""
    lines = []
    for label in ("routing", "sinks"):
        pair = [datasets.get(f"{label}_{n}") for n in ("analysis_vs_final", "halves_of_analysis")]
        if pair[0] is not None and pair[1] is not None:
            sizes = [
                np.sqrt(np.maximum(d["size"].sel(control="position") ** 2 - d["noise"].sel(control="position") ** 2, 0))
                for d in pair
                if d is not None
            ]
            if np.isfinite(sizes[0]).all() and np.isfinite(sizes[1]).all():
                larger = int((sizes[0] > sizes[1]).sum())
                lines.append(
                    f"{label.capitalize()}: analysis and final are farther apart than the halves of analysis in "
                    f"{larger} of "
                    f"{sizes[0].size} layers (size of the differences without the part of noise, at equal position)."
                )
    return "\n".join(lines)


def geometry(run: TokenRun, hook: str, a: str, b: str, *, seed: int = 0) -> xr.Dataset:
    """Return means, probes and CKA of a recorded activation in two channels, by layer.

    Raises:
        InputError: there are too few tokens or prompts for a probe.
    """
    values, channel, prompt, half, position, ids, before = _sample(run, hook, (a, b), seed)
    side = channel == CHANNELS.index(b)
    if min(side.sum(), (~side).sum()) < 20 or len(np.unique(prompt)) < 2 * _FOLDS:
        raise InputError(
            f"{hook} has {(~side).sum()} and {side.sum()} tokens of {len(np.unique(prompt))} prompts: too few to probe"
        )
    layers = next(x.layers for x in run.spec.activations if x.hook == hook)  # type: ignore[attr-defined]
    rows: dict[str, list[float]] = {
        n: [] for n in ("cosine", "distance", "auc", "auc_low", "auc_high", "auc_half", "auc_control", "selectivity")
    }
    rng = np.random.default_rng([seed, zlib.crc32(hook.encode())])
    random_label = probes.control_labels(ids, rng)
    for x in values:
        means = [_mean_of_prompts(x[side == s], prompt[side == s]) for s in (False, True)]
        within = np.sqrt(
            np.mean([((x[side == s] - m) ** 2).sum(-1).mean() for s, m in zip((False, True), means, strict=True)])
        )
        rows["cosine"].append(float(means[0] @ means[1] / (np.linalg.norm(means[0]) * np.linalg.norm(means[1]))))
        rows["distance"].append(float(np.linalg.norm(means[1] - means[0]) / within))
        scores = probe_auc(x, side, prompt)
        rows["auc"].append(float(np.mean(scores)))
        rows["auc_low"].append(float(np.min(scores)))
        rows["auc_high"].append(float(np.max(scores)))
        rows["auc_control"].append(float(np.mean(probe_auc(x, random_label, prompt))))
        rows["selectivity"].append(rows["auc"][-1] - rows["auc_control"][-1])
        own = ~side
        rows["auc_half"].append(float(np.mean(probe_auc(x[own], half[own], prompt[own]))))
    cka = np.array([[debiased_cka(x, y) for y in values] for x in values])
    variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {n: (("layer",), np.array(v)) for n, v in rows.items()}
    baselines = {
        "auc_token": np.unique(ids, return_inverse=True)[1],
        "auc_position": probes.position_bins(position),
        "auc_bigram": probes.bigrams(ids, before),
    }
    baseline_aucs = {n: np.mean(probes.category_auc(c, side, prompt)) for n, c in baselines.items()}
    variables |= {n: ((), np.asarray(v)) for n, v in baseline_aucs.items()}
    unit = [unit_tokens(x) for x in values.astype(np.float64)]
    of_layers = {
        "cka": cka,
        "cka_permuted": permuted_cka(values, prompt, rng),
        "cka_robust": np.array([[debiased_cka(x, y) for y in unit] for x in unit]),
    }
    variables |= {name: (("layer", "layer_2"), v) for name, v in of_layers.items()} | {
        "tokens": ((), np.asarray(len(side)))
    }
    attrs = provenance("channels", f"{hook}: {a} against {b}", run.digest, seed, {"hook": hook, "a": a, "b": b})
    best = int(np.argmax(rows["auc"]))
    attrs |= {
        "a": a,
        "b": b,
        "method": METHOD,
        "not_controlled": NOT_CONTROLLED,
        "summary": f"{hook}: a linear probe distinguishes {a} from {b} with AUC {rows['auc'][best]:.3f} in layer "
        f"{layers[best]} (folds "
        f"{rows['auc_low'][best]:.3f} to {rows['auc_high'][best]:.3f}; halves of {a}: {rows['auc_half'][best]:.3f}; "
        f"selectivity {rows['selectivity'][best]:.3f}); from the token alone {baseline_aucs['auc_token']:.3f}, "
        f"its position {baseline_aucs['auc_position']:.3f}, its bigram {baseline_aucs['auc_bigram']:.3f}; "
        f"the means lie {rows['distance'][best]:.2f} spreads apart." + _of_neighbours(of_layers),
    }
    return dataset(variables, {"layer": list(layers), "layer_2": list(layers)}, DEFINITIONS, attrs)


def _of_neighbours(cka: Mapping[str, Float[np.ndarray, "layer layer_2"]]) -> str:
    """Return a sentence with the mean CKA of a layer and the next; nothing if there is one layer."""
    mean = {name: float(np.diagonal(values, 1).mean()) for name, values in cka.items() if len(values) > 1}
    if not mean:
        return ""
    return (
        f" CKA of neighbouring layers is {mean['cka']:.3f}, with prompts permuted {mean['cka_permuted']:.3f}, robust "
        f"{mean['cka_robust']:.3f} on average."
    )


def _sample(run: TokenRun, hook: str, pair: tuple[str, str], seed: int) -> tuple[np.ndarray, ...]:
    """Activations [layer, token, d] of at most PROBE_TOKENS tokens of both channels, and their labels."""
    number = independent_prompts(run)
    codes = [CHANNELS.index(c) for c in pair]
    rng = np.random.default_rng(seed)
    counts = np.zeros(2, dtype=np.int64)
    for block in token_blocks(run, "count tokens"):
        counts += [int((block["channel"] == c).sum()) for c in codes]
    keep = np.minimum(1.0, PROBE_TOKENS / 2 / np.maximum(counts, 1))
    parts: list[tuple[np.ndarray, ...]] = []
    for block in token_blocks(run, f"sample {hook}", hook, "id"):
        chosen = np.zeros(len(block["channel"]), dtype=bool)
        for code, share in zip(codes, keep, strict=True):
            chosen |= (block["channel"] == code) & (rng.random(len(chosen)) < share)
        chosen &= np.isfinite(block[hook][0]).all(-1)
        inside = block["channel"] == codes[0]
        at = np.flatnonzero(chosen)
        parts.append(
            (
                block[hook][:, at],
                block["channel"][at],
                number[block["sequence"][at]],
                in_second_half(block["sequence"], inside)[at],
                block["position"][at],
                block["id"][at].astype(np.int64),
                probes.previous_ids(block["id"], block["sequence"])[at],
            )
        )
    return tuple(np.concatenate([p[i] for p in parts], 1 if i == 0 else 0) for i in range(7))


def _mean_of_prompts(x: Float[np.ndarray, "token d"], prompt: np.ndarray) -> Float[np.ndarray, " d"]:
    _, of = np.unique(prompt, return_inverse=True)
    sums = np.zeros((of.max() + 1, x.shape[1]))
    np.add.at(sums, of, x)
    return (sums / np.bincount(of)[:, None]).mean(0)


def probe_auc(x: Float[np.ndarray, "token d"], label: np.ndarray, group: np.ndarray) -> list[float]:
    """Return the AUC of each fold of a logistic probe of label [token], folds split by group [token]; 0.5 is chance."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    scores = []
    for train, test in StratifiedGroupKFold(_FOLDS).split(x, label, group):
        if len(set(label[train].tolist())) < 2 or len(set(label[test].tolist())) < 2:
            continue
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(x[train], label[train])
        scores.append(float(roc_auc_score(label[test], probe.decision_function(x[test]))))
    return scores or [np.nan]


def debiased_cka(x: Float[np.ndarray, "token d"], y: Float[np.ndarray, "token e"]) -> float:
    """Return the linear CKA with the unbiased estimator of HSIC: about 0 for independent data whatever the width."""
    xx, xy, yy = _hsic(x, x), _hsic(x, y), _hsic(y, y)
    return float(xy / np.sqrt(xx * yy)) if xx > 0 and yy > 0 else float("nan")


def unit_tokens(x: Float[np.ndarray, "token d"]) -> Float[np.ndarray, "token d"]:
    """Return activations less their median, every token scaled to length 1, so that no token dominates a CKA."""
    centred = x - np.median(x, axis=0)
    return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)


def permuted_cka(
    values: Float[np.ndarray, "layer token d"],
    prompt: Int[np.ndarray, " token"],
    rng: np.random.Generator,
    *,
    permutations: int = PERMUTATIONS,
) -> Float[np.ndarray, "layer layer_2"]:
    """Return the mean debiased CKA of two layers when the prompts of one are permuted: its bias on clustered tokens.

    Computed on at most 1,000 tokens, of whole prompts as far as they fit.
    """
    order = rng.permutation(np.unique(prompt))
    at = np.concatenate([np.flatnonzero(prompt == one) for one in order])[:_PERMUTED_TOKENS]
    grams = []
    for x in values[:, at].astype(np.float64):
        gram = (x - x.mean(0)) @ (x - x.mean(0)).T
        np.fill_diagonal(gram, 0)
        grams.append(gram)
    own = [_hsic_of_grams(gram, gram) for gram in grams]
    total = np.zeros((len(grams), len(grams)))
    for _ in range(permutations):
        moved = exchange_prompts(prompt[at], rng)
        shuffled = [gram[np.ix_(moved, moved)] for gram in grams]
        for gram in shuffled:
            np.fill_diagonal(gram, 0)
        spread = [_hsic_of_grams(gram, gram) for gram in shuffled]
        for i, j in np.ndindex(total.shape):
            scale = own[i] * spread[j]
            total[i, j] += _hsic_of_grams(grams[i], shuffled[j]) / np.sqrt(scale) if scale > 0 else np.nan
    return total / permutations


def exchange_prompts(prompt: Int[np.ndarray, " token"], rng: np.random.Generator) -> Int[np.ndarray, " token"]:
    """Return for every token one of another prompt: prompts are permuted, and their tokens drawn in random order.

    A prompt with fewer tokens than the one that it replaces gives some of them more than once.
    """
    members = [np.flatnonzero(prompt == one) for one in np.unique(prompt)]
    moved = np.empty(len(prompt), dtype=np.int64)
    for own, other in zip(members, rng.permutation(len(members)), strict=True):
        moved[own] = np.resize(rng.permutation(members[other]), len(own))
    return moved


def _hsic_of_grams(k: Float[np.ndarray, "token token_2"], m: Float[np.ndarray, "token token_2"]) -> float:
    """Return unbiased HSIC of two Gram matrices whose diagonals are zero."""
    n = len(k)
    rows_k, rows_m = k.sum(1), m.sum(1)
    total = rows_k.sum() * rows_m.sum() / ((n - 1) * (n - 2))
    return float((np.vdot(k, m) + total - 2 * rows_k @ rows_m / (n - 2)) / (n * (n - 3)))


def _hsic(x: np.ndarray, y: np.ndarray) -> float:
    """Return unbiased HSIC of linear kernels (Song et al. 2012) from products of features, with no n × n matrix."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    n = len(x)
    dx, dy = (x**2).sum(1), (y**2).sum(1)
    trace = ((x.T @ y) ** 2).sum() - dx @ dy
    rows_x, rows_y = x @ x.sum(0) - dx, y @ y.sum(0) - dy
    total = rows_x.sum() * rows_y.sum() / ((n - 1) * (n - 2))
    return float((trace + total - 2 * rows_x @ rows_y / (n - 2)) / (n * (n - 3)))
