"""A plan states what a job will take, writes nothing, and refuses what cannot fit."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import workbench as wb
from tests.cli.running import run_command
from workbench import harmony
from workbench.capture import estimate, job
from workbench.capture.sample import record_of
from workbench.capture.shape_model import ShapeModel, sample_transcripts
from workbench.cli import app
from workbench.errors import InputError
from workbench.harmony.transcripts import write_transcripts
from workbench.model.config import PUBLISHED
from workbench.model.export import save_random
from workbench.model.transformer import GptOss

RECORD = ["routing", "sinks", "logprobs", "resid_post:1", "attn.z:0 channel=analysis"]


def planned(nano: GptOss, transcripts: Path, path: Path) -> estimate.Estimate:
    return job.dry_run(nano, transcripts, path, record=RECORD, unit_tokens=1024)


def test_its_bytes_are_those_of_the_run_and_it_writes_nothing(nano: GptOss, transcripts: Path, tmp_path: Path) -> None:
    plan = planned(nano, transcripts, tmp_path / "r")
    assert not list(tmp_path.iterdir())
    run = wb.capture(nano, transcripts, tmp_path / "r", record=RECORD, unit_tokens=1024)
    assert plan.units == run.progress[1]
    assert plan.done == 0
    assert plan.tokens == run.dataset.sizes["token"]
    assert plan.sequences == len(run.sequences)
    used = 0
    for name in ("tokens", "routing", "attention", "activations", "selected", "summaries"):
        for _, array in run.group[name].arrays():
            dims = array.metadata.dimension_names
            rows = plan.tokens / array.shape[dims.index("token")] if "token" in dims else 1
            used += round(array.size * array.dtype.itemsize * rows)
    assert plan.raw_bytes == used
    assert plan.disk_bytes == pytest.approx(sum(disk_by_record(tmp_path / "r").values()), rel=0.2)
    routing_bytes = {name: size for name, size in plan.per_token.items() if name == "routing"}
    assert routing_bytes == {"routing": 4 * 4 * 3}
    again = planned(nano, transcripts, tmp_path / "r")
    assert (again.done, again.tokens, again.raw_bytes) == (plan.units, 0, 0)


EVERY = [
    "routing",
    "router_logits",
    "sinks",
    "logprobs",
    "resid_post",
    "resid_mid reduce=norm",
    "mlp_out reduce=mean",
    "attn_out reduce=moments sketch=4",
    "resid_pre reduce=message part=content",
    "attn.z every=4 heads=0-3",
    wb.Recorder("out_norm", hook="mlp.experts.hook_out", reduce=lambda x: x.float().norm(dim=-1), dims=("slot",)),
]


def disk_by_record(path: Path) -> Counter[str]:
    """The bytes of a run's files by record, tables and metadata apart."""
    sizes: Counter[str] = Counter()
    for file in (p for p in path.rglob("*") if p.is_file()):
        kind, name, *rest = (*file.relative_to(path).parts, "")
        is_array = rest[:1] == ["c"] and kind not in ("sequences", "messages", "units")
        kind = "summaries" if kind == "totals" else kind
        sizes[record_of(f"{kind}/{name}") if is_array and name != "groups" else "other"] += file.stat().st_size
    return sizes


def off_by(plan: estimate.Estimate, path: Path, least: int = 20_000) -> dict[str, float]:
    """Records of some size whose estimate is more than a fifth off, and by which factor."""
    sizes = {name: size for name, size in disk_by_record(path).items() if size >= least and name != "other"}
    factors = {name: plan.disk.get(name, 0) / size for name, size in sizes.items()}
    ratio_of_all = sum(plan.disk.values()) / sum(disk_by_record(path).values())
    return {name: f for name, f in (factors | {"all": ratio_of_all}).items() if not 0.8 <= f <= 1.2}


def test_every_record_takes_the_disk_that_was_planned(nano: GptOss, transcripts: Path, tmp_path: Path) -> None:
    plan = job.dry_run(nano, transcripts, tmp_path / "r", record=EVERY, unit_tokens=1024)
    wb.capture(nano, transcripts, tmp_path / "r", record=EVERY, unit_tokens=1024)
    assert off_by(plan, tmp_path / "r") == {}
    uncompressed = replace(plan, disk=plan.raw)  # a negative control
    assert {"all", "routing", "sinks", "hook_mlp_out"} <= set(off_by(uncompressed, tmp_path / "r"))


