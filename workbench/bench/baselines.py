"""Other implementations on the same card and problems, where they are installed."""

import importlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.bench.cases import Layer, row_error
from workbench.bench.timing import Clock
from workbench.kernels.gpu import moe, mxfp4, routing
from workbench.model import load
from workbench.model.config import Config
from workbench.model.export import save_random

Pair = tuple[Callable[[], Tensor], Callable[[], Tensor]]  # ours and theirs on one problem


def measure(clock: Clock, name: str, cfg: Config, tokens: Sequence[int]) -> list[dict[str, Any]]:
    """Return a row for each baseline and problem: both times (s), and the largest difference of a row."""
    rows: list[dict[str, Any]] = []
    for baseline, prepare in (("gpt_oss.triton (triton_kernels)", _expert_layer), ("transformers", _two_layers)):
        where = {"baseline": baseline, "model": name}
        try:
            problem = prepare(cfg, clock.device)
            for n in tokens:
                with torch.no_grad():
                    ours, theirs = problem(n)
                    took = {"ours_s": clock(ours), "theirs_s": clock(theirs)}
                    rows.append({**where, "tokens": n, **took, "difference": row_error(theirs(), ours().cpu())})
        except ImportError as error:
            rows.append({**where, "missing": str(error)})
        except Exception as error:  # a baseline that cannot run here must not end the benchmark
            rows.append({**where, "failed": f"{type(error).__name__}: {error}"})
    return rows


def _expert_layer(cfg: Config, device: torch.device) -> Callable[[int], Pair]:
    """Router, choice and experts of one layer, beside OpenAI's own Triton path."""
    upstream = importlib.import_module("gpt_oss.triton.moe")
    layer, k = Layer(cfg, device), cfg.experts_per_token
    router, bias = layer.normal(cfg.d_model, cfg.num_experts), torch.zeros(cfg.num_experts, device=device)
    up, down = (upstream.quantize_mx4(mxfp4.dequantise(*m).mT) for m in (layer.gate_up, layer.down))
    biases = (bias, layer.experts.gate_up_bias.float(), layer.experts.down_bias.float())

    def problem(tokens: int) -> Pair:
        x = layer.normal(tokens, cfg.d_model)

        def ours() -> Tensor:
            logits = (x @ router).float()
            ids = routing.top_k(logits, k)
            return moe.moe(x, ids, routing.gate(logits, ids), layer.experts)

        return ours, lambda: upstream.moe(x, router, *up, *down, *biases, k, cfg.num_experts, cfg.swiglu_limit)

    return problem


def _two_layers(cfg: Config, device: torch.device) -> Callable[[int], Pair]:
    """Return two layers with a small vocabulary and all their logits, beside transformers on the same checkpoint."""
    from transformers import AutoModelForCausalLM

    small = replace(cfg, n_layers=2, windows=cfg.windows[:2], d_vocab=min(cfg.d_vocab, 8192))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = save_random(Path(folder) / "two-layers", small)
        theirs = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16, device_map=str(device))
        ours = load(checkpoint, device=str(device))

    def problem(tokens: int) -> Pair:
        row = torch.randint(small.d_vocab, (1, tokens), generator=torch.Generator().manual_seed(0)).to(device)
        return lambda: ours(row), lambda: theirs(row).logits

    return problem
