"""The tokens whose logits each expert raises and lowers most, directly through the unembedding.

    logits = expert_logits.load(model, sequences)
    logits["top_text"].sel(layer=2, expert=5)

An expert's direct effect on the logits of a token is its gated output, divided by the scale of the final norm at that
token, times the unembedding, less the mean over the vocabulary. Shown is the mean over the expert's tokens: the scale
is that of the pass, and what later layers do with the output is not part of it.

Reference: direct logit attribution, Elhage et al. 2021, with the norm frozen.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from workbench.capture.recorder import source_digest
from workbench.counting import count_of, signed
from workbench.errors import InputError
from workbench.experiments.effects import effects
from workbench.experiments.final_channel import final_tokens
from workbench.harmony.transcripts import Transcript
from workbench.hooks.interventions import forbid
from workbench.hooks.sae import SAE, load_sae
from workbench.model.transformer import GptOss
from workbench.registry import Experiment

EXPERIMENT = Experiment(
    name="expert-logits",
    title="Direct effects of experts on logits",
    question="Which tokens' logits does each expert raise and lower directly?",
    compute="one forward pass over the sequences",
    cost={"passes": 1},
    options={
        "tokens": "Tokens with the largest and the smallest effects of each expert (default: 10).",
        "neuron_layer": "Layer whose neurons' direct effects are added, for the dashboard's page of neurons "
        "(default: none).",
        "neuron_expert": "Only the neurons of this expert of the layer (default: of all).",
        "sae": "Folder of a sparse autoencoder of the residual stream; the direct effects of its features are added, "
        "for the dashboard's page of features (default: none).",
    },
    figures="workbench.figures.expert_logits",
    order=170,
)
METHOD = (
    "The gated output of an expert at each of its tokens, divided by the scale of the final norm there, times the "
    "unembedding, less the mean over the vocabulary; the mean over the expert's tokens, in logits. No interval is "
    "given: the effects describe the weights and the tokens of these sequences."
)
NEURON_METHOD = (
    "A neuron's output weights, times the weight of the final norm and the unembedding, less the mean over the "
    "vocabulary: logits for an activation of 1, a gate weight of 1 and a final norm's scale of 1."
)
FEATURE_METHOD = (
    "A feature's decoder row, times the weight of the final norm and the unembedding, less the mean over the "
    "vocabulary: logits for an activation of 1 and a final norm's scale of 1."
)
NOT_CONTROLLED = "What later layers do with the output is not part of it, and neither is a change of the norm's scale."
N_TOKENS = 10  # with the largest and the smallest effects
_INSIDE = ("mlp.hook_expert_indices", "mlp.hook_expert_weights", "mlp.experts.hook_out")


def load(model: GptOss, sequences: Sequence[Any], *, n: int = N_TOKENS) -> xr.Dataset:
    """Return the tokens with the largest (`top`) and smallest (`bottom`) direct effects [layer expert rank], in logits.

    sequences: ids of the texts over which each expert's output is averaged, or transcripts. An expert without a token
    has the token −1.

    Raises:
        InputError: there is no sequence.
    """
    directions, tokens = mean_directions(model, sequences)
    shape = (*tokens.shape, min(n, model.cfg.d_vocab))
    columns = {f"{kind}_{name}": np.full(shape, fill) for kind in ("top", "bottom") for name, fill in _FIELDS.items()}
    unembedding = model.unembed.W_U.mT
    for layer in range(model.cfg.n_layers):
        used = tokens[layer] > 0
        logits = directions[layer].to(unembedding.dtype) @ unembedding.mT
        logits = logits.float() - logits.float().mean(-1, keepdim=True)
        for kind, largest in (("top", True), ("bottom", False)):
            values, ids = logits.topk(shape[-1], largest=largest)
            columns[f"{kind}_token"][layer] = np.where(used[:, None], ids.cpu().numpy(), -1)
            columns[f"{kind}_logit"][layer] = np.where(used[:, None], values.cpu().numpy(), np.nan)
    dims = ("layer", "expert", "rank")
    variables: dict[str, Any] = {name: (dims, values) for name, values in columns.items()}
    for kind in ("top", "bottom"):
        ids = columns[f"{kind}_token"]
        texts = [model.tokenizer.decode([i]) if i >= 0 else "" for i in ids.ravel().tolist()]
        variables[f"{kind}_text"] = (dims, np.array(texts, dtype=object).reshape(ids.shape))
    coords = {"layer": np.arange(tokens.shape[0]), "expert": np.arange(tokens.shape[1])}
    variables["tokens"] = (("layer", "expert"), tokens)
    return xr.Dataset(variables, coords, {"sequences": len(sequences), "checkpoint_digest": model.checkpoint.digest})


def experiment(
    model: GptOss,
    rows: Sequence[Transcript],
    *,
    tokens: int = N_TOKENS,
    neuron_layer: int = -1,
    neuron_expert: int = -1,
    sae: str = "",
    seed: int = 0,
) -> dict[str, xr.Dataset]:
    """Return `load` of the rows with its title, method and summary. seed: not used, as nothing is drawn at random.

    With `neuron_layer`, the dataset `neurons` has the direct effects of the layer's neurons [expert neuron rank]; with
    `sae`, the dataset `features` has those of the autoencoder's features [feature rank].

    Raises:
        InputError: `tokens` is not positive, there is no sequence, or the model has no such layer or expert.
    """
    if tokens < 1:
        raise InputError(f"tokens={tokens}: expected at least 1")
    if neuron_expert != -1 and neuron_layer == -1:
        raise InputError(f"neuron_expert={neuron_expert}: name its layer with neuron_layer, as neuron_layer=2")
    details = {} if neuron_layer == -1 else {"neurons": _layer_neurons(model, neuron_layer, neuron_expert, tokens)}
    if sae:
        details["features"] = feature_logits(model, load_sae(sae, device=model.device), n=tokens)
    ds = load(model, rows, n=tokens)
    ds.attrs |= {"title": EXPERIMENT.title, "method": METHOD, "not_controlled": NOT_CONTROLLED, "units": "logits"}
    ds.attrs["rests_on"] = f"{count_of(len(rows), 'sequence')}, {int(ds['tokens'].sum()):,} routed slots"
    first = ds["top_logit"].isel(rank=0).fillna(-np.inf)
    lines = []
    for place in np.argsort(-first.values, axis=None)[:5]:
        layer, expert = np.unravel_index(int(place), first.shape)
        one = ds.isel(layer=layer, expert=expert)
        texts = ", ".join(repr(str(text)) for text in one["top_text"].values[:3])
        lines.append(
            f"Layer {layer}, expert {expert} raises {texts}: up to {signed(float(one['top_logit'][0]), 2)} logits."
        )
    ds.attrs["summary"] = "\n".join([f"{ds.attrs['rests_on']}. The largest direct effects:", *lines])
    return {"logits": ds} | details


def _layer_neurons(model: GptOss, layer: int, expert: int, n: int) -> xr.Dataset:
    """Return the direct effects of the neurons of a layer's experts [expert neuron rank], all or one."""
    if not 0 <= layer < model.cfg.n_layers:
        raise InputError(f"neuron_layer={layer}: the model has layers 0 to {model.cfg.n_layers - 1}")
    numbers = list(range(model.cfg.experts_of(layer))) if expert == -1 else [expert]
    parts = [neuron_logits(model, layer, number, n=n) for number in numbers]
    neurons = xr.concat(parts, dim="expert").assign_coords(expert=numbers)
    shown = "all experts" if expert == -1 else f"expert {expert}"
    first = neurons["top_logit"].isel(rank=0)
    lines = [f"Direct effects of the neurons of layer {layer}, {shown}; the largest:"]
    for place in np.argsort(-first.values, axis=None)[:5]:
        i, neuron = np.unravel_index(int(place), first.shape)
        text = str(neurons["top_text"].values[i, neuron, 0])
        lines.append(
            f"  expert {numbers[int(i)]}, neuron {neuron} raises {text!r}: {signed(float(first[i, neuron]), 2)}"
        )
    attrs: dict[str, Any] = {
        "title": "Direct effects of neurons on logits",
        "method": NEURON_METHOD,
        "not_controlled": NOT_CONTROLLED,
    }
    attrs |= {"units": "logits", "layer": layer, "rests_on": "the weights", "summary": "\n".join(lines)}
    attrs["checkpoint_digest"] = model.checkpoint.digest
    return neurons.assign_attrs(attrs)


