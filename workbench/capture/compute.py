"""Compute one unit of a capture: run its transcripts through the model and return everything that is stored.

The result depends on the unit alone, not on the job, worker or attempt that computes it: passes are divided in the same
way every time.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from workbench import harmony
from workbench.capture.feature_lists import FeatureRecorder
from workbench.capture.host_routing import HostRoutes
from workbench.capture.neuron_lists import NeuronLists
from workbench.capture.record_buffers import Buffers
from workbench.errors import JobError
from workbench.harmony.labels import Labels, channel_codes, role_codes
from workbench.harmony.transcripts import Transcript
from workbench.hooks.sae import SAE
from workbench.kernels.logits import predict
from workbench.model.packing import FORWARD_TOKENS, pack, passes
from workbench.model.transformer import GptOss
from workbench.runs.examples import of_tokens
from workbench.runs.schema import Spec, Unit
from workbench.runs.summaries import summarise

LOGIT_ROWS = 512  # rows of logits at a time: 201,088 float32 logits each are 0.8 MB


class Computed(NamedTuple):
    """The arrays of a unit for the writer; `summarised` computes its summaries, in the writer's thread."""

    unit: Unit
    tokens: dict[str, np.ndarray]
    records: dict[str, np.ndarray]
    sums: dict[str, np.ndarray]
    examples: bool = False
    lists: Mapping[str, np.ndarray] = {}  # examples of neurons and of features

    def summarised(self, num_experts: int) -> dict[str, np.ndarray]:
        """Return sums [sequence channel ...], including those computed on the device, and examples of experts."""
        summary = summarise(self.records, self.tokens["sequence"], self.tokens["channel"], num_experts=num_experts)
        if wrong := [name for name, values in self.sums.items() if not np.isfinite(values).all()]:
            raise JobError(f"{wrong[0]} of unit {self.unit.index} is not finite: it was not written: check the weights")
        if self.examples:
            lists = of_tokens(self.records["experts"], self.records["gates"], self.tokens, num_experts=num_experts)
            summary |= {f"examples/{name}": values for name, values in lists.items()}
        return summary | dict(self.lists) | self.sums


@torch.no_grad()
def compute(
    model: GptOss,
    unit: Unit,
    rows: Sequence[Transcript],
    spec: Spec,
    buffers: Buffers,
    check: Callable[[], None] = lambda: None,
) -> Computed:
    """Run the unit's sequences in order and return their arrays. `check` is called before every pass, and may raise."""
    own = [rows[s] for s in unit.sequences]
    labels = [harmony.label(row.tokens, tokenizer=model.tokenizer, n_prompt=row.n_prompt) for row in own]
    tokens = token_table(unit, own, labels)
    members = {
        a.name: np.concatenate([harmony.token_set(tokenizer=model.tokenizer, **a.tokens)(row.tokens) for row in own])
        for a in spec.selected
        if a.sparse
    }
    logprobs: list[Tensor] = []
    entropies: list[Tensor] = []
    buffers.start(tokens["sequence"], tokens["channel"], tokens["message"], members)
    routes = HostRoutes(model.cfg) if spec.host_routing else None
    lists: list[NeuronLists | FeatureRecorder] = [NeuronLists(spec, model.cfg)] if spec.neuron_layers else []
    lists += [FeatureRecorder(one, cast(SAE, spec.functions[one.function_name])) for one in spec.features]
    for recorder in lists:
        recorder.start(tokens)
    extra = [*(routes.fwd_hooks if routes else []), *(hook for recorder in lists for hook in recorder.fwd_hooks)]
    with model.hooks(fwd_hooks=[*buffers.fwd_hooks, *extra]):
        for numbers in passes((len(row.tokens) for row in own), FORWARD_TOKENS):
            check()
            batch = [own[i] for i in numbers]
            tokens_of_pass, lengths = pack(batch, model.device)
            buffers.begin(tokens_of_pass.shape[1])
            for recorder in lists:
                recorder.begin(tokens_of_pass.shape[1])
            if routes is not None:
                routes.begin(batch)
            residual = model.residual(tokens_of_pass, packed=lengths)
            if spec.logprobs:
                logprob, entropy = predictions(model, residual, tokens_of_pass[0], lengths)
                logprobs.append(logprob)
                entropies.append(entropy)
    records, sums = buffers.take()
    if spec.logprobs:
        records |= {"logprob": torch.cat(logprobs).numpy(), "entropy": torch.cat(entropies).numpy()}
    if routes is not None:
        records |= routes.take()
    examples = {name: values for recorder in lists for name, values in recorder.take().items()}
    return Computed(unit, tokens, records, sums, spec.examples, examples)


def predictions(model: GptOss, residual: Tensor, tokens: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the log-probability of every token [token] given those before it, and the entropy [token], in nats.

    The first token of a sequence has no prediction: NaN.
    """
    logprob, entropy = torch.full((2, len(tokens)), torch.nan)
    first = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    predicted = torch.ones(len(tokens), dtype=torch.bool).index_fill(0, first, False).nonzero()[:, 0]
    for rows in predicted.split(LOGIT_ROWS):
        prediction = predict(model.logits(residual, rows[None] - 1)[0], tokens[rows])  # one chunk of logits is alive
        logprob[rows], entropy[rows] = prediction.logprob.float().cpu(), prediction.entropy.float().cpu()
    return logprob, entropy


def token_table(unit: Unit, own: Sequence[Transcript], labels: Sequence[Labels]) -> dict[str, np.ndarray]:
    """Return the columns of the token table of a unit, name → [token]."""
    lengths = [len(row.tokens) for row in own]
    position = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
    return {
        "id": np.concatenate([row.tokens for row in own]).astype(np.int32),
        "sequence": np.repeat(np.array(unit.sequences, dtype=np.int32), lengths),
        "position": position,
        "message": np.concatenate([label.message for label in labels]).astype(np.int32),
        "part": np.concatenate([label.part for label in labels]),
        "role": np.concatenate([role_codes(label) for label in labels]),
        "channel": np.concatenate([channel_codes(label) for label in labels]),
        "is_prompt": position < np.repeat([row.n_prompt for row in own], lengths),
    }
