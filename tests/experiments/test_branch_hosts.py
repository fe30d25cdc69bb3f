"""Branches from a host: prefixes of ids are sent, ids come back whatever the host gives, and its faults are named."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import workbench as wb
from tests.cli.running import run_command
from tests.conftest import DATA
from tests.experiments.test_sentence_importance import DECISIVE, Writer
from tests.harmony.hosts.mock_server import FakeHost, Reply
from workbench.errors import InputError, JobError
from workbench.experiments import sentence_importance
from workbench.experiments.branch_hosts import HostModel, connected
from workbench.experiments.registry import run_experiment


@pytest.fixture
def host() -> Iterator[FakeHost]:
    fake = FakeHost()
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


@pytest.fixture
def served(host: FakeHost) -> Iterator[HostModel]:
    with connected(host.url, "m", wb.open_run(DATA / "demo.zarr")) as model:
        yield model


class Serving:
    """Serves a writer as vLLM does: ids without the token that ended, at most `most` choices."""

    def __init__(self, writer: Writer, most: int = 100, ids: bool = True) -> None:
        self.writer, self.most, self.ids = writer, most, ids

    def __call__(self, path: str, body: dict[str, Any], n: int) -> Reply:
        assert path == "/v1/completions"
        wanted = min(body["n"], self.most)
        seeds = [body["seed"] + i for i in range(wanted)]
        new = self.writer.generate([body["prompt"]], samples=wanted, seed=seeds)
        choices = [
            {"text": self.writer.tokenizer.decode(ids), "finish_reason": "stop", "stop_reason": None}
            | ({"token_ids": ids[:-1]} if self.ids else {})
            for ids in new
        ]
        return 200, {"choices": choices}, {}


@pytest.mark.parametrize("options", [{}, {"most": 1}, {"ids": False}])
def test_the_ids_of_continuations(host: FakeHost, served: HostModel, options: dict[str, Any]) -> None:
    writer = Writer()
    host.reply = Serving(writer, **options)
    row = writer.transcript("c", "xyx", "x")
    prefix = row.tokens[: row.n_prompt].tolist()
    continuations = served.generate(
        [prefix, prefix], samples=3, temperature=1.0, max_new_tokens=50, seed=list(range(6))
    )
    wanted = writer.generate([prefix, prefix], samples=3, seed=list(range(6)))
    assert continuations == wanted
    assert all(body["prompt"] == prefix and body["temperature"] == 1.0 for body in host.requests)
    assert len(host.requests) == (6 if options.get("most") else 2)


@pytest.mark.filterwarnings("ignore:only .* prompts")
def test_the_sentence_that_decides_is_found_through_a_host(host: FakeHost, served: HostModel) -> None:
    writer = Writer()
    host.reply = Serving(writer)
    rows = [writer.transcript("c", "xyxyx", "x")]
    result = sentence_importance.experiment(served, rows, samples=30)["sentences"]
    assert result["q"].values.argmin() == DECISIVE
    assert np.nanmax(np.abs(result["effect"].values[[0, 1, 3, 4]])) < 0.45 < result["low"].values[DECISIVE]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"text": "4", "finish_reason": "stop"}, "the host removes harmony's marks"),
        ({"finish_reason": "stop"}, "neither token_ids nor a text"),
        ({"token_ids": [10**6], "finish_reason": "stop"}, "a continuation cannot be read"),
        (None, "the reply has no choices"),
    ],
)
def test_replies_that_cannot_be_read(host: FakeHost, served: HostModel, choice: Any, message: str) -> None:
    host.reply = lambda path, body, n: (200, {"choices": [choice] if choice else []}, {})
    with pytest.raises(JobError, match=message):
        served.generate([[1]], samples=1, temperature=1.0, max_new_tokens=5, seed=[0])


def test_a_cut_continuation_has_no_end_and_the_stop_token_of_the_host_is_kept(
    host: FakeHost, served: HostModel
) -> None:
    def one(**choice: Any) -> list[int]:
        host.reply = lambda path, body, n: (200, {"choices": [choice]}, {})
        return served.generate([[1]], samples=1, temperature=1.0, max_new_tokens=5, seed=[0])[0]

    call = served.tokenizer.mark("call")
    assert one(token_ids=[40], finish_reason="length") == [40]
    assert one(token_ids=[40], finish_reason="stop") == [40, served.tokenizer.mark("return")]
    assert one(token_ids=[40], finish_reason="stop", stop_reason=call) == [40, call]
    assert one(token_ids=[40, call], finish_reason="stop") == [40, call]


def test_the_command_asks_the_host_and_experiments_on_weights_refuse_it(
    host: FakeHost, served: HostModel, tmp_path: Path
) -> None:
    host.reply = Serving(Writer(decisive=None))
    run = str(tmp_path / "run.zarr")
    shutil.copytree(DATA / "demo.zarr", run)
    words = ["study", "sentence-importance", run, "--model", "m", "--sequences", "15", "--host", host.url]
    words += ["--option", "conversations=1", "--option", "samples=10"]
    first = run_command(*words)
    assert first.code == 0, first.err
    assert "1 conversation, " in first.out
    assert "1 conversations" not in first.out
    asked = len(host.requests)
    assert asked > 4
    assert (tmp_path / "run.zarr.branches.jsonl").exists(), "beside the run"
    assert run_command(*words).out == first.out
    assert len(host.requests) == asked, "resumed from the file"
    refused = run_command("study", "super-experts", run, "--model", "m", "--host", host.url)
    assert refused.code == 2
    assert "super-experts does not use a host: leave --host out" in refused.err
    with pytest.raises(InputError, match="super-experts needs the weights: leave --host out"):
        run_experiment("super-experts", served, wb.open_run(run))
