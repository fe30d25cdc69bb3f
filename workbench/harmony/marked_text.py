"""Text of a model as messages: with harmony's marks, with the marks stripped, or with tags or blocks of reasoning.

Marks are read by the tokenizer and the labeller, as in a stream of ids. Where programs have stripped them, only
`assistantfinal`, `assistantcommentary` and `assistantanalysis` are taken for remains of them, a channel before the
recipient of a call, and `final` that is glued to a digit or a capital letter: the words "analysis" and "final" begin
ordinary answers too.
"""

import re
from dataclasses import dataclass, replace
from typing import Any

from workbench.harmony.details_blocks import blocks_as_tags, has_blocks
from workbench.harmony.grammar import generation_prompt_ids, marked_ids, parse
from workbench.harmony.vocabulary import MARKS, Tokenizer, tokenizer

_CHANNELS = ("analysis", "commentary", "final")
STOPS = ("<|end|>", "<|return|>", "<|call|>")
_TAGS = ("think", "thinking")
_CONTENT_TYPES = ("json", "code")
_CALL_FIRST = re.compile(r" to=([\w.]+?)(commentary|analysis)\b")  # recipient and channel, as chat templates write it
_REMAINS = re.compile(f"assistant(?={'|'.join(_CHANNELS)}|{_CALL_FIRST.pattern})")
_GLUED = re.compile(r"(?:analysis|commentary)[^\W_]")  # no word begins so: the rest of a header
_TAG = re.compile(r"</?(?:think|thinking)>", re.IGNORECASE)
_TAG_NAMES = r"(?:\w+:)?(?:think|thinking|thoughts?|reasoning|analysis|reflection|scratchpad)"
_OTHER_TAG = re.compile(
    rf"\A\s*<\s*{_TAG_NAMES}\b[^<>\n]{{0,40}}>|</\s*{_TAG_NAMES}\s*>|\A\s*[\[◁]\s*think\s*[\]▷]|"
    r"\A\s*<\|\w*(?:thought|thinking|think)\|>",
    re.IGNORECASE,
)
_OTHER_REMAINS = re.compile(
    r"\s*(?:analysis|commentary).*?assistant[\s:_*-]*(?:final|commentary)", re.IGNORECASE | re.DOTALL
)
_CALL = re.compile(r"(?:analysis|commentary) to=[\w.]+")  # a header whose marks were stripped; no sentence begins so


@dataclass(frozen=True)
class Output:
    """Messages in a text.

    complete: False if the text shows that it was cut off, True if it ends with a stop token. irregular: whether its
    `<think>` tags are nested, left over or after other text, so that they may also be read in another way.
    """

    messages: list[dict[str, Any]]
    complete: bool | None = None
    irregular: bool = False


def read_output(text: str, *, truncated: bool = False, vocabulary: Tokenizer | None = None) -> Output:
    """Return messages of a model's output, whatever form it is in; a text without any form is one final answer."""
    if is_marked(text):
        return _marked(text, vocabulary or tokenizer())
    if (stripped := _stripped(text, truncated)) is not None:
        finals = [i for i, message in enumerate(stripped) if message["channel"] == "final"]
        ends = text.rstrip().endswith("<|return|>")
        # only the last answer is final: a word "assistantfinal" within a text looks the same
        return Output(stripped, True if ends else None, irregular=any(i < len(stripped) - 1 for i in finals))
    if (with_tags := blocks_as_tags(text)) != text:
        read = _tagged(with_tags)
        assert read is not None
        return replace(read, irregular=read.irregular or has_blocks(with_tags))
    if (tagged := _tagged(text)) is not None:
        begins = text.lstrip().startswith(tuple(f"<{tag}>" for tag in _TAGS))
        return tagged if begins or not _OTHER_TAG.match(text) else replace(tagged, irregular=True)
    return Output([{"role": "assistant", "channel": "final", "content": text}], irregular=_may_be_more(text))


