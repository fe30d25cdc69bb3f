"""Random answers of hosts and random addresses of pages: an answer is read or refused, a page shows what it knows.

`--long` runs thirty times as many cases.
"""

import contextlib
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workbench.dashboards.state import Selection
from workbench.harmony.hosts import answers
from workbench.harmony.hosts.answers import NoAnswerError

QUICK = 80  # cases of each kind


@pytest.fixture(scope="module")
def cases(long: bool) -> Any:
    """How many cases a test runs, and that they are the same every time."""
    return settings(
        max_examples=QUICK * (30 if long else 1),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=6,
)


def test_host_answers(cases: Any) -> None:
    @cases
    @given(st.data())
    def check(data: st.DataObject) -> None:
        message = data.draw(
            st.one_of(JSON, st.fixed_dictionaries({"content": JSON, "reasoning": JSON, "tool_calls": JSON}))
        )
        choice = {"message": message, "text": data.draw(JSON), "finish_reason": data.draw(JSON)}
        reply = data.draw(
            st.one_of(JSON, st.just({"choices": [choice], "output": data.draw(JSON), "usage": data.draw(JSON)}))
        )
        for read in (answers.from_chat, answers.from_responses, answers.from_completion):
            with contextlib.suppress(NoAnswerError, TypeError, AttributeError, KeyError, ValueError):
                read(reply)  # all of these are one failed row, see test_collect; nothing else may leave

    check()


def test_addresses_of_pages(cases: Any) -> None:
    @cases
    @given(st.dictionaries(st.sampled_from(Selection.NAMES), st.binary(max_size=12), max_size=5))
    def check(query: dict[str, bytes]) -> None:
        choice = Selection({name: value.decode("utf-8", "replace") for name, value in query.items()})
        for name in Selection.NAMES:
            assert choice.get(name, ["a", "b"]) in ("a", "b")
        assert "<" not in choice.query()

    check()


def test_an_error_that_is_not_one_of_the_answer_is_noticed(cases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A negative control: a reader that fails in another way."""

    monkeypatch.setattr(answers, "from_chat", lambda reply: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        test_host_answers(cases)
