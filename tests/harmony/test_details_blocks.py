"""Blocks of reasoning that Open WebUI exports are read as the model wrote them, and other blocks stay text."""

from workbench.harmony.details_blocks import blocks_as_tags
from workbench.harmony.marked_text import read_output

DETAILS = '<details type="reasoning" done="true" duration="1">\n<summary>One second</summary>\n'


def pairs(text: str) -> list[tuple[str, str]]:
    return [(m["channel"], m["content"]) for m in read_output(text).messages]


def test_blocks_of_open_webui_are_reasoning_as_it_was_written() -> None:
    quoted = "&gt; 1 &lt; 2\n&gt;\n&gt; so &amp;"
    assert pairs(DETAILS + quoted + "\n</details>\n4") == [("analysis", "1 < 2\n\nso &"), ("final", "4")]
    assert pairs(DETAILS + "> &lt;\n</details>\n4") == [("analysis", "&lt;"), ("final", "4")]
    for text in (DETAILS + "> It is", DETAILS.replace("true", "false") + "> It is\n</details>"):
        assert read_output(text).complete is False
        assert pairs(text) == [("analysis", "It is")]
    call = '<details type="tool_calls" name="f">\n</details>'
    assert read_output(DETAILS + f"> It is 4.\n</details>\n{call}4").irregular
    assert read_output(call + DETAILS + "> It is 4.\n</details>\n4").irregular
    assert blocks_as_tags(call) == call
    ordinary = "<details><summary>More</summary>\n> quoted\n</details>"  # negative control
    assert pairs(ordinary) == [("final", ordinary)]
    assert not read_output(ordinary).irregular
