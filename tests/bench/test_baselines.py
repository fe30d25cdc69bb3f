"""A baseline that is missing or fails is a row that states it; two layers agree with transformers."""

import pytest
import torch

from tests.model.conftest import BASE
from workbench.bench import baselines


class Once:
    """A clock that runs a function once."""

    device = torch.device("cpu")

    def __call__(self, function: object) -> float:
        function()  # type: ignore[operator]
        return 1.0


def test_missing_and_failed_baselines_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*arguments: object) -> None:
        raise ImportError("No module named 'gpt_oss'")

    def broken(*arguments: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(baselines, "_expert_layer", absent)
    monkeypatch.setattr(baselines, "_two_layers", broken)
    missing, failed = baselines.measure(Once(), "small", BASE, [4])  # type: ignore[arg-type]
    assert missing["missing"] == "No module named 'gpt_oss'"
    assert failed["failed"] == "RuntimeError: out of memory"


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def test_two_layers_agree_with_transformers_and_a_changed_model_does_not() -> None:
    ours, theirs = baselines._two_layers(BASE, torch.device("cpu"))(6)
    with torch.no_grad():
        expected, ours_read = theirs().float(), ours().float()
    assert correlation(expected, ours_read) > 0.98
    assert correlation(expected, ours_read.flip(-1)) < 0.5, "the negative control"
