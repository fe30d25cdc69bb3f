"""Knockout hides whole messages; the visible tokens that have read hidden ones are counted and named."""

import json

import numpy as np
import pytest

import workbench as wb
from tests.conftest import DATA
from workbench.errors import InputError
from workbench.experiments import attention_knockout, chain_of_thought
from workbench.experiments.effects import logprobs
from workbench.experiments.from_run import transcripts
from workbench.experiments.hidden_messages import message_tokens, readers
from workbench.harmony.transcripts import Transcript
from workbench.hooks.interventions import knockout
from workbench.model.transformer import GptOss


@pytest.fixture(scope="module")
def rows() -> list[Transcript]:
    """One of seven answers with an analysis, of every task."""
    return [row for row in transcripts(wb.open_run(DATA / "demo.zarr")) if row.effort != "low"][::7]


def test_whole_messages_have_their_frame_tokens(nano: GptOss, rows: list[Transcript]) -> None:
    ids, token = rows[0].tokens.astype(np.int64), nano.tokenizer.token
    for hide in ("messages", "content"):
        mask = message_tokens(nano.tokenizer, channel="analysis", hide=hide)(ids)
        text = "".join(token(int(i)) for i in ids[mask])
        assert (text.startswith("<|start|>assistant<|channel|>analysis<|message|>"), text.endswith("<|end|>")) == (
            hide == "messages",
        ) * 2
        assert "final" not in text
    user = message_tokens(nano.tokenizer, role="user")(ids)
    assert "".join(token(int(i)) for i in ids[user]).startswith("<|start|>user<|message|>")
    with pytest.raises(InputError, match="hide='thoughts'"):
        message_tokens(nano.tokenizer, channel="analysis", hide="thoughts")  # type: ignore[arg-type]


def test_hiding_the_content_alone_leaks_through_its_end_mark(nano: GptOss, rows: list[Transcript]) -> None:
    """Hidden with its frame tokens, the analysis is lost about as if it had never been written; its content is not.

    Negative control: the selection by content is called leaking by `readers`, and by the change itself.
    """
    answered = chain_of_thought.answered_sequences(nano, rows)
    own, final = [part.row for part in answered], wb.harmony.token_set(tokenizer=nano.tokenizer, channel="final")
    last = wb.harmony.token_set(tokenizer=nano.tokenizer, message=-1)
    base = logprobs(nano, own, final)

    def change(*edits: object, rows: list[Transcript] = own) -> float:
        return float(np.mean(logprobs(nano, rows, final, *edits) - base))  # type: ignore[arg-type]

    keys = {
        hide: message_tokens(nano.tokenizer, channel="analysis", hide=hide)  # type: ignore[arg-type]
        for hide in ("messages", "content")
    }
    hidden = {hide: change(knockout(list(range(4)), last, of)) for hide, of in keys.items()}
    emptied = change(rows=[chain_of_thought._with(part, part.row.tokens[:0]) for part in answered])
    assert abs(hidden["messages"] - emptied) < 0.15 * abs(emptied)
    assert hidden["content"] - emptied > 0.2 * abs(emptied), "the content alone leaks: less is lost"
    assert readers(own, last, keys["messages"], nano.tokenizer) == {}
    assert readers(own, last, keys["content"], nano.tokenizer) == {"<|end|> of assistant analysis": len(own)}
    as_content = wb.harmony.token_set(tokenizer=nano.tokenizer, channel="final")
    leaking = readers(own, as_content, keys["messages"], nano.tokenizer)
    assert leaking["<|message|> of assistant final"] == len(own), "a header that is not a query has read the analysis"


def test_readers_stand_between_hidden_tokens_and_queries(nano: GptOss) -> None:
    row = transcripts(wb.open_run(DATA / "demo.zarr"), [2])[0]
    ids = row.tokens
    labels = wb.harmony.label(ids, tokenizer=nano.tokenizer)
    n = len(ids)
    analysis = np.flatnonzero(labels.message == len(labels.messages) - 2)

    def only(*positions: int):
        return lambda given: np.isin(np.arange(len(given)), positions)

    assert readers([row], only(n - 1), only(n - 3), nano.tokenizer) == {"content of assistant final": 1}
    assert readers([row], only(0), only(n - 3), nano.tokenizer) == {}, "no query follows"
    result = readers([row], only(n - 1), only(*analysis[:-1]), nano.tokenizer)
    assert result["<|end|> of assistant analysis"] == 1
    assert sum(result.values()) == n - 1 - analysis[-1]


@pytest.mark.filterwarnings("ignore:only 18 prompts")
def test_results_count_and_name_the_readers(nano: GptOss, rows: list[Transcript]) -> None:
    few = rows[::3]
    hidden = attention_knockout.experiment(nano, few)["attention"]
    name = "final does not see analysis, all layers"
    assert float(hidden["readers"].sel(intervention=name)) == 0
    assert json.loads(hidden.attrs["readers"])[name] == {}
    user = json.loads(hidden.attrs["readers"])["final does not see the user, all layers"]
    assert user["content of assistant analysis"] > 10, "the analysis has read the user's message"
    content = attention_knockout.experiment(nano, few, hide="content")["attention"]
    assert float(content["readers"].sel(intervention=name)) == 1
    assert "<|end|> of assistant analysis 1.0" in content.attrs["summary"]
    change = [float(one["change"].sel(intervention=name)) for one in (hidden, content)]
    assert change[0] < change[1] - 1
