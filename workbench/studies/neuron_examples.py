"""What single neurons of an expert respond to: their largest activations and a random sample, in context, by channel.

    ds = wb.studies.neuron_examples.load(run, layer=2, expert=5)
    ds[["activation", "before", "token"]].sel(channel="analysis", neuron=77).to_dataframe()

The lists are those that a capture recorded (`--record neurons`). With `logits`, of `expert_logits.neuron_logits`, the
tokens whose logits each neuron raises and lowers directly are beside them.
"""

from typing import Any

import numpy as np
import xarray as xr

from workbench.counting import signed
from workbench.errors import InputError
from workbench.harmony.labels import CHANNELS
from workbench.registry import Study
from workbench.runs import conversations, neuron_examples
from workbench.studies.expert_examples import AFTER, BEFORE, contexts
from workbench.studies.result import Definition, dataset, provenance

STUDY = Study(
    name="neuron-examples",
    title="Neurons by example",
    question="Which tokens activate single neurons of an expert most, by channel?",
    requires=("neurons",),
    compute="one pass over the run's tokens",
    options={
        "layer": "Layer of the expert (default: the first whose neurons were recorded).",
        "expert": "Number of the expert (default: the one of that layer with the largest load).",
    },
    figures="workbench.figures.neuron_examples",
    order=16,
)
_EFFECT = "output weights times the final norm's weight and the unembedding, less the mean over the vocabulary"
_NONE = "; −1: fewer tokens than places"
DEFINITIONS = {
    "activation": Definition("activation", "1", "after SwiGLU, before the output weights; either sign"),
    "sequence": Definition("sequence", "1", f"number of the sequence in the run{_NONE}"),
    "position": Definition("position", "tokens", f"position of the token in its sequence{_NONE}"),
    "token": Definition("token", "text", "the token at which the neuron had this activation"),
    "before": Definition("text before", "text", f"up to {BEFORE} tokens before it, of the same sequence"),
    "after": Definition("text after", "text", f"up to {AFTER} tokens after it, of the same sequence"),
    "random_activation": Definition("activation, random token", "1", "activation at a random token of the expert"),
    "random_sequence": Definition("sequence, random token", "1", f"number of the sequence in the run{_NONE}"),
    "random_position": Definition("position, random token", "tokens", f"position in its sequence{_NONE}"),
    "random_token": Definition("random token", "text", "a random token of the expert, the same for all its neurons"),
    "random_before": Definition("text before, random token", "text", f"up to {BEFORE} tokens before it"),
    "random_after": Definition("text after, random token", "text", f"up to {AFTER} tokens after it"),
    "largest": Definition("largest activation", "1", "largest absolute activation in the channel"),
    "top_text": Definition("token raised", "text", "token whose logit the neuron raises most directly"),
    "top_logit": Definition("direct effect on it", "logits", f"{_EFFECT}, the largest"),
    "bottom_text": Definition("token lowered", "text", "token whose logit the neuron lowers most directly"),
    "bottom_logit": Definition("direct effect on it", "logits", f"{_EFFECT}, the smallest"),
}
METHOD = (
    "The tokens of the largest absolute activations of every neuron among the tokens of its expert, by channel, and "
    "its activations at a random sample of these tokens, the same tokens for all neurons of the expert."
)
NOT_CONTROLLED = (
    "Largest activations show the extreme; the random sample shows what the neuron does at most tokens. A neuron whose "
    "largest activations have both signs may respond to two unlike things."
)
_SHOWN = 5


def study(run: Any, *, layer: int = -1, expert: int = -1, seed: int = 0) -> dict[str, xr.Dataset]:
    """Return the examples of an expert's neurons."""
    return {"neurons": load(run, layer=layer, expert=expert, seed=seed)}


