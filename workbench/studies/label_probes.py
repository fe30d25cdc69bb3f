"""The label probes study: from which layer on do activations predict a label, beyond what the tokens predict?

The label is any of a run's: role, channel, part, effort, task, domain, right or wrong answers, or one of your own for
each sequence. A linear probe is fitted on some prompts and tested on others. Its AUC is compared with those of the
token alone, its position alone and the bigram alone, and with its AUC on a random label for each token type (the
control task). Thresholds are frozen: they are set on training prompts for a stated rate of false positives, and applied
to others.

    found = study(run, label="role", where="channel=prompt")["probes"]

Reference: Hewitt & Liang 2019, Designing and Interpreting Probes with Control Tasks.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from workbench.counting import count_of, signed_interval
from workbench.errors import InputError
from workbench.registry import Study
from workbench.runs import Run
from workbench.studies import token_labels
from workbench.studies.intervals import MIN_PROMPTS, few_prompts
from workbench.studies.probe_folds import (
    AUC_DEFINITIONS,
    FOLDS,
    Folds,
    Values,
    auc_variables,
    beyond_variables,
    pseudo_values,
)
from workbench.studies.probes import previous_ids
from workbench.studies.result import Definition, dataset, provenance
from workbench.studies.run_index import independent_prompts
from workbench.studies.token_labels import Selection, selection_of

STUDY = Study(
    name="label-probes",
    title="Label probes",
    question="From which layer on do activations predict a label better than its token, position and bigram do?",
    requires=("activations",),
    compute="probes of every recorded layer, fitted five times; jackknife over groups of prompts",
    options={
        "label": "role, channel, part, effort, task, domain or correct (default: task).",
        "hook": "Recorded hook point (default: hook_resid_post).",
        "where": "Tokens to read, as channel=prompt or role=user (default: all).",
        "pool": "token (default), or for each sequence: mean or last.",
        "max_tokens": "Use at most this many tokens or sequences (default: 2000).",
        "false_positives": "Rate at which thresholds are frozen (default: 0.05).",
    },
    page="label-probes",
    order=48,
)
SOURCES = ("activation", "token", "position", "bigram", "control task")
DEFINITIONS = {
    **AUC_DEFINITIONS,
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
    variables = _variables(
        [layer_values[0] for layer_values in by_layer], fixed, [layer_values[1] for layer_values in by_layer], best
    )
    for i, name in enumerate(("hits", "false_alarms")):
        variables[name] = (("layer", "label"), np.array([layer_values[2 + i] for layer_values in by_layer]))
    shown = label if isinstance(label, str) else "labels given by the caller"
    parameters = {"label": shown, "hook": hook, "where": str(where), "pool": pool, "max_tokens": max_tokens}
    unit, n_prompts = "tokens" if pool == "token" else "sequences", int(table["prompt"].nunique())
    attrs = provenance(STUDY.name, f"Probes of {shown}", run.digest, seed, parameters) | {
        "rests_on": f"{len(table):,} {unit} of {count_of(n_prompts, 'prompt')}",
        "prompts": n_prompts,
        "left_out": ", ".join(f"{name} ({n})" for name, n in table.attrs["rare"].items()),
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
        InputError: fewer than two labels have tokens of five prompts each.
    """
    x, table = np.zeros((0, 0), np.float32), pd.DataFrame()
    rng = np.random.default_rng(seed)  # the same rows in every layer
    for columns, values in token_labels.blocks(run, about, index):
        own = columns.assign(
            label=token_labels.values_of(label, columns, run),
            before=previous_ids(columns["id"].to_numpy(), columns["sequence"].to_numpy()),
        )
        there = np.isfinite(values).all(1) & (own["label"] != "").to_numpy()
        if where is not None:
            there &= token_labels.mask(where, own, run.sequences)
        selected, own = values[there], own[there]
        if pool != "token" and len(own):
            starts = np.flatnonzero(np.diff(own["sequence"].to_numpy(), prepend=-2))
            counts = np.diff([*starts, len(own)])
            last = starts + counts - 1
            selected = selected[last] if pool == "last" else np.add.reduceat(selected, starts, 0) / counts[:, None]
            own = own.iloc[last]
        table = pd.concat([table, own.assign(drawn=rng.random(len(own)))], ignore_index=True)
        x = np.concatenate([x.reshape(-1, selected.shape[1]), selected])
        if len(table) > max_tokens:  # no more than this, whatever the size of the run
            drawn = np.sort(np.argsort(table["drawn"].to_numpy())[:max_tokens])
            x, table = x[drawn], table.iloc[drawn].reset_index(drop=True)
    table["prompt"] = independent_prompts(run)[table["sequence"].to_numpy(np.int64)]  # duplicates are one prompt
    if (n := table["label"].nunique()) < 2:
        raise InputError(f"the tokens have {n} label: a probe needs two, see run.sequences")
    prompts_of = table.groupby("label")["prompt"].nunique().to_dict()
    rare = {str(label): int(n) for label, n in prompts_of.items() if n < FOLDS}
    if rare:  # no fold would be fitted and scored with them
        used = ~table["label"].isin(rare).to_numpy()
        x, table = x[used], table[used].reset_index(drop=True)
    table.attrs["rare"] = rare
    if len(prompts_of) - len(rare) < 2:
        listed = ", ".join(f"{label} ({n})" for label, n in prompts_of.items())
        raise InputError(f"a probe needs two labels that at least {FOLDS} prompts have, got prompts of {listed:.200}")
    if (n := table["prompt"].nunique()) < max(FOLDS, MIN_PROMPTS):
        raise InputError(
            f"{count_of(n, 'prompt has', 'prompts have')} these labels: a probe needs "
            f"{max(FOLDS, MIN_PROMPTS)} to hold some out"
        )
    return x, table


