"""Streams that break harmony's grammar or use it in rare ways, by name, with the messages that labels must give."""

from typing import Any

GOOD = "<|start|>user<|message|>a<|end|>"
MALFORMED: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "a start inside content opens a message": (
        "<|start|>user<|message|>ab" + GOOD,
        [{"closed_by": "start", "flags": ("unclosed",), "stop": -1, "end": 5}, {"start": 5, "flags": ()}],
    ),
    "the end of the text closes": (
        "<|start|>user<|message|>a<|endoftext|>" + GOOD,
        [{"closed_by": "eot", "end": 4}, {}],
    ),
    "a new text closes": ("<|start|>user<|message|>a<|startoftext|>a", [{"closed_by": "eot", "end": 4}]),
    "a channel mark inside content stays": (
        "<|start|>user<|message|>a<|channel|>final<|message|>b<|end|>",
        [{"channel": "", "flags": ("special_in_content",), "closed_by": "end", "content": 3}],
    ),
    "the first of two channels counts": (
        "<|start|>assistant<|channel|>analysis<|channel|>final<|message|>a<|end|>",
        [{"channel": "analysis", "flags": ("second_channel",)}],
    ),
    "the first of two types counts": (
        "<|start|>assistant<|constrain|>analysis<|constrain|>final<|message|>a<|end|>",
        [{"content_type": "<|constrain|>analysis", "flags": ("second_constrain",)}],
    ),
    "an empty channel is none": (
        "<|start|>assistant<|channel|><|message|>a<|end|>",
        [{"channel": "", "role": "assistant", "flags": ("empty_channel",)}],
    ),
    "a recipient is not a channel": (
        "<|start|>assistant<|channel|> to=user<|message|>a<|end|>",
        [{"channel": "", "recipient": "user", "flags": ("empty_channel",)}],
    ),
    "a cut header has a role at most": (
        "<|start|>assistant to=user<|channel|>ana",
        [
            {
                "role": "assistant",
                "channel": "",
                "recipient": "",
                "content": -1,
                "closed_by": "truncated",
                "flags": ("no_message",),
            }
        ],
    ),
    "a cut role is unknown": ("<|start|>assi", [{"role": "", "author": "", "flags": ("no_message",)}]),
    "a header without content": (
        "<|start|>user<|end|>",
        [{"role": "user", "stop": 2, "end": 3, "flags": ("no_message",)}],
    ),
    "a message without a role": (
        "<|start|><|message|>a<|end|>",
        [{"role": "assistant", "flags": ("no_role",), "content": 2}],
    ),
    "a padding in the header": (
        "<|start|>user<|pad|><|message|>a<|end|>",
        [{"role": "user", "flags": ("special_in_header",)}],
    ),
    "empty content": ("<|start|>user<|message|><|end|>", [{"content": 3, "stop": 3, "end": 4, "flags": ()}]),
    "nothing after the mark": (
        "<|start|>user<|message|>",
        [{"content": 3, "stop": -1, "end": 3, "closed_by": "truncated"}],
    ),
    "text before any message is outside": ("a<|end|>" + GOOD, [{"start": 2, "end": 7}]),
    "spaces after a message are outside": (GOOD + "  " + GOOD, [{"end": 5}, {"start": 7}]),
    "text after a message is the assistant's": (
        GOOD + "  ab<|end|>" + GOOD,
        [
            {"end": 5},
            {"start": 7, "content": 7, "end": 10, "role": "assistant", "channel": "", "flags": ("no_start",)},
            {"start": 10},
        ],
    ),
    "text after the end of a text is outside": (GOOD + "<|endoftext|>ab", [{"end": 5}]),
    "a header without a start": (
        "<|channel|>final<|message|>a<|end|><|message|>b<|end|>",
        [
            {"role": "assistant", "channel": "final", "content": 3, "flags": ("no_start",)},
            {"channel": "", "content": 6, "flags": ("no_start",)},
        ],
    ),
    "text instead of a header": (
        "<|start|>assistant ab c<|end|>",
        [{"role": "assistant", "channel": "", "content": 2, "flags": ("no_message",)}],
    ),
    "text glued to the role": (
        "<|start|>assistantab<|end|>",
        [{"role": "assistant", "content": 2, "flags": ("no_message",)}],
    ),
    "text instead of a role": (
        "<|start|>ab c de<|end|>",
        [{"role": "assistant", "content": 1, "flags": ("no_role", "no_message")}],
    ),
    "text after a channel": (
        "<|start|>assistant<|channel|>final ab c<|end|>",
        [{"role": "assistant", "channel": "final", "content": 4, "flags": ("no_message",)}],
    ),
    "text after a recipient": (
        "<|start|>assistant<|channel|>commentary to=functions.calc json a=1<|call|>",
        [{"channel": "commentary", "recipient": "functions.calc", "content_type": "json", "flags": ("no_message",)}],
    ),
    "a role written twice": (
        "<|start|>assistantassistant<|channel|>final<|message|>a<|return|>",
        [{"role": "assistant", "channel": "final", "author": "assistantassistant", "flags": ("irregular_role",)}],
    ),
    "a channel as a role": (
        "<|start|>final<|message|>a<|return|>",
        [{"role": "assistant", "channel": "", "author": "final", "flags": ("irregular_role",)}],
    ),
    "a sentence as a role": (
        "<|start|>ab cd ef<|message|>a<|end|>",
        [{"role": "assistant", "flags": ("irregular_role",)}],
    ),
    "an unknown channel": (
        "<|start|>assistant<|channel|>??<|message|>a<|end|>",
        [{"channel": "??", "flags": ("unknown_channel",)}],
    ),
    "signs after a channel": (
        "<|start|>assistant<|channel|>commentary 2?<|message|>a<|end|>",
        [{"channel": "commentary 2?", "content_type": "", "flags": ("extra_words", "unknown_channel")}],
    ),
    "an author that is not a role is a tool": (
        "<|start|>functions.calc<|message|>a<|end|>",
        [{"role": "tool", "author": "functions.calc"}],
    ),
    "a user has a name": ("<|start|>user:bob<|message|>a<|end|>", [{"role": "user", "author": "bob"}]),
    "a type without its mark": (
        "<|start|>assistant<|channel|>analysis code<|message|>a<|end|>",
        [{"channel": "analysis", "content_type": "code", "recipient": "", "flags": ()}],
    ),
    "a type without a recipient": (
        "<|start|>assistant<|channel|>final <|constrain|>json<|message|>a<|end|>",
        [{"channel": "final", "content_type": "<|constrain|>json", "recipient": ""}],
    ),
    "more words than a header has": (
        "<|start|>assistant a b c<|channel|>final to=user to=me<|message|>a<|end|>",
        [{"channel": "final", "recipient": "user", "flags": ("extra_words",)}],
    ),
    "nothing": ("", []),
}
