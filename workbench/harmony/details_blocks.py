"""Reasoning as Open WebUI exports it: a block `<details type="reasoning">` of quoted lines before the answer.

    <details type="reasoning" done="true" duration="3">
    <summary>…</summary>
    > 12 squared is 144.
    </details>
    144

Newer versions escape the block as HTML. Blocks of other types hold tool calls and code.
"""

import html
import re

_BLOCK = re.compile(
    r'<details\s+type="reasoning"(?P<about>[^>\n]*)>\s*(?:<summary>[^<\n]*</summary>)?(?P<quoted>.*?)(?P<end></details>|\Z)',
    re.DOTALL,
)
_ANY_BLOCK = re.compile(r'<details\s+type="\w+"')


def has_blocks(text: str) -> bool:
    """Return whether a text has a block of any type."""
    return _ANY_BLOCK.search(text) is not None


def blocks_as_tags(text: str) -> str:
    """Return a text that begins with a block of reasoning with `<think>` tags instead of blocks; others as they are.

    A block that is not closed, or not done, at the end of the text stays open, as reasoning that was cut off.
    """
    return _BLOCK.sub(_tags, text) if _BLOCK.match(text.lstrip()) else text


def _tags(block: re.Match[str]) -> str:
    cut_off = not block["end"] or ('done="false"' in block["about"] and not block.string[block.end() :].strip())
    return f"<think>{_unquoted(block['quoted'].strip())}" + ("" if cut_off else "</think>")


def _unquoted(text: str) -> str:
    lines = text.splitlines()
    if all(line.startswith("&gt;") for line in lines if line):
        lines = [html.unescape(line) for line in lines]
    if not all(line.startswith(">") for line in lines if line):
        return text
    return "\n".join(line.removeprefix(">").removeprefix(" ") for line in lines)
