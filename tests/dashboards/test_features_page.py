"""The features page: frequencies by channel and the strongest tokens are those of a loop over the record."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import workbench as wb
from tests.capture.test_feature_lists import HOOK, write_sae
from workbench.dashboards import features_page
from workbench.dashboards.pages import absent_pages, made
from workbench.dashboards.session import Session
from workbench.dashboards.state import RunRegistry, Selection
from workbench.harmony.labels import CHANNELS
from workbench.hooks.sae import load_sae
from workbench.runs import Run
from workbench.studies import feature_examples

PROMPTS = [
    [
        {"role": "user", "content": f"{a}+{b}"},
        {"role": "assistant", "channel": "analysis", "content": f"{a}+{b}={a + b};"},
        {"role": "assistant", "channel": "final", "content": str(a + b)},
    ]
    for a, b in ((2, 3), (4, 5), (6, 1))
]


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with lists of examples, and the same features at every token."""
    folder = tmp_path_factory.mktemp("listed")
    rows = [{"id": f"s{i}", "prompt_id": f"s{i}", "effort": "high", "messages": m} for i, m in enumerate(PROMPTS)]
    model = wb.load("nano", dtype=torch.float32, device="cpu")
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = write_sae(folder / "sae", model.cfg.d_model)
    every = wb.Recorder(
        "sae_features", hook="hook_resid_post", reduce=load_sae(path).encode, dims=("feature",), layers="2"
    )
    record = ["routing", f"features:{path}", every]
    return wb.capture(model, folder / "answers.jsonl", folder / "run.zarr", record=record)


def test_lists_of_examples_are_shown_as_the_record_of_every_token_is(listed: Run) -> None:
    assert features_page.names(listed) == [HOOK, "sae_features"]
    assert features_page.layers_of(listed, HOOK) == ["2"]
    table, same = (features_page.by_channel(listed, name, 0) for name in (HOOK, "sae_features"))
    assert len(table) > 5
    assert table["feature"].tolist() == same["feature"].tolist()
    np.testing.assert_allclose(table.drop(columns="feature"), same.drop(columns="feature"), atol=0.011)
    feature = int(table["feature"].iloc[0])
    ds = feature_examples.load(listed, [feature])
    strongest = features_page.examples(listed, "sae_features", 0, feature)[0]
    rows = [row for c in ds["channel"].values for row in features_page.listed_rows(ds, "top", c)]
    best = max(rows, key=lambda row: row["activation"])
    assert best["activation"] == pytest.approx(strongest["value"], rel=1e-3)
    assert (best["sequence"], best["position"]) == (strongest["sequence"], strongest["position"])
    other = feature_examples.load(listed, [int(table["feature"].iloc[1])])
    assert not np.array_equal(other["top_activation"], ds["top_activation"]), "negative control: another feature"
    session = Session(RunRegistry([Path(listed.path)]), Selection({}), lambda: None)
    assert "features" not in absent_pages(session)
    assert made("features", session).sidebar[0].options == [HOOK, "sae_features"]
    session.registry.jobs.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("features")
    directions = torch.randn(128, 6, generator=torch.Generator().manual_seed(0)) / 10

    def encode(x: torch.Tensor) -> torch.Tensor:
        return (x.float() @ directions).relu()

    record = wb.Recorder("sae_features", hook="hook_resid_post", reduce=encode, dims=("feature",), layers="1-2")
    rows = [{"id": f"s{i}", "prompt_id": f"s{i}", "effort": "high", "messages": m} for i, m in enumerate(PROMPTS)]
    model = wb.load("nano", dtype=torch.float32, device="cpu")
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return wb.capture(model, folder / "answers.jsonl", folder / "run.zarr", record=["routing", record])


def test_frequencies_are_those_of_the_record(run: Run, demo_run: Path) -> None:
    assert features_page.names(run) == ["sae_features"]
    assert features_page.names(wb.open_run(demo_run)) == []
    table = features_page.by_channel(run, "sae_features", 1).set_index("feature")
    data = run.dataset[["sae_features", "channel"]].compute()
    values = data["sae_features"].sel(layer=2).values if "layer" in data["sae_features"].dims else None
    values = data["sae_features"].values[-1] if values is None else values
    channel = data["channel"].values.astype(str)
    channel = channel if channel[0] in CHANNELS else np.array(CHANNELS)[data["channel"].values]
    for feature in table.index:
        share = 100 * (values[channel == "analysis", feature] > 0).mean()
        assert table.loc[feature, "analysis (%)"] == pytest.approx(share, abs=0.01)
    gaps = (table["analysis (%)"] - table["final (%)"]).abs().tolist()
    assert gaps == sorted(gaps, reverse=True)
    other = features_page.by_channel(run, "sae_features", 0).set_index("feature")
    assert not np.allclose(other["analysis (%)"].reindex(table.index), table["analysis (%)"]), (
        "negative control: a layer"
    )


def test_the_strongest_tokens_are_found_with_the_values_around_them(run: Run) -> None:
    data = run.dataset[["sae_features", "sequence", "position", "id"]].compute()
    values = data["sae_features"].sel(layer=1).values[:, 3].astype(np.float32)
    sequence, position = data["sequence"].values, data["position"].values
    strongest = features_page.examples(run, "sae_features", 0, 3)
    assert strongest[0]["value"] == pytest.approx(values.max(), rel=1e-3)
    assert strongest[0]["sequence"] == int(sequence[values.argmax()])
    assert len({row["sequence"] for row in strongest}) == len(strongest)
    for row in strongest:
        around = (sequence == row["sequence"]) & (position >= row["start"])
        around &= position < row["start"] + len(row["ids"])
        assert row["ids"] == data["id"].values[around].tolist()
        np.testing.assert_allclose(row["values"], values[around], rtol=1e-3)
    other = features_page.examples(run, "sae_features", 1, 3)
    assert other[0]["value"] != strongest[0]["value"], "negative control: another layer"


def test_the_random_sample_is_of_tokens_that_have_the_feature(run: Run) -> None:
    data = run.dataset[["sae_features", "sequence", "position"]].compute()
    values = data["sae_features"].sel(layer=1).values[:, 3].astype(np.float32)
    sampled = features_page.examples(run, "sae_features", 0, 3, "random")
    assert len(sampled) == len(PROMPTS)
    for row in sampled:
        own = (data["sequence"].values == row["sequence"]) & (data["position"].values == row["position"])
        assert values[own].item() == pytest.approx(row["value"], rel=1e-3)
        assert row["value"] > 0
    assert sampled == features_page.examples(run, "sae_features", 0, 3, "random"), "the same sample again"
    top = features_page.examples(run, "sae_features", 0, 3)
    assert {row["position"] for row in sampled} != {row["position"] for row in top}, "negative control: the largest"