def _may_be_more(text: str) -> bool:
    """Return whether a text read as one answer has what may be marks or tags: quoted, misspelled, after a preamble."""
    has_tags = any(f"<{tag}>" in text and f"</{tag}>" in text for tag in _TAGS)
    stopped = text.rstrip().endswith((*STOPS, "<|endoftext|>"))
    remains = _OTHER_REMAINS.match(text) or _GLUED.match(text)
    return has_tags or stopped or has_blocks(text) or bool(_OTHER_TAG.search(text) or remains)


def is_marked(text: str) -> bool:
    """Return whether marks in a text are harmony's: it starts with a header, or a header follows its first message.

    Marks that are quoted within an answer are text.
    """
    if "<|message|>" not in text and "<|channel|>" not in text and not text.lstrip().startswith("<|start|>"):
        return False
    first = min((at for mark in MARKS if (at := text.find(f"<|{mark}|>")) >= 0), default=-1)
    if first < 0:
        return False
    before = text[:first].split()
    if all(word in ("assistant", *_CHANNELS, *_CONTENT_TYPES) or word.startswith("to=") for word in before):
        return text[first:].startswith(("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"))
    header = text.find("<|start|>assistant")
    return header >= 0 and header <= first + len("<|return|>") and "<|message|>" in text[header:]


def _marked(text: str, words: Tokenizer) -> Output:
    start = _without_spaces_at_marks(text.lstrip())
    if start.startswith("<|start|>"):
        ids = marked_ids(start, words)
    elif start.startswith("assistant<|"):
        ids = marked_ids("<|start|>" + start, words)
    else:
        channel = start.startswith(_CHANNELS) and start[: start.find("<|")].split()[0] in _CHANNELS
        ids = [*generation_prompt_ids(words), *([words.mark("channel")] if channel else []), *marked_ids(start, words)]
    messages = parse(ids, tokenizer=words, n_prompt=len(generation_prompt_ids(words)))  # what follows was generated
    messages = [m for m in messages if m["content"] or m.get("recipient") or m.get("raw")]
    # a spacing that was put right, and messages that are no model's output: a dialogue within one message
    irregular = start != text.lstrip() or any(m["role"] not in ("assistant", "tool") for m in messages)
    if text.rstrip().endswith(("<|return|>", "<|call|>")):
        return Output(messages, True, irregular)
    last = messages[-1] if messages else {}
    within_analysis = last.get("channel") == "analysis" and not last.get("recipient")  # hosts strip the last mark only
    return Output(messages, False if within_analysis and not text.rstrip().endswith(STOPS) else None, irregular)


def _without_spaces_at_marks(text: str) -> str:
    """Return a text that was decoded with a space on both sides of every mark without them; any other text as it is."""
    if not re.search(r"<\|channel\|> (?:analysis|commentary|final)\b", text):
        return text
    return re.sub(r" ?(<\|(?:start|channel|message|end|return|call|constrain)\|>) ?", r"\1", text).replace(
        "<|constrain|>", " <|constrain|>"
    )


def _stripped(text: str, truncated: bool) -> list[dict[str, Any]] | None:
    """Return messages of a text whose marks were stripped, as in `analysis…assistantfinal…`."""
    start = text.removeprefix("assistant")
    if _CALL_FIRST.match(start):
        return _stripped_pieces("assistant" + start)
    if not start.startswith(_CHANNELS):
        return None
    cuts = [0, *(match.start() for match in _REMAINS.finditer(text, len(text) - len(start) + 1))]
    cut_analysis = truncated and start.startswith("analysis") and start[len("analysis") :][:1].isupper()
    is_header = _CALL.match(start) or _REMAINS.match(text) or _is_glued_final(start)
    if len(cuts) == 1 and not cut_analysis and not is_header:
        return None
    return _stripped_pieces(text)


def _stripped_pieces(text: str) -> list[dict[str, Any]]:
    first = len(text) - len(text.removeprefix("assistant"))
    cuts = [0, *(match.start() for match in _REMAINS.finditer(text, first + 1))]
    pieces = [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True)]
    return [_stripped_message(piece.removeprefix("assistant")) for piece in pieces]


