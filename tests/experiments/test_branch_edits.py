"""Edits of a sentence: mistakes change what they should, paraphrases keep the numbers, what is impossible is None."""

import json
from pathlib import Path

import pytest

import workbench as wb
from workbench import harmony
from workbench.errors import InputError
from workbench.experiments.branch_edits import Editor, asked_paraphrases, filler_token, read_paraphrases


@pytest.fixture(scope="module")
def words() -> harmony.Tokenizer:
    return harmony.tokenizer()


def edited(editor: Editor, words: harmony.Tokenizer, kind: str, text: str) -> str | None:
    ids = editor(kind, words.encode(text))  # type: ignore[arg-type]
    return None if ids is None else words.decode(ids)


def test_mistakes_change_a_number_a_letter_or_a_verb(words: harmony.Tokenizer) -> None:
    editor = Editor(words)
    wrong = edited(editor, words, "mistake", "So 12 + 30 = 42.")
    assert wrong is not None
    assert wrong != "So 12 + 30 = 42."
    assert [c for c in wrong if not c.isdigit()] == [c for c in "So 12 + 30 = 42." if not c.isdigit()]
    assert wrong == edited(Editor(words), words, "mistake", "So 12 + 30 = 42."), "the same mistake every time"
    assert edited(editor, words, "mistake", "The number is even.") == "The number is not even."
    assert edited(editor, words, "mistake", "That is not even.") == "That is even."
    assert edited(editor, words, "mistake", "Hmm.") is None


def test_paraphrases_come_from_the_list_or_are_given(words: harmony.Tokenizer) -> None:
    editor = Editor(words)
    assert edited(editor, words, "paraphrase", "We need to add 3 + 4 = 7.") == "We need to add 4 + 3 = 7."
    assert edited(editor, words, "paraphrase", " We need to stop.") == " We must stop."
    assert edited(editor, words, "paraphrase", "Nothing known.") is None
    given = Editor(words, {"Nothing known.": "All unknown."}.get)
    assert edited(given, words, "paraphrase", " Nothing known.") == " All unknown."
    asked: list[str] = []

    def ask(prompt: str) -> str:
        asked.append(prompt)
        return " Two.\n"

    of_host = Editor(words, asked_paraphrases(ask))
    assert [edited(of_host, words, "paraphrase", "One.") for _ in range(2)] == ["Two.", "Two."]
    assert len(asked) == 1
    assert asked[0].endswith("Sentence: One.")


def test_filler_has_as_many_tokens_and_small_vocabularies_are_served(words: harmony.Tokenizer) -> None:
    assert edited(Editor(words), words, "filler", "We stop.") == " ..." * 3
    nano = wb.load("nano").tokenizer
    assert nano.decode([filler_token(nano)]) == "."
    assert nano.decode(Editor(nano)("paraphrase", nano.encode("2*9=81;")) or []) == "9*2=81;"
    assert Editor(nano)("paraphrase", nano.encode("abc;")) is None


def test_a_file_of_paraphrases(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"sentence": " a. ", "paraphrase": "b."}) + "\n\n")
    assert read_paraphrases(path)["a."] == "b."
    path.write_text('{"sentence": 3}\n')
    with pytest.raises(InputError, match=r"p.jsonl, line 1: expected \{\"sentence\""):
        read_paraphrases(path)
