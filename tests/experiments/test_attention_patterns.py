"""Attention patterns: rows sum to one with the sink, agree with a run's record, and windows are honest."""

import numpy as np
import pytest
import torch

import workbench as wb
from tests.conftest import DATA
from workbench.errors import InputError
from workbench.experiments import attention_patterns
from workbench.model.transformer import GptOss
from workbench.runs import attention_file


@pytest.fixture(scope="module")
def model() -> GptOss:
    return wb.load("nano", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return [int(t) for t in wb.open_run(DATA / "demo.zarr").sequence(2)["id"].values]


def test_patterns_agree_with_the_recorded_sink_and_sum_to_one(model: GptOss, ids: list[int]) -> None:
    ds = attention_patterns.load(model, ids)
    recorded = wb.open_run(DATA / "demo.zarr").sequence(2)["sink"].transpose("layer", "head", "token").values
    assert np.abs(ds["sink"].values - recorded).max() < 2e-3, "the record has 16 bits"
    total = ds["pattern"].sum("key") + ds["sink"] + ds["earlier"]
    assert np.allclose(total, 1, atol=1e-5)
    without = ds["pattern"].sum("key")
    assert not np.allclose(without, 1, atol=1e-2), "negative control: a pattern that forgets the sink"
    assert not np.triu(ds["pattern"].values, 1).any(), "no query attends to a later key"


def test_a_window_sums_what_lies_before_it(model: GptOss, ids: list[int]) -> None:
    complete = attention_patterns.load(model, ids, layers=[1])
    part = attention_patterns.load(model, ids, layers=[1], start=20, stop=50)
    assert np.allclose(part["pattern"], complete["pattern"].sel(query=range(20, 50), key=range(20, 50)), atol=1e-6)
    before = complete["pattern"].sel(query=range(20, 50), key=range(20)).sum("key")
    assert np.allclose(part["earlier"], before, atol=1e-5)
    assert float(before.max()) > 0.1, "negative control: leaving it out would be seen"


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"layers": [4]}, "expected some of 0 to 3"),
        ({"layers": []}, "expected some of 0 to 3"),
        ({"start": 10, "stop": 10}, "expected a range"),
        ({"stop": 9_999}, "expected a range"),
    ],
)
def test_what_a_sequence_does_not_have_is_refused(
    model: GptOss, ids: list[int], chosen: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        attention_patterns.load(model, ids, **chosen)  # type: ignore[arg-type]


def test_the_size_is_bounded(model: GptOss, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_patterns, "MAX_VALUES", 2 * 8 * 30**2)
    assert attention_patterns.load(model, ids, layers=[0, 1]).sizes["query"] == 30
    with pytest.raises(InputError, match="at most 30 tokens"):
        attention_patterns.load(model, ids, layers=[0, 1], stop=31)


def test_a_file_is_read_back(model: GptOss, ids: list[int], tmp_path: object) -> None:
    ds = attention_patterns.load(model, ids, layers=[2], start=5, stop=25)
    path = tmp_path / "a.npz"  # type: ignore[operator]
    attention_file.write(ds, path)
    again = attention_file.read(path)
    assert again["query"].values.tolist() == list(range(5, 25))
    assert again.attrs["checkpoint_digest"] == model.checkpoint.digest
    for name in ("pattern", "sink", "earlier"):
        assert np.allclose(again[name], ds[name], atol=1e-3)
