"""Synthetic runs with planted differences of routing, to validate a study and to plan one.

A run is made of sums per sequence, so no model is needed. Every prompt has habits of its own (a Dirichlet draw around
the layer's load), shared by all its efforts and channels: the dependence that a token-level test overlooks.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from workbench.errors import InputError
from workbench.harmony.labels import CHANNELS
from workbench.harmony.messages import EFFORTS

LENGTHS = {"frame": 12, "prompt": 40, "analysis": 200, "final": 30}


@dataclass(frozen=True)
class SyntheticRun:
    """What studies read of a run, and `truth`: the expected load share [channel, effort, layer, expert]."""

    digest: str
    sequences: pd.DataFrame
    truth: xr.DataArray
    summaries: Mapping[str, xr.DataArray]
    attrs: Mapping[str, Any] = field(default_factory=lambda: {"synthetic": True})

    @property
    def recorded(self) -> list[str]:
        """Return the recorded quantities, as those of a stored run."""
        return ["routing"]

    def summary(self, name: str) -> xr.DataArray:
        """Return `expert_count`, `gate_sum` or `tokens` of the run.

        Raises:
            InputError: the name is none of these.
        """
        if name not in self.summaries:
            raise InputError(f"summary {name!r} is not in this run; it holds {', '.join(self.summaries)}")
        return self.summaries[name]


def planted_run(
    *,
    seed: int = 0,
    n_prompts: int = 30,
    efforts: Sequence[str] = EFFORTS,
    tasks: Sequence[str] = ("sums", "recall"),
    n_layers: int = 4,
    n_experts: int = 16,
    experts_per_token: int = 4,
    lengths: Mapping[str, int] | None = None,
    channel_shift: Mapping[str, Mapping[int, float]] | None = None,
    effort_shift: Mapping[str, Mapping[int, float]] | None = None,
    concentration: float = 30.0,
) -> SyntheticRun:
    """Draw a run; `channel_shift={"final": {2: 0.4}}` moves 0.4 of layer 2's load in final to another distribution.

    `effort_shift` does so for the generated channels of one effort; `lengths` are mean tokens a channel (Poisson), and
    analysis grows with effort. Lower `concentration`: prompts differ more.
    """
    rng = np.random.default_rng(seed)
    base, to_channel, to_effort = rng.dirichlet(np.ones(n_experts), size=(3, n_layers))
    lengths = LENGTHS if lengths is None else lengths
    weight = _weights(efforts, n_layers, channel_shift or {}, effort_shift or {})
    moved = weight[..., 0, None] * to_channel + weight[..., 1, None] * to_effort
    stay = 1 - weight.sum(axis=-1)[..., None]
    sequences = _sequences(n_prompts, efforts, tasks)
    habits = np.stack([rng.dirichlet(concentration * layer, size=n_prompts) for layer in base], axis=1)
    mean_length = np.array([[lengths.get(channel, 0) for channel in CHANNELS]] * len(efforts))
    mean_length[:, CHANNELS.index("analysis")] *= np.arange(1, len(efforts) + 1)
    tokens = rng.poisson(np.tile(mean_length, (n_prompts, 1)))
    shares = stay.transpose(1, 0, 2, 3) * habits[:, None, None] + moved.transpose(1, 0, 2, 3)
    shares = shares.reshape(len(sequences), len(CHANNELS), n_layers, n_experts)
    counts = rng.multinomial(tokens[..., None] * experts_per_token, shares).astype(np.uint32)
    return SyntheticRun(
        digest=f"synthetic-{seed}",
        sequences=sequences.assign(length=tokens.sum(axis=1), n_prompt=tokens[:, :2].sum(axis=1), correct=-1),
        truth=xr.DataArray(
            stay * base + moved,
            dims=("channel", "effort", "layer", "expert"),
            coords={"channel": list(CHANNELS), "effort": list(efforts)},
        ),
        summaries=_summaries(sequences, counts, tokens, experts_per_token),
    )


def _weights(
    efforts: Sequence[str],
    n_layers: int,
    channel_shift: Mapping[str, Mapping[int, float]],
    effort_shift: Mapping[str, Mapping[int, float]],
) -> Float[np.ndarray, "channel effort layer 2"]:
    """Return how much of the load is moved for the channel's and for the effort's sake."""
    weight = np.zeros((len(CHANNELS), len(efforts), n_layers, 2))
    for channel, by_layer in channel_shift.items():
        for layer, size in by_layer.items():
            weight[CHANNELS.index(channel), :, layer, 0] = size
    for effort, by_layer in effort_shift.items():
        for layer, size in by_layer.items():
            weight[CHANNELS.index("analysis") :, efforts.index(effort), layer, 1] = size
    return weight


def _sequences(n_prompts: int, efforts: Sequence[str], tasks: Sequence[str]) -> pd.DataFrame:
    """Return one sequence for each prompt and effort."""
    rows = [
        {"id": f"p{prompt}-{effort}", "prompt_id": f"p{prompt}", "effort": effort, "task": tasks[prompt % len(tasks)]}
        for prompt in range(n_prompts)
        for effort in efforts
    ]
    return pd.DataFrame(rows).assign(domain="synthetic")


def _summaries(
    sequences: pd.DataFrame, counts: np.ndarray, tokens: np.ndarray, experts_per_token: int
) -> dict[str, xr.DataArray]:
    names = ("id", "effort", "prompt_id", "task")
    coords: dict[str, Any] = {name: ("sequence", sequences[name].to_numpy(dtype=object)) for name in names}
    coords |= {"channel": list(CHANNELS), "layer": np.arange(counts.shape[2]), "expert": np.arange(counts.shape[3])}
    dims = ("sequence", "channel", "layer", "expert")
    summaries = xr.Dataset(
        {
            "expert_count": (dims, counts),
            "gate_sum": (dims, counts / np.float32(experts_per_token)),
            "tokens": (dims[:2], tokens),
        },
        coords,
    )
    return {str(name): summaries[name] for name in summaries.data_vars}


@dataclass(frozen=True)
class SyntheticTokens:
    """A run of single tokens, in memory, and `truth`: what was planted, by name."""

    digest: str
    sequences: pd.DataFrame
    model: Mapping[str, Any]
    tokens: Mapping[str, np.ndarray]
    truth: Mapping[str, Any]

    def blocks(self, *names: str) -> Iterator[dict[str, np.ndarray]]:
        """Yield all tokens at once, name → [... token ...]."""
        yield {name: self.tokens[name] for name in ("sequence", "position", "channel", *names)}


def planted_tokens(
    *,
    seed: int = 0,
    n_prompts: int = 40,
    efforts: Sequence[str] = EFFORTS,
    n_layers: int = 2,
    n_heads: int = 4,
    n_experts: int = 8,
    sink_shift: Mapping[str, float] | None = None,
    position_slope: float = 0.0,
    effort_shift: Mapping[str, float] | None = None,
    expert_shift: Mapping[str, float] | None = None,
    expert_position: float = 0.0,
    gain: float = 0.0,
) -> SyntheticTokens:
    """Return conversations of a prompt, analysis and final, with sinks and experts whose causes are known.

    sink_shift: added to the sink of head 0 in a channel. position_slope: taken from it per unit of log position, which
    is what seeing more keys does. effort_shift: added in the analysis of an effort. expert_shift: probability moved to
    expert 0 in a channel. expert_position: moved to it per unit of log position. gain: of the probability of a right
    answer, a step of effort. Prompts differ in sinks, experts and difficulty, and all their efforts alike.
    """
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    parts: list[tuple[np.ndarray, ...]] = []
    habit = rng.normal(0, 0.02, (n_prompts, n_layers, n_heads))
    base = rng.dirichlet(np.full(n_experts, 5.0), n_layers)
    difficulty = rng.uniform(0.2, 0.5, n_prompts)
    for prompt in range(n_prompts):
        own = np.stack([rng.dirichlet(200 * layer) for layer in base])
        for step, effort in enumerate(efforts):
            lengths = [int(rng.integers(6, 14)), int(rng.integers(10, 30) * (1 + step)), int(rng.integers(4, 12))]
            channel = np.repeat([CHANNELS.index(c) for c in ("prompt", "analysis", "final")], lengths)
            n = len(channel)
            log_position = np.log1p(np.arange(n))
            sink = 0.3 + habit[prompt][:, None] + rng.normal(0, 0.05, (n_layers, n, n_heads))
            sink -= position_slope * log_position[None, :, None]
            moved = np.clip(expert_position * log_position, 0, 0.9)
            for label, shift in (sink_shift or {}).items():
                sink[..., 0] += shift * (channel == CHANNELS.index(label))
            if effort_shift:
                sink[..., 0] += effort_shift.get(effort, 0.0) * (channel == CHANNELS.index("analysis"))
            for label, shift in (expert_shift or {}).items():
                moved = moved + shift * (channel == CHANNELS.index(label))
            first = np.stack([rng.choice(n_experts, n, p=layer) for layer in own])
            first[:, rng.random(n) < moved] = 0
            parts.append((np.full(n, len(rows)), np.arange(n), channel, sink, first[..., None]))
            rows.append(
                {
                    "id": f"p{prompt}/{effort}",
                    "prompt_id": f"p{prompt}",
                    "effort": effort,
                    "task": f"t{prompt % 2}",
                    "domain": "synthetic",
                    "length": n,
                    "n_prompt": lengths[0],
                    "correct": int(rng.random() < difficulty[prompt] + gain * step),
                }
            )
    names = ("sequence", "position", "channel", "sink", "experts")
    axes = (0, 0, 0, 1, 1)
    joined = {n: np.concatenate([p[i] for p in parts], a) for i, (n, a) in enumerate(zip(names, axes, strict=True))}
    joined["id"] = np.random.default_rng([seed, 1]).integers(0, 40, len(joined["position"]))  # unrelated to the rest
    model = {
        "n_layers": n_layers,
        "n_heads": n_heads,
        "num_experts": n_experts,
        "experts_per_token": 1,
        "windows": [None] * n_layers,
    }
    truth = {
        "sink_shift": sink_shift,
        "effort_shift": effort_shift,
        "expert_shift": expert_shift,
        "base": base,
        "gain": gain,
    }
    return SyntheticTokens(f"synthetic-{seed}", pd.DataFrame(rows).rename_axis("sequence"), model, joined, truth)
