"""Pages of experts as feature JSON, the form that Neuronpedia and circuit-tracer's viewer read.

A page has the expert's examples with the gate weight of every token of their context, by channel, and the tokens whose
logits its mean output raises and lowers most, if they are given. Its file is named by its number, which a graph that
`workbench.experiments.graph_export` writes has as `feature`: heads of a layer come first, then its experts, and the
layer and this number are made one by Cantor pairing.

Reference: `AnthropicFeatureDetail` in hijohnnylin/neuronpedia, apps/webapp/app/[modelId]/graph (commit b8efe84), and
safety-research/circuit-tracer, circuit_tracer/frontend/feature_models.py (0.5.0).
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from workbench.errors import InputError
from workbench.outputs import staged
from workbench.runs import conversations
from workbench.studies.expert_examples import AFTER, BEFORE

Page = dict[str, Any]


def cantor(x: int, y: int) -> int:
    """Return the number of a pair of numbers, Cantor's pairing function."""
    return (x + y) * (x + y + 1) // 2 + y


def numbers_of(model: Mapping[str, Any]) -> dict[str, int]:
    """Return the first number of each kind among the features of a layer. model: the shapes of a run's model.

    Heads are first, then experts, biases, errors of autoencoders, and each expert's neurons, after them one number for
    those of its neurons that are not shown; features of autoencoders are the last.
    """
    heads, experts, neurons = (int(model[name]) for name in ("n_heads", "num_experts", "d_mlp"))
    biases = heads + experts
    numbers = {"head": 0, "expert": heads, "attention bias": biases, "expert bias": biases + 1}
    return numbers | {
        "feature error": biases + 2,
        "neuron": biases + 3,
        "feature": biases + 3 + experts * (neurons + 1),
    }


def expert_number(model: Mapping[str, Any], layer: int, expert: int) -> int:
    """Return the number of an expert's page. model: the shapes of a run's model."""
    return cantor(layer, numbers_of(model)["expert"] + expert)


def neuron_number(model: Mapping[str, Any], layer: int, expert: int, neuron: int) -> int:
    """Return the number of the page of an expert's neuron. model: the shapes of a run's model."""
    return cantor(layer, numbers_of(model)["neuron"] + expert * (int(model["d_mlp"]) + 1) + neuron)


def dictionary_number(model: Mapping[str, Any], layer: int, feature: int) -> int:
    """Return the number of the page of a layer's autoencoder feature. model: the shapes of a run's model."""
    return cantor(layer, numbers_of(model)["feature"] + feature)


def pages(run: Any, examples: xr.Dataset, logits: xr.Dataset | None = None, *, tokenizer: Any = None) -> Iterator[Page]:
    """Yield the page of every expert that has an example.

    examples: of `expert_examples.load`. logits: of `workbench.experiments.expert_logits`; without them the lists of
    logits are empty.

    Raises:
        InputError: the run's tokenizer is not known.
    """
    contexts = _Contexts(run, examples, conversations.tokenizer(run, tokenizer))
    names = [f"{kind}_{name}" for kind in ("top", "random") for name in ("gate", "sequence", "position")]
    lists = {name: examples[name].transpose("layer", "expert", "channel", "example").values for name in names}
    channels, label = examples["channel"].values.tolist(), examples["label"].values
    load = _frequencies(run)
    for layer in examples["layer"].values.tolist():
        for expert in examples["expert"].values.tolist():
            cell = {name: values[layer, expert] for name, values in lists.items()}
            quantiles = _quantiles(cell, channels, layer, expert, contexts)
            if not quantiles:
                continue
            number = expert_number(run.model, layer, expert)
            yield {
                "index": number,
                "layer": layer,
                "expert": expert,
                "label": str(label[layer, expert]),
                "examples_quantiles": quantiles,
                "top_logits": _logits(logits, "top", layer, expert),
                "bottom_logits": _logits(logits, "bottom", layer, expert),
            } | _statistics(quantiles, float(load[layer, expert]))


