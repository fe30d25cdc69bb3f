"""Sink differences by label: the engine's numbers, a planted head found, words removed, nulls and refusals.

Also tests `workbench.figures.sink_difference`.
"""

import numpy as np
import pytest

import workbench as wb
from tests.conftest import DATA
from workbench.errors import InputError
from workbench.figures import sink_difference as figures
from workbench.harmony.labels import CHANNELS
from workbench.studies.contrast import contrast
from workbench.studies.sink_difference import study
from workbench.studies.synthetic import SyntheticTokens, planted_tokens

SIDES = {"a": "channel=final", "b": "channel=analysis"}


def test_between_channels_the_numbers_are_those_of_all_studies() -> None:
    """Negative control: all tokens pooled give other numbers."""
    run = wb.open_run(DATA / "demo.zarr")
    result = study(run, **SIDES)["heads"]
    theirs = contrast(run, "sink", "channel", "final", "analysis", controls=("none", "token"))
    for control, name in (("prompt", "none"), ("prompt and token", "token")):
        for variable in ("difference", "low", "high", "p", "q", "different", "bound", "tokens_a", "prompts"):
            np.testing.assert_allclose(
                result[variable].sel(control=control), theirs[variable].sel(control=name), atol=1e-6
            )
    pooled = result["mean_a"] - result["mean_b"]
    assert not np.allclose(pooled, result["difference"].sel(control="prompt"), atol=1e-3)
    drawn = figures.gallery({"heads": result})
    assert list(drawn) == ["heads_prompt", "heads_prompt_and_token"]
    assert all(item.draw().data and len(item.table()) for item in drawn.values())


def test_roles_of_nano_are_compared_and_their_positions_stated() -> None:
    result = study(wb.open_run(DATA / "demo.zarr"), a="role=developer,part=content", b="role=user,part=content")[
        "heads"
    ]
    assert float(result["position_a"]) < float(result["position_b"])
    assert "Mean position of the tokens" in result.attrs["summary"]
    assert int(result["prompts"].max()) >= 5


def test_a_planted_head_is_found_and_the_others_are_not() -> None:
    result = study(planted_tokens(seed=2, sink_shift={"final": 0.2}), **SIDES)["heads"].sel(control="prompt")
    planted = result.sel(head=0)
    assert planted["different"].all()
    assert ((planted["low"] < 0.2) & (planted["high"] > 0.2)).mean() > 0.5
    assert (
        "head 0, more in channel=final"
        in study(planted_tokens(seed=2, sink_shift={"final": 0.2}), **SIDES)["heads"].attrs["summary"]
    )


def test_a_difference_of_words_disappears_at_the_same_token_ids() -> None:
    """Negative control: without matching, words look like channels."""
    run = planted_tokens(seed=4, n_prompts=30)
    rng = np.random.default_rng(0)
    n = len(run.tokens["position"])
    odd = rng.random(n) < np.where(run.tokens["channel"] == CHANNELS.index("final"), 0.8, 0.2)
    sink = run.tokens["sink"].copy()
    sink[..., 1] += 0.2 * odd
    tokens = {**run.tokens, "id": 2 * rng.integers(0, 4, n) + odd, "sink": sink}
    result = study(SyntheticTokens(run.digest, run.sequences, run.model, tokens, run.truth), **SIDES)["heads"]
    assert result["different"].sel(control="prompt", head=1).all()
    assert not result["different"].sel(control="prompt and token", head=1).any()


def test_p_is_calibrated_without_a_difference() -> None:
    p = [study(planted_tokens(seed=seed, n_prompts=20, n_layers=1), **SIDES)["heads"]["p"] for seed in range(25)]
    rate = float(np.mean([one.sel(control="prompt").values < 0.05 for one in p]))
    assert rate <= 0.13, rate


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        ({"a": "channel=finale", "b": "channel=analysis"}, "channel 'finale': choose from"),
        ({"a": "channel=final", "b": "channel=final"}, "tokens are on both sides"),
        ({"a": "task=t0,channel=final", "b": "task=t1,channel=final"}, "no prompt has tokens of both sides"),
    ],
)
def test_wrong_sides_are_refused(sides: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        study(planted_tokens(n_prompts=6), **sides)
