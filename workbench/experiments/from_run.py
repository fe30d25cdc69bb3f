"""Read the transcripts of a run, and its recorded activations for patching."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from workbench.errors import InputError
from workbench.harmony.transcripts import Transcript
from workbench.hooks.names import BLOCK
from workbench.runs.reader import Run


def transcripts(run: Run, sequences: Sequence[int] | None = None) -> list[Transcript]:
    """Return the run's sequences as they were captured, or those with the given numbers, in their order.

    Raises:
        InputError: a number is not in the run.
    """
    table = run.sequences
    wanted = list(table.index) if sequences is None else list(sequences)
    if missing := sorted(set(wanted) - set(table.index)):
        raise InputError(f"sequences {missing[:5]} are not in {run.path}; it holds {len(table)}")
    ids = run.dataset["id"].to_numpy()
    owner = run.dataset["sequence"].to_numpy()
    begins = dict(zip(*np.unique(owner, return_index=True), strict=True))
    columns = table.loc[wanted].to_dict("records")
    return [
        Transcript(
            id=row["id"],
            prompt_id=row["prompt_id"] or row["id"],  # a sequence that names no prompt is one of its own
            effort=row["effort"],
            tokens=ids[begins[number] : begins[number] + row["length"]],
            n_prompt=row["n_prompt"],
            answer=row["answer"] or None,
            correct=None if row["correct"] < 0 else bool(row["correct"]),
            meta={name: row[name] for name in ("task", "domain") if row[name]},
        )
        for number, row in zip(wanted, columns, strict=True)
    ]


def recorded(run: Run, sequence: int | str, point: str) -> dict[str, Shaped[Tensor, "1 pos *feature"]]:
    """Return the values recorded at a hook point, for `patch`: full name → tensor of a batch of one [1 pos …].

    point: without its layer, as `mlp.hook_expert_indices` or `hook_resid_post`; all layers recorded are given.

    Raises:
        InputError: the run did not record the hook point, or only for some tokens or heads.
    """
    data = run.sequence(sequence)
    ours = {"mlp.hook_expert_indices": "experts", "mlp.hook_expert_weights": "gates", "attn.hook_sink": "sink"}
    name = ours.get(point, "router_logits" if point == "mlp.router.hook_out" else point)
    if point not in BLOCK or name not in data:
        raise InputError(f"{point!r} is not in {run.path}; it recorded {', '.join(run.recorded)}")
    chosen = next((a for a in run.spec.selected if a.name == name), None)
    if chosen is not None and (chosen.sparse or chosen.index):
        raise InputError(
            f"{point!r} of {run.path} holds some tokens or heads only: patching needs a record without options"
        )
    layers = tuple(range(run.model["n_layers"])) if chosen is None else chosen.layers
    values = data[name].sel(layer=list(layers)).transpose("layer", "token", ...)
    tensor = torch.from_numpy(values.to_numpy())
    tensor = tensor.long() if name == "experts" else tensor.float()
    sizes = {"head": run.model["n_heads"], "kv": run.model["n_key_value_heads"], "slot": run.model["experts_per_token"]}
    features = BLOCK[point].split()[2:]
    if len(features) > 1 and tensor.ndim == 3:  # runs before schema 4 do not name the axes
        tensor = tensor.unflatten(2, (sizes[features[0]], -1))
    return {f"blocks.{layer}.{point}": t[None] for layer, t in zip(layers, tensor, strict=True)}
