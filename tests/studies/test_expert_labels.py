"""Labels are read as data, kept when a person wrote them, and scored only where the score is of what is shown.

Also tests `workbench.cli.labels` and `workbench.studies.label_files`.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from typer.testing import CliRunner

import workbench as wb
from tests.cli.running import Result, run_command, snapshot
from tests.conftest import DATA
from tests.harmony.hosts.mock_server import FakeHost, chat
from workbench.cli import app
from workbench.errors import InputError, JobError
from workbench.file_lock import FileLock
from workbench.harmony.hosts.client import HostError
from workbench.runs.reader import Run
from workbench.studies import expert_examples, expert_labels, label_proposals
from workbench.studies.run_index import independent_prompts


@pytest.fixture(scope="module")
def demo() -> Run:
    return wb.open_run(DATA / "demo.zarr")


@pytest.fixture(scope="module")
def examples(demo: Run) -> xr.Dataset:
    return expert_examples.load(demo)


def test_labels_are_read_as_they_were_written(demo: Run, examples: xr.Dataset, tmp_path: Path) -> None:
    labels = expert_labels.automatic(examples)
    file = expert_labels.write(demo, labels, tmp_path / "labels.jsonl")
    again = expert_labels.read(demo, file)
    assert again is not None
    assert len(again) == demo.model["n_layers"] * demo.model["num_experts"]
    assert again["automatic"].tolist() == labels["automatic"].tolist()
    assert not expert_labels.is_edited(again).any()
    assert expert_labels.read(demo) is None
    with pytest.raises(InputError, match="is not a file of labels"):
        expert_labels.read(demo, tmp_path / "other.jsonl")


def test_what_a_person_wrote_is_kept(demo: Run, examples: xr.Dataset, tmp_path: Path) -> None:
    new = expert_labels.automatic(examples)
    proposal = {"layer": 0, "expert": 1, "proposed": "digits", "proposed_by": "m", "score": 0.9, "score_low": 0.6}
    proposal |= {"score_high": 0.99, "scored": 16.0}
    proposed = label_proposals.with_proposals(new, [proposal])
    edited = proposed.copy()
    edited.loc[(edited["layer"] == 0) & (edited["expert"] == 2), "label"] = "signs\nof   <b>sums</b>"
    file = expert_labels.write(demo, edited, tmp_path / "l.jsonl")
    merged = expert_labels.merged(expert_labels.read(demo, file), new).set_index(["layer", "expert"])
    assert merged.loc[(0, 2), "label"] == "signs of <b>sums</b>", "one line; pages escape it"
    assert merged.loc[(0, 1), "label"] == "digits"
    assert merged.loc[(0, 1), "score"] == 0.9
    assert merged.loc[(0, 3), "label"] == merged.loc[(0, 3), "automatic"]
    lost = expert_labels.merged(None, new)
    assert "signs of <b>sums</b>" not in set(lost["label"]), "the negative control: without the old file it is gone"


def test_a_score_is_shown_beside_the_label_it_is_of(examples: xr.Dataset) -> None:
    labels = expert_labels.automatic(examples)
    row = {"layer": 1, "expert": 3, "proposed": "digits", "proposed_by": "m", "score": 0.9}
    labels = label_proposals.with_proposals(labels, [row])
    shown = expert_labels.with_labels(examples, labels)
    assert shown["label"].values[1, 3] == "digits"
    assert float(shown["label_score"][1, 3]) == 0.9
    assert np.isnan(shown["label_score"].values).sum() == shown["label_score"].size - 1
    labels.loc[labels["proposed"] == "digits", "label"] = "mine"
    own = expert_labels.with_labels(examples, labels)
    assert own["label"].values[1, 3] == "mine"
    assert np.isnan(float(own["label_score"][1, 3])), "the score is of another label"
    assert examples["label"].values[1, 3] != "digits", "the dataset given is unchanged"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "expected an object"),
        ('{"layer": 0}', "expert is None, expected 0 to 15"),
        ('{"layer": 99, "expert": 0}', "layer is 99, expected 0 to 3"),
        ('{"layer": true, "expert": 0}', "layer is True"),
        ('{"layer": 0, "expert": 0, "label": 3}', "label is 3, expected a text"),
        ('{"layer": 0, "expert": 0, "score": "x"}', "score is 'x', expected a number"),
        ('{"layer": 0, "expert": 0}\n{"layer": 0, "expert": 0}', "has two labels"),
        ("{", "line 1"),
    ],
)
def test_lines_that_are_no_labels_are_refused(demo: Run, tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "l.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=message):
        expert_labels.read(demo, tmp_path / "l.jsonl")


def test_a_label_that_fits_scores_high_and_one_that_does_not_scores_half(demo: Run, examples: xr.Dataset) -> None:
    """The mock model recognizes which texts are of the expert, or guesses all of them."""
    own = {e.text for e in label_proposals._examples(examples, 2, 5)}

    def recognizes(prompt: str) -> str:
        if "Describe" in prompt:
            return "a label\nof two lines"
        texts = [line.partition(". ") for line in prompt.splitlines() if line.partition(". ")[0].isdigit()]
        return str([int(n) for n, _, text in texts if json.loads(text) in own])

    def guesses(prompt: str) -> str:
        return "label" if "Describe" in prompt else str(list(range(1, 17)))

    def rows(ask: label_proposals.Ask) -> dict[int, dict[str, Any]]:
        return {row["expert"]: row for row in label_proposals.propose(demo, examples, ask, name="m", layers=[2])}

    row = rows(recognizes)[5]
    assert row["proposed"] == "a label of two lines"
    assert (row["score"], row["scored"]) == (1.0, 16.0)
    assert 0.7 < row["score_low"] < row["score_high"] == 1.0
    assert rows(guesses)[5]["score"] == 0.5
    assert np.isnan(rows(lambda prompt: "no list")[5]["score"]), "an answer that cannot be read is not counted"
    assert rows(lambda prompt: "") == {}


def test_held_out_texts_are_not_those_of_the_proposal(demo: Run, examples: xr.Dataset) -> None:
    seen: list[str] = []

    def ask(prompt: str) -> str:
        seen.append(prompt)
        return "label" if "Describe" in prompt else "[]"

    (row,) = [r for r in label_proposals.propose(demo, examples, ask, name="m", layers=[2]) if r["expert"] == 5]
    assert row["score"] == 0.5
    proposals = [p for p in seen if "Describe" in p]
    detections = [p for p in seen if "Describe" not in p]
    assert len(proposals) == len(detections)
    data = demo.dataset
    for proposal, detection in zip(proposals, detections, strict=True):
        shown = {line for line in proposal.splitlines() if line.startswith('"')}
        scored = {line.partition(". ")[2] for line in detection.splitlines() if line.partition(". ")[0].isdigit()}
        assert len(shown) >= 1
        assert len(shown & scored) <= len(scored) // 2, "texts of other tokens may read the same"
    assert data.sizes["token"] > 0


def test_a_label_of_a_channel_or_of_shown_prompts_scores_half(demo: Run, examples: xr.Dataset) -> None:
    """The texts to score are of other prompts than those shown, and the others' are of the same channels.

    Negative control: others of any channel, as before.
    """
    own = label_proposals._examples(examples, 2, 5)
    prompt = independent_prompts(demo)
    shown, held_out = label_proposals._held_out(own, prompt)
    assert len(shown) == label_proposals.SHOWN
    assert len(held_out) == label_proposals.SCORED
    assert not {prompt[e.sequence] for e in shown} & {prompt[e.sequence] for e in held_out}
    routed = label_proposals._Routing(demo, examples)
    others = routed.others(2, 5, held_out, np.random.default_rng(0))
    assert [e.channel for e in others if e] == [e.channel for e in held_out]
    pool = routed._pool[2]
    anywhere = [pool[i].channel for i in np.random.default_rng(0).permutation(len(pool))[: len(held_out)]]
    assert anywhere != [e.channel for e in held_out], "negative control"
    two = [e for e in own if prompt[e.sequence] in {prompt[e.sequence] for e in own[:2]}]
    few = label_proposals._held_out(two, prompt)
    assert all(few)
    assert not {prompt[e.sequence] for e in few[0]} & {prompt[e.sequence] for e in few[1]}


def test_an_error_of_the_host_names_the_expert(demo: Run, examples: xr.Dataset) -> None:
    def ask(prompt: str) -> str:
        raise HostError("401: no key")

    with pytest.raises(JobError, match="layer 0 expert 0: 401: no key"):
        list(label_proposals.propose(demo, examples, ask, name="m"))


def test_the_command(demo: Run, tmp_path: Path) -> None:
    run = tmp_path / "r.zarr"
    shutil.copytree(DATA / "demo.zarr", run)
    done = CliRunner().invoke(app, ["label", str(run)])
    assert done.exit_code == 0, done.output
    assert "64 experts, 0 proposed, 0 written by hand" in done.output
    file = tmp_path / "r.zarr.labels.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[5]["label"] = "=HYPERLINK(1)"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    host = FakeHost()
    host.reply = lambda path, body, n: (200, chat("digits" if n % 2 == 0 else "[1]"), {})
    try:
        arguments = ["label", str(run), "--host", host.url, "--model", "m", "--layers", "1"]
        done = CliRunner().invoke(app, arguments)
    finally:
        host.server.shutdown()
        host.server.server_close()
    assert done.exit_code == 0, done.output
    assert "16 proposed, 1 written by hand" in done.output
    ds = expert_examples.load(wb.open_run(run))
    assert ds["label"].values[0, 5] == "=HYPERLINK(1)"
    assert ds["label"].values[1, 0] == "digits"
    assert np.isfinite(ds["label_score"].values[1]).all()
    wrong = CliRunner().invoke(app, ["label", str(run), "--host", host.url])
    assert "go together" in str(wrong.exception)
    wrong = CliRunner().invoke(app, ["label", str(run), "--host", host.url, "--model", "m", "--layers", "9"])
    assert "layers 0 to 3" in str(wrong.exception)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    shutil.copytree(DATA / "demo.zarr", tmp_path / "r.zarr")
    return tmp_path / "r.zarr"


def answered(path: str, body: Any, n: int) -> Any:
    return 200, chat("[1]" if "JSON list" in body["messages"][0]["content"] else "digits"), {}


def label(run: Path, *more: str) -> Result:
    return run_command("label", str(run), *more)


@pytest.fixture
def host() -> Iterator[FakeHost]:
    host = FakeHost()
    host.reply = answered
    yield host
    host.server.shutdown()
    host.server.server_close()


def test_a_host_that_fails_costs_no_proposal_and_the_next_start_goes_on(run: Path, host: FakeHost) -> None:
    asked: list[int] = []

    def fails_later(path: str, body: Any, n: int) -> Any:
        asked.append(n)
        return answered(path, body, n) if n < 10 else (401, {"error": "no key"}, {})

    host.reply = fails_later
    options = ("--host", host.url, "--model", "m", "--layers", "1")
    done = label(run, *options)
    assert (done.code, done.problem()) == (1, ""), done
    assert "layer 1 expert 5" in done.err
    before = (run.parent / "r.zarr.labels.jsonl").read_text()
    assert before.count('"proposed_by": "m"') == 5
    host.reply, asked[:] = (lambda *given: (asked.append(0), answered(*given))[1]), []
    done = label(run, *options)
    assert "5 experts have labels that m proposed" in done.out
    assert (done.code, len(asked)) == (0, 2 * 11), done
    straight = shutil.copytree(run, run.parent / "other.zarr")
    assert label(straight, *options).code == 0
    other = (run.parent / "other.zarr.labels.jsonl").read_text()
    assert other == (run.parent / "r.zarr.labels.jsonl").read_text(), "a resumed job ends with what an undisturbed does"


def test_what_is_written_while_a_host_proposes_is_kept(run: Path, host: FakeHost) -> None:
    assert label(run).code == 0
    file = run.parent / "r.zarr.labels.jsonl"

    def edits(path: str, body: Any, n: int) -> Any:
        if n == 3:
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            rows[40]["label"] = "mine"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return answered(path, body, n)

    host.reply = edits
    done = label(run, "--host", host.url, "--model", "m", "--layers", "1")
    assert "16 proposed, 1 written by hand" in done.out
    assert json.loads(file.read_text().splitlines()[40])["label"] == "mine"


def test_a_refused_command_writes_nothing(run: Path, host: FakeHost) -> None:
    """What cannot be replaced and what cannot be asked: the folder is as it was."""
    file = run.parent / "r.zarr.labels.jsonl"
    makes: list[Callable[[], object]] = [
        lambda: os.mkfifo(file),
        lambda: file.symlink_to(run.parent / "elsewhere"),
        file.mkdir,
        lambda: file.write_text("mine"),
        lambda: file.write_text('{"id": "a transcript"}\n'),
        lambda: os.truncate(os.open(file, os.O_CREAT | os.O_WRONLY), 2**40),
    ]
    for make in makes:
        make()
        before = snapshot(run.parent)
        for more in ((), ("--host", host.url, "--model", "m")):
            done = label(run, *more)
            assert (done.code, done.problem()) == (2, ""), done
        assert snapshot(run.parent) == before
        file.rmdir() if file.is_dir() else file.unlink()
    before = snapshot(run.parent)
    for url in ("nowhere", "ftp://x", "http://a:b@c/"):
        assert label(run, "--host", url, "--model", "m").code == 2
    assert snapshot(run.parent) == before


def test_two_commands_that_ask_a_host_are_one_too_many(run: Path, host: FakeHost) -> None:
    with FileLock(run.parent / "r.zarr.labels.jsonl.proposals"):
        done = label(run, "--host", host.url, "--model", "m")
    assert done.code == 2
    assert "is being written by process" in done.err
    assert label(run).code == 0
