"""Steering is a dose curve ranked among random directions of the same norm."""

import numpy as np
import pytest
import torch

import workbench as wb
from tests.conftest import DATA
from workbench.errors import InputError
from workbench.experiments import steering
from workbench.experiments.from_run import transcripts
from workbench.harmony.transcripts import Transcript


def test_random_directions_have_the_same_norm_and_differ() -> None:
    like = torch.randn(64, generator=torch.Generator().manual_seed(1)) * 3
    drawn = torch.stack(steering.random_directions(like, 30, 0))
    torch.testing.assert_close(drawn.norm(dim=-1), like.norm().expand(30))
    cosine = (drawn @ drawn.T) / like.norm() ** 2
    assert float((cosine - torch.eye(30)).abs().max()) < 0.7
    assert float(drawn.mean(0).norm()) < 0.4 * float(like.norm())


@pytest.fixture(scope="module")
def rows() -> list[Transcript]:
    every = transcripts(wb.open_run(DATA / "demo.zarr"))
    return [row for row in every if row.effort == "medium" and row.meta["task"] in ("count", "recall")][::4]


@pytest.mark.filterwarnings("ignore:only .* prompts")
def test_a_dose_curve_beside_random_directions(rows: list[Transcript], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steering, "DOSES", (0.0, 4.0))
    nano = wb.load("nano", dtype=torch.float32)
    result = steering.experiment(nano, rows, controls=20)["direction"]
    assert result["random"].sizes == {"control": 20, "dose": 2}
    none = result.sel(dose=0.0)
    assert float(np.abs(none["change"]).max()) < 1e-3
    assert float(none["p_family"]) > 0.05, "a dose of zero does nothing, and random directions neither"
    assert float(result["change"].sel(dose=4.0).max()) < -0.01
    np.testing.assert_allclose(result["change"].values[1], result["random"].mean("control"), rtol=1e-6, atol=1e-9)
    assert "rank p" in result.attrs["summary"]
    with pytest.raises(InputError, match="controls=8: at least 20 random controls"):
        steering.experiment(nano, rows, controls=8)
