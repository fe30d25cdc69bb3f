"""The label probes study: from which layer on can a label be read from activations, beyond what the words tell?

The label is any of a run's: role, channel, part, effort, task, domain, right or wrong answers, or one of your own for
each sequence. A linear probe is fitted on some prompts and tested on others. Its AUC stands beside those of the token
alone, its position alone and the bigram alone, and beside that on a random label for each token type (the control
task). Thresholds are frozen: set on training prompts for a stated rate of false positives, and applied to others.

    found = study(run, label="role", where="channel=prompt")["probes"]

Reference: Hewitt & Liang 2019, Designing and Interpreting Probes with Control Tasks.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Float, Int

from workbench.errors import InputError
from workbench.registry import Study
from workbench.runs import Run
from workbench.studies import token_labels
from workbench.studies.difference_tests import paired_test
from workbench.studies.intervals import MIN_PROMPTS, few_prompts, within_bounds
from workbench.studies.probes import bigrams, control_labels, position_bins, previous_ids
from workbench.studies.result import Definition, dataset, provenance
from workbench.studies.token_labels import Selection, selection_of

STUDY = Study(
    name="label-probes",
    title="Label probes",
    question="From which layer on can a label be read from activations, beyond what token, position and bigram tell?",
    requires=("activations",),
    compute="probes of every recorded layer, fitted five times; jackknife over groups of prompts",
    options={
        "label": "role, channel, part, effort, task, domain or correct (default: task).",
        "hook": "Recorded hook point (default: hook_resid_post).",
        "where": "Tokens to read, as channel=prompt or role=user (default: all).",
        "pool": "token (default), or for each sequence: mean or last.",
        "max_tokens": "At most so many tokens or sequences (default: 2000).",
        "false_positives": "Rate at which thresholds are frozen (default: 0.05).",
    },
    page="label-probes",
    page_title="Label probes",
    order=48,
)
SOURCES = ("activation", "token", "position", "bigram", "control task")
FOLDS, GROUPS = 5, 20
_PENALTY = 0.1  # of the probe, times the number of rows
_CI = f"95 %, delete-a-group jackknife over at most {GROUPS} groups of prompts, Student's t"
DEFINITIONS = {
    "auc": Definition("AUC", "1", "held out by prompt; several labels: mean over one against the rest", ci=_CI),
    "auc_low": Definition("AUC, lower limit", "1", "lower limit of auc", ci=_CI),
    "auc_high": Definition("AUC, upper limit", "1", "upper limit of auc", ci=_CI),
    "beyond_words": Definition("AUC beyond the best baseline", "1", "AUC less that of the best baseline", ci=_CI),
    "beyond_words_low": Definition("AUC beyond the best baseline, lower limit", "1", "lower limit", ci=_CI),
    "beyond_words_high": Definition("AUC beyond the best baseline, upper limit", "1", "upper limit", ci=_CI),
    "p": Definition("p", "1", "AUC is that of the best baseline, two-sided, Student's t", null="0"),
    "q": Definition("q", "1", "Benjamini–Hochberg over the layers"),
    "hits": Definition("hits at the frozen threshold", "1", "share of the label's tokens above its threshold"),
    "false_alarms": Definition("false alarms at the frozen threshold", "1", "share of the others above it"),
}
METHOD = (
    "Ridge regression on standardised activations, fitted on four fifths of the prompts and scored on the rest, five "
    "times; with several labels, one against the rest. AUC of all held-out scores within folds. Baselines: the share "
    "of the label among training tokens with the same id, position bin or bigram. Control task: a random label for "
    "each token type (sequences: each prompt); AUC on it is what the probe learns by heart. The threshold of a label "
    "is the training quantile of the other labels' scores for the stated rate of false positives, on training prompts "
    "that the probe was not fitted on; hits and false alarms are those of held-out prompts."
)
NOT_CONTROLLED = (
    "That a label can be read does not show that the model uses it. Labels of sequences differ in whatever their "
    "texts differ in; the baselines see single tokens and pairs, not whole texts."
)


def study(
    run: Run,
    *,
    label: str | pd.Series | Mapping[int, Any] | Sequence[Any] = "task",
    hook: str = "hook_resid_post",
    where: Selection = "",
    pool: Literal["token", "mean", "last"] = "token",
    max_tokens: int = 2000,
    false_positives: float = 0.05,
    seed: int = 0,
) -> dict[str, xr.Dataset]:
    """Return how well each label can be read from an activation by layer, beside its baselines and control.

    label: the name of a label, or a value for each sequence. where: only these tokens. pool: probe tokens, or the mean
    or last of a sequence's tokens.

    Raises:
        InputError: the activation or a label is unknown, or fewer than two labels or five prompts have it.
    """
    if pool not in ("token", "mean", "last"):
        raise InputError(f"pool={pool!r}: use token, mean or last")
    if not 0 < false_positives < 1 or max_tokens < 10 * FOLDS:
        raise InputError(f"false_positives={false_positives}, max_tokens={max_tokens}: expected 0 to 1, and 50 or more")
    about = token_labels.recorded(run, hook)
    chosen = selection_of(where) if where != "" else None
    n_layers = int(run.model["n_layers"])
    samples = [
        read(run, about, token_labels.layer_index(about, layer, n_layers), label, chosen, pool, max_tokens, seed)
        for layer in about.layers
    ]
    table = samples[0][1]
    names = sorted(set(table["label"]))
    design = Folds(table, pool, seed)
    by_layer = [design.activation(x, names, false_positives) for x, _ in samples]
    fixed = {source: design.category(source, names) for source in SOURCES[1:4]}
    best = max(fixed.values(), key=lambda values: float(np.nan_to_num(values[0])))
    variables = _variables([found[0] for found in by_layer], fixed, [found[1] for found in by_layer], best)
    for i, name in enumerate(("hits", "false_alarms")):
        variables[name] = (("layer", "label"), np.array([found[2 + i] for found in by_layer]))
    shown = label if isinstance(label, str) else "labels given by the caller"
    parameters = {"label": shown, "hook": hook, "where": str(where), "pool": pool, "max_tokens": max_tokens}
    unit, n_prompts = "tokens" if pool == "token" else "sequences", int(table["prompt"].nunique())
    attrs = provenance(STUDY.name, f"Probes of {shown}", run.digest, seed, parameters) | {
        "rests_on": f"{len(table):,} {unit} of {n_prompts} prompts",
        "prompts": n_prompts,
        "method": METHOD,
        "not_controlled": NOT_CONTROLLED,
    }
    coords = {"layer": list(about.layers), "source": list(SOURCES), "label": names}
    result = dataset(variables, coords, DEFINITIONS, attrs)
    result.attrs["summary"] = _summary(result)
    return {"probes": result}


def read(
    run: Run,
    about: Any,
    index: int,
    label: Any,
    where: Selection | None,
    pool: str,
    max_tokens: int,
    seed: int,
) -> tuple[Float[np.ndarray, "row d"], pd.DataFrame]:
    """Return activations of the tokens (or pooled sequences) with a label, and their label, prompt, id and position.

    Raises:
        InputError: fewer than two labels or five prompts have tokens.
    """
    x, table = np.zeros((0, 0), np.float32), pd.DataFrame()
    rng = np.random.default_rng(seed)  # the same rows in every layer
    for columns, values in token_labels.blocks(run, about, index):
        own = columns.assign(
            label=token_labels.named(label, columns, run),
            before=previous_ids(columns["id"].to_numpy(), columns["sequence"].to_numpy()),
        )
        there = np.isfinite(values).all(1) & (own["label"] != "").to_numpy()
        if where is not None:
            there &= token_labels.mask(where, own, run.sequences)
        found, own = values[there], own[there]
        if pool != "token" and len(own):
            starts = np.flatnonzero(np.diff(own["sequence"].to_numpy(), prepend=-2))
            counts = np.diff([*starts, len(own)])
            last = starts + counts - 1
            found = found[last] if pool == "last" else np.add.reduceat(found, starts, 0) / counts[:, None]
            own = own.iloc[last]
        table = pd.concat([table, own.assign(drawn=rng.random(len(own)))], ignore_index=True)
        x = np.concatenate([x.reshape(-1, found.shape[1]), found])
        if len(table) > max_tokens:  # so many at a time, whatever the size of the run
            kept = np.sort(np.argsort(table["drawn"].to_numpy())[:max_tokens])
            x, table = x[kept], table.iloc[kept].reset_index(drop=True)
    table["prompt"] = run.sequences["prompt_id"].reindex(table["sequence"]).to_numpy()
    if (n := table["label"].nunique()) < 2:
        raise InputError(f"the tokens have {n} label: a probe needs two, see run.sequences")
    if (n := table["prompt"].nunique()) < max(FOLDS, MIN_PROMPTS):
        raise InputError(f"{n} prompts have these labels: a probe needs {max(FOLDS, MIN_PROMPTS)} to hold some out")
    return x, table


Values = tuple[float, Float[np.ndarray, " group"]]  # an AUC, and it without each group of prompts


class Folds:
    """The folds of some labelled rows, shared by all layers and baselines.

    table: label, prompt, id, before (the id before it) and position of every row. pool: whether rows are tokens.
    """

    def __init__(self, table: pd.DataFrame, pool: str, seed: int) -> None:
        from sklearn.model_selection import StratifiedGroupKFold

        self.label = table["label"].to_numpy(dtype=object)
        prompts, self._prompt = np.unique(table["prompt"].to_numpy(dtype=object).astype(str), return_inverse=True)
        folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
        self._splits = list(folds.split(np.zeros(len(table)), self.label.astype(str), self._prompt))
        self.fold = np.zeros(len(table), dtype=np.int64)
        for i, (_, test) in enumerate(self._splits):
            self.fold[test] = i
        rng = np.random.default_rng(seed)
        group = np.arange(len(prompts)) % min(GROUPS, len(prompts))
        self.group = rng.permutation(group)[self._prompt]
        ids, before = table["id"].to_numpy(np.int64), table["before"].to_numpy(np.int64)
        self._categories = {
            "token": np.unique(ids, return_inverse=True)[1],
            "position": np.asarray(position_bins(table["position"].to_numpy())),
            "bigram": bigrams(ids, before),
        }
        self._random = control_labels(ids if pool == "token" else self._prompt, rng)

    def activation(
        self, x: Float[np.ndarray, "row d"], names: Sequence[str], rate: float
    ) -> tuple[Values, Values, Float[np.ndarray, " label"], Float[np.ndarray, " label"]]:
        """Return the AUC of the probe and of the control task, and hits and false alarms at frozen thresholds."""
        truth = np.array([*(self.label == name for name in names), self._random])
        scores, thresholds = np.full(truth.shape, np.nan), np.full(truth.shape, np.nan)
        for train, test in self._splits:
            held, rest = _held_out(train, self._prompt)
            score = ridge(x[rest], truth[:, rest].T)
            possible = np.array([len(set(own[rest].tolist())) == 2 for own in truth])
            scores[np.ix_(possible, test)] = score(x[test]).T[possible]
            known = score(x[held]).T
            for i, own in enumerate(truth):
                if possible[i] and (~own[held]).any():
                    thresholds[i, test] = np.quantile(known[i][~own[held]], 1 - rate)
        above, known_at = scores > thresholds, np.isfinite(thresholds)
        cells = list(zip(above, truth, known_at, strict=True))[:-1]
        hits, alarms = ([_share(a[(t == side) & k]) for a, t, k in cells] for side in (True, False))
        control = self._auc(scores[-1:], truth[-1:])
        return self._auc(scores[:-1], truth[:-1]), control, np.array(hits), np.array(alarms)

    def category(self, source: str, names: Sequence[str]) -> Values:
        """Return the AUC of the share of the label among training rows of the same category."""
        category = self._categories[source]
        truth, n = np.array([self.label == name for name in names]), int(category.max()) + 1
        scores = np.zeros(truth.shape)
        for train, test in self._splits:
            counts = np.bincount(category[train], minlength=n)
            for i, own in enumerate(truth):
                positive = np.bincount(category[train], own[train], n)
                scores[i, test] = ((positive + own[train].mean()) / (counts + 1))[category[test]]
        return self._auc(scores, truth)

    def _auc(self, scores: Float[np.ndarray, "label row"], truth: Bool[np.ndarray, "label row"]) -> Values:
        """Return the mean over labels and folds of the AUC, with all rows and without each group of prompts."""
        groups = range(int(self.group.max()) + 1)
        kept = [np.ones(len(self.group), dtype=bool), *(self.group != g for g in groups)]
        each = [[_fold_auc(s, t, self.fold, keep) for keep in kept] for s, t in zip(scores, truth, strict=True)]
        values = np.nanmean(each, axis=0)
        return float(values[0]), np.asarray(values[1:])


def _fold_auc(score: np.ndarray, own: np.ndarray, fold: np.ndarray, keep: np.ndarray) -> float:
    """Return the mean over folds of the AUC, by ranks."""
    from scipy.stats import rankdata

    found = []
    for number in range(FOLDS):
        at = keep & (fold == number) & np.isfinite(score)
        n = int(own[at].sum())
        if 0 < n < at.sum():
            ranks = rankdata(score[at])[own[at]].sum()
            found.append((ranks - n * (n + 1) / 2) / (n * (at.sum() - n)))
    return float(np.mean(found)) if found else float("nan")


def _held_out(
    train: Int[np.ndarray, " row"], prompt: Int[np.ndarray, " row"]
) -> tuple[Int[np.ndarray, " held"], Int[np.ndarray, " rest"]]:
    """Return the rows of every fourth training prompt, on which thresholds are set, and the others."""
    own = np.unique(prompt[train])
    held = np.isin(prompt[train], own[::4])
    return train[held], train[~held]


def ridge(
    x: Float[np.ndarray, "row d"], targets: Bool[np.ndarray, "row label"]
) -> Callable[[Float[np.ndarray, "other d"]], Float[np.ndarray, "other label"]]:
    """Return the scores that ridge regression on standardised activations gives to other rows, for all labels at once.

    The penalty is a tenth of the number of rows: about that of shrinking the covariance by a tenth of its mean.
    """
    mean, spread = x.mean(0), x.std(0)
    scale = np.where(spread > 0, spread, 1)
    z, y = ((x - mean) / scale).astype(np.float64), targets.astype(np.float64)
    penalty = _PENALTY * len(z)
    centred = y - y.mean(0)
    if len(z) < z.shape[1]:
        weights = z.T @ np.linalg.solve(z @ z.T + penalty * np.eye(len(z)), centred)
    else:
        weights = np.linalg.solve(z.T @ z + penalty * np.eye(z.shape[1]), z.T @ centred)
    return lambda other: ((other - mean) / scale) @ weights


def _share(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _variables(
    activation: Sequence[Values], fixed: Mapping[str, Values], control: Sequence[Values], best: Values
) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Return the AUC by layer and source, and the difference from the best baseline, with intervals."""
    by_source = [activation, *([values] * len(activation) for values in fixed.values()), control]
    pseudo = np.stack([[pseudo_values(values) for values in layers] for layers in by_source], -1)  # layer group source
    tested = paired_test(np.moveaxis(pseudo, 1, 0))
    beyond = paired_test(np.stack([pseudo_values(values) - pseudo_values(best) for values in activation], 1))
    auc = np.asarray(tested["difference"])
    low, high = within_bounds(auc, np.asarray(tested["low"]), np.asarray(tested["high"]), pseudo.shape[1])
    return {
        "auc": (("layer", "source"), auc),
        "auc_low": (("layer", "source"), low),
        "auc_high": (("layer", "source"), high),
        "beyond_words": (("layer",), np.asarray(beyond["difference"])),
        "beyond_words_low": (("layer",), np.asarray(beyond["low"])),
        "beyond_words_high": (("layer",), np.asarray(beyond["high"])),
        "p": (("layer",), np.asarray(beyond["p"])),
        "q": (("layer",), np.asarray(beyond["q"])),
    }