@torch.no_grad()
def neuron_logits(model: GptOss, layer: int, expert: int, *, n: int = N_TOKENS) -> xr.Dataset:
    """Return the tokens with the largest (`top`) and smallest (`bottom`) direct effects of neurons [neuron rank].

    A neuron's direct effect is its output weight, times the final norm's weight and the unembedding, less the mean over
    the vocabulary: logits for an activation of 1, a gate weight of 1 and a final norm's scale of 1.

    Raises:
        InputError: the model has no such layer or expert.
    """
    cfg = model.cfg
    n_experts = cfg.experts_of(layer) if 0 <= layer < cfg.n_layers else cfg.num_experts
    if not 0 <= layer < cfg.n_layers or not 0 <= expert < n_experts:
        raise InputError(
            f"layer {layer} expert {expert}: the model has layers 0 to {cfg.n_layers - 1} and experts 0 to "
            f"{n_experts - 1}"
        )
    variables = _direct_effects(model, model.blocks[layer].mlp.experts.W_out(expert), "neuron", n)
    return xr.Dataset(variables, {"neuron": np.arange(cfg.d_mlp)}, {"layer": layer, "expert": expert})


@torch.no_grad()
def feature_logits(model: GptOss, sae: SAE, *, n: int = N_TOKENS) -> xr.Dataset:
    """Return the tokens with the largest (`top`) and smallest (`bottom`) direct effects of features [feature rank].

    A feature's direct effect is its decoder row, times the final norm's weight and the unembedding, less the mean over
    the vocabulary: logits for an activation of 1 and a final norm's scale of 1.

    Raises:
        InputError: the autoencoder names no hook point of the model, or does not write to the residual stream.
    """
    hook = str(sae.cfg.hook_name)
    if hook not in model.hook_dict or sae.cfg.d_in != model.cfg.d_model or sae.cfg.reshape_activations != "none":
        raise InputError(
            f"autoencoder of width {sae.cfg.d_in} at {hook!r}: expected one of the residual stream of this model, of "
            f"width {model.cfg.d_model}, as at blocks.0.hook_resid_post"
        )
    decoder = sae.W_dec.to(model.device, torch.float32)
    if sae.cfg.rescale_acts_by_decoder_norm:  # whose activations have the norm of the decoder's row in them
        decoder = decoder / decoder.norm(dim=-1, keepdim=True)
    ds = xr.Dataset(_direct_effects(model, decoder, "feature", n), {"feature": np.arange(sae.cfg.d_sae)})
    lines = [f"Direct effects of the features at {hook}; the largest:"]
    for feature in np.argsort(-ds["top_logit"].values[:, 0])[:5].tolist():
        text, effect = str(ds["top_text"].values[feature, 0]), float(ds["top_logit"][feature, 0])
        lines.append(f"  feature {feature} raises {text!r}: {effect:+.2f}")
    attrs = {"title": "Direct effects of features on logits", "method": FEATURE_METHOD, "units": "logits"}
    attrs |= {"not_controlled": NOT_CONTROLLED, "rests_on": "the weights", "summary": "\n".join(lines)}
    attrs |= {"hook": hook, "sae_digest": source_digest(sae.encode), "checkpoint_digest": model.checkpoint.digest}
    return ds.assign_attrs(attrs)


