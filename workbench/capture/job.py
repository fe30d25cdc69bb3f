"""The capture job: transcripts through the model, unit by unit, into a run.

Every sequence's length is known before the first forward pass, so the whole run is laid out first; then each
unit is computed, written and committed. Starting the same job again goes on where the last one stopped.
"""

import hashlib
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import workbench
from workbench import harmony
from workbench.capture import recording
from workbench.capture.plan import plan_units
from workbench.errors import InputError
from workbench.harmony.labels import Labels, channel_codes, role_codes
from workbench.harmony.transcripts import Reject, Transcript, read_transcripts
from workbench.hooks.recorders import Recorder
from workbench.model.transformer import GptOss
from workbench.progress import progress
from workbench.runs import Run, open_run
from workbench.runs.schema import Layout, Spec, Unit
from workbench.runs.summaries import summarise
from workbench.runs.writer import open_writer

FORWARD_TOKENS = 4096  # tokens of one packed forward pass: large enough for full expert tiles, small enough for 24 GB
LOGIT_ROWS = 512  # rows of logits at a time: 201,088 float32 logits each are 0.8 MB


def capture(
    model: GptOss,
    transcripts: str | Path,
    path: str | Path,
    *,
    record: Sequence[str] = recording.DEFAULT,
    unit_tokens: int = 16_384,
    strict: bool = False,
) -> Run:
    """Run `transcripts` through `model` and record into the run at `path`, made or resumed.

    record: see `workbench.capture.recording.parse`. Transcript rows that cannot be used are skipped and listed
    in the run's rejects; with `strict` they are refused before anything is written.
    """
    spec = recording.parse(record, model.cfg)
    rows, rejects = read_transcripts(transcripts, tokenizer=model.tokenizer, n_ctx=model.cfg.n_ctx)
    if not rows:
        raise InputError(f"{transcripts}: none of the {len(rejects)} rows can be used; the first: {_why(rejects[0])}")
    if strict and rejects:
        raise InputError(f"{transcripts}: {len(rejects)} rows cannot be used; the first: {_why(rejects[0])}")
    layout = plan_units([len(row.tokens) for row in rows], unit_tokens)
    labels = [harmony.label(row.tokens, tokenizer=model.tokenizer) for row in rows]
    with open_writer(
        path,
        layout=layout,
        sequences=_sequences(rows, layout),
        messages=_messages(labels),
        model=model.cfg.to_json(),
        checkpoint={"digest": model.checkpoint.digest, "name": model.checkpoint.path.name},
        spec=spec,
        provenance=_provenance(transcripts, rejects, model),
    ) as writer:
        pending = [layout.units[index] for index in writer.pending()]
        with progress("capture", sum(len(rows[s].tokens) for u in pending for s in u.sequences), "tokens") as advance:
            for unit in pending:
                tokens = _token_table(unit, rows, labels)
                records = _forward(model, [rows[s] for s in unit.sequences], spec)
                summaries = summarise(records, tokens["sequence"], tokens["channel"], num_experts=model.cfg.num_experts)
                writer.write_unit(unit.index, tokens, records, summaries)
                advance(len(tokens["id"]))
        writer.finish()
    return open_run(path)


@torch.no_grad()
def _forward(model: GptOss, rows: Sequence[Transcript], spec: Spec) -> dict[str, np.ndarray]:
    """Everything the spec asks of these sequences, end to end in their order, as the store's arrays."""
    recorder = Recorder(recording.wanted(spec, model.cfg))
    logprobs: list[Tensor] = []
    entropies: list[Tensor] = []
    with model.hooks(fwd_hooks=recorder.fwd_hooks):
        for batch in _batches(rows):
            lengths = [len(row.tokens) for row in batch]
            tokens = torch.from_numpy(np.concatenate([row.tokens for row in batch])).long().to(model.device)
            residual = model.residual(tokens[None], packed=lengths)
            if spec.logprobs:
                logprob, entropy = _predictions(model, residual, tokens, lengths)
                logprobs.append(logprob)
                entropies.append(entropy)
    kept = recorder.take() if recorder.wanted else {}

    def layers(name: str, which: Sequence[int] = range(model.cfg.n_layers)) -> np.ndarray:
        stacked = torch.stack([kept[f"blocks.{layer}.{name}"].flatten(1) for layer in which])
        return stacked.view(torch.uint16).numpy() if stacked.dtype == torch.bfloat16 else stacked.numpy()

    records: dict[str, np.ndarray] = {}
    if spec.routing:
        records["experts"] = layers("mlp.hook_expert_indices")
        records["gates"] = layers("mlp.hook_expert_weights")
    if spec.router_logits:
        records["router_logits"] = layers("mlp.router.hook_out")
    if spec.sinks:
        records["sink"] = layers("attn.hook_sink")
    if spec.logprobs:
        records["logprob"] = torch.cat(logprobs).numpy()
        records["entropy"] = torch.cat(entropies).numpy()
    for point in spec.activations:
        records[f"activations/{point.hook}"] = layers(point.hook, point.layers)
    return records