def pseudo_values(values: Values) -> Float[np.ndarray, " group"]:
    """Return pseudo-values with the mean of the estimate, whose standard error is that of the jackknife."""
    whole, without = values
    n = len(without)
    return np.asarray(whole - (n - 1) * (without - without.mean()))


def _summary(result: xr.Dataset) -> str:
    words = {s: float(result["auc"].sel(source=s)[0]) for s in SOURCES[1:4]}
    lines = [
        f"{result.attrs['rests_on']}, {result.sizes['label']} labels. AUC from words alone: "
        + ", ".join(f"{name} {value:.3f}" for name, value in words.items())
        + "."
    ]
    if text := few_prompts(int(result.attrs["prompts"])):
        lines.append(f"Warning: {text}.")
    for layer in map(int, result["layer"].values):
        one = result.sel(layer=layer)
        auc, low, high = (float(one[name].sel(source="activation")) for name in ("auc", "auc_low", "auc_high"))
        beyond = [float(one[f"beyond_words{end}"]) for end in ("", "_low", "_high")]
        shown = float(one["q"]) <= 0.05 and beyond[1] * beyond[2] > 0
        hits, alarms = float(one["hits"].mean()), float(one["false_alarms"].mean())
        verdict = "beyond" if shown and beyond[0] > 0 else "below" if shown else "not shown to differ from"
        lines.append(
            f"  layer {layer}: AUC {auc:.3f} [{low:.3f}, {high:.3f}], {verdict} the best baseline ({beyond[0]:+.3f} "
            f"[{beyond[1]:+.3f}, {beyond[2]:+.3f}]); control task {float(one['auc'].sel(source='control task')):.3f}; "
            f"frozen thresholds: {hits:.0%} hits, {alarms:.0%} false alarms."
        )
    return "\n".join(lines)