def _variables(
    activation: Sequence[Values], fixed: Mapping[str, Values], control: Sequence[Values], best: Values
) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Return the AUC by layer and source, and the difference from the best baseline, with intervals."""
    by_source = [activation, *([values] * len(activation) for values in fixed.values()), control]
    pseudo = np.stack([[pseudo_values(values) for values in layers] for layers in by_source], -1)  # layer group source
    differences = np.stack([pseudo_values(values) - pseudo_values(best) for values in activation], 1)
    return auc_variables(("layer", "source"), np.moveaxis(pseudo, 1, 0)) | beyond_variables(("layer",), differences)


def _summary(result: xr.Dataset) -> str:
    words = {s: float(result["auc"].sel(source=s)[0]) for s in SOURCES[1:4]}
    lines = [
        f"{result.attrs['rests_on']}, {result.sizes['label']} labels. AUC from words alone: "
        + ", ".join(f"{name} {value:.3f}" for name, value in words.items())
        + "."
    ]
    if text := few_prompts(int(result.attrs["prompts"])):
        lines.append(f"Warning: {text}.")
    if result.attrs["left_out"]:
        lines.append(f"Skipped, as fewer than {FOLDS} prompts have them: {result.attrs['left_out']}.")
    for layer in map(int, result["layer"].values):
        one = result.sel(layer=layer)
        auc, low, high = (float(one[name].sel(source="activation")) for name in ("auc", "auc_low", "auc_high"))
        beyond, beyond_low, beyond_high = (float(one[f"beyond_words{end}"]) for end in ("", "_low", "_high"))
        shown = float(one["q"]) <= 0.05 and beyond_low * beyond_high > 0
        hits, alarms = float(one["hits"].mean()), float(one["false_alarms"].mean())
        verdict = "beyond" if shown and beyond > 0 else "below" if shown else "not shown to differ from"
        lines.append(
            f"  layer {layer}: AUC {auc:.3f} [{low:.3f}, {high:.3f}], {verdict} the best baseline "
            f"({signed_interval(beyond, beyond_low, beyond_high, 3)}); control task "
            f"{float(one['auc'].sel(source='control task')):.3f}; frozen thresholds: {hits:.0%} hits, {alarms:.0%} "
            "false alarms."
        )
    return "\n".join(lines)