def _batches(rows: Sequence[Transcript]) -> Iterator[list[Transcript]]:
    """Consecutive sequences of together at most FORWARD_TOKENS, a longer one alone: fixed by the plan."""
    batch: list[Transcript] = []
    for row in rows:
        if batch and sum(len(r.tokens) for r in batch) + len(row.tokens) > FORWARD_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _predictions(model: GptOss, residual: Tensor, tokens: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Log-probability of every token given those before it, and the entropy it was drawn from, in nats.

    The first token of a sequence was predicted by nothing: NaN.
    """
    logprob, entropy = torch.full((2, len(tokens)), torch.nan)
    first = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    predicted = torch.ones(len(tokens), dtype=torch.bool).index_fill(0, first, False).nonzero()[:, 0]
    for rows in predicted.split(LOGIT_ROWS):
        logits = model.logits(residual, rows[None] - 1)[0]
        logp = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        logprob[rows] = logp.gather(-1, tokens[rows, None].to(logp.device))[:, 0].float().cpu()
        entropy[rows] = -(logp.exp() * logp).nansum(-1).float().cpu()
    return logprob, entropy


def _token_table(unit: Unit, rows: Sequence[Transcript], labels: Sequence[Labels]) -> dict[str, np.ndarray]:
    """The columns of the tokens a unit owns."""
    own = unit.sequences
    lengths = [len(rows[s].tokens) for s in own]
    position = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
    return {
        "id": np.concatenate([rows[s].tokens for s in own]).astype(np.int32),
        "sequence": np.repeat(np.array(own, dtype=np.int32), lengths),
        "position": position,
        "message": np.concatenate([labels[s].message for s in own]).astype(np.int32),
        "part": np.concatenate([labels[s].part for s in own]),
        "role": np.concatenate([role_codes(labels[s]) for s in own]),
        "channel": np.concatenate([channel_codes(labels[s]) for s in own]),
        "is_prompt": position < np.repeat([rows[s].n_prompt for s in own], lengths),
    }


def _sequences(rows: Sequence[Transcript], layout: Layout) -> pd.DataFrame:
    import json

    return pd.DataFrame(
        {
            "id": [row.id for row in rows],
            "prompt_id": [row.prompt_id for row in rows],
            "effort": [row.effort for row in rows],
            "offset": layout.offsets,
            "length": layout.lengths,
            "n_prompt": [row.n_prompt for row in rows],
            "correct": np.array([-1 if row.correct is None else int(row.correct) for row in rows], dtype=np.int8),
            "answer": [row.answer or "" for row in rows],
            "meta": [json.dumps(row.meta, sort_keys=True) for row in rows],
        }
    )


def _messages(labels: Sequence[Labels]) -> pd.DataFrame:
    columns = ("role", "author", "channel", "recipient", "content_type", "start", "content", "stop", "end", "closed_by")
    return pd.DataFrame(
        [
            {"sequence": s, **{c: getattr(m, c) for c in columns}, "flags": " ".join(m.flags)}
            for s, label in enumerate(labels)
            for m in label.messages
        ]
    )


def _provenance(transcripts: str | Path, rejects: Sequence[Reject], model: GptOss) -> dict[str, Any]:
    packages = ("torch", "transformer-lens", "numpy", "zarr")
    return {
        "command": " ".join(sys.argv),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": platform.node(),
        "process": os.getpid(),
        "software": {"workbench": workbench.__version__, "python": platform.python_version()}
        | {name: version(name) for name in packages},
        "harmony": harmony.distribution(),
        "tokenizer": {"name": model.tokenizer.name, "digest": model.tokenizer.digest},
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": ",".join(dict.fromkeys(map(str, model.devices))),
        "transcripts": {
            "name": Path(transcripts).name,
            "digest": hashlib.sha256(Path(transcripts).read_bytes()).hexdigest(),
        },
        "rejects": [{"line": r.line, "id": r.id, "reason": r.reason} for r in rejects],
    }


def _why(reject: Reject) -> str:
    return f"line {reject.line}, {reject.reason}"
