"""Tokenizers: text to ids and back, and the ids of harmony's marks.

Ids come from the checkpoint's own tokenizer, by name, never from constants. Text is always ordinary: the
characters `<|end|>` in a message are characters, and only `Tokenizer.mark` gives the mark of that name.
"""

import functools
import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

from workbench.bounded_json import MAX_BYTES, parse_json
from workbench.errors import InputError, refuse_lfs_pointer
from workbench.harmony.tokenizer_names import TokenizerNames, plain_ids
from workbench.inputs import open_regular

Mark = Literal["start", "end", "message", "channel", "constrain", "return", "call"]
MARKS: tuple[Mark, ...] = get_args(Mark)

_SURROGATE = re.compile("[\ud800-\udfff]")
_RUN = re.compile(r"[^\W\d_]+|\s+|(?:[^\w\s]|_)+")
_LONGEST_RUN = 20_000


class Tokenizer(TokenizerNames, ABC):
    """A vocabulary with harmony's marks.

    special: ids of the tokens that no text encodes to, by name (`"<|start|>"`). chat_template: the checkpoint's
    own, a jinja text, or None. tokenizer_json: the content of the file that defines it; None for o200k_harmony.
    """

    tokenizer_json: str | None = None

    def __init__(self, name: str, d_vocab: int, special: dict[str, int], chat_template: str | None = None) -> None:
        self.name = name
        self.d_vocab = d_vocab
        self.special = special
        self.chat_template = chat_template

    def __repr__(self) -> str:
        return f"<Tokenizer {self.name}: {self.d_vocab:,} ids>"

    def mark(self, name: Mark) -> int:
        """Return the id of a harmony mark, as in `mark("start")`."""
        return self.special[f"<|{name}|>"]

    @functools.cached_property
    def stop_ids(self) -> frozenset[int]:
        """Return ids that end a generation: return, call, and the end of text where there is one."""
        names = ("<|return|>", "<|call|>", "<|endoftext|>")
        return frozenset(self.special[name] for name in names if name in self.special)

    def encode(self, text: str, *, add_special_tokens: bool = False, return_tensors: None = None) -> list[int]:
        """Return the ids of a text, all of it as ordinary text, never as special tokens.

        The options are Hugging Face's: add_special_tokens changes nothing, as harmony adds none.

        Raises:
            InputError: the text has half of a surrogate pair, or tensors are asked for.
        """
        if return_tensors is not None:
            raise InputError(f"encode returns a list: tokenizer(text, return_tensors={return_tensors!r}) has tensors")
        if lone := _SURROGATE.search(text):
            raise InputError(f"the text has half a surrogate pair, {lone[0]!r}, at character {lone.start()}: remove it")
        return self._encode(text)

    @abstractmethod
    def _encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        """Return the text of an id or of a row of ids, special tokens by name; invalid UTF-8 becomes U+FFFD.

        Raises:
            InputError: an id is not a whole number from 0.
        """
        row = plain_ids(ids)
        return self._decode([id for id in row if id not in self._special_ids] if skip_special_tokens else row)

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self.special.values())

    @abstractmethod
    def _decode(self, ids: Sequence[int]) -> str: ...

    def token(self, id: int) -> str:
        """Return the text of one id for display: part of a character is U+FFFD, an id without a token `<|id|>`."""
        return self.decode([id]) or f"<|{id}|>"

    def printable(self, id: int) -> str:
        """Return the bytes of a token in GPT-2's characters, special tokens by name."""
        text = self._decode([id])
        return text if id in self._special_ids else "".join(gpt2_characters()[byte] for byte in text.encode())

    @property
    @abstractmethod
    def digest(self) -> str:
        """Return SHA-256 of the vocabulary."""


