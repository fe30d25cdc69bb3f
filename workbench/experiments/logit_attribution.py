"""Direct logit attribution: the exact parts that experts and heads write of the answer's first logit."""

from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr

from workbench.errors import InputError
from workbench.experiments import chain_of_thought
from workbench.experiments.attribution import by_expert, logit_parts
from workbench.experiments.effects import paired
from workbench.harmony.transcripts import Transcript
from workbench.model.transformer import GptOss
from workbench.registry import Experiment

EXPERIMENT = Experiment(
    name="logit-attribution",
    title="Direct logit attribution of the answer",
    question="Which experts and heads write the first token of the final answer?",
    compute="forward passes over at most 100 sequences: one",
    aliases=("attribution",),
    order=190,
)


def experiment(model: GptOss, rows: Sequence[Transcript], *, seed: int = 0) -> dict[str, xr.Dataset]:
    """Which experts and heads write the first token of the answer: exact parts of its logit, mean over prompts."""
    found = chain_of_thought.thoughts(model, rows) or []
    if not found:
        raise InputError("no sequence has an analysis and a closed final message: there is no answer to attribute")
    experts, heads = [], []
    for thought in found[:100]:
        ids = torch.from_numpy(thought.row.tokens.astype(np.int64))[None, : thought.content + 1].to(model.device)
        parts = logit_parts(model, ids[:, :-1], at=[thought.content - 1], of=int(ids[0, -1]))
        experts.append(by_expert(parts).squeeze().values)
        heads.append(parts["heads"].squeeze().values)
    units = [t.row.prompt_id for t in found[:100]]
    made = {}
    for name, dims, each in (("experts", ("layer", "expert"), experts), ("heads", ("layer", "head"), heads)):
        value, low, high = paired(np.moveaxis(np.nan_to_num(np.stack(each)), 0, -1), units, seed=seed)
        result = xr.Dataset({"change": (dims, value), "low": (dims, low), "high": (dims, high)})
        top = np.argsort(-np.abs(value), axis=None)[:5]
        said = ", ".join("{}.{} ({:+.2f})".format(*np.unravel_index(i, value.shape), value.flat[i]) for i in top)
        text = (
            f"Largest parts of the logit of the answer's first token, mean over {len(set(units))} prompts "
            f"(layer.{dims[1]}): {said}."
        )
        made[name] = result.assign_attrs(
            title=f"Parts of the answer's logit: {name}",
            summary=text,
            units="logit",
            method="Exact decomposition of a logit with the final norm's scale frozen; parts sum to the logit.",
            not_controlled="A part is what was written, not what would be missing: later layers may compensate.",
        )
    return made