@pytest.mark.long
def test_a_shape_without_weights_takes_the_disk_of_a_model_of_that_shape(tmp_path: Path) -> None:
    """Two layers of the width of gpt-oss-20b with random weights; 40 s and 2 GB."""
    cfg = replace(PUBLISHED["20b"], n_layers=2, windows=(128, None), d_vocab=8192)
    model = wb.load(str(save_random(tmp_path / "model", cfg)))
    rows = sample_transcripts(model.tokenizer, 5, 400)
    write_transcripts(tmp_path / "t.jsonl", rows)
    shape = ShapeModel("shape", cfg, model.tokenizer)
    plan = job.dry_run(shape, tmp_path / "t.jsonl", tmp_path / "r", record=EVERY, unit_tokens=1024)
    wb.capture(model, tmp_path / "t.jsonl", tmp_path / "r", record=EVERY, unit_tokens=1024)
    assert off_by(plan, tmp_path / "r") == {}


def test_a_published_shape_is_planned_without_weights(tmp_path: Path) -> None:
    rows = sample_transcripts(harmony.tokenizer(), 3, 200)
    write_transcripts(tmp_path / "t.jsonl", rows)
    words = ["capture", "openai/gpt-oss-20b", str(tmp_path / "t.jsonl"), str(tmp_path / "r"), "--record", "routing"]
    planned = run_command(*words, "--dry-run")
    assert planned.code == 0, planned.err
    flat = " ".join(planned.out.split())
    assert "gpt-oss-20b without weights" in flat
    assert "estimated for one H100" in flat.replace("│ ", "")
    assert not (tmp_path / "r").exists()
    refused = run_command("capture", "20b", *words[2:])
    assert (refused.code, "is a shape without weights: add --dry-run" in refused.err) == (2, True)


def test_info_plans_a_capture_of_a_number_of_tokens() -> None:
    words = [
        "info",
        "openai/gpt-oss-20b",
        "--tokens-total",
        "1e6",
        "--record",
        "routing",
        "--tokens-per-second",
        "1000",
    ]
    planned = run_command(*words)
    assert planned.code == 0, planned.err
    flat = re.sub(r"[│┃\s]+", " ", planned.out)
    assert "1,000, 1,000,000" in flat  # sequences, tokens
    assert "about 17 min at 1,000 tokens/s, as you gave it" in flat
    assert re.search(r"routing 288 [\d.]+ MB [\d.]+ MB", flat)
    assert "1.5" in run_command("info", "20b", "--tokens-total", "1.5").err


def test_what_cannot_fit_is_refused_before_anything_is_written(
    nano: GptOss, transcripts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "free_bytes", lambda path: 10_000)
    plan = planned(nano, transcripts, tmp_path / "r")
    assert not plan.fits
    with pytest.raises(InputError, match="would be written, and the disk has"):
        estimate.refuse_what_cannot_fit(plan, tmp_path / "r")
    with pytest.raises(InputError, match="the disk has"):
        wb.capture(nano, transcripts, tmp_path / "r", record=RECORD, unit_tokens=1024)
    assert not list(tmp_path.iterdir())


def test_the_command_prints_the_plan(transcripts: Path, tmp_path: Path) -> None:
    ran = CliRunner().invoke(app, ["capture", "nano", str(transcripts), str(tmp_path / "r"), "--dry-run"])
    assert ran.exit_code == 0, ran.output
    for words in ("units", "bytes a token", "disk free", "tokens/s"):
        assert words in ran.output
    assert not (tmp_path / "r").exists()
    url = CliRunner().invoke(app, ["capture", "nano", str(transcripts), "memory://plan/r", "--dry-run"])
    assert url.exit_code == 0
    assert "unknown" in url.output


def test_a_job_into_memory_is_read_and_verified_there_and_not_shared(
    nano: GptOss, transcripts: Path, tmp_path: Path
) -> None:
    from workbench.runs.verify import verify

    local = wb.capture(nano, transcripts, tmp_path / "r", unit_tokens=1024)
    run = wb.capture(nano, transcripts, "memory://jobs/r.zarr", unit_tokens=1024)
    assert not verify("memory://jobs/r.zarr")
    assert np.array_equal(run.dataset["experts"], local.dataset["experts"])
    with pytest.raises(InputError, match="in the memory of one process"):
        wb.capture(nano, transcripts, "memory://jobs/other.zarr", unit_tokens=1024, workers=2)


def test_sinks_as_sums_alone(nano: GptOss, transcripts: Path, tmp_path: Path) -> None:
    from workbench.runs.verify import verify

    uninterrupted = wb.capture(nano, transcripts, tmp_path / "whole", record=["sinks"], unit_tokens=1024)
    sums = wb.capture(nano, transcripts, tmp_path / "sums", record=["sink_sums"], unit_tokens=1024)
    assert "sink" not in sums.dataset
    assert "attention" not in sums.group
    for name in ("sink_sum", "sink_sumsq"):
        assert np.array_equal(sums.summary(name), uninterrupted.summary(name))
        assert np.array_equal(sums.total(name), uninterrupted.total(name))
    assert not verify(tmp_path / "sums")