class _O200kHarmony(Tokenizer):
    """The published gpt-oss vocabulary, from the harmony library's own wheel."""

    def __init__(self) -> None:
        self._encoding = harmony_encoding()
        d_vocab = 201_088  # rows of the published embedding; the library reserves one id more
        names = self._encoding.special_tokens_set
        ids = {name: self._encoding.encode(name, allowed_special="all")[0] for name in names}
        special = dict(sorted(((n, i) for n, i in ids.items() if i < d_vocab), key=lambda item: item[1]))
        super().__init__("o200k_harmony", d_vocab, special)

    def _encode(self, text: str) -> list[int]:
        # The library's time is quadratic in a run of letters, spaces or signs (300,000: half a minute), and a
        # million of them overflow its stack.
        if len(text) > _LONGEST_RUN:
            for run in _RUN.finditer(text):
                if run.end() - run.start() > _LONGEST_RUN:
                    raise InputError(
                        f"the text has {run.end() - run.start():,} letters, spaces or signs in a row, from character "
                        f"{run.start():,}; expected at most {_LONGEST_RUN:,}: is this text?"
                    )
        return self._encoding.encode(text, disallowed_special=())

    def _decode(self, ids: Sequence[int]) -> str:
        return self._encoding.decode(ids)

    def printable(self, id: int) -> str:
        content = bytes(self._encoding._inner.decode_bytes([id]))
        return content.decode() if id in self._special_ids else "".join(gpt2_characters()[byte] for byte in content)

    @functools.cached_property
    def digest(self) -> str:
        sha = hashlib.sha256()
        for id in range(self.d_vocab):
            sha.update(bytes(self._encoding._inner.decode_bytes([id])) + b"\0")
        return sha.hexdigest()


class _FromFile(Tokenizer):
    """The vocabulary of a checkpoint's tokenizer.json."""

    def __init__(self, path: Path, chat_template: str | None, content: str | None = None) -> None:
        import tokenizers

        content = _read(path) if content is None else content
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        except BaseException as error:  # the library raises no narrower class, and a panic is not an Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise InputError(f"{path} is not a tokenizer: {error}") from error
        self._tokenizer.no_padding()  # it may be to a length that ends the process, for which a text has no use here
        self._tokenizer.no_truncation()
        for mark in MARKS:
            pieces = self._tokenizer.encode(f"<|{mark}|>", add_special_tokens=False).ids
            if pieces != [self._tokenizer.token_to_id(f"<|{mark}|>")]:
                problem = f"splits in {len(pieces)}" if len(pieces) > 1 else "is missing"
                raise InputError(
                    f"{path}: <|{mark}|> {problem}; harmony needs it as one token: is this a gpt-oss tokenizer?"
                )
        added = self._tokenizer.get_added_tokens_decoder()
        names = {f"<|{mark}|>" for mark in MARKS} | {token.content for token in added.values() if token.special}
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        special = {name: ids[name] for name in sorted(names)}
        self._tokenizer.encode_special_tokens = True  # read the characters of special tokens as text
        self._bytes = "ByteLevel" in repr(self._tokenizer.decoder)  # its tokens are in GPT-2's characters already
        self._digest = hashlib.sha256(content.encode()).hexdigest()
        self.tokenizer_json = content
        super().__init__(path.parent.resolve().name, max(ids.values()) + 1, special, chat_template)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        if self._decode(ids) != text:  # a small vocabulary drops or replaces what it lacks
            lacking = next(
                (c for c in text if self._decode(self._tokenizer.encode(c, add_special_tokens=False).ids) != c), None
            )
            what = repr(text[:60]) if lacking is None else f"the character {lacking!r} (U+{ord(lacking):04X})"
            raise InputError(
                f"the vocabulary of {self.name} cannot express {what}: rewrite the text or use another model"
            )
        if not self._special_ids.isdisjoint(ids):
            name = next(name for name, id in self.special.items() if id in ids)
            raise InputError(f"the vocabulary of {self.name} cannot express {name} as ordinary text: rewrite the text")
        return ids

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def printable(self, id: int) -> str:
        token = self._tokenizer.id_to_token(id)
        return token if self._bytes and token is not None else super().printable(id)

    @property
    def digest(self) -> str:
        return self._digest