def neuron_pages(run: Any, examples: xr.Dataset, logits: xr.Dataset | None = None) -> Iterator[Page]:
    """Yield the page of every neuron of an expert that has an example.

    A run holds the activation of the example's token only: the texts before and after it are shown with 0.

    examples: of `neuron_examples.load`. logits: of `workbench.experiments.neuron_logits`.
    """
    layer, expert = int(examples.attrs["layer"]), int(examples.attrs["expert"])
    frequency = float(_frequencies(run)[layer, expert])  # a neuron has an activation wherever its expert is chosen
    names = ("activation", "sequence", "position", "before", "token", "after")
    n_neurons = examples.sizes["neuron"]
    lists = {name: examples[name].transpose("neuron", "channel", "neuron_example").values for name in names}
    for name in names:  # the tokens of the random sample are those of all neurons
        sample = examples[f"random_{name}"]
        sample = sample if "neuron" in sample.dims else sample.expand_dims(neuron=n_neurons)
        lists[f"random_{name}"] = sample.transpose("neuron", "channel", "random_example").values
    titles = {"": "Largest activations", "random_": "Random sample"}
    for i, neuron in enumerate(examples["neuron"].values.tolist()):
        quantiles = []
        for c, channel in enumerate(examples["channel"].values.tolist()):
            for kind, title in titles.items():
                rows = zip(*(lists[f"{kind}{name}"][i, c].tolist() for name in names), strict=True)
                shown = [_neuron_example(*row) for row in rows if row[1] >= 0]
                if shown:
                    quantiles.append({"quantile_name": f"{title}, {channel}", "examples": shown})
        if quantiles:
            yield {
                "index": neuron_number(run.model, layer, expert, neuron),
                "layer": layer,
                "expert": expert,
                "neuron": neuron,
                "label": f"neuron {neuron} of layer {layer} expert {expert}",
                "examples_quantiles": quantiles,
                "top_logits": _neuron_logits(logits, "top", neuron),
                "bottom_logits": _neuron_logits(logits, "bottom", neuron),
            } | _statistics(quantiles, frequency)


def dictionary_pages(run: Any, examples: xr.Dataset, shares: xr.Dataset) -> Iterator[Page]:
    """Yield the page of every feature of an autoencoder that has an example.

    A run holds neither the autoencoder's weights nor the activations of other tokens: logits are empty, and the texts
    before and after a token are shown with 0.

    examples: of `feature_examples.load`. shares: of `feature_examples.table`.
    """
    layer, hook = int(str(examples.attrs["hook"]).split(".")[1]), str(examples.attrs["hook"])
    names = ("activation", "sequence", "position", "before", "token", "after")
    totals = run.total("tokens").sum("group").sel(channel=shares["channel"])
    frequency = (shares["share"] * totals).sum("channel") / totals.sum()
    titles = {"top": "Largest activations", "random": "Random sample"}
    for feature in examples["feature"].values.tolist():
        quantiles = []
        for channel in examples["channel"].values.tolist():
            cell = examples.sel(channel=channel, feature=feature)
            for kind, title in titles.items():
                rows = zip(*(cell[f"{kind}_{name}"].values.tolist() for name in names), strict=True)
                shown = [_neuron_example(*row) for row in rows if row[1] >= 0]
                if shown:
                    quantiles.append({"quantile_name": f"{title}, {channel}", "examples": shown})
        if quantiles:
            yield {
                "index": dictionary_number(run.model, layer, feature),
                "layer": layer,
                "feature": feature,
                "label": f"feature {feature} of {hook}",
                "examples_quantiles": quantiles,
                "top_logits": [],
                "bottom_logits": [],
            } | _statistics(quantiles, float(frequency.sel(feature=feature)))


def _frequencies(run: Any) -> np.ndarray:
    """Return the share of all tokens that went to each expert [layer expert]."""
    counts = run.total("expert_count").sum(("group", "channel")).values.astype(np.float64)
    tokens = counts[:1].sum() / run.model["experts_per_token"]
    return np.asarray(counts / max(float(tokens), 1.0))


def _statistics(quantiles: Sequence[Mapping[str, Any]], frequency: float) -> dict[str, Any]:
    """Return what circuit-tracer's pages hold beside Neuronpedia's; nothing is known of quantiles and histograms."""
    acts = [a for quantile in quantiles for example in quantile["examples"] for a in example["tokens_acts_list"]]
    statistics = {"transcoder_id": "gpt-oss", "act_min": min(acts), "act_max": max(acts)}
    return statistics | {"quantile_values": [], "histogram": [], "activation_frequency": round(frequency, 6)}


def _neuron_example(
    activation: float, sequence: int, position: int, before: str, token: str, after: str
) -> dict[str, Any]:
    return {
        "tokens": [before, token, after],
        "tokens_acts_list": [0.0, round(float(activation), 4), 0.0],
        "train_token_ind": 1,
        "is_repeated_datapoint": False,
        "sequence": sequence,
        "position": position,
    }


def _neuron_logits(logits: xr.Dataset | None, kind: str, neuron: int) -> list[str]:
    return [] if logits is None else [str(text) for text in logits[f"{kind}_text"].sel(neuron=neuron).values.tolist()]


