"""Edits of one sentence of an analysis: filler, a mistake, a paraphrase.

A mistake changes one number, else one letter that stands alone, else one verb into its negation. A paraphrase is
given for the sentence, or made by a fixed list of equivalent wordings and by exchanging the operands of + and *.

Reference: Lanham et al. 2023, arXiv 2307.13702 (mistakes, filler, paraphrases of a chain of thought).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from workbench import harmony
from workbench.bounded_json import MAX_BYTES, parse_json
from workbench.errors import InputError
from workbench.inputs import regular_file

EditKind = Literal["filler", "removed", "mistake", "paraphrase"]
KINDS: tuple[EditKind, ...] = ("filler", "removed", "mistake", "paraphrase")
_FILLERS = (" ...", "...", ".", " ", ";")
_NEGATED = (
    (r"\bis not\b", "is"),
    (r"\bare not\b", "are"),
    (r"\bcannot\b", "can"),
    (r"\bis\b", "is not"),
    (r"\bare\b", "are not"),
    (r"\bcan\b", "cannot"),
    (r"\bmust\b", "must not"),
    (r"\bshould\b", "should not"),
)
_EQUIVALENT = (
    (r"(?<!\w)(\w+)(\s*)([+*])(\s*)(\w+)(?=\s*=)", r"\5\2\3\4\1"),
    (r"\bLet's\b", "Let us"),
    (r"\b(We|we) (?:need|have) to\b", r"\1 must"),
    (r"\b(We|we) must\b", r"\1 need to"),
    (r"\bTherefore,?", "So"),
    (r"\bThus,?", "Hence"),
    (r"\bSo,?\b", "Therefore"),
    (r"\b(can|do|is)n't\b", r"\1 not"),
    (r"\b([Ii]t|[Tt]hat)'s\b", r"\1 is"),
    (r"\bBut\b", "However,"),
    (r"\bMaybe\b", "Perhaps"),
    (r"\bAlso\b", "In addition"),
)
_PROMPT = (
    "Rewrite the sentence in other words with the same meaning. Keep all numbers, names and formulas, and the "
    "punctuation at its end. Answer with the sentence alone.\n\nSentence: {}"
)
Paraphrases = Callable[[str], str | None]


class Editor:
    """Edits sentences, given and returned as ids; None where an edit is not possible.

    paraphrases: returns the paraphrase of a text, or None to use the fixed list.
    """

    def __init__(self, tokenizer: harmony.Tokenizer, paraphrases: Paraphrases | None = None, seed: int = 0) -> None:
        self._tokenizer, self._paraphrases, self._seed = tokenizer, paraphrases, seed

    def __call__(self, kind: EditKind, ids: Sequence[int]) -> list[int] | None:
        """Return the sentence with the edit.

        Raises:
            InputError: the vocabulary has no filler.
        """
        if kind == "removed":
            return []
        if kind == "filler":
            return [filler_token(self._tokenizer)] * len(ids)
        return self._mistake(ids) if kind == "mistake" else self._paraphrase(ids)

    def _mistake(self, ids: Sequence[int]) -> list[int] | None:
        rng = np.random.default_rng([self._seed, *map(int, ids)])
        texts = [self._tokenizer.decode([int(token)]) for token in ids]
        for pattern, others in ((r"\d+", _other_number), (r"[A-Za-z]", _other_letter)):
            places = [i for i, text in enumerate(texts) if re.fullmatch(pattern, text.strip())]
            if places:
                i = int(rng.choice(places))
                own = texts[i].strip()
                new = self._encoded(texts[i].replace(own, others(own, rng)))
                return None if new is None else [*map(int, ids[:i]), *new, *map(int, ids[i + 1 :])]
        return self._rewritten(ids, _NEGATED)

    def _paraphrase(self, ids: Sequence[int]) -> list[int] | None:
        text = self._tokenizer.decode([int(token) for token in ids])
        given = self._paraphrases(text.strip()) if self._paraphrases else None
        if given is None:
            return self._rewritten(ids, _EQUIVALENT)
        body = text.strip()
        return self._encoded(text.replace(body, given)) if body and given != body else None

    def _rewritten(self, ids: Sequence[int], rules: Sequence[tuple[str, str]]) -> list[int] | None:
        """Return the sentence changed by the first rule that changes it."""
        text = self._tokenizer.decode([int(token) for token in ids])
        for pattern, replacement in rules:
            if (new := re.sub(pattern, replacement, text, count=1)) != text:
                return self._encoded(new)
        return None

    def _encoded(self, text: str) -> list[int] | None:
        try:
            return [int(token) for token in self._tokenizer.encode(text)]
        except InputError:  # a small vocabulary lacks it
            return None


def _other_number(own: str, rng: np.random.Generator) -> str:
    digits = list(own)
    i = int(rng.integers(len(digits)))
    digits[i] = str((int(digits[i]) + int(rng.integers(1, 10))) % 10)
    return "".join(digits)


def _other_letter(own: str, rng: np.random.Generator) -> str:
    first = ord("a" if own.islower() else "A")
    return chr(first + (ord(own) - first + int(rng.integers(1, 26))) % 26)


def filler_token(tokenizer: harmony.Tokenizer) -> int:
    """Return the token of dots, or of the sign in a small vocabulary that has the least meaning.

    Raises:
        InputError: the vocabulary has none of them.
    """
    for text in _FILLERS:
        try:
            ids = tokenizer.encode(text)
        except InputError:  # a small vocabulary lacks it
            continue
        if len(ids) == 1:
            return int(ids[0])
    raise InputError("edits=filler: the vocabulary has no token of dots, a space or a semicolon")


def read_paraphrases(path: str | Path) -> Mapping[str, str]:
    """Return the paraphrase of every sentence of a JSONL file with rows {"sentence": …, "paraphrase": …}.

    Raises:
        InputError: the file cannot be read, or a row is another.
    """
    paraphrases: dict[str, str] = {}
    try:
        with regular_file(path) as file:
            if (size := file.stat().st_size) > MAX_BYTES:
                raise InputError(f"it has {size:,} bytes, expected at most {MAX_BYTES:,}")
            lines = file.read_text(encoding="utf-8").splitlines()
    except (InputError, OSError, UnicodeDecodeError) as error:
        raise InputError(f"paraphrases={str(path)!r} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        row = parse_json(line) if line.strip() else {"sentence": "", "paraphrase": ""}
        texts = [row.get(name) for name in ("sentence", "paraphrase")] if isinstance(row, dict) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise InputError(f'{path}, line {number}: expected {{"sentence": "…", "paraphrase": "…"}}')
        paraphrases[str(texts[0]).strip()] = str(texts[1]).strip()
    return paraphrases


def asked_paraphrases(ask: Callable[[str], str]) -> Paraphrases:
    """Return paraphrases that a model writes, each asked for once. ask: returns the answer to a prompt."""
    known: dict[str, str] = {}

    def paraphrase(text: str) -> str | None:
        if text not in known:
            known[text] = ask(_PROMPT.format(text)).strip()
        return known[text] or None

    return paraphrase
