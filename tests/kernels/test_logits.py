"""Log-probabilities and entropies in torch and in Triton against float64."""

import pytest
import torch
from torch import Tensor

from tests.kernels.gpu.poison import poison
from workbench.kernels import logits as reference
from workbench.kernels.gpu import logits as kernels

both = pytest.mark.parametrize("logits", [reference, kernels], ids=["torch", "kernel"])


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


def case(rows: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(vocabulary)
    return torch.randn(rows, vocabulary, generator=rng) * 6, torch.randint(vocabulary, (rows,), generator=rng)


def exact(x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    logp = x.double().log_softmax(-1)
    return logp[torch.arange(len(x)), chosen], -torch.where(logp == -torch.inf, 0.0, logp.exp() * logp).sum(-1)


@both
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (5, 7), (3, 4096), (4, 9001)])
def test_agrees_with_float64(logits: object, rows: int, vocabulary: int) -> None:
    x, chosen = case(rows, vocabulary)
    for got, want in zip(logits.predict(x, chosen), exact(x, chosen), strict=True):  # type: ignore[attr-defined]
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-5)
    if vocabulary > 1:
        neighbour = (chosen + 1) % vocabulary
        got = logits.predict(x, chosen).logprob.double()  # type: ignore[attr-defined]
        assert not torch.allclose(got, exact(x, neighbour)[0], atol=1e-2), "another token is noticed"


@both
def test_masked_logits_have_no_probability_and_no_entropy(logits: object) -> None:
    x, _ = case(3, 50)
    x[:, 10:] = -torch.inf
    x[2, 1:] = -torch.inf
    got = logits.predict(x, torch.tensor([3, 20, 0]))  # type: ignore[attr-defined]
    assert got.logprob[1] == -torch.inf
    assert got.logprob[2] == 0
    assert got.entropy[2].abs() < 1e-5
    torch.testing.assert_close(got.entropy.double(), exact(x, torch.tensor([3, 3, 0]))[1], rtol=1e-5, atol=1e-5)


@both
def test_nan_is_not_hidden(logits: object) -> None:
    x, chosen = case(2, 5000)
    x[1, 4999] = torch.nan
    got = logits.predict(x, chosen)  # type: ignore[attr-defined]
    assert torch.isfinite(got.logprob[0])
    assert got.logprob[1].isnan()
    assert got.entropy[1].isnan()


@both
def test_large_logits_do_not_overflow(logits: object) -> None:
    x = torch.tensor([[1e4, 1e4 - 1.0, -1e4]])
    got = logits.predict(x, torch.tensor([1]))  # type: ignore[attr-defined]
    torch.testing.assert_close(got.logprob.double(), exact(x, torch.tensor([1]))[0], rtol=1e-5, atol=2e-3)
