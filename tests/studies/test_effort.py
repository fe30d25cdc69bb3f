"""The effort study: planted gains are in their intervals, and nothing is found where nothing was planted."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from tests.studies.summed_runs import with_summaries
from workbench.errors import InputError
from workbench.studies import effort
from workbench.studies.synthetic import planted_tokens


@pytest.mark.parametrize("gain", [0.0, 0.15])
def test_the_gain_of_effort_is_in_its_interval(gain):
    inside = shown = 0
    for seed in range(100, 200):
        run = with_summaries(planted_tokens(seed=seed, n_prompts=60, n_layers=1, n_heads=1, gain=gain))
        table = effort.sequences_of(run).assign(task="")  # tasks and other steps are further cells
        cell = effort.gain(run, table, ["low", "high"]).sel(task="all", step="low → high")
        inside += bool(cell["gain_low"] <= 2 * gain <= cell["gain_high"])
        shown += bool(cell["gain_low"] * cell["gain_high"] > 0)
    assert inside >= 93
    assert shown <= 12 if gain == 0 else shown >= 85


def test_the_effort_study_needs_two_efforts():
    with pytest.raises(InputError, match="compares at least 2"):
        effort.study(with_summaries(planted_tokens(efforts=("high",), n_prompts=5)))


def test_p_of_the_effort_contrasts_is_uniform_without_an_effect():
    from workbench.studies.contrast import contrast

    p = [
        float(
            contrast(planted_tokens(seed=s, n_layers=1, n_heads=1), "sink", "effort", "low", "high", channel="prompt")[
                "p"
            ]
            .sel(control="position")
            .squeeze()
        )
        for s in range(150)
    ]
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.01


def test_gains_of_tasks_are_tested_together_and_have_a_width_where_nothing_changes():
    """Negative control: the intervals alone exclude zero in some of nine tasks without a gain far oftener."""
    wrong = alone = 0
    run = with_summaries(planted_tokens(n_prompts=5))
    for seed in range(40):
        result = effort.gain(run, null_answers(np.random.default_rng(seed)), ["low", "high"])
        tasks = result.drop_sel(task="all")
        wrong += bool(tasks["gain_different"].any())
        alone += bool((tasks["gain_low"] * tasks["gain_high"] > 0).any())
        assert ((result["gain_high"] - result["gain_low"]) > 0.01).all()
        assert (result["gain_low"] >= -1).all()
        assert (result["gain_high"] <= 1).all()
    assert wrong <= 5
    assert alone >= 7, "negative control"
    certain = null_answers(np.random.default_rng(0)).assign(correct=1.0)
    cell = effort.gain(run, certain, ["low", "high"]).sel(task="t0").squeeze()
    assert cell["gain_low"] < 0 < cell["gain_high"]
    assert float(cell["gain_p"]) == 1
    few = effort.gain(run, certain[certain["prompt_id"].isin([f"t0/{i}" for i in range(4)])], ["low", "high"])
    assert np.isnan(few["gain_low"]).all()
    assert "cannot be tested, 4 prompts have both efforts" in few.attrs["summary"]


def null_answers(rng: np.random.Generator, n_tasks: int = 9, n_prompts: int = 20) -> pd.DataFrame:
    """Answers at two efforts that are right by chance alone."""
    rows = [
        {"prompt_id": f"t{task}/{i}", "task": f"t{task}", "effort": effort, "analysis": length + rng.integers(9)}
        for task in range(n_tasks)
        for i in range(n_prompts)
        for effort, length in (("low", 10), ("high", 60))
    ]
    return pd.DataFrame(rows).assign(correct=lambda t: (rng.random(len(t)) < 0.5).astype(float))


def test_the_model_of_accuracy_rarely_has_an_effect_of_ten_prompts_without_one(monkeypatch):
    """Right answers depend on the prompt alone. Negative control: errors without the correction for few prompts."""
    from statsmodels.genmod.generalized_estimating_equations import GEE

    def called() -> float:
        models = [effort.accuracy_model(run, answers(seed), ["low", "medium", "high"]) for seed in range(100)]
        return float(np.mean([model["p"].values[1:] < 0.05 for model in models if model is not None]))

    def answers(seed: int) -> pd.DataFrame:
        rng = np.random.default_rng(seed)
        easy = rng.normal(size=10) * 1.5
        rows = [
            {"prompt_id": i, "effort": e, "analysis": int(n * np.exp(rng.normal() / 2)), "easy": easy[i], "task": ""}
            for i in range(10)
            for e, n in (("low", 20), ("medium", 60), ("high", 150))
        ]
        return pd.DataFrame(rows).assign(correct=lambda t: (rng.random(30) < 1 / (1 + np.exp(-t["easy"]))) * 1.0)

    run = planted_tokens(n_prompts=5)
    assert called() <= 0.05
    fit = GEE.fit
    monkeypatch.setattr(GEE, "fit", lambda model, **options: fit(model))
    assert called() > 0.06, "negative control"


def test_answers_without_a_grade_and_few_prompts_are_stated():
    run = with_summaries(planted_tokens(n_prompts=12))
    ungraded = dataclasses.replace(run, sequences=run.sequences.assign(correct=-1))
    few = with_summaries(planted_tokens(n_prompts=4))
    texts = ["\n".join(d.attrs["summary"] for d in effort.study(r).values()) for r in (run, ungraded, few)]
    assert not any("nan" in text for text in texts)
    assert "accuracy" in texts[0]
    assert "no answer is graded" not in texts[0], "negative control"
    assert texts[1].count("no answer is graded") == 3
    assert "accuracy cannot be tested, fewer than 5 prompts are graded at both efforts" in texts[1]
    assert "[no interval below 5 prompts]" in texts[2]


def test_a_run_with_sums_of_sinks_alone_keeps_the_rest_of_the_study():
    run = with_summaries(planted_tokens(n_prompts=12))

    class WithoutSinks(type(run)):
        def blocks(self, *names):
            if "sink" in names:
                raise InputError("'sink' is not in this run; it recorded routing, sink_sums")
            return super().blocks(*names)

    result = effort.study(WithoutSinks(**{f.name: getattr(run, f.name) for f in dataclasses.fields(run)}))
    assert "routing_low_vs_high_in_analysis" in result
    assert not any(name.startswith("sinks") for name in result)
    assert "Skipped: sinks, as 'sink' is not in this run" in result["cost"].attrs["summary"]
