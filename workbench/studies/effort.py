"""The effort study: what changes with reasoning effort: length, accuracy, routing and sinks.

Every prompt is answered at several efforts, so everything is paired by prompt. What effort costs in tokens and brings
in accuracy comes first; then whether routing and sinks differ, in the prompt (the same words at the same positions,
save the effort's own) and in the analysis at equal position.

Reference for the model of accuracy: Liang & Zeger 1986, generalised estimating equations, clustered by prompt; Mancl
& DeRouen 2001, A Covariance Estimator for GEE with Improved Small-Sample Properties.
"""

import warnings
from collections.abc import Mapping
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from workbench.counting import count_of, signed, signed_interval
from workbench.errors import InputError
from workbench.harmony.labels import CHANNELS
from workbench.harmony.messages import EFFORTS
from workbench.registry import Study
from workbench.studies.comparison import Run
from workbench.studies.contrast import Plan, contrasts, uncomparable
from workbench.studies.intervals import MIN_PROMPTS, mean_test, ratio, ratio_test, share_change, share_of_answers
from workbench.studies.result import Definition, dataset, provenance
from workbench.studies.run_index import TokenRun, merged_prompts
from workbench.studies.statistics import ALPHA, false_discovery

STUDY = Study(
    name="effort",
    title="Effort",
    question="What does a higher reasoning effort cost in tokens, gain in accuracy and change in routing and sinks?",
    compute="several passes over the run's tokens; jackknife over prompts",
    figures="workbench.figures.effort",
    main_figures=("accuracy_by_tokens", "routing_sizes"),
    page="effort",
    order=40,
)
_CI = "95 %, delete-one jackknife over prompts, corrected for skewness"
_GAIN = "95 %, Student's t over prompts with two pseudo-prompts (Agresti & Min)"
_ROBUST = "95 %, robust, corrected for few prompts (Mancl & DeRouen)"
_WILSON = "95 %, Wilson, with the sample size that the variance between prompts implies"
DEFINITIONS = {
    "analysis_tokens": Definition("analysis tokens", "tokens", "mean over sequences of the tokens of analysis", ci=_CI),
    "accuracy": Definition("accuracy", "1", "mean over prompts of their share of right answers", ci=_WILSON),
    "sequences": Definition("sequences", "sequences", "sequences of the cell"),
    "more_tokens": Definition(
        "more analysis tokens", "tokens", "paired by prompt: mean of the second less the first", ci=_CI
    ),
    "gain": Definition("gain of accuracy", "1", "paired by prompt: mean of the second less the first", ci=_GAIN),
    "gain_p": Definition("p of the gain", "1", "two-sided, over prompts; missing: cannot be tested", null="no gain"),
    "gain_q": Definition("q of the gain", "1", "Benjamini–Hochberg over all tasks and steps"),
    "gain_different": Definition("accuracy changes", "1", f"q < {ALPHA} and the interval excludes zero"),
    "gain_per_100": Definition(
        "gain per 100 tokens", "1", "gain over more tokens, times 100: a ratio of means", ci=_CI
    ),
    "coefficient": Definition(
        "log-odds",
        "1",
        "of a right answer in a logistic GEE with exchangeable errors within a prompt",
        ci=_ROBUST,
    ),
    "p": Definition("p", "1", "Wald test of the coefficient", null="no effect"),
}
METHOD = (
    "Means over sequences, differences paired by prompt (samples of a prompt averaged first), intervals by the "
    "jackknife over prompts, corrected for skewness; those of accuracy are Wilson's, with the sample size that the "
    "variance between prompts implies. The model of accuracy is a logistic GEE on the logarithm of analysis tokens and "
    "the effort, clustered by prompt, with errors corrected for few prompts."
)
NOT_CONTROLLED = (
    "Whether more tokens cause more right answers is not shown by their going together: hard prompts make both longer "
    "and wronger. Truncating or hiding the analysis (the chain-of-thought experiment) intervenes."
)


