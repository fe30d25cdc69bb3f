"""An experiment gives the answers that the library gives, compares them correctly, and leaves the model as it was.

Also tests `workbench.cli.live`.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import workbench as wb
from tests.cli.running import run_command
from tests.conftest import DATA
from workbench.harmony.transcripts import read_transcripts
from workbench.hooks.interventions import applied
from workbench.live.experiment import Experiment, RoutingRecorder, exchanged, first_difference, limited, summarize
from workbench.live.result import result_of, text_of
from workbench.model.prompt_cache import PromptCache, installed_hooks
from workbench.model.transformer import GptOss
from workbench.research.recipe import Intervention, Recipe, Scope
from workbench.research.recipe_python import recipe_python

FORBID = Intervention("forbid", cells=tuple((1, e) for e in range(12)), scope=Scope(channel=("analysis",)))
RECIPE = Recipe(user="12+7", effort="medium", max_new_tokens=40, interventions=(FORBID,))


@pytest.fixture(scope="module")
def nano() -> GptOss:
    model: GptOss = wb.load("nano", dtype=torch.float32)
    return model


def finished(model: GptOss, recipe: Recipe, **options: Any) -> Experiment:
    experiment = Experiment(model, recipe, **options)
    for _ in experiment.steps():
        pass
    return experiment


@pytest.fixture(scope="module")
def done(nano: GptOss) -> Experiment:
    return finished(nano, RECIPE)


def test_both_answers_are_those_of_the_library(nano: GptOss, done: Experiment) -> None:
    prompt = wb.harmony.render([{"role": "user", "content": "12+7"}], effort="medium", tokenizer=nano.tokenizer)
    assert done.original.rows == nano.generate([prompt], max_new_tokens=40)
    with applied(nano, *RECIPE.edits(nano)):
        want = nano.generate([prompt], max_new_tokens=40)
    assert done.edited is not None
    assert done.edited.rows == want
    assert want != done.original.rows, "the intervention should change the answer, or nothing is tested"
    assert not installed_hooks(nano)


def test_the_python_of_a_recipe_makes_its_answers(
    nano: GptOss, done: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    steered = replace(RECIPE, interventions=(FORBID, Intervention("steer", layers=(2,), strength=0.5)))
    for recipe, experiment in ((RECIPE, done), (steered, finished(nano, steered))):
        monkeypatch.setattr(wb, "load", lambda name: nano, raising=False)
        namespace: dict[str, Any] = {}
        exec(compile(recipe_python(recipe), "recipe", "exec"), namespace)
        assert experiment.edited is not None
        assert (namespace["original"], namespace["edited"]) == (experiment.original.rows, experiment.edited.rows)


def test_changes_of_log_probabilities_are_those_of_two_passes(nano: GptOss, done: Experiment) -> None:
    assert done.comparison is not None
    assert done.edited is not None

    def logprobs(new: list[int], edited: bool) -> torch.Tensor:
        ids = torch.tensor([[*done.prompt, *new]])
        with torch.no_grad(), applied(nano, *(RECIPE.edits(nano) if edited else [])):
            scores = nano(ids)[0, len(done.prompt) - 1 : -1].log_softmax(-1)
        return scores.gather(-1, torch.tensor(new)[:, None])[:, 0]

    for answer, change in (
        (done.original, done.comparison.original_change),
        (done.edited, done.comparison.edited_change),
    ):
        want = logprobs(answer.tokens, True) - logprobs(answer.tokens, False)
        torch.testing.assert_close(torch.tensor(change), want, rtol=1e-3, atol=1e-3)
        assert want.abs().max() > 0.01
        assert (torch.tensor(change) + want).abs().max() > 0.01, "a negative control: the other sign"


def test_routing_is_that_of_a_pass_over_the_answer(nano: GptOss, done: Experiment) -> None:
    ids = torch.tensor([[*done.prompt, *done.original.tokens]])
    names = [f"blocks.{layer}.mlp.hook_expert_indices" for layer in range(4)]
    at = slice(len(done.prompt) - 1, -1)

    def routed(edited: bool) -> np.ndarray:
        with torch.no_grad(), applied(nano, *(RECIPE.edits(nano) if edited else [])):
            _, cache = nano.run_with_cache(ids, names_filter=names)
        return torch.stack([cache[name][0, at] for name in names], 1).numpy()

    plain, edited = routed(False), routed(True)
    assert np.array_equal(np.sort(np.stack(done.original.experts), -1), np.sort(plain, -1))
    sets = zip(plain.reshape(-1, 4, 4), edited.reshape(-1, 4, 4), strict=True)
    want = np.mean([[1 - len(set(a) & set(b)) / 4 for a, b in zip(x, y, strict=True)] for x, y in sets], 0)
    assert done.comparison is not None
    np.testing.assert_allclose(done.comparison.routing_change, want)
    assert want[0] == 0, "nothing changes before the layer of the intervention"
    assert want[1] > 0.2
    load = done.original.load(4, 16)
    np.testing.assert_allclose(load.sum(1), 1)
    np.testing.assert_allclose(load[1], np.bincount(plain[:, 1].ravel(), minlength=16) / plain[:, 1].size)


def test_first_differences() -> None:
    assert [first_difference(*pair) for pair in (([1, 2], [1, 2]), ([1, 2], [1, 3]), ([1], [1, 2]))] == [None, 1, 1]
    slots = [np.array([[0, 1]])], [np.array([[1, 2]])]
    assert exchanged(*slots) == [0.5]
    assert exchanged(slots[0], slots[0]) == [0.0]


def test_samples_are_summarized_on_both_sides(nano: GptOss) -> None:
    recipe = replace(RECIPE, effort="low", samples=3, temperature=1.5, max_new_tokens=20)
    experiment = finished(nano, recipe)
    prompt = recipe.prompt_ids(nano)
    assert experiment.original.rows == nano.generate([prompt], **recipe.options)
    summary = summarize(experiment, experiment.original)
    assert summary.complete == sum(n for _, n in summary.answers) <= 3
    assert summary.mean_tokens == pytest.approx(np.mean([len(row) for row in experiment.original.rows]))
    assert "3 samples" in text_of(experiment)


def test_a_cancelled_experiment_leaves_the_model_as_it_was(nano: GptOss, done: Experiment) -> None:
    experiment = Experiment(nano, RECIPE)
    steps = experiment.steps()
    while experiment.edited is None or len(experiment.edited.tokens) < 2:
        next(steps)
    assert installed_hooks(nano), "interventions and the recorder are on the model"
    steps.close()
    assert not installed_hooks(nano)
    assert finished(nano, RECIPE).original.rows == done.original.rows


def test_an_answer_is_continued_without_reading_it_again(nano: GptOss, done: Experiment) -> None:
    recorder, cache = RoutingRecorder(nano), PromptCache()
    plain = replace(RECIPE, interventions=())
    try:
        first = finished(nano, replace(plain, max_new_tokens=10), recorder=recorder, prompt_cache=cache)
        begin = nano.tokenizer.decode(first.original.tokens)
        again = finished(nano, replace(plain, begin=begin, max_new_tokens=30), recorder=recorder, prompt_cache=cache)
    finally:
        recorder.close()
    assert again.original.shared_tokens >= len(first.prompt) + 8
    assert first.original.tokens + again.original.tokens == done.original.tokens
    edited = finished(nano, replace(plain, begin=begin[:-2] + "99", max_new_tokens=30))
    assert edited.original.tokens != again.original.tokens


def test_an_intervention_without_tokens_is_reported(nano: GptOss) -> None:
    never = replace(FORBID, scope=Scope(channel=("commentary",)))
    experiment = finished(nano, replace(RECIPE, interventions=(never,), max_new_tokens=3))
    assert experiment.unmatched == [0]
    assert experiment.edited is not None
    assert experiment.edited.rows == experiment.original.rows
    assert "no token matched forbid L" in text_of(experiment)


def test_limits_are_told() -> None:
    recipe, notes = limited(replace(RECIPE, max_new_tokens=5000, samples=20), 100, 4)
    assert (recipe.max_new_tokens, recipe.samples, len(notes)) == (100, 4, 2)
    assert limited(RECIPE, 100, 4) == (RECIPE, [])


def test_a_saved_recipe_runs_on_the_command_line(done: Experiment, tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(RECIPE.to_json())
    ran = run_command("apply", str(file), "--dtype", "float32", "--json")
    assert ran.code == 0, ran.err
    result, want = json.loads(ran.out), result_of(done)
    assert [result[side]["tokens"] for side in ("original", "edited")] == [
        want[side]["tokens"] for side in ("original", "edited")
    ]
    answers = tmp_path / "answers.jsonl"
    assert run_command("apply", str(file), "--dtype", "float32", "--answers", str(answers)).code == 0
    rows, rejects = read_transcripts(answers, tokenizer=done.model.tokenizer)
    assert rejects == []
    assert [(row.meta["task"], row.tokens[row.n_prompt :].tolist()) for row in rows] == [
        ("original", done.original.tokens),
        ("edited", done.edited.tokens if done.edited else None),
    ]
    assert {row.prompt_id for row in rows} == {"prompt"}, "both answer one prompt, so that studies pair them"
    again = run_command("apply", str(file), "--dtype", "float32", "--answers", str(answers))
    assert (again.code, "exists" in again.err) == (2, True)
    assert again.out == "", "it is refused before anything is generated"
    python = run_command("apply", str(file), "--python")
    assert (python.code, python.out) == (0, recipe_python(RECIPE))
    file.write_text('{"recipe": 1, "users": 3}')
    refused = run_command("apply", str(file))
    assert (refused.code, "'users' is unknown" in refused.err) == (2, True)


def test_a_recipe_is_applied_to_other_prompts(tmp_path: Path) -> None:
    cells = [[layer, expert] for layer in (0, 1, 2) for expert in range(12)]
    recipe = {"recipe": 1, "effort": "low", "max_new_tokens": 8, "interventions": [{"kind": "forbid", "cells": cells}]}
    (tmp_path / "r.json").write_text(json.dumps(recipe))
    rows = [line for line in (DATA / "prompts.jsonl").read_text().splitlines() if '"conflict' in line][:3]
    (tmp_path / "p.jsonl").write_text("\n".join(rows) + "\n")
    ran = run_command("apply", str(tmp_path / "r.json"), "--prompts", str(tmp_path / "p.jsonl"))
    assert ran.code == 0, ran.err
    head, original, edited = (line.split() for line in ran.out.splitlines())
    assert float(original[head.index("accuracy")]) > float(edited[head.index("accuracy")])
    assert (original[-1], edited[-1]) == ("original", "edited")