def load(
    run: Any,
    *,
    layer: int = -1,
    expert: int = -1,
    seed: int = 0,
    tokenizer: Any = None,
    logits: xr.Dataset | None = None,
) -> xr.Dataset:
    """Return the examples of an expert's neurons [channel neuron neuron_example], the largest activation first.

    layer, expert: −1 takes the first layer whose neurons were recorded, and its expert with the largest load. seed: of
    no effect. tokenizer: if that of the run is not installed.

    Raises:
        InputError: the run did not record the neurons of this layer, or has no such expert.
    """
    if not getattr(getattr(run, "spec", None), "neuron_layers", ()):
        raise InputError(f"{getattr(run, 'path', 'this run')} recorded no neurons: capture with --record neurons")
    layer = run.spec.neuron_layers[0] if layer == -1 else layer
    if expert == -1:
        expert = int(run.total("expert_count").sum(("group", "channel")).values[layer].argmax())
    lists = neuron_examples.of_expert(run, layer, expert)
    channels = [c for c in range(len(CHANNELS)) if (lists["sequence"][c] >= 0).any()]
    lists = {name: values[channels] for name, values in lists.items()}
    kinds = {"": ("channel", "neuron", "neuron_example"), "random_": ("channel", "random_example")}
    places = {
        kind: np.stack([lists[f"{kind}{name}"].ravel() for name in ("sequence", "position")], axis=1) for kind in kinds
    }
    texts = contexts(run, np.concatenate(list(places.values())), conversations.tokenizer(run, tokenizer))
    variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
    for kind, dims in kinds.items():
        shape = lists[f"{kind}sequence"].shape
        rows = np.array([texts[s, p] for s, p in places[kind].tolist()], dtype=object).reshape(*shape, 3)
        variables |= {f"{kind}{name}": (dims, lists[f"{kind}{name}"]) for name in ("sequence", "position")}
        variables |= {f"{kind}{name}": (dims, rows[..., i]) for i, name in enumerate(("token", "before", "after"))}
    variables["activation"] = (kinds[""], lists["activation"])
    variables["random_activation"] = (("channel", "neuron", "random_example"), lists["random_activation"])
    variables["largest"] = (kinds[""][:2], np.abs(lists["activation"]).max(-1).astype(np.float64))
    coords = {"channel": [CHANNELS[c] for c in channels], "neuron": np.arange(run.model["d_mlp"])}
    if logits is not None:
        if (logits.attrs.get("layer"), logits.attrs.get("expert")) != (layer, expert):
            of = f"layer {logits.attrs.get('layer')} expert {logits.attrs.get('expert')}"
            raise InputError(f"the logits are of {of}, and the examples of layer {layer} expert {expert}")
        names = ("top_text", "top_logit", "bottom_text", "bottom_logit")
        variables |= {name: (("neuron", "rank"), logits[name].transpose("neuron", "rank").values) for name in names}
    attrs = provenance("neuron-examples", STUDY.title, run.digest, seed, {"layer": layer, "expert": expert})
    attrs |= {"method": METHOD, "not_controlled": NOT_CONTROLLED, "layer": layer, "expert": expert}
    examples = dataset(variables, coords, DEFINITIONS, attrs)
    return examples.assign_attrs(summary=_summary(examples))


def _summary(ds: xr.Dataset) -> str:
    """Return the neurons with the largest activations in content, each with its token there."""
    content = ds.sel(channel=[name for name in ds["channel"].values.tolist() if name != "frame"])
    where = f"layer {ds.attrs['layer']} expert {ds.attrs['expert']}"
    if not content.sizes["channel"]:
        return f"No token of content was routed to {where}."
    best = content["largest"].max("channel").argsort().values[::-1][:_SHOWN]
    lines = [f"Largest activations of the neurons of {where}:"]
    for neuron in best.tolist():
        cell = content.isel(neuron=neuron)
        own = cell.isel(channel=int(cell["largest"].values.argmax()), neuron_example=0)
        text = f"{str(own['before'].item())[-20:]}[{own['token'].item()}]"
        lines.append(f"  neuron {neuron}: {signed(float(own['activation']), 1)} at {text!r} ({own['channel'].item()})")
    return "\n".join(lines)