def _is_glued_final(text: str) -> bool:
    """Return whether a text begins as in `final144` or `finalThe`, which no word does: the answer had no analysis."""
    rest = text.removeprefix("final")
    return text.startswith("final") and (
        rest[:1].isdigit() or rest[:1].isupper() or (rest[:1] == "-" and rest[1:2].isdigit())
    )


def _stripped_message(piece: str) -> dict[str, Any]:
    for stop in STOPS:
        piece = piece.removesuffix(stop)
    if call := _CALL_FIRST.match(piece):  # the recipient before the channel
        piece = f"{call[2]} to={call[1]} {piece[call.end() :].lstrip()}"
    channel = next(channel for channel in _CHANNELS if piece.startswith(channel))
    content = piece.removeprefix(channel)
    message: dict[str, Any] = {"role": "assistant", "channel": channel}
    if content.startswith(" to="):
        recipient, _, content = content.removeprefix(" to=").partition(" ")
        if "{" in recipient:  # the mark between recipient and type was stripped with its space
            recipient, brace, rest = recipient.partition("{")
            content = brace + rest + (" " + content if content else "")
        kind = next((kind for kind in _CONTENT_TYPES if content.startswith(kind)), None)
        if kind is None and (glued := next((k for k in _CONTENT_TYPES if recipient.endswith(k)), None)):
            recipient, kind = recipient.removesuffix(glued), glued
        elif kind is not None:
            content = content.removeprefix(kind)
        message |= {"recipient": recipient} | ({"content_type": kind} if kind else {})
    return message | {"content": content}


def _tagged(text: str) -> Output | None:
    """Return messages of a text with its reasoning in `<think>` tags.

    A tag that is never closed holds reasoning that was cut off; where only the closing tag is there, the opening one
    was part of the prompt. Tags within tags belong to the reasoning, and the output is irregular.
    """
    for tag in _TAGS:
        opening, closing = f"<{tag}>", f"</{tag}>"
        start = text.lstrip()
        if start.startswith(opening) or (closing in text and opening not in text):
            return _between_tags(start, opening, closing)
    return None


def _between_tags(text: str, opening: str, closing: str) -> Output:
    messages: list[dict[str, Any]] = []
    complete: bool | None = None
    text = text if text.startswith(opening) else opening + text
    pairs = _pairs(text, opening, closing)
    irregular = False
    at = 0
    while text.startswith(opening, at):  # by position: copies of the rest would make this quadratic
        begin = at + len(opening)
        end = pairs[at] if at in pairs else text.find(closing, begin)
        complete = None if end >= 0 else False
        analysis = text[begin : end if end >= 0 else len(text)]
        messages.append({"role": "assistant", "channel": "analysis", "content": analysis.strip("\r\n")})
        after_end = end + len(closing) if end >= 0 else len(text)
        again = text.find(opening, after_end)
        at = again if again >= 0 else len(text)
        answer = text[after_end:at]
        other_tags = any(tag.casefold() not in (opening, closing) for tag in _TAG.findall(analysis + answer))
        irregular |= opening in analysis or closing in answer or other_tags
        if answer.strip():
            channel = "commentary" if again >= 0 else "final"
            messages.append({"role": "assistant", "channel": channel, "content": answer.strip("\r\n")})
    return Output([m for m in messages if m["content"] or m["channel"] == "final"], complete, irregular)


def _pairs(text: str, opening: str, closing: str) -> dict[int, int]:
    """Return position of an opening tag → position of the tag that closes it, tags within it being closed before."""
    pairs: dict[int, int] = {}
    opened: list[int] = []
    for tag in re.finditer(f"{opening}|{closing}", text):
        if tag.group() == opening:
            opened.append(tag.start())
        elif opened:
            pairs[opened.pop()] = tag.start()
    return pairs
