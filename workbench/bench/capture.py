"""Tokens a second of a plain forward pass, of our capture, and of other tools' recording, on one checkpoint.

What each records: routing and the residual streams of all layers. Others keep what they record in memory; ours also
compresses and writes it. In turn, medians.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.bench.table import show
from workbench.capture.compute import compute
from workbench.capture.record_buffers import Buffers
from workbench.capture.recording import parse
from workbench.harmony.transcripts import Transcript
from workbench.model import load
from workbench.model.transformer import GptOss
from workbench.runs.schema import Unit

RECORD = ("routing", "resid_post")
DEFAULT = ("routing", "sinks")


def run(checkpoint: str, tokens: int, rounds: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return rows of tokens a second, those of tools that are not installed left out and named."""
    model = load(checkpoint, dtype=dtype)
    ids = torch.randint(model.cfg.d_vocab, (1, tokens), generator=torch.Generator().manual_seed(0))
    ways: dict[str, Callable[[], None]] = {
        "workbench, forward only": lambda: _forward(model, ids),
        "workbench, routing and sinks": _capturing(model, ids, DEFAULT),
        "workbench, routing and all streams": _capturing(model, ids, RECORD),
    }
    missing = {}
    for name, make in {"TransformerLens bridge, run_with_cache": _bridge, "nnsight, trace": _nnsight}.items():
        if model.checkpoint is None or model.checkpoint.layout != "huggingface":
            missing[name] = "reads folders in the Hugging Face layout only"
            continue
        try:
            ways[name] = make(checkpoint, ids, dtype)
        except ImportError as error:
            missing[name] = f"not installed ({error})"
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for turn in range(rounds + 1):  # the first one warms up
            for name, way in ways.items():
                begun = time.perf_counter()
                way()
                if turn:
                    seconds[name].append(time.perf_counter() - begun)
    rows: list[dict[str, Any]] = [
        {"way": name, "tokens_per_s": tokens / statistics.median(times)} for name, times in seconds.items()
    ]
    base = rows[0]["tokens_per_s"]
    show(
        f"{tokens:,} tokens through {checkpoint}, {torch.get_num_threads()} threads, medians of {rounds}",
        ("way", "tokens/s", "of forward only"),
        [(str(r["way"]), f"{r['tokens_per_s']:,.0f}", f"{r['tokens_per_s'] / base:.0%}") for r in rows],
    )
    for name, why in missing.items():
        print(f"{name}: {why}")
    return {"checkpoint": checkpoint, "tokens": tokens, "rounds": rounds, "ways": rows, "missing": missing}


def _forward(model: GptOss, ids: Tensor) -> None:
    model.residual(ids.to(model.device))


def _capturing(model: GptOss, ids: Tensor, record: tuple[str, ...]) -> Callable[[], None]:
    """Return our capture of one unit, written into a run that is thrown away."""
    from workbench.capture.plan import plan_units
    from workbench.runs.writer import open_writer

    spec = parse(record, model.cfg)
    row = Transcript("0", "0", "", ids[0].numpy().astype("int32"), 1)
    layout = plan_units([len(row.tokens)], -(-len(row.tokens) // 1024) * 1024)
    buffers = Buffers(spec, model.cfg, len(row.tokens), pinned=model.device.type == "cuda")

    def way() -> None:
        import pandas as pd

        with tempfile.TemporaryDirectory() as folder:
            about: dict[str, Any] = {"transcripts": {"digest": ""}}
            sequences = pd.DataFrame({"id": ["0"], "meta": ["{}"]})
            messages = pd.DataFrame({"sequence": [0], "start": [0], "end": [1]})
            with open_writer(
                Path(folder) / "run",
                layout=layout,
                sequences=sequences,
                messages=messages,
                model=model.cfg.to_json(),
                checkpoint={"digest": ""},
                spec=spec,
                provenance=about,
            ) as writer:
                computed = compute(model, Unit(0, 0, layout.units[0].capacity, (0,)), [row], spec, buffers)
                summaries = computed.summarised(model.cfg.num_experts)
                writer.write_unit(0, computed.tokens, computed.records, summaries)

    return way


def _bridge(checkpoint: str, ids: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM

    from workbench.model.checkpoint import resolve

    folder = str(resolve(checkpoint))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    bridge = TransformerBridge.boot_transformers(folder, hf_model=theirs, device="cpu", dtype=dtype)
    names = [
        n for n in bridge.hook_dict if n.endswith(("hook_resid_post", "hook_expert_indices", "hook_expert_weights"))
    ]
    return lambda: bridge.run_with_cache(ids, names_filter=names)


def _nnsight(checkpoint: str, ids: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    from nnsight import NNsight
    from transformers import AutoModelForCausalLM

    from workbench.model.checkpoint import resolve

    traced = NNsight(AutoModelForCausalLM.from_pretrained(str(resolve(checkpoint)), dtype=dtype))

    def way() -> None:
        with traced.trace(ids):
            for layer in traced.model.layers:
                layer.mlp.router.output.save()
                layer.output.save()

    return way
