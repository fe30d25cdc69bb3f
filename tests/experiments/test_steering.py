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


@pytest.mark.filterwarnings("ignore:only .* prompts")
def test_steering_by_role_finds_what_a_planted_direction_does(
    rows: list[Transcript], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: what is added at final tokens along one axis destroys the answer. Negative control: other directions."""
    monkeypatch.setattr(steering, "DOSES", (1.0,))
    nano = wb.load("nano", dtype=torch.float32)
    axis = torch.zeros(nano.cfg.d_model)
    axis[5] = 40.0
    user = steering.labelled_tokens(nano, "role=user")
    real = steering._mean

    def mean(model: object, rows: object, point: str, where: object) -> torch.Tensor:
        return axis if repr(where) == repr(user) else torch.zeros_like(axis)

    def reader(x: torch.Tensor, hook: object) -> torch.Tensor:
        """The planted mechanism: a large value on the axis turns the stream around."""
        return torch.where(x[..., 5:6] > 35, -x, x)

    options = {"a": "role=user", "b": "role=system", "at": "channel=final,part=content", "controls": 20}
    with monkeypatch.context() as patch, nano.hooks(fwd_hooks=[("blocks.3.hook_resid_pre", reader)]):
        patch.setattr(steering, "_mean", mean)
        result = steering.experiment(nano, rows, **options)["direction"]  # type: ignore[arg-type]
    assert str(result["which"].values[0]) == "user − system"
    assert float(result["change"].isel(which=0, dose=0)) < -1
    assert float(result["p"].item()) <= 0.05
    assert float(np.abs(result["random"]).max()) < float(np.abs(result["change"].isel(which=0)).max())
    assert "+1 × (user − system)" in result.attrs["summary"]
    point = "blocks.2.hook_resid_post"
    direction = real(nano, rows[:2], point, user) - real(nano, rows[:2], point, steering.labelled_tokens(nano, "final"))
    own = steering.channel_direction(nano, rows[:2], point)
    assert not torch.allclose(direction, own), "the negative control: a direction of roles is not that of channels"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"a": "effort=high"}, "'effort' is not a label of tokens: use channel, role, part"),
        ({"b": "role=king"}, "role .*king.*: use one or several of"),
        ({"at": "channel=commentary"}, "no sequence has tokens in <tokens: channel=.*commentary"),
    ],
)
def test_wrong_tokens_are_refused(rows: list[Transcript], options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        steering.experiment(wb.load("nano", dtype=torch.float32), rows, **options)  # type: ignore[arg-type]
