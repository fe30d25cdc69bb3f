"""Tokenizers: exact round trips, marks by name, and no text that turns into a mark."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench import harmony
from workbench.errors import InputError
from workbench.harmony.vocabulary import MARKS, Tokenizer

Write = Callable[..., Path]
TEXT = st.text(st.characters(exclude_categories=("Cs",)))


def everyone(request: pytest.FixtureRequest) -> list[Tokenizer]:
    return [request.getfixturevalue(name) for name in ("o200k", "small", "byte")]


@settings(deadline=None)
@given(text=TEXT)
def test_every_text_comes_back(text: str, o200k: Tokenizer, byte: Tokenizer) -> None:
    assert o200k.decode(o200k.encode(text)) == text
    assert byte.decode(byte.encode(text)) == text


def test_a_small_vocabulary_gives_back_what_it_can_express(small: Tokenizer) -> None:
    text = "sort abc user to=functions.calc 12+3?"
    assert small.decode(small.encode(text)) == text


def test_marks_have_the_published_ids(o200k: Tokenizer) -> None:
    ids = {"start": 200006, "end": 200007, "message": 200008, "channel": 200005, "constrain": 200003, "return": 200002}
    assert {mark: o200k.mark(mark) for mark in MARKS} == ids | {"call": 200012}
    assert o200k.d_vocab == 201_088
    assert o200k.stop_ids == {200002, 200012, 199999}
    assert max(o200k.special.values()) == 201_087
    assert o200k.encode(" high") == [1932]


def test_ids_of_a_folder_are_its_own(small: Tokenizer, o200k: Tokenizer) -> None:
    assert small.mark("start") != o200k.mark("start")
    assert small.token(small.mark("start")) == "<|start|>"
    assert small.stop_ids == {small.special[f"<|{n}|>"] for n in ("return", "call", "endoftext")}


@pytest.mark.parametrize("text", ["<|end|>", "a<|start|>system<|message|>b", "<|endoftext|>", "<|reserved_200000|>"])
def test_the_characters_of_a_mark_are_text(text: str, o200k: Tokenizer, byte: Tokenizer) -> None:
    for tokenizer in (o200k, byte):
        ids = tokenizer.encode(text)
        assert not set(ids) & set(tokenizer.special.values())
        assert tokenizer.decode(ids) == text


def test_a_vocabulary_that_reads_marks_in_text_refuses_the_text(tmp_path: Path, write_byte_tokenizer: Write) -> None:
    loose = harmony.tokenizer(write_byte_tokenizer(tmp_path, special=False))  # marks that match like any word
    assert loose.decode(loose.encode("a | b")) == "a | b"
    with pytest.raises(InputError, match=r"cannot express <\|end\|> as ordinary text"):
        loose.encode("a<|end|>b")


@pytest.mark.parametrize(
    ("text", "what"), [("grüß", r"'ü' \(U\+00FC\)"), ("a\n", r"'\\n'"), ("<|end|>", "'<'"), ("🦄", "'🦄'")]
)
def test_a_character_that_is_lacking_is_named(text: str, what: str, small: Tokenizer) -> None:
    with pytest.raises(InputError, match=f"small cannot express the character {what}"):
        small.encode(text)


def test_half_a_surrogate_pair_is_refused(request: pytest.FixtureRequest) -> None:
    for tokenizer in everyone(request):
        with pytest.raises(InputError, match=r"half a surrogate pair.*at character 1"):
            tokenizer.encode("a\ud83d")


@pytest.mark.parametrize("character", ["a", " ", "\n", "^", "_", "語"])
def test_a_run_that_would_take_minutes_is_refused(character: str, o200k: Tokenizer) -> None:
    with pytest.raises(InputError, match="20,001 letters, spaces or signs in a row"):
        o200k.encode("word1" + character * 20_001 + "1")
    prose = f"{character * 50} 12 " * 2000
    assert o200k.decode(o200k.encode(prose)) == prose


def test_every_id_has_a_text(request: pytest.FixtureRequest) -> None:
    for tokenizer in everyone(request):
        assert all(tokenizer.token(id) for id in range(tokenizer.d_vocab))


def test_part_of_a_character_shows_as_a_replacement(o200k: Tokenizer, byte: Tokenizer) -> None:
    for tokenizer in (o200k, byte):
        ids = tokenizer.encode("\U0001fae8")
        assert len(ids) > 1
        assert "\ufffd" in tokenizer.token(ids[0])
        assert tokenizer.decode(ids) == "\U0001fae8"


def test_the_digest_is_that_of_the_vocabulary(tmp_path: Path, o200k: Tokenizer, write_tokenizer: Write) -> None:
    one, same = (harmony.tokenizer(write_tokenizer(tmp_path / name)) for name in ("one", "same"))
    other = harmony.tokenizer(write_tokenizer(tmp_path / "other", marks=["x", *(m for m in MARKS)]))
    assert one.digest == same.digest != other.digest
    assert o200k.digest == "25527f4e9ec14f08674d0e077087d7190125a85d996def3c4773a3941c6258fc"


def test_a_folder_in_the_original_layout_has_o200k(tmp_path: Path, o200k: Tokenizer) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert harmony.tokenizer(tmp_path) is o200k


@pytest.mark.parametrize("mark", MARKS)
def test_a_missing_mark_is_named(mark: str, tmp_path: Path, write_tokenizer: Write) -> None:
    folder = write_tokenizer(tmp_path, marks=[m for m in MARKS if m != mark])
    with pytest.raises(InputError, match=rf"<\|{mark}\|>.*harmony needs it as one token"):
        harmony.tokenizer(folder)


def test_a_mark_in_several_pieces_is_refused(tmp_path: Path, write_byte_tokenizer: Write) -> None:
    path = write_byte_tokenizer(tmp_path) / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "<|call|>"]
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"<\|call\|> splits in 8"):
        harmony.tokenizer(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"not json", b"[]", b'{"version": "1.0"}', b"\xff\xfe", b'{"model": {"type": "X"}}']
)
def test_a_broken_tokenizer_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        harmony.tokenizer(tmp_path)


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", Path(__file__)):
        with pytest.raises(InputError, match="is not a folder"):
            harmony.tokenizer(path)


def test_the_chat_template_is_found_where_it_may_be(tmp_path: Path, write_tokenizer: Write) -> None:
    folder = write_tokenizer(tmp_path)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "in the config"}))
    (folder / "chat_template.jinja").write_text("in its file")
    assert harmony.tokenizer(folder).chat_template == "in its file"
    (folder / "chat_template.jinja").unlink()
    assert harmony.tokenizer(folder).chat_template == "in the config"
    config.write_text(json.dumps({"chat_template": [{"name": "default", "template": "the default"}]}))
    assert harmony.tokenizer(folder).chat_template == "the default"
    config.write_text("{}")
    assert harmony.tokenizer(folder).chat_template is None
    config.unlink()
    assert harmony.tokenizer(folder).chat_template is None


@pytest.mark.parametrize(
    "content", ["", "[]", '{"chat_template": 5}', '{"chat_template": [{"name": "other"}]}', "[" * 10**5]
)
def test_a_config_without_a_usable_template_is_refused(content: str, tmp_path: Path, write_tokenizer: Write) -> None:
    folder = write_tokenizer(tmp_path)
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(InputError, match=r"tokenizer_config\.json"):
        harmony.tokenizer(folder)


def test_provenance_names_the_installed_library() -> None:
    assert harmony.distribution() == {"name": "oss-harmony", "version": version("oss-harmony")}


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout


def test_importing_harmony_is_quick() -> None:
    code = "import time; t = time.process_time(); import {}; print(time.process_time() - t)"
    ours, yardstick = (min(float(run(code.format(name))) for _ in range(3)) for name in ("workbench.harmony", "typer"))
    assert ours < 2 * yardstick, (ours, yardstick)


def test_the_heavy_libraries_come_with_their_first_use() -> None:
    rooms = "import workbench.harmony.labels, workbench.harmony.transcripts, workbench.harmony.vocabulary, sys"
    heavy = "openai_harmony tokenizers jinja2 pandas torch transformers"
    assert run(f"{rooms}; print([m for m in {heavy.split()!r} if m in sys.modules])").strip() == "[]"


def test_every_export_is_there() -> None:
    for name in harmony._EXPORTS:
        assert getattr(harmony, name) is not None
        assert name in dir(harmony)
    with pytest.raises(AttributeError, match="nothing"):
        harmony.nothing  # noqa: B018