def study(run: Run, *, seed: int = 0) -> dict[str, xr.Dataset]:
    """Return cost and gain by effort and task, a model of accuracy, and routing and sinks of the extreme efforts.

    Raises:
        InputError: the run has fewer than two efforts.
    """
    table = sequences_of(run)
    efforts = [e for e in EFFORTS if e in set(table["effort"])]
    if len(efforts) < 2:
        raise InputError(
            f"the run has {len(efforts)} effort, and the effort study compares at least 2: "
            "capture answers at several efforts"
        )
    datasets = {"cost": cost(run, table, efforts, seed), "gain": gain(run, table, efforts, seed)}
    left_out = []
    fitted = accuracy_model(run, table, efforts, seed)
    if fitted is None:
        left_out.append("Skipped: the model of accuracy, as it cannot be fitted to these answers.")
    else:
        datasets["accuracy_model"] = fitted
    if isinstance(run, TokenRun):
        for what, label in (("experts", "routing"), ("sink", "sinks")):
            compared, reasons = _efforts_compared(run, what, label, efforts, seed)
            datasets |= compared
            left_out += reasons
    datasets["cost"].attrs["summary"] = "\n".join([datasets["cost"].attrs["summary"], *left_out])
    return datasets


def _efforts_compared(
    run: TokenRun, what: str, label: str, efforts: list[str], seed: int
) -> tuple[dict[str, xr.Dataset], list[str]]:
    """In each channel, the comparison of the most distant efforts that can be paired; and why others cannot."""
    planned = {
        f"{label}_{a}_vs_{b}_in_{channel}": Plan("effort", a, b, channel)
        for channel in ("prompt", "analysis", "final")
        for a, b in widest_first(efforts)
    }
    widest: dict[str, str] = {}
    try:
        refused = uncomparable(run, what, planned)
        for name, plan in planned.items():
            if name not in refused:
                widest.setdefault(str(plan.channel), name)
        compared, _ = contrasts(run, what, {n: planned[n] for n in widest.values()}, study="effort", seed=seed)
    except InputError as error:  # this quantity was not recorded
        return {}, [f"Skipped: {label}, as {error}."]
    return compared, [f"Skipped: a comparison of {label}, as {reason}." for reason in dict.fromkeys(refused.values())]


def widest_first(efforts: list[str]) -> list[tuple[str, str]]:
    """Return pairs of efforts, the most distant first."""
    return sorted(combinations(efforts, 2), key=lambda pair: efforts.index(pair[0]) - efforts.index(pair[1]))


def sequences_of(run: Run) -> pd.DataFrame:
    """Return a row for each sequence: prompt, effort, task, tokens of every channel, and correctness (NaN: unknown).

    Prompts under different ids whose tokens are equal have one number.
    """
    tokens = run.summary("tokens")
    table = pd.DataFrame({c: np.asarray(tokens[c].values) for c in ("id", "effort", "task")})
    table = table.assign(prompt_id=merged_prompts(run, tokens)[0])
    for channel in CHANNELS:
        table[channel] = tokens.sel(channel=channel).values.astype(np.float64)
    known = getattr(run, "sequences", None)
    correct = known["correct"].to_numpy() if known is not None else np.full(len(table), -1)
    return table.assign(correct=np.where(correct < 0, np.nan, correct.astype(np.float64)))


