"""The Jacobian lens by channel and effort: how early, and by which lens, the model's next token can be read.

Lenses are fitted to half of the prompts and read on the other half: the logit lens, a tuned lens, the Jacobian lens of
all tokens, and that of the tokens of a channel at an effort, beside the Jacobian lens of another group as a control.

Reference: Gurnee et al. 2026, Verbalizable Representations Form a Global Workspace in Language Models, Transformer
Circuits Thread; Belrose et al. 2023, the tuned lens, arXiv 2303.08112.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.counting import count_of
from workbench.errors import InputError
from workbench.experiments.jacobians import SKIP_FIRST, JacobianLens, fit_jacobian_lenses, group_masks
from workbench.experiments.lens import TunedLens, fit_tuned_lens, lens_of_streams, streams
from workbench.experiments.token_selection import select_tokens
from workbench.harmony.transcripts import Transcript
from workbench.model.transformer import GptOss
from workbench.outputs import check_output, refuse_paths, staged
from workbench.registry import Experiment
from workbench.studies.intervals import MIN_PROMPTS, mean_effect, within_bounds
from workbench.studies.statistics import ALPHA, false_discovery

EXPERIMENT = Experiment(
    name="jacobian-lens",
    title="Jacobian lens by channel and effort",
    question="At which layer can the next token be read by each lens, and does a channel have a Jacobian of its own?",
    compute="half of the sequences: d_model / batch backward passes of batch copies each; the others: a forward pass "
    "for each lens",
    cost={"passes": 1.5, "width_passes": 0.5},
    options={
        "by": "What the groups of tokens are: channel, effort, or channel,effort (default).",
        "batch": "Rows of the Jacobian that one backward pass computes; memory grows with it (default: 16).",
        "skip_first": "First tokens of each sequence that are neither sources nor targets (default: 16).",
        "tuned_steps": "Steps of Adam for the tuned lens; 0 leaves it out (default: 200).",
        "jacobian": "File of a Jacobian lens of all tokens to read instead of fitting one; no group has its own then.",
        "save": "New folder for the fitted Jacobian lenses, a .pt file for all tokens and one for each group.",
    },
    figures="workbench.figures.jacobian_lens",
    order=185,
)
_COMMAND = "study jacobian-lens"  # which writes the lenses
LENSES = ("logit lens", "tuned lens", "Jacobian lens", "Jacobian lens of the group", "Jacobian lens of another group")
COMPARISONS = ("Jacobian lens less logit lens", "group's less all tokens' Jacobian", "group's less another's Jacobian")
_COMPARED = ((2, 0), (3, 2), (3, 4))
METHOD = (
    "Half of the prompts, at random, fit the lenses; the other half is read. Divergence: KL of the lens's distribution "
    "of the next token from the model's own, in nats; agreement: share of tokens for which both have the same most "
    "likely token. Means over a sequence's tokens of the group, then over prompts, with bootstrap-t intervals. "
    "Change: the divergence of one lens less that of another; q: Benjamini–Hochberg over groups, layers and "
    "comparisons. The Jacobian lens is the mean derivative of the last residual stream, summed over all later tokens, "
    "with respect to the stream after a layer. The control is the Jacobian lens of the group that follows in the list."
)
NOT_CONTROLLED = (
    "A Jacobian lens is not fitted to predict the next token: it shows what a stream leads to in this and all later "
    "tokens, so that a larger divergence is not a defect of it. Groups differ in tokens and positions, and a lens of a "
    "small group is a mean of fewer prompts."
)


class _Lenses(NamedTuple):
    """The lenses that were fitted; tuned is None where it was left out."""

    tuned: TunedLens | None
    jacobian: Mapping[str, JacobianLens]  # "all", and by group where they were fitted

    def layers(self, last: int) -> list[int]:
        """Return the layers before the last that the Jacobian lens has."""
        return [layer for layer in self.jacobian["all"].layers if layer < last]


def experiment(
    model: GptOss,
    rows: Sequence[Transcript],
    *,
    by: str = "channel,effort",
    batch: int = 16,
    skip_first: int = SKIP_FIRST,
    tuned_steps: int = 200,
    jacobian: str = "",
    save: str = "",
    seed: int = 0,
) -> dict[str, xr.Dataset]:
    """Return how far each lens is from the model's own prediction, by group and layer, on prompts that did not fit it.

    jacobian: a file that `JacobianLens.load` reads, instead of a fit. save: a new folder for the fitted lenses.
    Dataset `lenses`: divergence and agreement over (lens, group, layer), each with its interval. Dataset `comparisons`:
    change, low, high, p and q over (which, group, layer).

    Raises:
        InputError: an option is not valid, or no group has enough prompts.
    """
    if tuned_steps < 0:
        raise InputError(f"tuned_steps={tuned_steps}: expected 0 or more")
    if jacobian and save:
        raise InputError(f"save={save!r}: with jacobian={jacobian!r} no Jacobian lens is fitted, leave one of them out")
    if save and os.path.lexists(save):
        raise InputError(f"save={save!r} exists: choose a new folder")
    kinds = [kind.strip() for kind in by.split(",")]
    fitted, read = _halves(rows, np.random.default_rng(seed))
    own = {group for row in fitted for group in group_masks(model, row, kinds)}
    if save:  # before the fit, which takes hours
        check_output(save, command=_COMMAND)
        refuse_paths(map(_file_name, own))
    if jacobian:
        by_group = {"all": JacobianLens.load(jacobian, model)}
        if by_group["all"].layers[0] == model.cfg.n_layers - 1:
            raise InputError(
                f"{jacobian} has the last layer only, whose Jacobian is the identity: give a lens of earlier layers"
            )
    else:
        by_group = fit_jacobian_lenses(model, fitted, by=kinds, skip_first=skip_first, batch=batch)
        own &= set(by_group)
        _save(by_group, save)
    tokens, lengths = _padded(fitted)
    tuned = fit_tuned_lens(model, tokens, n_real=lengths, steps=tuned_steps, seed=seed) if tuned_steps else None
    lenses = _Lenses(tuned, by_group)
    groups = _groups(model, read, kinds, sorted(own))
    readings = {group: _readings(model, chosen, lenses, group, list(groups)) for group, chosen in groups.items()}
    n_fitted, n_read = (len({row.prompt_id for row in half}) for half in (fitted, read))
    rests_on = f"{count_of(n_fitted, 'prompt')} fit the lenses, {n_read} are read"
    if jacobian:
        rests_on += (
            f"; the Jacobian lens is that of {jacobian}, fitted to {count_of(by_group['all'].n_prompts, 'prompt')}"
        )
    prompts = {group: _prompts(chosen) for group, chosen in groups.items()}
    return _results(readings, prompts, by_group, lenses.layers(model.cfg.n_layers - 1), rests_on, seed)


def _save(lenses: Mapping[str, JacobianLens], folder: str) -> None:
    """Write a folder with a file for each lens, as in analysis-high.pt, complete or not at all; "" for none."""
    if folder:
        with staged(folder, command=_COMMAND, owned=lambda existing: False) as part:
            part.mkdir()
            for group, lens in lenses.items():
                lens.save(part / _file_name(group))


def _file_name(group: str) -> str:
    """Return the name of the file of a group's lens; the effort in it is a text of the run."""
    return f"{group.replace(', ', '-').replace(' ', '-')}.pt"


