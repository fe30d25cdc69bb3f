"""What confounds lengths, tasks and prompts is not called a difference; pooling all tokens of a side calls it one."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from workbench.studies.comparison import prompt_numbers
from workbench.studies.contrast import contrast
from workbench.studies.matching import sums_by_prompt
from workbench.studies.statistics import false_discovery
from workbench.studies.synthetic import SyntheticTokens


def pooled_difference(run: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The former engine, a negative control: all tokens of a side together, with a jackknife over prompts."""
    blocks = list(run.blocks(name))
    prompt = prompt_numbers(run.sequences)
    n_prompts = int(prompt.max()) + 1
    sums, tokens = [0.0, 0.0], [np.zeros(n_prompts), np.zeros(n_prompts)]
    for block in blocks:
        for side, code in enumerate((2, 4)):
            at = block["channel"] == code
            values = block[name][:, at]
            if name == "experts":
                values = (values[..., None] == np.arange(run.model["num_experts"])).mean(2)
            take = prompt[block["sequence"][at]]
            total = np.zeros((n_prompts, *values.swapaxes(0, 1).shape[1:]))
            np.add.at(total, take, values.swapaxes(0, 1).astype(np.float64))
            sums[side] = sums[side] + total
            tokens[side] += np.bincount(take, minlength=n_prompts)

    def difference(without: int | None) -> np.ndarray:
        means = []
        for total, n in zip(sums, tokens, strict=True):
            included = np.ones(n_prompts, dtype=bool)
            included[[] if without is None else without] = False
            means.append(np.asarray(total)[included].sum(0) / max(n[included].sum(), 1))
        return means[0] - means[1]

    value = difference(None)
    away = np.stack([difference(i) for i in range(n_prompts)])
    error = np.sqrt(((away - away.mean(0)) ** 2).sum(0) * (n_prompts - 1) / n_prompts)
    p = 2 * scipy.stats.t.sf(np.abs(value) / np.maximum(error, 1e-300), n_prompts - 1)
    return value, false_discovery(p) < 0.05


CONFOUNDS = (
    "task",
    "a task without analysis",
    "effort with task",
    "difficulty",
    "heavy tails",
    "one giant conversation",
    "five prompts",
    "two hundred prompts",
    "duplicated prompts",
)
POOLED_FAILS = ("task", "a task without analysis", "effort with task", "difficulty", "duplicated prompts")
COPIES = 4  # ids that have the same prompt, where prompts are duplicated


def confounded(seed: int, kind: str) -> SyntheticTokens:
    """Conversations in which analysis and final do not differ on average, while lengths, tasks and prompts do."""
    rng = np.random.default_rng(seed)
    n_prompts = {"five prompts": 5, "two hundred prompts": 200}.get(kind, 40)
    rows: list[dict[str, Any]] = []
    parts: list[tuple[np.ndarray, ...]] = []
    for prompt in range(n_prompts):
        hard = rng.random()
        task = prompt % 2
        level = rng.normal(0.3, 0.05, 4)
        if kind != "duplicated prompts" or prompt % COPIES == 0:
            own_shift = rng.normal(0, 0.05, 4) if kind == "duplicated prompts" else np.zeros(4)
        if kind in ("task", "a task without analysis", "effort with task"):
            level = level + 0.2 * task
        if kind == "difficulty":
            level = level + 0.3 * hard
        efforts = ("low", "high") if kind != "effort with task" else (("low", "high")[task],)
        for effort in efforts:
            n_analysis, n_final = int(rng.integers(10, 20)), int(rng.integers(5, 15))
            if kind == "task":
                n_analysis += 40 * task
            if kind == "a task without analysis" and task:
                n_analysis = 0
            if kind == "effort with task":
                n_analysis *= 1 + 3 * task
            if kind == "difficulty":
                n_analysis += int(100 * hard)
            if kind == "heavy tails":
                n_analysis = min(int(10 * rng.pareto(1.1)) + 3, 600)
            if kind == "one giant conversation" and not rows:
                n_analysis = 3000
            channel = np.repeat([1, 2, 4], [4, n_analysis, n_final])
            n = len(channel)
            sink = level + rng.normal(0, 0.1, (1, n, 4)) + own_shift * (channel == 4)[:, None]
            ids = np.full(n, prompt // COPIES if kind == "duplicated prompts" else prompt)
            parts.append((np.full(n, len(rows)), np.arange(n), channel, sink, rng.integers(0, 4, (1, n, 1)), ids))
            rows.append({"id": f"{prompt}/{effort}", "prompt_id": f"{prompt}", "effort": effort, "task": f"t{task}"})
    names, axes = ("sequence", "position", "channel", "sink", "experts", "id"), (0, 0, 0, 1, 1, 0)
    joined = {n: np.concatenate([p[i] for p in parts], a) for i, (n, a) in enumerate(zip(names, axes, strict=True))}
    model = {"n_layers": 1, "n_heads": 4, "num_experts": 4, "experts_per_token": 1, "windows": [None]}
    return SyntheticTokens(f"c{seed}", pd.DataFrame(rows).rename_axis("sequence"), model, joined, {})


@pytest.mark.parametrize("kind", CONFOUNDS)
def test_confounds_are_not_called_differences(kind: str, long: bool) -> None:
    """Family-wise: any of four heads called different, without and with the control of position."""
    seeds = 1000 if long else 25
    wrong = {control: 0 for control in ("none", "position", "pooled")}
    for seed in range(seeds):
        run = confounded(seed, kind)
        result = contrast(run, "sink", "channel", "analysis", "final")
        for control in ("none", "position"):
            wrong[control] += bool(result["different"].sel(control=control).any())
        wrong["pooled"] += bool(pooled_difference(run, "sink")[1].any())
    allowed = scipy.stats.binom.ppf(0.999, seeds, 0.06)  # 6 of 25, 84 of 1,000
    print(f"| {kind} | {' | '.join(f'{n / seeds:.3f}' for n in wrong.values())} |")
    assert wrong["none"] <= allowed
    assert wrong["position"] <= allowed
    if kind in POOLED_FAILS:
        assert wrong["pooled"] > allowed  # negative control


def test_sums_of_weighted_cells_are_those_of_plain_addition() -> None:
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(3, 40)) * (rng.random((3, 40)) < 0.3)
    weights[2] = 0
    prompt, values = rng.integers(0, 9, 40), rng.normal(size=(40, 6))
    for weight, (present, sums) in zip(weights, sums_by_prompt(weights, prompt, values), strict=True):
        expected = np.zeros((9, 6))
        np.add.at(expected, prompt, weight[:, None] * values)
        totals = np.zeros((9, 6))
        totals[present] = sums
        np.testing.assert_allclose(totals, expected, atol=1e-12)
        assert set(present) == set(prompt[weight != 0])
