"""Massive activations and super experts: a planted one is found and its removal matters; nano has none."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import workbench as wb
from tests.conftest import DATA
from workbench.errors import InputError
from workbench.experiments import super_experts
from workbench.experiments.from_run import transcripts
from workbench.experiments.super_experts import magnitudes, massive, nearest_in_load
from workbench.figures import default
from workbench.harmony.transcripts import Transcript
from workbench.model.transformer import GptOss

LAYER, DIMENSION = 1, 5


@pytest.fixture(scope="module")
def rows() -> list[Transcript]:
    every = transcripts(wb.open_run(DATA / "demo.zarr"))
    return [row for row in every if row.effort == "low" and row.meta["task"] in ("recall", "sort")][::6]


@contextmanager
def planted(model: GptOss, expert: int) -> Iterator[None]:
    """One expert's bias writes a huge entry at every token that it is chosen for."""
    bias = model.blocks[LAYER].mlp.experts.down.bias
    before = bias.detach().clone()
    with torch.no_grad():
        bias[expert, DIMENSION] += 5e4
    try:
        yield
    finally:
        with torch.no_grad():
            bias.copy_(before)


@pytest.mark.filterwarnings("ignore:only .* prompts")
def test_a_planted_super_expert_is_found_and_its_removal_takes_the_massive_activations_away(
    nano: GptOss, rows: list[Transcript]
) -> None:
    load = super_experts.load_of(super_experts.routed_slots(nano, rows))
    expert = int(np.argsort(load[LAYER])[-4])
    with planted(nano, expert):
        result = super_experts.experiment(nano, rows, controls=20)
    assert result["experts"].attrs["super_experts"] == f"{LAYER}.{expert}"
    assert int(result["activations"]["massive"][0]) == 0
    assert int(result["activations"]["massive"][LAYER]) > 0
    assert f"layer {LAYER}, dimension {DIMENSION}" in result["activations"].attrs["summary"]
    assert all(item.draw().data and len(item.table()) for item in default.gallery(result).values())
    removal = result["removal"].sel(measure="log of the largest activation")
    assert float(removal["change"]) < -2
    assert float(removal["p_family"]) <= 0.05
    assert np.abs(removal["random"]).max() < 0.5, "the negative control: other experts' removal leaves them"


def test_nano_has_no_massive_activation_and_limits_decide(nano: GptOss, rows: list[Transcript]) -> None:
    result = magnitudes(nano, rows[:4])
    assert result.largest.shape == (4, sum(len(row.tokens) for row in rows[:4]))
    assert len(massive(result)) == 0
    assert len(massive(result, magnitude=1, ratio=2)) > 0
    _, cache = nano.run_with_cache(torch.from_numpy(rows[0].tokens.astype(np.int64))[None])
    one = cache["blocks.2.hook_resid_post"][0].abs()
    np.testing.assert_allclose(result.largest[2, : len(one)], one.max(-1).values.numpy(), rtol=1e-4)
    np.testing.assert_allclose(
        magnitudes(nano, rows[:1]).output[2].max(), float(cache["blocks.2.mlp.experts.hook_out"].abs().max()), rtol=1e-4
    )


def test_sizes_are_means_over_prompts(nano: GptOss, monkeypatch: pytest.MonkeyPatch) -> None:
    """One prompt has a long sequence whose sinks and activations change. Negative control: means over tokens."""
    lengths = [90, *[2] * 9]
    rows = [Transcript(f"s{i}", f"p{i}", "", np.full(n, i, np.int32), 1) for i, n in enumerate(lengths)]
    first = np.repeat(np.arange(10), lengths) == 0
    ones, none = np.ones((1, len(first))), np.zeros((1, 1))
    before = super_experts.Magnitudes(ones, ones.astype(int), ones, np.zeros(len(first)), none)
    changed = before._replace(largest=np.where(first, np.e, ones), sink=np.where(first, 0.5, 0.0))
    monkeypatch.setattr(super_experts, "magnitudes", lambda *args, **options: changed)
    monkeypatch.setattr(super_experts, "logprobs", lambda model, rows, of, *edits: np.zeros(len(rows)))
    removal = super_experts._removal(nano, rows, before, [[(0, 0)]])
    np.testing.assert_allclose(removal, [[0.0, 0.1, 0.05]])
    assert changed.sink.mean() > 0.4, "negative control"


def test_controls_are_the_nearest_in_load_and_never_the_chosen() -> None:
    load = np.arange(12.0).reshape(3, 4)
    assert nearest_in_load(load, [(1, 1)], 2, 0) == [[(1, 0)], [(1, 2)]]
    pairs = nearest_in_load(load, [(0, 3), (2, 0)], 5, 0)
    assert all((0, 3) not in cells and (2, 0) not in cells and len(set(cells)) == 2 for cells in pairs)
    with pytest.raises(InputError, match="only 11 other sets of 1 experts"):
        nearest_in_load(load, [(0, 0)], 20, 0)


def test_wrong_options_are_refused(nano: GptOss, rows: list[Transcript]) -> None:
    with pytest.raises(InputError, match="magnitude=-1, ratio=1000: expected positive"):
        super_experts.experiment(nano, rows, magnitude=-1)
    with pytest.raises(InputError, match="controls=3: at least 20"):
        super_experts.experiment(nano, rows, controls=3)