def write_pages(
    run: Any,
    out: str | Path,
    examples: xr.Dataset,
    logits: xr.Dataset | None = None,
    *,
    tokenizer: Any = None,
    neurons: Iterable[Page] = (),
    overwrite: bool = False,
) -> int:
    """Write a folder of pages, `NUMBER.json`, and return how many; it appears complete or not at all.

    neurons: further pages, of `neuron_pages` and `dictionary_pages`.

    Raises:
        InputError: the run has no example, or the folder may not be written.
    """
    with staged(out, command="export", inputs=[run.path], overwrite=overwrite) as part:
        part.mkdir()
        n = 0
        for page in chain(pages(run, examples, logits, tokenizer=tokenizer), neurons):
            n += 1
            text = json.dumps(page, ensure_ascii=False, allow_nan=False)
            (part / f"{page['index']}.json").write_text(text + "\n", encoding="utf-8")
        if not n:
            raise InputError(f"{run.path} has no example of an expert: wait for its capture")
    return n


def _logits(logits: xr.Dataset | None, kind: str, layer: int, expert: int) -> list[str]:
    if logits is None:
        return []
    cell = logits.sel(layer=layer, expert=expert)
    texts, ids = cell[f"{kind}_text"].values.tolist(), cell[f"{kind}_token"].values.tolist()
    return [str(text) for text, i in zip(texts, ids, strict=True) if i >= 0]


class _Contexts:
    """The tokens around every example and the experts and gate weights of each; a pass over the run reads them."""

    def __init__(self, run: Any, examples: xr.Dataset, tokenizer: Any) -> None:
        wanted = np.unique(np.concatenate([_places(examples, kind) for kind in ("top", "random")]), axis=0)
        wanted = wanted[wanted[:, 0] >= 0]
        self._texts: dict[int, str] = {}
        self._tokenizer = tokenizer
        self._contexts: dict[tuple[int, int], tuple[list[int], np.ndarray, np.ndarray, int]] = {}
        for block in run.blocks("id", "experts", "gates"):
            first, last = np.searchsorted(wanted[:, 0], (block["sequence"][0], block["sequence"][-1] + 1))
            for sequence, position in wanted[first:last].tolist():
                start, stop = np.searchsorted(block["sequence"], (sequence, sequence + 1)).tolist()
                rows = slice(max(start, start + position - BEFORE), min(stop, start + position + AFTER + 1))
                columns = block["experts"][:, rows].copy(), block["gates"][:, rows].copy()
                at = start + position - rows.start
                self._contexts[sequence, position] = (block["id"][rows].tolist(), *columns, at)

    def example(self, sequence: int, position: int, layer: int, expert: int) -> dict[str, Any]:
        """Return an example's tokens and the expert's gate weight at each, 0 where it was not chosen."""
        ids, experts, gates, at = self._contexts[sequence, position]
        weights = np.where(experts[layer] == expert, gates[layer].astype(np.float64), 0).sum(-1)
        return {
            "tokens": [self._text(i) for i in ids],
            "tokens_acts_list": [round(float(w), 4) for w in weights],
            "train_token_ind": at,
            "is_repeated_datapoint": False,
            "sequence": sequence,
            "position": position,
        }

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self._tokenizer.decode([token])
        return self._texts[token]


def _places(examples: xr.Dataset, kind: str) -> np.ndarray:
    return np.stack([examples[f"{kind}_{name}"].values.ravel() for name in ("sequence", "position")], axis=1)


def _quantiles(
    cell: Mapping[str, np.ndarray], channels: Sequence[str], layer: int, expert: int, contexts: _Contexts
) -> list[dict[str, Any]]:
    """Return lists of examples: the largest gate weights of all content, then both lists of each channel.

    cell: of one expert, values [channel example].
    """
    groups, best = [], []
    for c, channel in enumerate(channels):
        for kind, title in (("top", "Largest gate weights"), ("random", "Random sample")):
            rows = [cell[f"{kind}_{name}"][c].tolist() for name in ("gate", "sequence", "position")]
            places = [(g, s, p) for g, s, p in zip(*rows, strict=True) if s >= 0]
            if places:
                shown = [contexts.example(s, p, layer, expert) for _, s, p in places]
                groups.append({"quantile_name": f"{title}, {channel}", "examples": shown})
            if kind == "top" and channel != "frame":
                best += places
    if best:
        first = sorted(best, key=lambda row: (-row[0], row[1], row[2]))[: cell["top_gate"].shape[1]]
        shown = [contexts.example(s, p, layer, expert) for _, s, p in first]
        groups.insert(0, {"quantile_name": "Largest gate weights", "examples": shown})
    return groups
