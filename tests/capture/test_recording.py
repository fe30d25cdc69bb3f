"""The options of `--record` decide what is stored: heads, tokens, reductions; each against the raw activations."""

from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import workbench as wb
from workbench.capture import compute, recording
from workbench.capture.record_buffers import sketch_matrix
from workbench.errors import InputError, JobError
from workbench.harmony import CHANNELS
from workbench.model.transformer import GptOss
from workbench.runs.reader import Run
from workbench.runs.verify import verify

RAW = ["resid_post:1,3", "attn.z:0", "mlp_out:2"]


@pytest.fixture(scope="module")
def raw(nano: GptOss, transcripts: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return wb.capture(nano, transcripts, tmp_path_factory.mktemp("raw") / "run", record=RAW, unit_tokens=1024)


def captured(nano: GptOss, transcripts: Path, path: Path, *record: str) -> Run:
    run = wb.capture(nano, transcripts, path, record=list(record), unit_tokens=1024)
    assert verify(path) == []
    return run


def values(data: xr.Dataset, name: str) -> np.ndarray:
    """[layer, token, d] of the layers and heads that were recorded: the others are NaN at every token."""
    array = data[name].transpose("layer", "token", ...)
    array = array.dropna("layer", how="all")
    array = array.dropna("head", how="all") if "head" in array.dims else array
    return np.asarray(array.values).reshape(*array.shape[:2], -1)


def off(got: np.ndarray, want: np.ndarray) -> float:
    """Relative error; the raw run was rounded to bfloat16, what it is compared with was not."""
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-9))


def test_only_the_chosen_heads(nano: GptOss, transcripts: Path, raw: Run, tmp_path: Path) -> None:
    run = captured(nano, transcripts, tmp_path / "r", "attn.z:0 index=0,5")
    complete = values(raw.dataset, "attn.hook_z").reshape(1, -1, nano.cfg.n_heads, nano.cfg.d_head)
    assert np.array_equal(
        values(run.dataset, "attn.hook_z"), complete[:, :, [0, 5]].reshape(1, -1, 2 * nano.cfg.d_head)
    )


@pytest.mark.parametrize(
    "selection", ["channel=analysis", "channel=final,prompt every=3", "role=assistant part=content last=2"]
)
def test_only_the_chosen_tokens(nano: GptOss, transcripts: Path, raw: Run, tmp_path: Path, selection: str) -> None:
    run = captured(nano, transcripts, tmp_path / "r", f"resid_post:1,3 {selection}")
    which = {k: v if k in ("role", "channel", "part") else int(v) for k, v in (w.split("=") for w in selection.split())}
    which = {k: v.split(",") if isinstance(v, str) else v for k, v in which.items()}
    members = wb.harmony.token_set(tokenizer=nano.tokenizer, **which)  # type: ignore[arg-type]
    data = raw.dataset
    owner, ids = data["sequence"].values, data["id"].values
    mask = np.concatenate([members(ids[owner == s]) for s in np.unique(owner)])
    assert 0 < mask.sum() < len(mask)
    got, want = values(run.dataset, "hook_resid_post"), values(data, "hook_resid_post")
    assert np.array_equal(got[:, mask], want[:, mask])
    assert np.isnan(got[:, ~mask]).all()
    tokens = run.summary("hook_resid_post_tokens")
    assert int(tokens.sum()) == mask.sum()
    total = run.summary("hook_resid_post_sum").sum(["sequence", "channel"]).values
    np.testing.assert_allclose(total, want[:, mask].sum(1), rtol=1e-3, atol=1e-2)


def test_the_mean_of_each_message_at_its_last_token(nano: GptOss, transcripts: Path, raw: Run, tmp_path: Path) -> None:
    run = captured(nano, transcripts, tmp_path / "r", "resid_post:1,3 part=content reduce=message")
    data, got = raw.dataset, values(run.dataset, "hook_resid_post")
    want = values(data, "hook_resid_post")
    content = data["part"].values == wb.harmony.PARTS.index("content")
    key = data["sequence"].values.astype(np.int64) * 1000 + data["message"].values
    rows = 0
    for message in np.unique(key[content]):
        own = np.flatnonzero((key == message) & content)
        assert off(got[:, own[-1]], want[:, own].mean(1)) < 0.01
        assert np.isnan(got[:, own[:-1]]).all()
        rows += 1
    assert rows == int((~np.isnan(got[0, :, 0])).sum())


def test_moments_are_sums_and_squares_by_channel_and_the_sketch_is_of_second_moments(
    nano: GptOss, transcripts: Path, raw: Run, tmp_path: Path
) -> None:
    run = captured(nano, transcripts, tmp_path / "r", "resid_post:1,3 reduce=moments sketch=16")
    assert "hook_resid_post" not in run.dataset
    data = raw.dataset
    x, channel = values(data, "hook_resid_post").astype(np.float64), data["channel"].values
    sums, squares = (run.summary(f"hook_resid_post_{name}").sum("sequence") for name in ("sum", "sumsq"))
    sketch, tokens = run.summary("hook_resid_post_sketch"), run.summary("hook_resid_post_tokens").sum("sequence")
    omega = sketch_matrix(run.spec.activations[0]).double().numpy()
    for code, name in enumerate(CHANNELS):
        own = x[:, channel == code]
        assert int(tokens[code]) == own.shape[1], name
        assert off(sums[code].values, own.sum(1)) < 0.01
        assert off(squares[code].values, (own**2).sum(1)) < 0.01
        assert off(sketch[code].values, np.einsum("ltd,lte,er->ldr", own, own, omega)) < 0.01


