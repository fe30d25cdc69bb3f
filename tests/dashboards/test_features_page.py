"""The features page: frequencies by channel and the strongest tokens are those of a loop over the record."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import workbench as wb
from workbench.dashboards import features_page
from workbench.harmony.labels import CHANNELS
from workbench.runs import Run

PROMPTS = [
    [
        {"role": "user", "content": f"{a}+{b}"},
        {"role": "assistant", "channel": "analysis", "content": f"{a}+{b}={a + b};"},
        {"role": "assistant", "channel": "final", "content": str(a + b)},
    ]
    for a, b in ((2, 3), (4, 5), (6, 1))
]


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


def test_the_strongest_tokens_are_found(run: Run) -> None:
    data = run.dataset[["sae_features", "sequence"]].compute()
    values = data["sae_features"].sel(layer=1).values[:, 3]
    found = features_page.strongest(run, "sae_features", 0, 3)
    assert found["value"].iloc[0] == pytest.approx(values.max(), rel=1e-3)
    assert int(found["sequence"].iloc[0]) == int(data["sequence"].values[values.argmax()])
    assert found["sequence"].is_unique
