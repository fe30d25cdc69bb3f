"""The choice of the next token: the most probable one, or a sample of a truncated distribution.

One uniform number a row decides, so that a row's choice depends on its own logits and generator alone. It is drawn on
the host, the rest happens where the logits are.

Reference: top-p, Holtzman et al. 2019, arXiv 1904.09751; min-p, Nguyen et al. 2024, arXiv 2407.01082; repetition
penalty, Keskar et al. 2019, arXiv 1909.05858.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy. top_k, top_p and min_p truncate the distribution, in this order, before sampling.

    As in TransformerLens, repetition_penalty divides the positive and multiplies the negative logits of tokens that
    the row has, and freq_penalty is subtracted from the logits, after the temperature, for each time that the row has
    the token.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: int | float | None = None
    min_p: int | float | None = None
    freq_penalty: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def of(
        cls,
        temperature: int | float | None,
        *,
        do_sample: bool | None,
        top_k: int | None,
        top_p: int | float | None,
        min_p: int | float | None,
        freq_penalty: int | float = 0.0,
        repetition_penalty: int | float = 1.0,
    ) -> "Sampling":
        """Return the sampling that these options ask for.

        Raises:
            InputError: an option is outside its range, or they contradict each other.
        """
        _check_number("freq_penalty", freq_penalty, 0.0, "from 0")
        _check_number("repetition_penalty", repetition_penalty, 1e-9, "above 0")
        sampled = any(option is not None for option in (top_k, top_p, min_p)) or freq_penalty > 0
        if temperature is None:
            temperature = 1.0 if do_sample or (sampled and do_sample is None) else 0.0
        if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not math.isfinite(temperature):
            raise InputError(f"temperature {temperature!r}: expected a finite number from 0")
        if temperature < 0:
            raise InputError(f"temperature {temperature!r}: expected a number from 0 (greedy) upwards")
        if do_sample and temperature == 0:
            raise InputError("do_sample=True with temperature 0: leave one of them out")
        if top_k is not None and (type(top_k) is not int or top_k < 1):
            raise InputError(f"top_k {top_k!r}: expected a whole number from 1")
        if top_p is not None and not 0 < top_p <= 1:
            raise InputError(f"top_p {top_p!r}: expected a number above 0 and at most 1")
        if min_p is not None and not 0 <= min_p <= 1:
            raise InputError(f"min_p {min_p!r}: expected a number from 0 to 1")
        temperature = 0.0 if do_sample is False else float(temperature)
        if freq_penalty > 0 and temperature == 0:
            raise InputError(
                f"freq_penalty {freq_penalty!r} has no effect on the most probable token: sample with a temperature "
                "above 0, or use repetition_penalty"
            )
        return cls(temperature, top_k, top_p, min_p, float(freq_penalty), float(repetition_penalty))

    @property
    def has_penalty(self) -> bool:
        """Return whether `choose` needs the counts of tokens."""
        return self.freq_penalty > 0 or self.repetition_penalty != 1

    def choose(
        self,
        logits: Float[Tensor, "row d_vocab"],
        rngs: Sequence[torch.Generator],
        counts: Int[Tensor, "row d_vocab"] | None = None,
    ) -> Int[Tensor, " row"]:
        """Return a token for each row, −1 where its largest logit is not finite; greedy ties go to the smaller id.

        counts: how often each token is in the row, prompt included; for the penalties.
        """
        top = logits.amax(-1)
        bad = ~torch.isfinite(top)
        if counts is not None:
            logits = self._penalized(logits, counts)
        if self.temperature == 0:
            return torch.where(bad, -1, logits.argmax(-1))
        weight = self.weights(torch.where(bad[:, None], 0.0, logits.double()))
        drawn = torch.cat([torch.rand(1, dtype=torch.float64, generator=rng) for rng in rngs])
        drawn = drawn.to(logits.device, non_blocking=True)
        total = weight.cumsum(-1)
        # The first token whose running total exceeds the draw; never one of weight 0.
        chosen = torch.searchsorted(total, (drawn * total[:, -1])[:, None], right=True)[:, 0]
        return torch.where(bad, -1, chosen.clamp(max=logits.shape[-1] - 1))

    def _penalized(
        self, logits: Float[Tensor, "row d_vocab"], counts: Int[Tensor, "row d_vocab"]
    ) -> Float[Tensor, "row d_vocab"]:
        """Return the logits with both penalties; the temperature is applied to them later."""
        penalty = self.repetition_penalty
        repeated = torch.where(logits > 0, logits / penalty, logits * penalty)
        return torch.where(counts > 0, repeated, logits) - self.freq_penalty * self.temperature * counts

    def weights(self, logits: Float[Tensor, "row d_vocab"]) -> Float[Tensor, "row d_vocab"]:
        """Return probabilities of the truncated distribution, up to a factor for each row."""
        p = (logits / self.temperature).softmax(-1)
        if self.top_k is not None and self.top_k < p.shape[-1]:
            kth = p.topk(self.top_k, -1).values[:, -1:]
            p = torch.where(p >= kth, p, 0.0)
            p = p / p.sum(-1, keepdim=True)
        if self.top_p is not None:
            descending, order = p.sort(dim=-1, descending=True, stable=True)
            before = descending.cumsum(-1) - descending
            p = torch.where((before < self.top_p), descending, 0.0).gather(-1, order.argsort(-1))
        if self.min_p is not None:
            p = torch.where(p >= self.min_p * p.amax(-1, keepdim=True), p, 0.0)
        return p


def _check_number(name: str, value: object, least: float, wanted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
        raise InputError(f"{name} {value!r}: expected a number {wanted}")


def token_counts(rows: Sequence[Sequence[int]], d_vocab: int, device: torch.device) -> Int[Tensor, "row d_vocab"]:
    """Return how often each token is in each row."""
    counts = [torch.bincount(torch.tensor(row, dtype=torch.int64), minlength=d_vocab) for row in rows]
    return torch.stack(counts).to(device)
