"""Harmony, the response format of gpt-oss: its vocabulary, prompts, token labels and transcripts.

Reference: https://cookbook.openai.com/articles/openai-harmony
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.harmony.grammar import parse as parse
    from workbench.harmony.labels import CHANNELS as CHANNELS
    from workbench.harmony.labels import PARTS as PARTS
    from workbench.harmony.labels import ROLES as ROLES
    from workbench.harmony.labels import Labels as Labels
    from workbench.harmony.labels import Message as Message
    from workbench.harmony.labels import channel_codes as channel_codes
    from workbench.harmony.labels import label as label
    from workbench.harmony.labels import role_codes as role_codes
    from workbench.harmony.messages import EFFORTS as EFFORTS
    from workbench.harmony.rendering import render as render
    from workbench.harmony.token_sets import TokenSet as TokenSet
    from workbench.harmony.token_sets import check_token_set as check_token_set
    from workbench.harmony.token_sets import token_set as token_set
    from workbench.harmony.transcripts import Prompt as Prompt
    from workbench.harmony.transcripts import Reject as Reject
    from workbench.harmony.transcripts import Transcript as Transcript
    from workbench.harmony.transcripts import read_prompts as read_prompts
    from workbench.harmony.transcripts import read_transcripts as read_transcripts
    from workbench.harmony.transcripts import write_transcripts as write_transcripts
    from workbench.harmony.vocabulary import Tokenizer as Tokenizer
    from workbench.harmony.vocabulary import distribution as distribution
    from workbench.harmony.vocabulary import tokenizer as tokenizer

_HOMES = {
    "grammar": ("parse",),
    "labels": ("CHANNELS", "PARTS", "ROLES", "Labels", "Message", "channel_codes", "label", "role_codes"),
    "messages": ("EFFORTS",),
    "rendering": ("render",),
    "token_sets": ("TokenSet", "check_token_set", "token_set"),
    "transcripts": ("Prompt", "Reject", "Transcript", "read_prompts", "read_transcripts", "write_transcripts"),
    "vocabulary": ("Tokenizer", "distribution", "tokenizer"),
}
_EXPORTS = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:  # late: the package costs milliseconds, numpy and the rest come with the first use
        return getattr(importlib.import_module(f"workbench.harmony.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'workbench.harmony' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
