"""Direct logit attribution: the exact parts that experts and heads write of the answer's first logit."""

from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr

from workbench.counting import count_of, signed
from workbench.errors import InputError
from workbench.experiments import chain_of_thought
from workbench.experiments.attribution import by_expert, logit_parts
from workbench.experiments.effects import paired
from workbench.experiments.sampling import spread_rows
from workbench.harmony.transcripts import Transcript
from workbench.model.transformer import GptOss
from workbench.registry import Experiment

EXPERIMENT = Experiment(
    name="logit-attribution",
    title="Direct logit attribution of the answer",
    question="Which experts and heads write the first token of the final answer?",
    compute="one forward pass for each of at most 100 sequences, spread over tasks and efforts",
    cost={"passes": 0.5},
    aliases=("attribution",),
    order=190,
)
SEQUENCES = 100  # at most: each is one forward pass with every part of the residual stream


def experiment(model: GptOss, rows: Sequence[Transcript], *, seed: int = 0) -> dict[str, xr.Dataset]:
    """Return the exact parts that experts and heads write of the logit of the answer's first token, mean over prompts.

    At most SEQUENCES sequences are used, spread over tasks and efforts.

    Raises:
        InputError: no sequence has an analysis and a closed final message.
    """
    answered = chain_of_thought.answered_sequences(model, rows)
    if not answered:
        raise InputError("no sequence has an analysis and a closed final message: there is no answer to attribute")
    sample = [answered[i] for i in spread_rows([part.row for part in answered], SEQUENCES)]
    experts, heads = [], []
    for one in sample:
        ids = torch.from_numpy(one.row.tokens.astype(np.int64))[None, : one.content + 1].to(model.device)
        parts = logit_parts(model, ids[:, :-1], at=[one.content - 1], of=int(ids[0, -1]))
        experts.append(by_expert(parts).squeeze().values)
        heads.append(parts["heads"].squeeze().values)
    units = [t.row.prompt_id for t in sample]
    made = {}
    for name, dims, parts_by_sequence in (
        ("experts", ("layer", "expert"), experts),
        ("heads", ("layer", "head"), heads),
    ):
        value, low, high = paired(np.moveaxis(np.nan_to_num(np.stack(parts_by_sequence)), 0, -1), units, seed=seed)
        result = xr.Dataset({"change": (dims, value), "low": (dims, low), "high": (dims, high)})
        top = np.argsort(-np.abs(value), axis=None)[:5]
        largest = [(*np.unravel_index(i, value.shape), signed(value.flat[i], 2)) for i in top]
        listed = ", ".join(f"{layer}.{number} ({change})" for layer, number, change in largest)
        text = (
            f"Largest parts of the logit of the answer's first token, mean over {count_of(len(set(units)), 'prompt')} "
            f"(layer.{dims[1]}): {listed}."
        )
        made[name] = result.assign_attrs(
            title=f"Parts of the answer's logit: {name}",
            summary=text,
            units="logit",
            method="Exact decomposition of a logit with the final norm's scale frozen; parts sum to the logit.",
            not_controlled="A part is what was written, not what would be missing: later layers may compensate.",
        )
    return made