def _direct_effects(model: GptOss, directions: Float[Tensor, "row d_model"], dim: str, n: int) -> dict[str, Any]:
    """Return tokens, logits and texts of the largest and smallest direct effects of directions of the stream.

    They are variables of a dataset, [row rank], whose rows are called `dim`.
    """
    unembedding = model.unembed.W_U.mT
    columns: dict[str, list[np.ndarray]] = {f"{k}_{name}": [] for k in ("top", "bottom") for name in _FIELDS}
    for rows in directions.split(_ROWS):
        logits = ((rows.float() * model.ln_final.weight.float()).to(unembedding.dtype) @ unembedding.mT).float()
        logits = logits - logits.mean(-1, keepdim=True)
        for kind, largest in (("top", True), ("bottom", False)):
            values, ids = logits.topk(min(n, model.cfg.d_vocab), largest=largest)
            columns[f"{kind}_token"].append(ids.cpu().numpy())
            columns[f"{kind}_logit"].append(values.cpu().numpy())
    variables: dict[str, Any] = {name: ((dim, "rank"), np.concatenate(parts)) for name, parts in columns.items()}
    for kind in ("top", "bottom"):
        ids = variables[f"{kind}_token"][1]
        known = {i: model.tokenizer.decode([i]) for i in np.unique(ids).tolist()}
        texts = [known[i] for i in ids.ravel().tolist()]
        variables[f"{kind}_text"] = ((dim, "rank"), np.array(texts, dtype=object).reshape(ids.shape))
    return variables