def test_reductions_do_not_depend_on_how_passes_are_cut(
    nano: GptOss, transcripts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = ("resid_post:1 reduce=moments sketch=4", "mlp_out reduce=message", "resid_mid:2 channel=final")
    uninterrupted = captured(nano, transcripts, tmp_path / "a", *record)
    monkeypatch.setattr(compute, "FORWARD_TOKENS", 150)
    cut = captured(nano, transcripts, tmp_path / "b", *record)
    for name in ("hook_resid_post_sum", "hook_resid_post_sumsq", "hook_resid_post_sketch", "hook_resid_post_tokens"):
        np.testing.assert_allclose(cut.summary(name), uninterrupted.summary(name), rtol=1e-3, atol=1e-3, err_msg=name)
    for name in ("hook_mlp_out", "hook_resid_mid"):
        a, b = values(uninterrupted.dataset, name), values(cut.dataset, name)
        assert np.array_equal(np.isnan(a), np.isnan(b))
        np.testing.assert_allclose(np.nan_to_num(a), np.nan_to_num(b), rtol=2e-2, atol=1e-2)


def test_nan_in_a_sum_is_refused(nano: GptOss, transcripts: Path, tmp_path: Path) -> None:
    broken: GptOss = wb.load("nano", dtype=torch.float32)
    broken.blocks[2].attn.o.bias.data = torch.full_like(broken.blocks[2].attn.o.bias, torch.nan)
    with pytest.raises(JobError, match="is not finite"):
        wb.capture(broken, transcripts, tmp_path / "r", record=["resid_post:3 reduce=moments"])
    assert wb.open_run(tmp_path / "r").progress[0] == 0


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("resid_post:1 heads=2", "resid_post has no heads: leave heads= out"),
        ("router_logits heads=2", "router_logits has no heads: use experts="),
        ("sinks experts=2", "sinks has no experts: use heads="),
        ("routing experts=2", "routing has no experts=.*select when you read"),
        ("resid_post:1 head_index=2", "'head_index' is not an option: use layers=, heads="),
        ("resid_post:1 every", "'every' has no value: write every=1"),
        ("resid_post:1 every=two", "every takes a number from 1"),
        ("resid_post:1 every=2 every=3", "every= is given twice"),
        ("resid_post:1 layers=2", "layers= is given twice"),
        ("resid_post layers=3-1", "layers takes numbers and ranges, as in layers=0-3,7; got '3-1'"),
        ("resid_post layers=0-9", "no layer 4; the model has layers 0 to 3"),
        ("resid_post:one", "no file 'resid_post.py'|layers takes numbers"),
        ("resid_post:1 channel=thinking", r"channel \['thinking'\]"),
        ("resid_post:1 reduce=max", "use one of raw, norm, mean, moments, message"),
        ("routing reduce=mean", "use one of raw; expert numbers have no mean"),
        ("resid_post:1 sketch=4", "goes with reduce=moments"),
        ("router_logits sketch=4", "router_logits has no option sketch="),
        ("resid_post:1 index=0", "resid_post has no heads or slots"),
        ("attn.z:1 index=8", "attn.z has heads 0 to 7"),
        ("attn.k:1 heads=4", "has key-value heads 0 to 0"),
        ("resid_post:1 last=0", "last takes a number from 1"),
        ("logprobs channel=final", "record 'logprobs', and select when you read"),
        ("examples", "also record routing"),
        ("examples layers=0", "examples takes no options"),
        ("sink_sums layers=0", "record 'sinks reduce=moments'"),
        ("top_experts", "top_experts is recorded as routing"),
        ("mlp.router.out channel=final", "recorded as router_logits"),
        ("attn.pattern", "a value for each pair of tokens"),
        ("no_such_file.py:norms", "no file 'no_such_file.py'"),
    ],
)
def test_options_that_mean_nothing_are_refused(nano: GptOss, record: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        recording.parse([record], nano.cfg)


def test_bytes_a_token_are_what_is_stored(nano: GptOss, raw: Run) -> None:
    spec = recording.parse(["routing", "sinks", "router_logits", *RAW], nano.cfg)
    sizes = recording.bytes_per_token(spec, nano.cfg)
    assert sizes["hook_resid_post"] == 2 * nano.cfg.d_model * 2
    assert sizes["routing"] == nano.cfg.n_layers * 4 * 3
    tokens = {name for name, array in raw.group["tokens"].arrays()}
    assert sizes["tokens"] == sum(raw.group["tokens"][name].dtype.itemsize for name in tokens)