def tokenizer(source: str | Path | None = None) -> Tokenizer:
    """Return the tokenizer of a checkpoint folder; without one, o200k_harmony, which needs no network.

    A folder in OpenAI's original layout has no tokenizer.json: its vocabulary is o200k_harmony.

    Raises:
        InputError: the folder does not exist.
    """
    if source is None:
        return _o200k_harmony()
    folder = Path(source)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give a checkpoint's folder, or nothing for o200k_harmony")
    path = folder / "tokenizer.json"
    return _FromFile(path, _chat_template(folder)) if path.exists() else _o200k_harmony()


def tokenizer_of_tokens(
    source: Path, tokens: Sequence[str], tokenizer_json: str | None = None, chat_template: str | None = None
) -> Tokenizer:
    """Return the tokenizer for the list of tokens that a GGUF file holds, in GPT-2's characters for bytes.

    A list of the length of o200k_harmony must be it: the special tokens by name, and a sample of the others. Another
    list needs the tokenizer.json that the file holds.

    Raises:
        InputError: the tokens are neither.
    """
    harmony = _O200kHarmony()
    if len(tokens) != harmony.d_vocab:
        if tokenizer_json is None:
            raise InputError(
                f"{source}: {len(tokens):,} tokens and no tokenizer.huggingface.json; expected the {harmony.d_vocab:,} "
                "of o200k_harmony"
            )
        return _FromFile(source / "tokenizer.json", chat_template, tokenizer_json)
    for name in (*(f"<|{mark}|>" for mark in MARKS), "<|startoftext|>", "<|endoftext|>"):
        if tokens[harmony.special[name]] != name:
            raise InputError(
                f"{source}: token {harmony.special[name]} is {tokens[harmony.special[name]]!r}, expected {name!r} of "
                "o200k_harmony: is this a gpt-oss?"
            )
    for id in range(0, min(harmony.special.values()), 997):
        if tokens[id] != harmony.printable(id):
            raise InputError(
                f"{source}: token {id} is {tokens[id]!r}, expected {harmony.printable(id)!r} of o200k_harmony"
            )
    harmony.chat_template = chat_template
    return harmony


@functools.cache
def gpt2_characters() -> tuple[str, ...]:
    """Return the character that stands for each byte in GPT-2's vocabularies.

    Printable bytes of Latin-1 stand for themselves, the others for the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (chr(0x100 + i) for i in range(256))
    return tuple(chr(byte) if byte in printable else next(others) for byte in range(256))


@functools.cache
def _o200k_harmony() -> Tokenizer:
    return _O200kHarmony()


@functools.cache  # a quarter of a second
def harmony_encoding() -> Any:
    """Return the harmony library's own encoding, an `openai_harmony.HarmonyEncoding`."""
    from openai_harmony import HarmonyEncodingName, load_harmony_encoding

    return load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)


def _chat_template(folder: Path) -> str | None:
    """Return the folder's chat_template.jinja, or the (default) template in its tokenizer_config.json."""
    if (path := folder / "chat_template.jinja").exists():
        return _read(path)
    if not (path := folder / "tokenizer_config.json").exists():
        return None
    try:
        template: Any = parse_json(_read(path)).get("chat_template")
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}["default"]
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise InputError(f"{path} holds no valid chat template: {error!r}") from error
    if not isinstance(template, str | None):
        raise InputError(f"{path}: the chat template is {type(template).__name__}; expected text")
    return template


def _read(path: Path) -> str:
    try:
        with open_regular(path) as file:
            content = file.read(MAX_BYTES + 1)
        refuse_lfs_pointer(path, content)
        if len(content) > MAX_BYTES:
            raise InputError(f"{path} is larger than {MAX_BYTES:,} bytes: is it a tokenizer's file?")
        return content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def distribution() -> dict[str, str]:
    """Return the name and version of the installed harmony library: two distributions share its import name."""
    installed: dict[str, str] = {}
    for name in ("oss-harmony", "openai-harmony"):
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"name": " and ".join(installed), "version": " and ".join(installed.values())}
