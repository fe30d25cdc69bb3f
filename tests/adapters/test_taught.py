"""The tokens that are taught are those that the model itself would write."""

import json
from pathlib import Path

import numpy as np
import pytest

from workbench import harmony
from workbench.adapters.taught import read_examples, taught_tokens
from workbench.errors import InputError
from workbench.harmony.grammar import marked_ids

TOKENIZER = harmony.tokenizer()
PROMPT = "<|start|>user<|message|>2 + 2?<|end|><|start|>assistant"
CALL = "<|channel|>commentary to=functions.add<|constrain|>json<|message|>{}<|call|>"
REPLY = "<|start|>functions.add to=assistant<|channel|>commentary<|message|>4<|end|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>4<|return|>"
ANALYSIS = "<|channel|>analysis<|message|>I add.<|end|><|start|>assistant"


def taught(text: str, **options: object) -> str:
    ids = marked_ids(text, TOKENIZER)
    n_prompt = len(marked_ids(PROMPT, TOKENIZER))
    return TOKENIZER.decode(list(np.array(ids)[taught_tokens(ids, n_prompt, tokenizer=TOKENIZER, **options)]))


def test_everything_after_the_prompt_is_taught_but_what_tools_return() -> None:
    text = PROMPT + ANALYSIS + CALL + REPLY + FINAL
    assert taught(text) == ANALYSIS + CALL + FINAL


def test_channels_select_messages_with_the_tokens_of_their_format() -> None:
    text = PROMPT + ANALYSIS + CALL + REPLY + FINAL
    assert taught(text, channels={"final"}) == FINAL
    assert taught(text, channels={"analysis"}) == ANALYSIS.removesuffix("<|start|>assistant")
    with pytest.raises(InputError, match="'prompt': choose from analysis"):
        taught(text, channels={"prompt"})


def test_a_row_without_an_answer_is_refused_by_its_id(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    good = {
        "id": "good",
        "prompt_id": "p",
        "effort": "low",
        "messages": [
            {"role": "user", "content": "2 + 2?"},
            {"role": "assistant", "content": "4"},
        ],
    }
    rows.write_text(json.dumps(good) + "\n")
    (example,) = read_examples(rows, tokenizer=TOKENIZER, n_ctx=4096)
    answer = TOKENIZER.decode(list(example.ids[example.taught]))
    assert answer == "<|channel|>final<|message|>4<|return|>"
    with pytest.raises(InputError, match="row 'good' has no token of an answer in the channels analysis"):
        read_examples(rows, tokenizer=TOKENIZER, n_ctx=4096, channels={"analysis"})
    rows.write_text(json.dumps(good) + "\n{}\n")
    with pytest.raises(InputError, match="line 2"):
        read_examples(rows, tokenizer=TOKENIZER, n_ctx=4096)
    rows.write_text("")
    with pytest.raises(InputError, match="is empty"):
        read_examples(rows, tokenizer=TOKENIZER, n_ctx=4096)