_ROWS = 64  # whose logits are in memory at a time
_FIELDS = {"token": -1, "logit": np.nan}


@torch.no_grad()
def mean_directions(
    model: GptOss, sequences: Sequence[Any]
) -> tuple[list[Float[Tensor, "expert d_model"]], np.ndarray]:
    """Return for each layer the mean direct effect of its experts before the unembedding, and
    their tokens [layer expert].

    Raises:
        InputError: there is no sequence.
    """
    if not sequences:
        raise InputError("the direct effects of experts need at least one sequence")
    cfg = model.cfg
    names = [f"blocks.{layer}.{name}" for layer in range(cfg.n_layers) for name in _INSIDE]
    sums = [torch.zeros(cfg.num_experts, cfg.d_model, device=model.device) for _ in range(cfg.n_layers)]
    counts = torch.zeros(cfg.n_layers, cfg.num_experts, device=model.device)
    for sequence in sequences:
        ids = torch.as_tensor(np.asarray(getattr(sequence, "tokens", sequence)).astype(np.int64), device=model.device)
        _, cache = model.run_with_cache(
            ids[None], names_filter=[*names, "ln_final.hook_scale"], return_cache_object=False
        )
        scale = cache["ln_final.hook_scale"][0].float()
        for layer in range(cfg.n_layers):
            chosen, gates, out = (cache[f"blocks.{layer}.{name}"][0] for name in _INSIDE)
            write = gates.float()[..., None] * out.float() / scale[:, None]
            sums[layer].index_add_(0, chosen.flatten().long(), write.flatten(0, 1))
            counts[layer] += torch.bincount(chosen.flatten(), minlength=cfg.num_experts)
    gain = model.ln_final.weight.float()
    means = [total / counts[layer].clamp(min=1)[:, None] * gain for layer, total in enumerate(sums)]
    return means, counts.long().cpu().numpy()


def ablations(
    model: GptOss, rows: Sequence[Transcript], experts: Sequence[tuple[int, int]], *, seed: int = 0
) -> xr.Dataset:
    """Return what masking each expert (layer, expert) before the top-k does to the final answers' log-probability.

    The dataset is that of `effects`, with `layer` and `expert` of each intervention: `change` with its interval in
    nats a sequence, and q.

    Raises:
        InputError: there is no expert, or one that the model does not have, or fewer than five prompts.
    """
    if not experts:
        raise InputError("no expert was given: give at least one to ablate, as (layer, expert)")
    edits = {f"layer {layer} expert {expert}": forbid(layer, [expert]) for layer, expert in experts}
    results = effects(model, rows, edits, final_tokens(model), seed=seed)
    layers, numbers = zip(*experts, strict=True)
    return results.assign_coords(layer=("intervention", list(layers)), expert=("intervention", list(numbers)))
