"""New answers of a model at temperature 0, and how they differ: accuracy, length, refusals, routing and divergence.

base = generate_answers(model, rows)
changes = measure(model, rows, base, forbid(1, [3]))  # `MEASURES` by sequence
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from workbench import harmony
from workbench.capture.generation import final_text
from workbench.experiments.effects import routing
from workbench.harmony.transcripts import Transcript
from workbench.hooks.edits import Edit, applied
from workbench.model.transformer import GptOss

SHARES = ("correct", "complete", "refused", "same answer")  # 0 or 1 of each answer
MEASURES = (*SHARES, "new tokens", "analysis tokens", "tokens before divergence", "routing flips")
# How a final answer begins that refuses; typographic apostrophes count as plain ones.
REFUSAL = r"(i'm sorry|i am sorry|sorry,|i can't|i cannot|i can not|i won't|i'm unable|i am unable|as an ai)\b"


class Answer(NamedTuple):
    """A new answer: its ids, the text of its final message (None: there is no finished one), and its analysis."""

    ids: list[int]
    text: str | None
    analysis_tokens: int
    refused: bool


def generate_answers(
    model: GptOss,
    rows: Sequence[Transcript],
    *edits: Edit,
    max_new_tokens: int = 256,
    refusal: str = REFUSAL,
    batch: int = 64,
) -> list[Answer]:
    """Return the model's answers to the prompts of the sequences at temperature 0, with the edits."""
    prompts = [row.tokens[: row.n_prompt].tolist() for row in rows]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    new: dict[int, list[int]] = {}
    with applied(model, *edits):
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            continued = model.generate([prompts[i] for i in chosen], max_new_tokens=max_new_tokens)
            new.update(zip(chosen, continued, strict=True))
    return [_answer(model, prompts[i], new[i], re.compile(refusal)) for i in range(len(prompts))]


def _answer(model: GptOss, prompt: list[int], new: list[int], refusal: re.Pattern[str]) -> Answer:
    ids = np.array([*prompt, *new])
    labels = harmony.label(ids, tokenizer=model.tokenizer, n_prompt=len(prompt))
    written = [m.text_span for m in labels.messages if m.channel == "analysis" and m.content >= len(prompt)]
    analysis = sum(span.stop - span.start for span in written)
    text = final_text(ids, model.tokenizer)
    lowered = (text or "").replace("’", "'").lower()
    return Answer(new, text, analysis, refusal.match(lowered) is not None)


def measure(
    model: GptOss,
    rows: Sequence[Transcript],
    base: Sequence[Answer],
    *edits: Edit,
    max_new_tokens: int = 256,
    routes: Sequence[np.ndarray] | None = None,
) -> Float[np.ndarray, "measure sequence"]:
    """Return every measure of the answers with the edits, less that without: `MEASURES` by sequence.

    For "same answer", "tokens before divergence" and "routing flips" the value without an edit is 1, 1 and 0. "correct"
    is NaN where the expected text is not known. routes: the experts [layer pos slot]
    of each unedited answer, if they are known already.
    """
    answers = generate_answers(model, rows, *edits, max_new_tokens=max_new_tokens)
    answered = with_answers(rows, base)
    before = routing(model, answered) if routes is None else routes
    with applied(model, *edits):
        after = routing(model, answered)
    return measure_changes(rows, base, answers, before, after)


def measure_changes(
    rows: Sequence[Transcript],
    base: Sequence[Answer],
    after_edits: Sequence[Answer],
    before: Sequence[np.ndarray],
    after: Sequence[np.ndarray],
) -> Float[np.ndarray, "measure sequence"]:
    """Return every measure of the answers `after_edits`, less that of `base`.

    before, after: the experts [layer pos slot] of each sequence with its base answer, without and with what is changed.
    Those of the tokens are compared from which the common beginning and the token after it are predicted: from the last
    token of the prompt on.
    """
    common = [_common(b.ids, f.ids) for b, f in zip(base, after_edits, strict=True)]
    flips = [
        _flips(x[:, r.n_prompt - 1 : r.n_prompt + n], y[:, r.n_prompt - 1 : r.n_prompt + n])
        for x, y, r, n in zip(before, after, rows, common, strict=True)
    ]
    right = np.array(
        [[correctness(a, row) for a, row in zip(answers, rows, strict=True)] for answers in (after_edits, base)]
    )
    return np.array(
        [
            right[0] - right[1],
            _change([a.text is not None for a in after_edits], [a.text is not None for a in base]),
            _change([a.refused for a in after_edits], [a.refused for a in base]),
            np.array([float(same_answer(a, b)) - 1 for a, b in zip(after_edits, base, strict=True)]),
            _change([len(a.ids) for a in after_edits], [len(a.ids) for a in base]),
            _change([a.analysis_tokens for a in after_edits], [a.analysis_tokens for a in base]),
            np.array([n / max(len(b.ids), 1) - 1 for n, b in zip(common, base, strict=True)]),
            np.array(flips),
        ]
    )


def with_answers(rows: Sequence[Transcript], base: Sequence[Answer]) -> list[Transcript]:
    """Return the sequences with the new answers in place of theirs."""
    return [
        Transcript(r.id, r.prompt_id, r.effort, np.array([*r.tokens[: r.n_prompt], *b.ids], np.int32), r.n_prompt)
        for r, b in zip(rows, base, strict=True)
    ]


def _change(after: Sequence[float], before: Sequence[float]) -> Float[np.ndarray, " sequence"]:
    return np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)


def same_answer(a: Answer, b: Answer) -> bool:
    """Return whether two final messages are equal; of answers without a finished one, all ids."""
    return a.ids == b.ids if a.text is None or b.text is None else a.text == b.text


def correctness(answer: Answer, row: Transcript) -> float:
    """Return 1 if the final message is the expected text, else 0; NaN where the expected text is not known."""
    return np.nan if row.answer is None else float(answer.text == row.answer)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two answers begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _flips(before: np.ndarray, after: np.ndarray) -> float:
    """Return the share of chosen experts [layer pos slot] that are no longer chosen."""
    return float(1 - (before[..., :, None] == after[..., None, :]).any(-1).mean())
