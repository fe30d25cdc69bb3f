"""The result of an experiment as plain values and as text, for `workbench apply`."""

from typing import Any

from workbench.counting import count_of
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
        "interventions_without_tokens": experiment.unmatched,
    }


def text_of(experiment: Experiment) -> str:
    """Return the answers and their comparison as text for a terminal."""
    sides = {"original": experiment.original} | ({"edited": experiment.edited} if experiment.edited else {})
    lines = [line for name, answer in sides.items() for line in _lines(experiment, name, answer)]
    if (comparison := experiment.comparison) is not None:
        at = comparison.first_difference
        changes = comparison.original_change
        lines += [
            "the answers are equal" if at is None else f"first differing token: number {at}",
            f"log-probability of the original answer: {sum(changes):+.3f} nats with the interventions",
            "experts exchanged by layer: " + ", ".join(f"{share:.1%}" for share in comparison.routing_change),
        ]
    lines += [f"no token matched {description}" for description in experiment.unmatched]
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
