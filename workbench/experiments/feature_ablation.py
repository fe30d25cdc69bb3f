"""Ablate a feature of an autoencoder in the model, and measure what it changes at tokens that a run recorded for it.

    effects = feature_ablation.measure(model, load_sae("saes/layer2"), wb.open_run("run.zarr"), feature=77)
    effects[["token", "next_token", "change", "control_change"]].to_dataframe()
    effects["lowered_text"].sel(kind="top")          # tokens whose logits fall without the feature

The run has lists of examples of the autoencoder (`workbench capture … --record features:FOLDER`). Each text is read up
to an example, and the feature is set to zero at all of its tokens; what the autoencoder does not reconstruct stays.

Reference: Bricken et al. 2023, Towards Monosemanticity, who ablate features over the context in the same way.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from workbench.capture.recorder import source_digest
from workbench.counting import count_of, signed, signed_interval
from workbench.errors import InputError
from workbench.experiments.from_run import transcripts
from workbench.harmony.labels import CHANNELS
from workbench.hooks.sae import SAE, load_sae
from workbench.model.transformer import GptOss
from workbench.runs import Run, feature_examples
from workbench.runs.schema import EXAMPLE_KINDS, FeatureLists
from workbench.studies.comparison import prompt_ids
from workbench.studies.intervals import MIN_PROMPTS, mean_effect
from workbench.studies.result import Definition, dataset, provenance

EXAMPLES = 12  # of each kind
RANKS = 10  # tokens whose logits fall and rise most
METHOD = (
    "The model reads each text up to an example, as it is and with the feature set to zero at every token (features "
    "less the feature, decoded; the error of the autoencoder stays). Measured at the example: the log-probability of "
    "the token that follows in the text, the Kullback-Leibler divergence of the predictions, and each logit less the "
    "mean over the vocabulary. Control: what is taken out has the same size and a random direction."
)
NOT_CONTROLLED = (
    "Largest activations show the extreme; the random sample has about as many tokens of each channel, whatever their "
    "number. A change at the other tokens of the text is not measured."
)
DEFINITIONS = {
    "example_kind": Definition("kind of example", "text", "top: a largest activation; random: of the random sample"),
    "channel": Definition("channel", "text", "harmony channel of the token"),
    "sequence": Definition("sequence", "1", "number of the sequence in the run"),
    "position": Definition("position", "tokens", "position of the token in its sequence"),
    "activation": Definition("activation", "1", "of the feature at the token, in this pass"),
    "token": Definition("token", "text", "the token at which the feature is active"),
    "next_token": Definition("next token", "text", "the token that follows in the text"),
    "logprob": Definition("log-probability", "nats", "of the next token, as the model is"),
    "change": Definition("change", "nats", "of the log-probability of the next token, without the feature"),
    "kl": Definition("divergence", "nats", "Kullback-Leibler divergence of the predictions with and without it"),
    "control_change": Definition("change, control", "nats", "the same with a random direction of the same size"),
    "control_kl": Definition("divergence, control", "nats", "the same with a random direction of the same size"),
} | {
    f"{side}_{name}": Definition(f"{side} {name}", unit, f"of tokens whose logits {verb} most without the feature")
    for side, verb in (("lowered", "fall"), ("raised", "rise"))
    for name, unit in (("text", "text"), ("logit", "logits"))
}


@torch.no_grad()
def measure(model: GptOss, sae: SAE, run: Run, feature: int, *, examples: int = EXAMPLES, seed: int = 0) -> xr.Dataset:
    """Return the effects of ablating a feature: by example, and the mean change of logits [kind rank].

    examples: of each kind, at most one of a prompt. seed: of the random directions and of the intervals.

    Raises:
        InputError: the run is of another checkpoint, recorded no examples of this autoencoder, or the feature is
            active at no token that another one follows.
    """
    about = lists_of(run, sae)
    if run.checkpoint["digest"] != model.checkpoint.digest:
        raise InputError(f"{run.path} was captured from another checkpoint than {model.checkpoint.path}: load that one")
    rows = _examples(run, about, feature, examples, model.cfg.n_ctx)
    sae = sae.to(model.device)
    changes: dict[str, list[Float[Tensor, " d_vocab"]]] = {}
    measured = []
    for number, row in enumerate(rows.to_dict("records")):
        values, change = _at_example(model, sae, about.hook, feature, row, seed + number)
        measured.append(values)
        changes.setdefault(row["example_kind"], []).append(change)
    table = pd.concat([rows.drop(columns=["ids", "prompt"]), pd.DataFrame(measured)], axis=1)
    means = {kind: torch.stack(of_kind).mean(0) for kind, of_kind in changes.items()}
    return _dataset(model, run, about, feature, table, means, rows["prompt"].tolist(), seed)


def load_autoencoder(folder: str | Path, run: Run) -> SAE:
    """Return the autoencoder in a folder, of whose features the run has examples.

    Raises:
        InputError: the folder holds no autoencoder, or the run recorded no examples of its features.
    """
    sae = load_sae(folder)
    lists_of(run, sae)
    return sae


def lists_of(run: Run, sae: SAE) -> FeatureLists:
    """Return the run's lists of examples that are of this autoencoder.

    Raises:
        InputError: the run recorded none.
    """
    digest, known = source_digest(sae.encode), run.spec.features
    for lists in known:
        if lists.digest == digest:
            return lists
    recorded = f"examples of other autoencoders ({', '.join(lists.hook for lists in known)})" if known else "none"
    raise InputError(
        f"{run.path} has no examples of this autoencoder's features (recorded: {recorded}): capture with --record "
        "features:FOLDER, or give the folder of that capture"
    )


def _examples(run: Run, about: FeatureLists, feature: int, most: int, n_ctx: int) -> pd.DataFrame:
    """Return tokens of content at which the feature is active and that another token follows, at most `most` a kind.

    Columns: example_kind, channel, sequence, position, prompt, ids (of the text up to the token, and the next one).
    """
    lists, lengths = feature_examples.of_run(run, about.hook, [feature]), run.sequences["length"]
    prompts = dict(zip(run.sequences.index.tolist(), prompt_ids(run.sequences), strict=True))
    chosen: list[dict[str, Any]] = []
    for kind in EXAMPLE_KINDS:
        places = []
        for number, channel in enumerate(CHANNELS):
            own = zip(
                *(lists[f"{kind}_{n}"][number, 0].tolist() for n in ("activation", "sequence", "position")), strict=True
            )
            rank = 0
            for activation, sequence, position in own:
                if channel != "frame" and sequence >= 0 and position + 1 < min(lengths[sequence], n_ctx):
                    places.append((-activation if kind == "top" else rank, channel, sequence, position))
                    rank += 1
        seen: set[str] = set()
        for _, channel, sequence, position in sorted(places, key=lambda place: (place[0], place[1])):
            prompt = str(prompts[sequence])
            if prompt not in seen and len(seen) < most:
                seen.add(prompt)
                place = {"channel": channel, "sequence": sequence, "position": position, "prompt": prompt}
                chosen.append({"example_kind": kind} | place)
    if not chosen:
        raise InputError(f"feature {feature} of {about.hook} is active at no token of content that another one follows")
    rows = pd.DataFrame(chosen)
    texts = {n: row for n, row in zip(rows["sequence"], transcripts(run, rows["sequence"].tolist()), strict=True)}
    places_of = zip(rows["sequence"], rows["position"], strict=True)
    ids = [np.asarray(texts[n].tokens)[: at + 2].astype(np.int64) for n, at in places_of]
    rows["ids"] = pd.Series(ids, dtype=object)
    return rows


def _at_example(
    model: GptOss, sae: SAE, hook: str, feature: int, row: Mapping[Any, Any], seed: int
) -> tuple[dict[str, Any], Float[Tensor, " d_vocab"]]:
    """Return what the ablation changes after one token, and the change of each logit less the mean over them."""
    ids, following = row["ids"][:-1], int(row["ids"][-1])
    tokens = torch.tensor(ids, device=model.device)[None]
    activation = torch.zeros(())

    def written(x: Float[Tensor, "batch pos *feature"]) -> Float[Tensor, "batch pos *feature"]:
        nonlocal activation
        acts = sae.encode(x)
        without = acts.clone()
        without[..., feature] = 0
        activation = acts[0, -1, feature]
        return sae.decode(acts, x) - sae.decode(without, x)

    def ablate(x: Tensor, hook: Any) -> Tensor:
        return (x - written(x)).to(x.dtype)

    def control(x: Tensor, hook: Any) -> Tensor:
        part = written(x).flatten(2)
        random = torch.randn(part.shape[-1], generator=torch.Generator().manual_seed(seed)).to(part)
        taken = part.norm(dim=-1, keepdim=True) * random / random.norm()
        return (x - taken.view_as(x)).to(x.dtype)

    def logits(edit: Callable[..., Tensor] | None) -> Float[Tensor, " d_vocab"]:
        with model.hooks(fwd_hooks=[(hook, edit)] if edit else []):
            out: Tensor = model(tokens)[0, -1].double()
        return out - out.mean()

    plain, ablated, controlled = logits(None), logits(ablate), logits(control)
    before = plain.log_softmax(-1)
    values = {
        "activation": float(activation),
        "token": model.tokenizer.decode([int(ids[-1])]),
        "next_token": model.tokenizer.decode([following]),
        "logprob": float(before[following]),
    }
    for name, after in (("", ablated.log_softmax(-1)), ("control_", controlled.log_softmax(-1))):
        values[f"{name}change"] = float(after[following] - before[following])
        values[f"{name}kl"] = max(0.0, float((before.exp() * (before - after)).sum()))
    return values, ablated - plain


def _dataset(
    model: GptOss,
    run: Run,
    about: FeatureLists,
    feature: int,
    table: pd.DataFrame,
    changes: dict[str, Float[Tensor, " d_vocab"]],
    prompts: Sequence[str],
    seed: int,
) -> xr.Dataset:
    columns = {name: (("example",), table[name].to_numpy()) for name in DEFINITIONS if name in table}
    ranked: dict[str, list[Any]] = {}
    for change in changes.values():
        for side, largest in (("lowered", False), ("raised", True)):
            values, ids = change.topk(min(RANKS, len(change)), largest=largest)
            ranked.setdefault(f"{side}_logit", []).append(values.cpu().numpy())
            texts = [model.tokenizer.decode([n]) for n in ids.tolist()]
            ranked.setdefault(f"{side}_text", []).append(np.array(texts, dtype=object))
    variables = columns | {name: (("kind", "rank"), np.stack(values)) for name, values in ranked.items()}
    parameters = {"feature": feature, "hook": about.hook, "examples": len(table)}
    title = f"Ablation of feature {feature} at {about.hook}"
    attrs = provenance("feature-ablation", title, run.digest, seed, parameters) | {
        "checkpoint_digest": model.checkpoint.digest,
        "sae_digest": about.digest,
        "feature": feature,
        "hook": about.hook,
        "method": METHOD,
        "not_controlled": NOT_CONTROLLED,
        "summary": "\n".join(_sentences(table, prompts, seed)),
    }
    coords = {"example": np.arange(len(table)), "kind": list(changes)}
    return dataset(variables, coords, DEFINITIONS, attrs)


_KINDS = {"top": "At its largest activations", "random": "At a random sample of its tokens"}


def _sentences(table: pd.DataFrame, prompts: Sequence[str], seed: int) -> list[str]:
    """Return a sentence for each kind of example."""
    sentences = []
    for kind, own in table.assign(prompt=list(prompts)).groupby("example_kind", sort=False):
        n, mean = own["prompt"].nunique(), float(own["change"].mean())
        if n >= MIN_PROMPTS:
            effect = mean_effect(own["change"].to_numpy(np.float64), own["prompt"].tolist(), seed=seed)
            change = f"{signed_interval(float(effect.change), float(effect.low), float(effect.high), 3)} nats"
            over = f"mean and 95 % interval over {count_of(n, 'prompt')}"
        else:
            change = f"{signed(mean, 3)} nats"
            over = f"mean of {count_of(len(own), 'token')} of {count_of(n, 'prompt')}, too few for an interval"
        control, kl, control_kl = (float(own[name].mean()) for name in ("control_change", "kl", "control_kl"))
        sentences.append(
            f"{_KINDS[str(kind)]}, the log-probability of the next token changes by {change} without the feature "
            f"({over}), and by {signed(control, 3)} without a random direction of the same size. The divergence of the "
            f"predictions is {kl:.3f} nats (random direction: {control_kl:.3f})."
        )
    return sentences
