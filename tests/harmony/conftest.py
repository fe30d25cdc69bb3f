"""Small tokenizers, and random well-formed conversations."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from workbench import harmony

MARKS = ("start", "end", "message", "channel", "constrain", "return", "call", "startoftext", "endoftext", "pad")
WORDS = ("system", "developer", "user", "assistant", "analysis", "commentary", "final", "functions.calc", " to=")
CHARACTERS = "0123456789+-*=;:. abcdefghijklmnopqrstuvwxyzR?"
TEMPLATE = (
    "<|start|>system<|message|>Reasoning: {{ reasoning_effort }}<|end|>"
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
)

Messages = list[dict[str, Any]]


def write_characters(folder: Path, *, marks: Sequence[str] = MARKS, special: bool = True) -> Path:
    """A vocabulary like nano's: marks and header words whole, all else by character, "?" for what it lacks."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    names = [f"<|{mark}|>" for mark in marks]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate([*names, *WORDS, *CHARACTERS])}, unk_token="?"))
    words = "|".join(word.replace(".", r"\.") for word in WORDS)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{words}|."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
    add([AddedToken(name, special=special, normalized=False) for name in names])
    return _saved(tokenizer, folder)


def write_bytes(folder: Path, *, special: bool = True) -> Path:
    """A vocabulary of the 256 bytes and the marks: it can express everything."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
    add([AddedToken(f"<|{mark}|>", special=special, normalized=False) for mark in MARKS])
    return _saved(tokenizer, folder)


def _saved(tokenizer: Any, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def write_tokenizer() -> Callable[..., Path]:
    return write_characters


@pytest.fixture(scope="session")
def write_byte_tokenizer() -> Callable[..., Path]:
    return write_bytes


@pytest.fixture(scope="session")
def o200k() -> harmony.Tokenizer:
    return harmony.tokenizer()


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> harmony.Tokenizer:
    return harmony.tokenizer(write_characters(tmp_path_factory.mktemp("tokenizers") / "small"))


@pytest.fixture(scope="session")
def byte(tmp_path_factory: pytest.TempPathFactory) -> harmony.Tokenizer:
    return harmony.tokenizer(write_bytes(tmp_path_factory.mktemp("tokenizers") / "byte"))


@pytest.fixture(scope="session")
def conversation() -> Callable[[int], Messages]:
    """A random conversation by seed: analysis, tool calls and their answers, names, odd texts."""
    texts = (
        "",
        " ",
        "Hi",
        "2+2=4",
        "a\n\nb\n",
        "<|end|>",
        "<|start|>assistant",
        "naïve 日本 🦄\u200d",
        '{"x": [1, "y"]}',
        "to=me",
    )

    def make(seed: int) -> Messages:
        rng = random.Random(seed)

        def text() -> str:
            return " ".join(rng.choices(texts, k=rng.randint(1, 4)))

        tool = rng.choice(("functions.calc", "python", "browser.search"))
        messages: Messages = [{"role": "developer", "content": text() + "."}] if rng.random() < 0.5 else []
        for _ in range(rng.randint(1, 3)):
            messages.append({"role": "user", "content": text()})
            if rng.random() < 0.2:
                messages[-1]["name"] = "alice"
            if rng.random() < 0.7:
                messages.append({"role": "assistant", "channel": "analysis", "content": text()})
            if rng.random() < 0.5:
                call = {"role": "assistant", "channel": "commentary", "recipient": tool, "content": text()}
                if rng.random() < 0.7:
                    call["content_type"] = rng.choice(("json", "<|constrain|>json", "code"))
                answer = {
                    "role": "tool",
                    "name": tool,
                    "recipient": "assistant",
                    "channel": "commentary",
                    "content": text(),
                }
                messages += [call, answer]
            messages.append({"role": "assistant", "channel": "final", "content": text()})
        return json.loads(json.dumps(messages[: rng.randint(1, len(messages))]))

    return make
