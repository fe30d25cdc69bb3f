"""The document of a conversation holds the tokens, experts and gate weights of the run, and marks what is irregular."""

import base64
from pathlib import Path

import numpy as np
import pytest

import workbench as wb
from tests.conftest import DATA
from workbench import harmony
from workbench.dashboards import search
from workbench.dashboards.conversation import data_of, frame
from workbench.runs import Run


@pytest.fixture(scope="module")
def run() -> Run:
    return wb.open_run(DATA / "demo.zarr")


def test_a_conversation_s_page_holds_its_tokens_and_no_open_tag(run: Run) -> None:
    words = search.vocabulary(run)
    assert words is not None
    number = int(run.sequences.index[17])
    data = data_of(run, number, words)
    tokens = run.sequence(number).compute()
    assert "".join(data["texts"]) == words.decode(tokens["id"].values.tolist())
    experts = np.frombuffer(base64.b64decode(data["experts"]), np.uint8).reshape(tokens["experts"].shape)
    np.testing.assert_array_equal(experts, tokens["experts"].values)
    gates = np.frombuffer(base64.b64decode(data["gates"]), np.uint8).reshape(tokens["gates"].shape) / 255
    np.testing.assert_allclose(gates, tokens["gates"].values, atol=0.002)
    page = frame(run, number, words)
    assert page.count("<iframe") == 1
    assert 'sandbox="allow-scripts"' in page
    assert "allow-same-origin" not in page


def test_a_vocabulary_that_nobody_has_shows_numbers(run: Run) -> None:
    assert search.tokenizer_of("unknown") is None
    assert search.tokenizer_of(harmony.tokenizer().digest) is not None
    assert data_of(run, int(run.sequences.index[0]), None)["texts"][0].startswith("⟨")


def test_irregular_messages_of_a_conversation_are_marked(demo_run: Path) -> None:
    run = wb.open_run(demo_run)
    tokenizer = search.vocabulary(run)
    assert data_of(run, 0, tokenizer)["irregular"] == {}, "nothing is irregular in the demo run"
    messages = run.messages.copy()
    own = messages.index[messages["sequence"] == 0]
    messages.loc[own[1], "flags"] = "no_message extra_text"
    messages.loc[own[2], "closed_by"] = "truncated"
    run.__dict__["messages"] = messages
    assert data_of(run, 0, tokenizer)["irregular"] == {"1": "no message, extra text", "2": "cut off"}
    assert data_of(run, 1, tokenizer)["irregular"] == {}
