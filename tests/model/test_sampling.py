"""Samples follow the truncated distribution, whatever else is in the batch."""

import math

import pytest
import torch
import transformer_lens.utilities
from scipy.stats import chisquare
from torch import Tensor

from workbench.errors import InputError
from workbench.model.sampling import Sampling, token_counts

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])


def exact(top_k: int = 6, top_p: float = 1.0, min_p: float = 0.0, temperature: float = 1.0) -> Tensor:
    """The definition, token by token: LOGITS are in descending order."""
    p = [math.exp(x / temperature) for x in LOGITS.tolist()][:top_k]
    total, probabilities, seen = sum(p), [], 0.0
    for value in p:
        if seen < top_p:
            probabilities.append(value / total)
        seen += value / total
    probabilities = [value for value in probabilities if value >= min_p * probabilities[0]]
    out = torch.zeros(len(LOGITS), dtype=torch.float64)
    out[: len(probabilities)] = torch.tensor(probabilities, dtype=torch.float64) / sum(probabilities)
    return out


def counts(sampling: Sampling, n: int = 4000, shuffle: bool = False) -> Tensor:
    order = torch.randperm(len(LOGITS), generator=torch.Generator().manual_seed(5)) if shuffle else torch.arange(6)
    rngs = [torch.Generator().manual_seed(i) for i in range(n)]
    chosen = sampling.choose(LOGITS[order].repeat(n, 1), rngs)
    return torch.bincount(order[chosen], minlength=len(LOGITS))


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2}, {"top_k": 4, "top_p": 0.9, "min_p": 0.1}],
)
def test_samples_follow_the_definition(options: dict[str, float]) -> None:
    sampling = Sampling(**{"temperature": 1.0, **options})  # type: ignore[arg-type]
    want, drawn = exact(**options), counts(sampling, shuffle=True)  # type: ignore[arg-type]
    assert drawn[want == 0].sum() == 0
    possible = want > 0
    assert chisquare(drawn[possible], want[possible] * drawn.sum()).pvalue > 1e-4
    flat = torch.full_like(want, 1 / len(want))
    assert chisquare(drawn + 1e-9, flat * drawn.sum(), sum_check=False).pvalue < 1e-4, "a uniform sampler is noticed"


def test_a_row_is_sampled_as_if_it_were_alone() -> None:
    sampling, logits = Sampling(1.0, top_k=4), torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    together = sampling.choose(logits, [torch.Generator().manual_seed(i) for i in range(5)])
    alone = [int(sampling.choose(logits[i : i + 1], [torch.Generator().manual_seed(i)])) for i in range(5)]
    assert together.tolist() == alone


def test_greedy_takes_the_smaller_id_of_a_tie_and_marks_nan() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [torch.nan, 1.0, 2.0], [torch.inf, 1.0, 2.0], [-torch.inf, 1.0, 0.0]])
    assert Sampling().choose(logits, []).tolist() == [1, -1, -1, 1]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0, "repetition_penalty": 1.5},
        {"temperature": 0.0, "repetition_penalty": 0.6},
        {"temperature": 0.7, "top_k": 1, "freq_penalty": 1.2},
        {"temperature": 1.0, "top_k": 1, "freq_penalty": 0.4, "repetition_penalty": 1.3},
    ],
)
def test_penalties_are_those_of_transformer_lens(options: dict[str, float]) -> None:
    """With top_k=1 nothing is drawn, so that both choose the same token."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(12, (200, 9), generator=generator)
    logits = torch.randn(200, 12, generator=generator)
    theirs = transformer_lens.utilities.sample_logits(logits.clone(), tokens=rows, **options)  # type: ignore[arg-type]
    sampling, rngs = Sampling(**options), [torch.Generator().manual_seed(i) for i in range(200)]  # type: ignore[arg-type]
    counts = token_counts(rows.tolist(), 12, torch.device("cpu"))
    assert sampling.choose(logits, rngs, counts).tolist() == theirs.tolist()
    assert sampling.choose(logits, rngs).tolist() != theirs.tolist(), "the negative control: without the counts"


def test_a_penalty_that_is_no_number_or_has_no_effect_is_refused() -> None:
    none = {"do_sample": None, "top_k": None, "top_p": None, "min_p": None}
    assert Sampling.of(None, **none, freq_penalty=0.5).temperature == 1
    assert Sampling.of(None, **none, repetition_penalty=1.5).temperature == 0
    for options, message in (
        ({"freq_penalty": -0.5}, "freq_penalty -0.5: expected a number from 0"),
        ({"repetition_penalty": 0}, "repetition_penalty 0: expected a number above 0"),
        ({"repetition_penalty": True}, "repetition_penalty True"),
        ({"freq_penalty": 0.5, "temperature": 0.0}, "has no effect on the most probable token"),
    ):
        with pytest.raises(InputError, match=message):
            Sampling.of(**{"temperature": None, **none, **options})  # type: ignore[arg-type]
