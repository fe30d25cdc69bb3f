"""A user's quantity is what its function returns of the activations, written, resumed and verified like any other.

Tests `workbench.capture.recorder` and `workbench.capture.own_record`.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

import workbench as wb
from tests.cli.test_cli import run as command
from workbench.capture import recording
from workbench.capture.recorder import source_digest
from workbench.errors import InputError
from workbench.hooks.sae import SAE, SAEConfig
from workbench.model.transformer import GptOss
from workbench.runs.reader import Run
from workbench.runs.verify import other_content, verify

SCALE = 2.0
Stored = Callable[[Path], dict[str, bytes]]


def expert_norm(x: torch.Tensor) -> torch.Tensor:
    return SCALE * x.float().norm(dim=-1)


NORMS = wb.Recorder(
    "expert_norm", hook="mlp.experts.hook_out", reduce=expert_norm, dims=("slot",), layers="0-1", unit="1"
)
FILE = """
import workbench as wb

def spread(x):
    return x.float().std(dim=-1)

spreads = wb.Recorder("spread", hook="hook_resid_post", reduce=spread)
"""


@pytest.fixture(scope="module")
def few(transcripts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("few") / "transcripts.jsonl"
    path.write_text("".join(line + "\n" for line in transcripts.read_text().splitlines()[:24]))
    return path


@pytest.fixture(scope="module")
def both(nano: GptOss, few: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    record = ["routing", "router_logits", "sinks", "mlp.experts.out:0,1", "resid_post", NORMS]
    return wb.capture(nano, few, tmp_path_factory.mktemp("both") / "run", record=record, unit_tokens=1024)


def capture(nano: GptOss, few: Path, path: Path, *record: str | wb.Recorder) -> Run:
    run = wb.capture(nano, few, path, record=list(record), unit_tokens=1024)
    assert verify(path) == []
    assert verify(path, recompute=True) == []
    return run


def test_the_values_are_those_of_the_function(both: Run) -> None:
    raw = both.dataset["mlp.experts.hook_out"].sel(layer=[0, 1]).values
    norms = both.dataset["expert_norm"]
    assert norms.dims == ("layer", "token", "slot")
    assert norms.attrs["units"] == "1"
    np.testing.assert_allclose(norms.sel(layer=[0, 1]), SCALE * np.linalg.norm(raw, axis=-1), rtol=2e-2)
    assert np.isnan(norms.sel(layer=[2, 3])).all()
    total = both.summary("expert_norm_sum")
    assert total.dims == ("sequence", "channel", "layer", "slot")
    np.testing.assert_allclose(total.sum(["sequence", "channel"]), norms.sel(layer=[0, 1]).sum("token"), rtol=1e-4)
    stored = zarr.open_group(both.path)["records/expert_norm"]
    assert stored.metadata.dimension_names == ("layer_0to1", "token", "slot")
    assert not any("hook" in str(dim) for dim in both.dataset.dims)
    assert not any("hook" in str(d) for name in both.summaries for d in both.summary(name).dims)


def test_a_job_that_is_stopped_resumes_and_another_function_is_refused(nano: GptOss, few: Path, tmp_path: Path) -> None:
    uninterrupted = capture(nano, few, tmp_path / "a", NORMS)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    group = zarr.open_group(tmp_path / "b")
    group["units/committed"][1] = False
    group.attrs["status"] = "writing"
    resumed = wb.capture(nano, few, tmp_path / "b", record=[NORMS], unit_tokens=1024)
    assert resumed.status == "complete"
    np.testing.assert_array_equal(resumed.dataset["expert_norm"], uninterrupted.dataset["expert_norm"])

    def other(x: torch.Tensor) -> torch.Tensor:
        return x.float().norm(dim=-1)

    def factor(by: float) -> wb.Recorder:
        return wb.Recorder("expert_norm", hook="mlp.experts.hook_out", reduce=lambda x: by * x.mean(-1), dims=("slot",))

    assert source_digest(factor(1.0).reduce) != source_digest(factor(2.0).reduce), "the digest reads closures"  # type: ignore[arg-type]
    for changed in (
        wb.Recorder("expert_norm", hook=NORMS.hook, reduce=other, dims=("slot",), layers="0-1"),
        factor(1.0),
    ):
        with pytest.raises(InputError, match="was begun with spec records"):
            wb.capture(nano, few, tmp_path / "b", record=[changed], unit_tokens=1024)


def test_a_method_of_an_autoencoder_can_be_recorded(nano: GptOss) -> None:
    def features(bias: float, k: int = 2) -> wb.Recorder:
        weights = {
            "W_enc": torch.eye(128),
            "W_dec": torch.eye(128),
            "b_enc": torch.zeros(128),
            "b_dec": torch.zeros(128),
        }
        weights["b_enc"] += bias
        sae = SAE(SAEConfig("topk", 128, 128, torch.float32, True, "none", "none", k, False, None), weights)
        return wb.Recorder("f", hook="resid_post", reduce=sae.encode, dims=("feature",), layers="2", dtype="float16")

    (record,) = recording.parse(["routing", features(0.0)], nano.cfg).records
    assert (record.dims, record.shape, record.layers) == (("feature",), (128,), (2,))
    digest = source_digest(features(0.0).reduce)  # type: ignore[arg-type]
    assert digest == record.digest
    for other in (features(0.5), features(0.0, k=3)):  # negative control: other weights, other settings
        assert source_digest(other.reduce) != digest  # type: ignore[arg-type]
    torch.manual_seed(0)
    one, two = torch.nn.Linear(128, 2), torch.nn.Linear(128, 2)
    first, second = (lambda x: one(x) + 1), (lambda x: two(x) + 1)
    assert source_digest(first) != source_digest(second), "modules of torch itself, by weights"


def test_a_recorder_of_a_file_that_the_command_line_names(
    few: Path, both: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FILE)
    for record in ("mine.py:spreads layers=1-2 channel=final", "mine:spreads layers=1-2 channel=final"):
        out = f"run-{record[4]}.zarr"
        code, _, err = command(capsys, "capture", "nano", str(few), out, "--record", record, "--dtype", "float32")
        assert code == 0, err
        run = wb.open_run(out)
        final = run.dataset["channel"].values == wb.harmony.CHANNELS.index("final")
        got = run.dataset["spread"].sel(layer=[1, 2]).values
        want = both.dataset["hook_resid_post"].sel(layer=[1, 2]).values.std(-1, ddof=1)
        np.testing.assert_allclose(got[:, final], want[:, final], rtol=2e-2)
        assert np.isnan(got[:, ~final]).all()
    (tmp_path / "mine.py").write_text("raise OSError('no')")
    code, _, err = command(capsys, "capture", "nano", str(few), "other.zarr", "--record", "mine.py:spreads")
    assert (code, err.count("\n")) == (2, 1)
    assert "'mine.py' fails: OSError: no" in err


def test_workers_record_what_one_process_records(
    nano: GptOss, few: Path, tmp_path: Path, stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FILE)
    written: dict[str, Any] = {}
    exec("def largest(x):\n    return x.float().amax(dim=-1)", written)  # without a source, as in an interpreter
    typed = wb.Recorder("largest", hook="hook_resid_post", reduce=written["largest"])
    record = ["routing", "mine.py:spreads layers=0-1", typed]
    runs = [
        wb.capture(nano, few, tmp_path / f"{workers}", record=record, unit_tokens=1024, workers=workers)
        for workers in (1, 2)
    ]
    one, two = (stored(tmp_path / str(workers)) for workers in (1, 2))
    assert one == two
    assert len(runs[0].committed) > 1
    assert one != two | {"records/largest/c/0/0": b""}  # a negative control


def test_a_file_that_workers_do_not_have_is_one_error(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from distributed import LocalCluster

    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone.py").write_text(FILE + "\nimport os\nos.remove(__file__)\n")  # only the first to read it can
    words = ["capture", "nano", str(few), "run", "--record", "gone.py:spreads"]
    with LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, protocol="tcp", dashboard_address=None, host="127.0.0.1"
    ) as one:
        code, _, err = command(capsys, *words, "--dask", one.scheduler_address)
    assert code == 2
    lines = [line for line in err.splitlines() if not line.startswith("capture: ")]
    assert len(lines) == 1, err
    assert lines[0].startswith("workbench: worker ")
    assert f"there is no file '{tmp_path / 'gone.py'}'" in lines[0]


@pytest.mark.parametrize(
    ("record", "name", "dims"),
    [
        ("router_logits layers=1,3 experts=0,5 channel=final", "router_logits", ("expert",)),
        ("sinks layers=2 heads=0-2 role=assistant", "sink", ("head",)),
        ("routing layers=0-1 part=content every=2", "gates", ("slot",)),
        ("resid_post layers=1 reduce=norm last=3", "hook_resid_post", ()),
    ],
)
def test_every_record_takes_layers_entries_and_tokens(
    nano: GptOss, few: Path, both: Run, tmp_path: Path, record: str, name: str, dims: tuple[str, ...]
) -> None:
    run = capture(nano, few, tmp_path / "r", record)
    got, want = run.dataset[name], both.dataset[name].astype(np.float32)
    if not dims:
        want = np.sqrt((want**2).sum("d_model"))
    assert got.dims == ("layer", "token", *dims)
    there = ~np.isnan(got.values)
    np.testing.assert_allclose(got.values[there], want.values[there], rtol=2e-2, atol=2e-2)
    spec = run.spec.records[-1]
    tokens = int(run.summary(f"{name}_tokens").sum())
    assert there.sum() == tokens * len(spec.layers) * spec.d > 0
    if "routing" in record:
        experts = run.dataset["experts"].values
        np.testing.assert_array_equal(experts[there], both.dataset["experts"].values[there])
        assert (experts[~there] == -1).all()


@pytest.mark.parametrize("reduce", ["mean", "moments"])
def test_means_of_router_logits_and_activations(
    nano: GptOss, few: Path, both: Run, tmp_path: Path, reduce: str
) -> None:
    run = capture(nano, few, tmp_path / "r", f"router_logits:1 reduce={reduce}", f"resid_post:2 reduce={reduce}")
    assert not {"router_logits", "hook_resid_post"} & set(run.dataset)
    for name, layer in (("router_logits", 1), ("hook_resid_post", 2)):
        want = both.dataset[name].sel(layer=layer).sum("token")
        np.testing.assert_allclose(run.summary(f"{name}_sum").sum(["sequence", "channel"])[0], want, rtol=2e-2, atol=2)
        assert (f"{name}_sumsq" in run.summaries) == (reduce == "moments")


def test_a_quantity_of_pairs_of_tokens_can_be_reduced_by_a_function(nano: GptOss, few: Path, tmp_path: Path) -> None:
    def entropy(pattern: torch.Tensor) -> torch.Tensor:  # [batch head query key] → [batch query head]
        return -torch.special.xlogy(pattern, pattern).sum(-1).transpose(1, 2)

    own = wb.Recorder(
        "attention_entropy", hook="attn.hook_pattern", reduce=entropy, dims=("head",), layers=[1], heads=[0, 3]
    )
    run = capture(nano, few, tmp_path / "r", own)
    entropies = run.sequence(int(run.sequences.index[0]))["attention_entropy"].sel(layer=1)
    ids = torch.from_numpy(run.sequence(0)["id"].values.astype(np.int64))[None]
    _, cache = nano.run_with_cache(ids, names_filter="blocks.1.attn.hook_pattern")
    np.testing.assert_allclose(
        entropies.sel(head=[0, 3]), entropy(cache["blocks.1.attn.hook_pattern"])[0, :, [0, 3]], atol=1e-4
    )
    assert np.isnan(entropies.sel(head=1)).all()


@pytest.mark.parametrize(
    ("recorder", "message"),
    [
        (wb.Recorder("experts", hook="mlp.hook_out"), "name is taken by another quantity"),
        (wb.Recorder("a b", hook="hook_mlp_out"), "not letters, digits"),
        (wb.Recorder("a", hook="mlp.hook_out"), "'mlp.hook_out' is not a hook point"),
        (wb.Recorder("a", hook="hook_mlp_out", reduce="max"), "use one of raw, norm, mean, moments or a function"),
        (
            wb.Recorder("a", hook="hook_mlp_out", reduce=lambda x: x.sum(-1), dims=("b",)),
            r"returns \(1, 3\) of activations",
        ),
        (
            wb.Recorder("a", hook="hook_mlp_out", reduce=lambda x: x - x.mean(1, keepdim=True), dims=("b",)),
            "mixes tokens",
        ),
        (wb.Recorder("a", hook="hook_mlp_out", reduce=lambda x: x[..., :2], dims=("d_model",)), "another name"),
        (wb.Recorder("a", hook="hook_mlp_out", reduce=lambda x: x @ x), "its function fails on activations"),
        (wb.Recorder("a", hook="hook_mlp_out", reduce=lambda x: 3), "return a tensor"),
        (wb.Recorder("a", hook="hook_mlp_out", channel="analyses"), "channel .'analyses'."),
        (wb.Recorder("a", hook="hook_mlp_out", layers="0-9"), "no layer 4"),
        (wb.Recorder("a", hook="hook_mlp_out", dtype="int8"), "use one of float32, float16"),
    ],
)
def test_recorders_that_cannot_work_are_refused(nano: GptOss, recorder: wb.Recorder, message: str) -> None:
    with pytest.raises(InputError, match=message):
        recording.parse([recorder], nano.cfg)


@pytest.mark.parametrize(
    ("tried", "message"),
    [
        ("layers=0-3", "is an option: write it after a record, as in 'router_logits layers=0-3'"),
        ("top_experts", "is recorded as routing"),
        ("router_logits chanel=final", "'chanel' is not an option: use layers="),
        ("router_logits channel=thought", "thought"),
    ],
)
def test_what_a_new_user_tries_is_answered_with_the_right_name(nano: GptOss, tried: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        recording.parse([tried], nano.cfg)
    assert recording.parse(["router_logits channel=final layers=0-3"], nano.cfg).records[0].layers == (0, 1, 2, 3)


def test_what_others_add_to_a_run_is_left_alone_and_mentioned(
    nano: GptOss, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    capture(nano, few, path, "sinks")
    group = zarr.open_group(path)
    group.create_group("probes").create_array("scores", data=np.arange(3.0))
    group.create_array("summaries/mine", data=np.arange(3.0))
    group.create_array("tokens/mine", data=np.arange(3.0))
    (path / "probes" / "half.partial").write_text("kept")
    again = capture(nano, few, path, "sinks")
    assert "mine" not in again.dataset
    assert "mine" not in again.summaries
    assert (path / "probes" / "half.partial").exists()
    assert other_content(again) == ["probes", "summaries/mine", "tokens/mine"]
    code, out, _ = command(capsys, "verify", str(path))
    assert code == 0
    assert "not of this run, left alone: probes, summaries/mine, tokens/mine" in out
    (path / "attention" / "sink" / "zarr.json").write_text("{}")
    assert verify(path), "the negative control: a changed file of the run is no other content"