def _prompts(chosen: Sequence[tuple[Transcript, Bool[np.ndarray, " pos"]]]) -> list[str]:
    """Return the prompt of each sequence."""
    return [row.prompt_id for row, _ in chosen]


def _halves(rows: Sequence[Transcript], rng: np.random.Generator) -> tuple[list[Transcript], list[Transcript]]:
    """Return the sequences of a random half of the prompts, and those of the others."""
    prompts = sorted({row.prompt_id for row in rows})
    half = set(rng.permutation(prompts)[: len(prompts) // 2].tolist())
    return [row for row in rows if row.prompt_id in half], [row for row in rows if row.prompt_id not in half]


def _padded(rows: Sequence[Transcript]) -> tuple[Tensor, list[int]]:
    """Return the tokens [sequence pos], padded on the right, and the lengths."""
    parts = [torch.from_numpy(row.tokens.astype(np.int64)) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True), [len(part) for part in parts]


def _groups(
    model: GptOss, rows: Sequence[Transcript], by: Sequence[str], fitted: Sequence[str]
) -> dict[str, list[tuple[Transcript, Bool[np.ndarray, " pos"]]]]:
    """Return, for each group with a lens and enough prompts, its sequences and their tokens of it.

    Raises:
        InputError: there is no such group.
    """
    by_group: dict[str, list[tuple[Transcript, Bool[np.ndarray, " pos"]]]] = {name: [] for name in fitted}
    for row in rows:
        for name, mask in group_masks(model, row, by).items():
            if name in by_group:
                by_group[name].append((row, mask))
    enough = {name: chosen for name, chosen in by_group.items() if len(set(_prompts(chosen))) >= MIN_PROMPTS}
    if not enough:
        raise InputError(
            f"no group by {','.join(by)} has a lens and {MIN_PROMPTS} prompts to read it on: use more sequences"
        )
    return enough


def _readings(
    model: GptOss,
    chosen: Sequence[tuple[Transcript, Bool[np.ndarray, " pos"]]],
    lenses: _Lenses,
    group: str,
    groups: Sequence[str],
) -> Float[np.ndarray, "measure lens layer sequence"]:
    """Return divergence and agreement of every lens in every layer that it has; NaN for a lens that there is not."""
    other = groups[(groups.index(group) + 1) % len(groups)]
    options: dict[str, Any] = {"logit lens": {}, "Jacobian lens": {"jacobian": lenses.jacobian["all"]}}
    if lenses.tuned:
        options["tuned lens"] = {"tuned": lenses.tuned}
    if group in lenses.jacobian:
        options["Jacobian lens of the group"] = {"jacobian": lenses.jacobian[group]}
        if other != group:
            options["Jacobian lens of another group"] = {"jacobian": lenses.jacobian[other]}
    layers = lenses.layers(model.cfg.n_layers - 1)
    out = np.full((2, len(LENSES), len(layers), len(chosen)), np.nan)
    for i, (row, mask) in enumerate(chosen):
        tokens = torch.from_numpy(row.tokens.astype(np.int64))[None]
        selected = select_tokens(model, tokens, np.flatnonzero(mask).tolist())
        stream = streams(model, selected)
        for name, option in options.items():
            lens = lens_of_streams(model, selected, stream, of=0, **option)
            read = lens.isel(depth=(lens["after"].values == "mlp") & np.isin(lens["layer"].values, layers))
            agrees = read["top"] == lens["top"].isel(depth=-1)
            out[:, LENSES.index(name), :, i] = [read["kl"].mean("point").values, agrees.mean("point").values]
    return out


def _results(
    readings: Mapping[str, Float[np.ndarray, "measure lens layer sequence"]],
    prompts: Mapping[str, Sequence[str]],
    jacobian: Mapping[str, JacobianLens],
    layers: Sequence[int],
    rests_on: str,
    seed: int,
) -> dict[str, xr.Dataset]:
    groups = list(readings)
    measured = [mean_effect(readings[group], prompts[group], seed=seed) for group in groups]
    means, low, high = (np.stack([getattr(m, name) for m in measured], 2) for name in ("change", "low", "high"))
    for i, group in enumerate(groups):  # agreement is a share; all prompts may have the same one
        share, n = means[1, :, i], len(set(prompts[group]))
        ends = [np.where(np.isnan(limit), share, limit) for limit in (low[1, :, i], high[1, :, i])]
        low[1, :, i], high[1, :, i] = within_bounds(share, ends[0], ends[1], n)
    low[0] = np.maximum(low[0], 0)  # a divergence
    pairs = [
        np.stack([readings[group][0, a] - readings[group][0, b] for a, b in _COMPARED])  # divergence
        for group in groups
    ]
    effects = [mean_effect(values, prompts[group], seed=seed) for group, values in zip(groups, pairs, strict=True)]
    cells = {name: np.stack([getattr(e, name) for e in effects], 1) for name in ("change", "low", "high", "p")}
    coords = {"group": groups, "layer": list(layers)}
    fewest = min(len(set(prompts[group])) for group in groups)
    about = {"method": METHOD, "not_controlled": NOT_CONTROLLED, "rests_on": rests_on, "prompts": fewest}
    measures = {"divergence": ("KL divergence from the model's own prediction", "nat")}
    measures["agreement"] = ("share of tokens with the model's own most likely token", "1")
    data = {}
    for i, (name, (long_name, unit)) in enumerate(measures.items()):
        for suffix, values in (("", means), ("_low", low), ("_high", high)):
            data[name + suffix] = (("lens", "group", "layer"), values[i], {"long_name": long_name, "units": unit})
    counts = [jacobian[group].n_prompts if group in jacobian else 0 for group in groups]
    lenses = xr.Dataset(data, {"lens": list(LENSES), **coords}, {"title": "Lenses on prompts that did not fit them"})
    about_counts = {"long_name": "sequences in the group's Jacobian", "units": "1"}
    lenses["n_prompts"] = xr.DataArray(counts, dims="group", attrs=about_counts)
    dims = ("which", "group", "layer")
    q = false_discovery(cells["p"])
    comparisons = xr.Dataset(
        {name: (dims, values, {"units": "nat"}) for name, values in {**cells, "q": q}.items()},
        {"which": list(COMPARISONS), **coords},
        {"title": "Change of divergence between lenses", "units": "nat"},
    )
    if set(jacobian) == {"all"}:  # a lens of a file: no group has its own
        comparisons = comparisons.sel(which=[COMPARISONS[0]])
    for ds, text in ((lenses, _divergences), (comparisons, _differences)):
        ds.attrs |= about
        ds.attrs["summary"] = text(ds)
    return {"lenses": lenses, "comparisons": comparisons}


def _divergences(lenses: xr.Dataset) -> str:
    """Return the divergences of the lenses by layer, a line for each group."""
    lines = [f"{lenses.attrs['rests_on']}; KL divergence from the model's own prediction, nats, by layer:"]
    for group in map(str, lenses["group"].values):
        one = lenses["divergence"].sel(group=group)
        parts = [
            f"{lens} {', '.join(f'{v:.2f}' for v in one.sel(lens=lens).values)}"
            for lens in LENSES[:4]
            if np.isfinite(one.sel(lens=lens)).all()
        ]
        lines.append(f"  {group}: {'; '.join(parts)}.")
    return "\n".join(lines)


def _differences(comparisons: xr.Dataset) -> str:
    """Return how many differences of divergence are shown in either direction, a line for each comparison."""
    lines = [f"{comparisons.attrs['rests_on']}; differences of divergence that are shown (q of at most {ALPHA}):"]
    for which in map(str, comparisons["which"].values):
        one = comparisons.sel(which=which)
        shown = one["q"] <= ALPHA
        nearer, farther = int((shown & (one["high"] < 0)).sum()), int((shown & (one["low"] > 0)).sum())
        tested = int(np.isfinite(one["q"]).sum())
        lines.append(
            f"  {which}: nearer to the model's own prediction in {nearer} and farther in {farther} of {tested} groups "
            "and layers."
        )
    return "\n".join(lines)
