"""What a capture writes is what the model does; killed and resumed it writes the same.

Also tests `workbench.capture.job_plan` and `workbench.capture.job_log`.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

import workbench as wb
from tests.cli.running import run_command
from workbench.capture import pipeline, recording
from workbench.errors import InputError, JobError
from workbench.harmony.transcripts import read_transcripts
from workbench.model.transformer import GptOss
from workbench.runs import examples
from workbench.runs.verify import verify

Stored = Callable[[Path], dict[str, bytes]]
EVERYTHING = ["routing", "examples", "router_logits", "sinks", "logprobs", "resid_post:1,3", "attn.z:0", "mlp_out:2"]


@pytest.fixture(scope="module")
def run_path(nano: GptOss, transcripts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("r") / "run.zarr"
    wb.capture(nano, transcripts, path, record=EVERYTHING, unit_tokens=1024)
    return path


@torch.no_grad()
def test_records_are_what_hooks_see_one_sequence_at_a_time(nano: GptOss, transcripts: Path, run_path: Path) -> None:
    run = wb.open_run(run_path)
    assert run.progress[1] > 1, "the test needs several units"
    sequences, _ = read_transcripts(transcripts, tokenizer=nano.tokenizer)
    for number in (0, 7, len(sequences) - 1):
        tokens = torch.from_numpy(sequences[number].tokens).long()
        logits, cache = nano.run_with_cache(tokens[None])
        got = run.sequence(number).compute()
        assert np.array_equal(got["id"], tokens)
        for layer in range(nano.cfg.n_layers):
            for t in range(len(tokens)):
                want = cache[f"blocks.{layer}.mlp.hook_expert_indices"][0, t].tolist()
                assert set(got["experts"].values[layer, t]) == set(want)
            gates = cache[f"blocks.{layer}.mlp.hook_expert_weights"][0]
            np.testing.assert_allclose(got["gates"].values[layer], gates, atol=2e-3)
            np.testing.assert_allclose(got["sink"].values[layer], cache[f"blocks.{layer}.attn.hook_sink"][0], atol=2e-3)
        scores = cache["blocks.2.mlp.router.hook_out"][0]
        np.testing.assert_allclose(got["router_logits"].values[2], scores, rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(
            got["hook_resid_post"].sel(layer=3), cache["blocks.3.hook_resid_post"][0], rtol=1e-2, atol=1e-2
        )
        np.testing.assert_allclose(
            got["attn.hook_z"].sel(layer=0), cache["blocks.0.attn.hook_z"][0], rtol=1e-2, atol=1e-3
        )
        logp = logits[0].log_softmax(-1)
        want_logp = logp[:-1].gather(1, tokens[1:, None])[:, 0]
        np.testing.assert_allclose(got["logprob"].values[1:], want_logp, rtol=1e-4, atol=1e-4)
        assert np.isnan(got["logprob"].values[0])
        entropy = -(logp.exp() * logp).sum(-1)[:-1]
        np.testing.assert_allclose(got["entropy"].values[1:], entropy, rtol=1e-4, atol=1e-4)


def test_a_captured_run_is_valid(run_path: Path) -> None:
    assert verify(run_path) == []
    run = wb.open_run(run_path)
    assert run.status == "complete"
    assert run.provenance["harmony"]["name"] == "oss-harmony"
    assert run.provenance["transcripts"]["name"] == "transcripts.jsonl"
    assert set(run.sequences["effort"]) == {"low", "high"}
    assert set(run.sequences["correct"]) == {1}
    assert "arithmetic" in set(run.sequences["domain"])
    final = run.messages.query("channel == 'final'")
    assert set(final["role"]) == {"assistant"}


def test_an_interrupted_job_goes_on_and_ends_up_the_same(
    nano: GptOss, transcripts: Path, run_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: Stored
) -> None:
    calls = 0
    compute = pipeline.compute

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return compute(*arguments)

    monkeypatch.setattr(pipeline, "compute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        wb.capture(nano, transcripts, tmp_path / "r", record=EVERYTHING, unit_tokens=1024)
    done, total = wb.open_run(tmp_path / "r").progress
    assert done == 1
    state = f"valid, but not finished: 1 of {total} units; rerun the capture to resume"
    assert state in run_command("verify", str(tmp_path / "r")).out
    wb.capture(nano, transcripts, tmp_path / "r", record=EVERYTHING, unit_tokens=1024)
    assert calls == 1 + wb.open_run(run_path).progress[1], "the committed unit was computed again"
    assert stored(tmp_path / "r") == stored(run_path)
    assert "not finished" not in run_command("verify", str(tmp_path / "r")).out


def test_rows_that_cannot_be_used_are_skipped_and_listed(
    nano: GptOss, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    bad = [
        "{not json",
        json.dumps({**rows[0], "id": "x", "effort": "extreme"}),
        json.dumps({"id": "y", "prompt_id": "y", "effort": "low", "tokens": [5, 10**6], "n_prompt": 1}),
    ]
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join([json.dumps(rows[0]), *bad, json.dumps(rows[1])]) + "\n")
    run = wb.capture(nano, path, tmp_path / "r")
    assert len(run.sequences) == 2
    assert [reject["line"] for reject in run.provenance["rejects"]] == [2, 3, 4]
    with pytest.raises(InputError, match="3 rows cannot be used; the first: line 2"):
        wb.capture(nano, path, tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()
    path.write_text("\n".join(bad))
    with pytest.raises(InputError, match="none of the 3 rows"):
        wb.capture(nano, path, tmp_path / "none")


def test_another_transcript_file_cannot_go_on_with_a_run(
    nano: GptOss, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(rows[0]) + "\n")
    wb.capture(nano, path, tmp_path / "r")
    path.write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(InputError, match="transcripts digest"):
        wb.capture(nano, path, tmp_path / "r")


def test_nan_weights_are_refused_with_their_layer(nano: GptOss, transcripts: Path, tmp_path: Path) -> None:
    broken: GptOss = wb.load("nano", dtype=torch.float32)
    broken.blocks[2].attn.sinks.data = torch.full_like(broken.blocks[2].attn.sinks, torch.nan)
    with pytest.raises(JobError, match="not finite in layer 2"):
        wb.capture(broken, transcripts, tmp_path / "r")
    assert wb.open_run(tmp_path / "r").progress[0] == 0


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (["routing", "routing"], "twice"),
        (["resid_post:1", "hook_resid_post:2"], "twice"),
        (["resid_pots"], "choose from .*resid_post"),
        (["attn.pattern"], "a value for each pair of tokens"),
        (["resid_post:9"], r"no layer 9; the model has layers 0 to 3"),
        (["resid_post:one"], "layers takes numbers and ranges"),
    ],
)
def test_what_cannot_be_recorded_is_refused(nano: GptOss, record: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        recording.parse(record, nano.cfg)


def test_a_hook_point_may_be_named_with_or_without_hook(nano: GptOss) -> None:
    short, full = (recording.parse([name], nano.cfg) for name in ("attn.z:1", "attn.hook_z:1"))
    assert short == full
    assert short.activations[0].d == nano.cfg.n_heads * nano.cfg.d_head
    assert recording.parse(["mlp.experts.post"], nano.cfg).activations[0].layers == (0, 1, 2, 3)


def test_recorded_examples_are_those_of_the_routing_whatever_the_units(
    nano: GptOss, transcripts: Path, run_path: Path, tmp_path: Path
) -> None:
    lists = examples.of_run(wb.open_run(run_path))
    plain = wb.capture(nano, transcripts, tmp_path / "plain", record=["routing"])
    large = wb.capture(nano, transcripts, tmp_path / "large", record=["routing", "examples"])
    assert len(large.committed) < len(wb.open_run(run_path).committed)
    for run in (plain, large):
        result = examples.of_run(run)
        assert all(np.array_equal(result[name], values) for name, values in lists.items())


def test_examples_that_are_not_those_of_the_tokens_are_found(nano: GptOss, transcripts: Path, tmp_path: Path) -> None:
    run = wb.capture(nano, transcripts, tmp_path / "r", record=["routing", "examples"])
    assert verify(run.path, recompute=True) == []
    shutil.rmtree(tmp_path / "r" / "manifest")
    group = zarr.open_group(run.path)
    group.attrs["schema"] = 2
    del group.attrs["digest"]
    group["examples/top_position"][0, 2, 1, 0, 0] += 1
    assert any("examples/top_position" in problem.what for problem in verify(run.path))
