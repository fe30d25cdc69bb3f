"""What is followed backwards through a frozen pass adds up to the logit, from every layer on, and to nothing else."""

import pytest
import torch

import workbench as wb
from workbench.experiments.frozen_pass import FrozenPass
from workbench.model.transformer import GptOss


@pytest.fixture(scope="module")
def model() -> GptOss:
    return wb.load("nano", dtype=torch.float32, device="cpu")


def followed(frozen: FrozenPass, *, without: str = "") -> tuple[float, float]:
    """The logit less the mean of all, and the sum of everything that begins a path to it."""
    model, logits = frozen.model, frozen.logits.double()
    target = int(logits.argmax())
    rows = (model.unembed.weight[target] - model.unembed.weight.mean(0)).to(frozen.wide)
    end = torch.zeros(len(frozen.tokens), model.cfg.d_model)
    end[-1] = rows * model.ln_final.weight / frozen.seen("ln_final.hook_scale")[-1]
    flow_back = frozen.backward(end)
    total = float((flow_back.start * frozen.seen("hook_embed")).sum())
    for flow in flow_back.layers:
        parts = {n: getattr(flow, n) for n in ("head_bias", "attention_bias", "expert_constants", "expert_bias")}
        total += sum(float(part.sum()) for name, part in parts.items() if name != without)
    return float(logits[target] - logits.mean()), total


@pytest.mark.parametrize("text", ["12+34=", "<|start|>user<|message|>24*29<|end|>"])
def test_paths_add_up_to_the_logit(model: GptOss, text: str) -> None:
    frozen = FrozenPass(model, model.to_tokens(text)[0])
    logit, total = followed(frozen)
    assert total == pytest.approx(logit, rel=1e-5, abs=1e-4)
    for name in ("head_bias", "expert_constants", "expert_bias"):  # negative controls: a part left out
        assert abs(followed(frozen, without=name)[1] - logit) > 1e-3


def test_each_node_passes_on_what_it_takes_in(model: GptOss) -> None:
    frozen = FrozenPass(model, model.to_tokens("12+34=")[0])
    end = torch.zeros(len(frozen.tokens), model.cfg.d_model)
    end[-1] = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    stream = model.run_with_cache(frozen.tokens[None])[1]["resid_mid", 2][0]
    flow = frozen.backward(end).layers[2]
    taken = torch.einsum("psm,pm->ps", flow.expert_reads, stream) + flow.expert_constants
    torch.testing.assert_close(taken, flow.experts, rtol=1e-4, atol=1e-4)
    assert (taken - flow.expert_constants - flow.experts).abs().max() > 1e-3  # negative control
