"""nano is a checkpoint like any other: transformers and TransformerLens' bridge load it, and say the same."""

import json
from typing import Any

import pytest
import torch

import workbench as wb
from tests.conftest import DATA
from workbench.model.transformer import GptOss

TOKENS = torch.tensor([[6, 10, 8, 19, 22, 7, 6, 12, 8, 27, 30, 34, 29, 31, 7, 6, 13, 5, 14, 8, *range(23, 60)]])


@pytest.fixture(scope="module")
def nano() -> GptOss:
    model: GptOss = wb.load("nano", dtype=torch.float32)
    return model


@pytest.fixture(scope="module")
def theirs() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(DATA / "nano", dtype=torch.float32, attn_implementation="eager")


@torch.no_grad()
def test_transformers_gives_the_same_logits(nano: GptOss, theirs: Any) -> None:
    want = theirs(TOKENS).logits
    assert float((nano(TOKENS) - want).norm() / want.norm()) <= 1e-5


@torch.no_grad()
def test_transformers_generates_the_same_answer(nano: GptOss, theirs: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DATA / "nano")
    messages = [
        {
            "role": "user",
            "content": "home of "
            + json.loads((DATA / "prompts.jsonl").read_text().splitlines()[120])["messages"][-1]["content"][8:],
        }
    ]
    inputs = tokenizer.apply_chat_template(
        messages, reasoning_effort="low", add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ours = wb.harmony.render(messages, effort="low", tokenizer=nano.tokenizer)
    assert inputs["input_ids"][0].tolist() == ours
    answer = theirs.generate(**inputs, max_new_tokens=40)[0].tolist()[len(ours) :]
    assert nano.generate([ours], max_new_tokens=40) == [answer]


@torch.no_grad()
def test_the_transformer_lens_bridge_loads_it_and_agrees(nano: GptOss, theirs: Any) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(str(DATA / "nano"), hf_model=theirs, device="cpu", dtype=torch.float32)
    torch.testing.assert_close(bridge(TOKENS), nano(TOKENS), rtol=1e-3, atol=1e-4)
    _, cache = bridge.run_with_cache(TOKENS)
    _, ours = nano.run_with_cache(TOKENS)
    for name in ("blocks.1.hook_resid_post", "blocks.3.hook_resid_mid"):
        torch.testing.assert_close(cache[name], ours[name], rtol=1e-3, atol=1e-4)