def _of_prompts(table: pd.DataFrame, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number by prompt of a column's known values."""
    known = table.dropna(subset=[column]).groupby("prompt_id")[column]
    return known.sum().to_numpy(), known.count().to_numpy()


def cost(run: Run, table: pd.DataFrame, efforts: list[str], seed: int = 0) -> xr.Dataset:
    """Return analysis tokens and accuracy of every task and effort; the task `all` is everything."""
    tasks = ["all", *sorted(set(table["task"]) - {""})]
    parts: dict[str, list[Any]] = {n: [] for n in ("analysis_tokens", "accuracy", "sequences")}
    for task in tasks:
        for effort in efforts:
            own = table[(table["effort"] == effort) & ((table["task"] == task) | (task == "all"))]
            parts["analysis_tokens"].append(ratio(*_of_prompts(own, "analysis")))
            parts["accuracy"].append(share_of_answers(*_of_prompts(own, "correct")))
            parts["sequences"].append(len(own))
    shape = (len(tasks), len(efforts))
    variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
    for name in ("analysis_tokens", "accuracy"):
        values = np.array(parts[name], dtype=np.float64).reshape(*shape, 3)
        variables |= {
            f"{name}{end}": (("task", "effort"), values[..., i]) for i, end in enumerate(("", "_low", "_high"))
        }
    variables["sequences"] = (("task", "effort"), np.array(parts["sequences"]).reshape(shape))
    attrs = provenance("effort", "Tokens and accuracy by effort", run.digest, seed, {})
    result = dataset(variables, {"task": tasks, "effort": efforts}, DEFINITIONS, attrs)
    lines = []
    for effort in efforts:
        cell = result.sel(task="all", effort=effort)
        numbers = _percent({str(k): float(v) for k, v in cell.data_vars.items()})
        graded = np.isfinite(numbers["accuracy"])
        lines.append(
            f"{effort}: {numbers['analysis_tokens']:.1f} analysis tokens {_limits(numbers, 'analysis_tokens')}, "
            + (
                f"accuracy {numbers['accuracy']:.1f} % {_limits(numbers, 'accuracy')}."
                if graded
                else "no answer is graded."
            )
        )
    efforts_of = table.groupby("prompt_id")["effort"].nunique()
    if lacking := int((efforts_of < len(efforts)).sum()):
        lines.append(
            f"Unpaired: {lacking} of {count_of(len(efforts_of), 'prompt')} lack an effort, so that these means are of "
            "different prompts; the gains below are taken within prompts that have both efforts."
        )
    result.attrs |= {"method": METHOD, "not_controlled": NOT_CONTROLLED, "summary": "\n".join(lines)}
    return result


def _limits(numbers: Mapping[str, float], name: str) -> str:
    """Return the interval of a number, or that it has none."""
    low, high = (numbers[f"{name}_{end}"] for end in ("low", "high"))
    return f"[{low:.1f}, {high:.1f}]" if np.isfinite(low) else f"[no interval below {MIN_PROMPTS} prompts]"


def _percent(numbers: Mapping[str, float]) -> dict[str, float]:
    """Return the numbers with the accuracies in percent."""
    return {name: 100 * value if name.startswith("accuracy") else value for name, value in numbers.items()}


def gain(run: Run, table: pd.DataFrame, efforts: list[str], seed: int = 0) -> xr.Dataset:
    """Return the change of tokens and accuracy for each step of effort and for all steps together, paired by prompt."""
    steps = list(dict.fromkeys([*pairwise(efforts), (efforts[0], efforts[-1])]))
    tasks = ["all", *sorted(set(table["task"]) - {""})]
    names = ("more_tokens", "gain", "gain_per_100")
    parts: dict[str, list[Any]] = {n: [] for n in (*names, "gain_p")}
    means = table.groupby(["prompt_id", "effort"])[["analysis", "correct"]].mean()
    task_of = table.groupby("prompt_id")["task"].first()
    for task in tasks:
        prompts = task_of.index[(task_of == task) | (task == "all")]
        for first, second in steps:
            sides = [pd.DataFrame(means.xs(e, level="effort")).reindex(prompts) for e in (first, second)]
            change: pd.DataFrame = sides[1].sub(sides[0])
            change = change[change["analysis"].notna()]
            ones = np.ones(len(change))
            known = change[change["correct"].notna()]
            parts["more_tokens"].append(ratio(change["analysis"].to_numpy(), ones))
            parts["gain"].append(_gain(known["correct"].to_numpy()))
            parts["gain_p"].append(ratio_test(known["correct"].to_numpy(), np.ones(len(known)))[1].p)
            parts["gain_per_100"].append(
                _ratio_of_means(100 * known["correct"].to_numpy(), known["analysis"].to_numpy())
            )
    shape = (len(tasks), len(steps))
    variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
    for name in names:
        values = np.array(parts[name], dtype=np.float64).reshape(*shape, 3)
        variables |= {f"{name}{end}": (("task", "step"), values[..., i]) for i, end in enumerate(("", "_low", "_high"))}
    p = np.array(parts["gain_p"], dtype=np.float64).reshape(shape)
    q = np.asarray(false_discovery(p))
    differs = (q < ALPHA) & (variables["gain_low"][1] * variables["gain_high"][1] > 0)
    for name, of_steps in (("gain_p", p), ("gain_q", q), ("gain_different", differs)):
        variables[name] = (("task", "step"), of_steps)
    labels = [f"{a} → {b}" for a, b in steps]
    attrs = provenance("effort", "Gain by effort step", run.digest, seed, {})
    result = dataset(variables, {"task": tasks, "step": labels}, DEFINITIONS, attrs)
    lines = []
    for label in labels:
        c = {str(k): float(v) for k, v in result.sel(task="all", step=label).data_vars.items()}
        if not np.isfinite(c["more_tokens_low"]):
            a, b = label.split(" → ")
            both = int(means["analysis"].unstack("effort")[[a, b]].notna().all(axis=1).sum())
            lines.append(
                f"{label}: cannot be tested, {count_of(both, 'prompt has', 'prompts have')} both efforts "
                f"and {MIN_PROMPTS} are needed."
            )
            continue
        changed = "accuracy changes by" if c["gain_different"] else "no change of accuracy shown:"
        accuracy = (
            f"{changed} {signed_interval(100 * c['gain'], 100 * c['gain_low'], 100 * c['gain_high'], 1)} points"
            f"{_per_tokens(c['gain_per_100'], c['more_tokens'])}"
        )
        if not np.isfinite(c["gain_p"]):
            accuracy = f"accuracy cannot be tested, fewer than {MIN_PROMPTS} prompts are graded at both efforts"
        lines.append(
            f"{label}: {signed(c['more_tokens'], 1)} analysis tokens [{signed(c['more_tokens_low'], 1)}, "
            f"{signed(c['more_tokens_high'], 1)}]; {accuracy}."
        )
    result.attrs |= {"method": METHOD, "not_controlled": NOT_CONTROLLED, "summary": "\n".join(lines)}
    return result


def _per_tokens(gain_per_100: float, more_tokens: float) -> str:
    """Return the gain of accuracy per additional token, or per 10, 100, …, but not per more than were added."""
    if not np.isfinite(gain_per_100) or abs(more_tokens) < 1:
        return ""
    unit = 10 ** int(np.log10(abs(more_tokens)))
    return f", {signed(gain_per_100 * unit, 1)} points per {count_of(unit, 'additional token')}"


def _gain(change: Float[np.ndarray, " prompt"]) -> tuple[float, float, float]:
    """Return the mean change of a share and its interval, which has a width also where no answer changed."""
    if len(change) < MIN_PROMPTS:
        return float(change.mean()) if len(change) else np.nan, np.nan, np.nan
    value, low, high = share_change(change)
    return float(value), float(low), float(high)


def _ratio_of_means(over: np.ndarray, under: np.ndarray) -> tuple[Any, Any, Any]:
    """Σ over / Σ under, where under may be of either sign; NaN unless the denominator is clearly above zero."""
    _, low, _ = ratio(under, np.ones(len(under)))
    if not low > 0:
        return np.nan, np.nan, np.nan
    n, total = len(over), under.sum()
    value = over.sum() / total
    influence = (over - value * under) / (total - under)
    tested = mean_test(value, (influence - influence.mean()) * np.sqrt((n - 1) / n), n - 1.0)
    return value, tested.low, tested.high


def accuracy_model(run: Run, table: pd.DataFrame, efforts: list[str], seed: int = 0) -> xr.Dataset | None:
    """Return log-odds of a right answer on log analysis tokens and effort; None where the answers allow no fit."""
    import statsmodels.api as sm
    from statsmodels.genmod.cov_struct import Exchangeable
    from statsmodels.genmod.generalized_estimating_equations import GEE

    known = table[table["effort"].isin(efforts)].dropna(subset=["correct"])
    if len(known) < 20 or known["correct"].nunique() < 2 or known["prompt_id"].nunique() < 10:
        return None
    x = pd.DataFrame({"intercept": 1.0, "log_tokens": np.log1p(known["analysis"])}, index=known.index)
    for effort in efforts[1:]:
        x[effort] = (known["effort"] == effort).astype(float)
    if np.linalg.matrix_rank(x.to_numpy()) < x.shape[1]:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            fit = GEE(
                known["correct"], x, groups=known["prompt_id"], family=sm.families.Binomial(), cov_struct=Exchangeable()
            ).fit(cov_type="bias_reduced")
        except (np.linalg.LinAlgError, ValueError):
            return None
    limits = fit.conf_int().to_numpy()
    if not np.isfinite(limits).all() or np.abs(fit.params).max() > 15:  # separated: some effort is always right
        return None
    variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {
        "coefficient": (("term",), fit.params.to_numpy()),
        "coefficient_low": (("term",), limits[:, 0]),
        "coefficient_high": (("term",), limits[:, 1]),
        "p": (("term",), fit.pvalues.to_numpy()),
    }
    attrs = provenance("effort", "A model of accuracy", run.digest, seed, {"terms": list(x.columns)})
    result = dataset(variables, {"term": list(x.columns)}, DEFINITIONS, attrs)
    lines = [
        f"{term}: log-odds "
        + signed_interval(float(c["coefficient"]), float(c["coefficient_low"]), float(c["coefficient_high"]), 2)
        for term in list(x.columns)[1:]
        for c in (result.sel(term=term),)
    ]
    summary = "Other things equal in a logistic GEE clustered by prompt: " + "; ".join(lines) + "."
    result.attrs |= {"method": METHOD, "not_controlled": NOT_CONTROLLED, "summary": summary}
    return result
