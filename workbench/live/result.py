"""The result of an experiment as plain values and as text, for `workbench apply`."""

from typing import Any

import numpy as np

from workbench.capture.generation import final_text
from workbench.counting import count_of, signed
from workbench.harmony.transcripts import Transcript
from workbench.live.experiment import Answer, Experiment, summarize


def result_of(experiment: Experiment) -> dict[str, Any]:
    """Return the recipe, both answers and their comparison as values that JSON can hold."""
    comparison = experiment.comparison
    return {
        "recipe": experiment.recipe.to_json(indent=None),
        "n_prompt": len(experiment.prompt),
        "original": _answer(experiment, experiment.original),
        "edited": None if experiment.edited is None else _answer(experiment, experiment.edited),
        "comparison": None if comparison is None else vars(comparison),
        "interventions_without_tokens": [experiment.recipe.interventions[i].describe() for i in experiment.unmatched],
    }


def transcripts_of(experiment: Experiment) -> list[Transcript]:
    """Return all samples of both answers as transcripts, which a capture records: the task names the answer.

    A capture applies no interventions: of the edited answer it records the model that reads what was generated.
    """
    recipe = experiment.recipe
    sides = {"original": experiment.original} | ({"edited": experiment.edited} if experiment.edited else {})
    interventions = [one.describe() for one in recipe.interventions]
    tokenizer, expected = experiment.model.tokenizer, recipe.expected.strip()
    return [
        Transcript(
            f"{name}/{recipe.effort}/{sample}",
            "prompt",
            recipe.effort,
            np.array([*experiment.prompt, *row], dtype=np.int32),
            len(experiment.prompt),
            expected or None,
            meta={"task": name, **({"interventions": interventions} if name == "edited" else {})},
            complete=bool(row) and row[-1] in tokenizer.stop_ids,
            correct=final_text(np.array([*experiment.prompt, *row]), tokenizer) == expected if expected else None,
        )
        for name, answer in sides.items()
        for sample, row in enumerate(answer.rows)
    ]


def text_of(experiment: Experiment) -> str:
    """Return the answers and their comparison as text for a terminal."""
    sides = {"original": experiment.original} | ({"edited": experiment.edited} if experiment.edited else {})
    lines = [line for name, answer in sides.items() for line in _lines(experiment, name, answer)]
    if (comparison := experiment.comparison) is not None:
        at = comparison.first_difference
        changes = comparison.original_change
        lines += [
            "the answers are equal" if at is None else f"first differing token: number {at}",
            f"log-probability of the original answer: {signed(sum(changes), 3)} nats with the interventions",
            "experts exchanged by layer: " + ", ".join(f"{share:.1%}" for share in comparison.routing_change),
        ]
    lines += [f"no token matched {experiment.recipe.interventions[i].describe()}" for i in experiment.unmatched]
    return "\n".join(lines)


def _answer(experiment: Experiment, answer: Answer) -> dict[str, Any]:
    tokenizer = experiment.model.tokenizer
    return {
        "texts": [tokenizer.decode(row) for row in answer.rows],
        "tokens": answer.rows,
        "finished": answer.finished,
        "correct": summarize(experiment, answer).correct,
        "logprobs": answer.logprobs,
        "first_token_s": answer.speed.first_token_s,
        "tokens_per_s": answer.speed.tokens_per_s,
        "decoding_tokens_per_s": answer.speed.decoding_tokens_per_s,
    }


def _lines(experiment: Experiment, name: str, answer: Answer) -> list[str]:
    """Return the lines of one side: the first answer, the speed, and with several samples their summary."""
    lines = [f"{name}: {experiment.model.tokenizer.decode(answer.tokens)}"]
    lines.append(f"  {count_of(answer.speed.tokens, 'new token')}, {answer.speed}")
    summary = summarize(experiment, answer)
    if summary.correct is not None:
        expected = experiment.recipe.expected
        lines.append(f"  {summary.correct} of {len(answer.rows)} are the expected answer {expected!r}")
    if len(answer.rows) > 1:
        texts = ", ".join(f"{text!r} {n}×" for text, n in summary.answers[:5]) or "none"
        lines.append(f"  {count_of(len(answer.rows), 'sample')}, {summary.complete} complete, final answers: {texts}")
    return lines
