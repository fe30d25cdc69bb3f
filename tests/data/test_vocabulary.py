"""nano's tokenizer files give tokenizers, transformers and this project the same ids."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from workbench import harmony
from workbench.data import vocabulary
from workbench.data.conversations import conversation, prompt_messages, spell
from workbench.data.tasks import FAMILIES, draw
from workbench.data.vocabulary import ID, VOCABULARY
from workbench.harmony.rendering import EFFORTS

CALL = "<|start|>assistant<|channel|>commentary to=functions.calc<|message|>12*34<|call|>"
REPLY = "<|start|>functions.calc<|channel|>commentary to=assistant<|message|>408<|end|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nano")
    vocabulary.write(folder)
    return folder


@pytest.fixture(scope="module")
def transformers_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def test_every_token_decodes_to_its_own_name(folder: Path) -> None:
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert [raw.id_to_token(i) for i in range(raw.get_vocab_size())] == list(VOCABULARY)
    assert [raw.decode([i], skip_special_tokens=False) for i in range(len(VOCABULARY))] == list(VOCABULARY)


@pytest.mark.parametrize("header", [CALL, REPLY])
def test_a_header_is_spelled_with_its_words_and_comes_back(header: str, folder: Path) -> None:
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = raw.encode(header, add_special_tokens=False).ids
    assert raw.decode(ids, skip_special_tokens=False) == header
    assert ids == spell(header)
    assert {ID["assistant"], ID["commentary"], ID[" to="], ID["functions.calc"]} <= set(ids)


@pytest.mark.parametrize("text", ["assistants", "a low user", "say final", "to=3", "highest"])
def test_a_header_word_inside_a_text_is_letters(text: str, folder: Path) -> None:
    tokenizer = harmony.tokenizer(folder)
    assert len(tokenizer.encode(text)) == len(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_chat_template_renders_as_we_do(
    family: str, effort: str, folder: Path, transformers_tokenizer: Any
) -> None:
    """Through transformers, a prompt of two turns is the ids that training shows."""
    rng = random.Random(6)
    turns = (draw(rng, "sort"), draw(rng, family))
    ids = transformers_tokenizer.apply_chat_template(
        prompt_messages(*turns), reasoning_effort=effort, add_generation_prompt=True, return_dict=False
    )
    ours = harmony.render(prompt_messages(*turns), effort=effort, tokenizer=harmony.tokenizer(folder))
    assert ids == ours
    assert conversation(effort, turns, called=True).ids[: len(ids)] == ids


def test_generation_stops_where_harmony_does(folder: Path) -> None:
    stops = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert set(stops) == harmony.tokenizer(folder).stop_ids
