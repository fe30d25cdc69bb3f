"""Chain-of-thought ablation: the analysis is truncated, replaced or hidden, and the answer computed again.

Truncated to a fraction, exchanged for that of another prompt, or shuffled, the last analysis message is closed and the
model continues with the final message. Hidden, the analysis messages keep their positions, but the final message (its
header included) does not attend to them, frame tokens included: in all layers, in those with full attention alone, or
in those with a window alone (final tokens reach far analysis tokens only through full layers). Hiding the content alone
leaks, because the `<|end|>` of the analysis has read it; each result counts the visible tokens that have.

An answer that does not end is wrong, and is the same only if all of its tokens are; the summary counts those.

Reference: Lanham et al. 2023, arXiv 2307.13702 (early answering, area over the curve); Geva et al. 2023 (knockout).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import xarray as xr

from workbench import harmony
from workbench.counting import count_of, signed_interval
from workbench.errors import InputError
from workbench.experiments.answer_measures import Answer, generate_answers, same_answer
from workbench.experiments.effects import logprobs, paired
from workbench.experiments.hidden_messages import Hidden, Hide, add_readers, layer_kinds, message_tokens
from workbench.harmony.token_sets import token_set
from workbench.harmony.transcripts import Transcript
from workbench.hooks.edits import Edit
from workbench.hooks.interventions import knockout
from workbench.model.transformer import GptOss
from workbench.registry import Experiment
from workbench.studies.intervals import (
    MIN_PROMPTS,
    mean_effect,
    share_change_interval,
    share_interval,
    within_bounds,
)
from workbench.studies.statistics import ALPHA, false_discovery

EXPERIMENT = Experiment(
    name="chain-of-thought",
    title="Chain-of-thought ablation",
    question="Does the final answer depend on the chain of thought before it?",
    compute="forward passes and new answers for the sequences: one for each of about nine changes",
    cost={"passes": 9, "sequence_new_tokens": 2560},
    options={
        "hide": "What is hidden: messages, with their frame tokens (default), or their content alone.",
        "max_new_tokens": "Most tokens of a new final message (default: 256).",
    },
    aliases=("cot",),
    order=110,
)
FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)
_ANSWER_TOKENS = 256


class AnsweredSequence(NamedTuple):
    """A transcript with the positions of its last analysis, [start, stop), and of the final message, [content, end)."""

    row: Transcript
    start: int
    stop: int
    content: int
    end: int


def answered_sequences(model: GptOss, rows: Sequence[Transcript]) -> list[AnsweredSequence]:
    """Return the transcripts that end in a closed final message with an analysis before it, with their positions."""
    answered = []
    for row in rows:
        messages = harmony.label(row.tokens, tokenizer=model.tokenizer).messages
        final = messages[-1] if messages else None
        analysis = next((m for m in reversed(messages[:-1]) if m.channel == "analysis"), None)
        if final is None or analysis is None or final.channel != "final" or final.closed_by not in ("return", "end"):
            continue
        if analysis.stop > analysis.content and final.stop > final.content:
            answered.append(AnsweredSequence(row, analysis.content, analysis.stop, final.content, final.stop))
    return answered


def _with(answered: AnsweredSequence, words: np.ndarray) -> Transcript:
    """Return the transcript with other tokens as the content of its analysis."""
    t = answered.row.tokens
    tokens = np.concatenate([t[: answered.start], words, t[answered.stop :]]).astype(np.int32)
    return Transcript(
        answered.row.id, answered.row.prompt_id, answered.row.effort, tokens, answered.row.n_prompt, answered.row.answer
    )


def experiment(
    model: GptOss,
    rows: Sequence[Transcript],
    *,
    hide: Hide = "messages",
    max_new_tokens: int = _ANSWER_TOKENS,
    seed: int = 0,
) -> dict[str, xr.Dataset]:
    """Return the effects of ablating the chain of thought, with their summary.

    hide: whole messages with their frame tokens, or their content alone, which leaks through the frame tokens.
    """
    result = study(model, rows, hide=hide, max_new_tokens=max_new_tokens, seed=seed)
    return {
        "chain_of_thought": result.assign_attrs(
            title="Does the answer depend on the analysis?",
            summary="\n".join([*_summary(result), result.attrs["summary"]]),
            method=" ".join((__doc__ or "").split("Reference:")[0].split()),
        )
    }


def _summary(result: xr.Dataset) -> list[str]:
    """Return the sentences of the summary: one for each change of the analysis."""
    lines = [f"{result.attrs['rests_on']}."]
    if "accuracy" in result:
        share, low, high = (float(result[name]) for name in ("accuracy", "accuracy_low", "accuracy_high"))
        lines = [
            f"{result.attrs['rests_on']}; accuracy with the complete analysis {share:.3f} [{low:.3f}, {high:.3f}]."
        ]
    for change in map(str, result["change"].values):
        one = {str(k): float(v) for k, v in result.sel(change=change).data_vars.items()}
        verdict = "" if one["logprob_q"] <= ALPHA else "not shown to change, "
        logprob = signed_interval(one["logprob"], one["logprob_low"], one["logprob_high"], 2)
        lines.append(
            f"{change}: {one['same']:.0%} of answers stay the same [{one['same_low']:.0%}, "
            f"{one['same_high']:.0%}]; log-probability {verdict}{logprob} nats."
        )
    if unfinished := int(result.attrs["unfinished"]):
        lines.append(
            f"Warning: {count_of(unfinished, 'answer')} with the complete analysis "
            f"{'does' if unfinished == 1 else 'do'} not end within {result.attrs['max_new_tokens']} tokens: use a "
            "larger max_new_tokens."
        )
    area, low, high = (float(result[name]) for name in ("area", "area_low", "area_high"))
    return [*lines, f"Area over the curve of early answering: {area:.3f} [{low:.3f}, {high:.3f}]."]


def study(
    model: GptOss,
    rows: Sequence[Transcript],
    *,
    hide: Hide = "messages",
    max_new_tokens: int = _ANSWER_TOKENS,
    n_boot: int = 2000,
    seed: int = 0,
) -> xr.Dataset:
    """Return the effect of changed analyses on the answer: its log-probability, and whether it is given again.

    Variables over `change`: logprob (nats a sequence, less that with the complete analysis), same (the same answer is
    given), accuracy_change, each with its interval; `readers` counts visible tokens that have read hidden ones; `area`
    is the area over the curve of early answering. max_new_tokens: of a new final message.

    Raises:
        InputError: too few prompts have an analysis and a closed final message.
    """
    answered = answered_sequences(model, rows)
    prompts = {t.row.prompt_id for t in answered}
    if len(prompts) < MIN_PROMPTS:
        raise InputError(
            f"prompts that have an analysis and a closed final message: {len(prompts)}; at least "
            f"{MIN_PROMPTS} are needed"
        )
    logp, answers, unchanged = _changed_answers(model, answered, hide, np.random.default_rng(seed), max_new_tokens)
    units = [t.row.prompt_id for t in answered]
    same = np.array(
        [[same_answer(a, b) for a, b in zip(new, unchanged, strict=True)] for new in answers.values()], float
    )
    right = np.array(
        [[a.text == t.row.answer for a, t in zip(s, answered, strict=True)] for s in (*answers.values(), unchanged)],
        float,
    )
    right[:, [t.row.answer is None for t in answered]] = np.nan
    variables: dict[str, tuple[str | tuple[()], np.ndarray]] = {}
    moved = mean_effect(np.stack(list(logp.values())), units, n_boot=n_boot, seed=seed)
    variables |= _with_interval("logprob", "change", moved[:3]) | {"logprob_q": ("change", false_discovery(moved.p))}
    variables |= _with_interval("same", "change", share_interval(same, units))
    if np.isfinite(right).any():
        variables |= _with_interval("accuracy_change", "change", share_change_interval(right[:-1] - right[-1], units))
        variables |= _with_interval("accuracy", (), share_interval(right[-1], units))
    curve = np.append(same[: len(FRACTIONS) - 1], np.ones((1, len(answered))), axis=0)
    area, low, high = paired(1 - np.trapezoid(curve, FRACTIONS, axis=0), units, n_boot=n_boot, seed=seed)
    low, high = (np.where(np.isnan(limit), area, limit) for limit in (low, high))  # all prompts agree
    variables |= _with_interval("area", (), (area, *within_bounds(area, low, high, len(prompts))))
    result = xr.Dataset(variables, coords={"change": list(logp)})
    result.attrs = {
        "definition": "logprob: change of the summed log-probability of the final message; same: share of "
        "prompts that get the "
        "same answer; area: over the curve of same against the fraction of the analysis kept",
        "ci": f"95 % over prompts; logprob and area: bootstrap-t, {n_boot} draws; same and accuracy: Wilson with the "
        "sample size that the prompts' variance implies; accuracy_change: Student's t with two pseudo-prompts",
        "rests_on": f"{count_of(len(answered), 'sequence')} of {count_of(len(prompts), 'prompt')}",
        "prompts": len(prompts),
        "unfinished": sum(answer.text is None for answer in unchanged),
        "max_new_tokens": max_new_tokens,
        "summary": "",
    }
    return add_readers(result, "change", [t.row for t in answered], _hidden(model, hide), model.tokenizer)


def _with_interval(
    name: str, dims: str | tuple[()], values: Sequence[np.ndarray]
) -> dict[str, tuple[str | tuple[()], np.ndarray]]:
    """Return the variables NAME, NAME_low and NAME_high."""
    return {full: (dims, np.asarray(v)) for full, v in zip((name, f"{name}_low", f"{name}_high"), values, strict=True)}


def _hidden(model: GptOss, hide: Hide) -> dict[str, Hidden]:
    """Return the knockouts: the final message, header included, does not attend to the analysis messages."""
    analysis = message_tokens(model.tokenizer, channel="analysis", hide=hide)
    final = token_set(tokenizer=model.tokenizer, message=-1)
    return {f"hidden in {kind}": Hidden(layers, final, analysis) for kind, layers in layer_kinds(model).items()}


def _changed_answers(
    model: GptOss, sequences: Sequence[AnsweredSequence], hide: Hide, rng: np.random.Generator, max_new_tokens: int
) -> tuple[dict[str, np.ndarray], dict[str, list[Answer]], list[Answer]]:
    """Return for each change the differences of log-probability and the answers, and the answers without a change."""
    words = [t.row.tokens[t.start : t.stop] for t in sequences]
    others = _derange([t.row.prompt_id for t in sequences], rng)
    changes: dict[str, Callable[[int], np.ndarray]] = {
        _cut_name(fraction): partial(_beginning, words, fraction) for fraction in FRACTIONS[:-1]
    }
    changes |= {"shuffled": lambda i: rng.permutation(words[i]), "another prompt's": lambda i: words[others[i]]}
    of, own = token_set(tokenizer=model.tokenizer, channel="final"), [t.row for t in sequences]
    base = logprobs(model, own, of)
    logp: dict[str, np.ndarray] = {}
    answers: dict[str, list[Answer]] = {}

    def answer(rows: Sequence[Transcript], *edits: Edit) -> list[Answer]:
        return _answers(model, sequences, rows, *edits, max_new_tokens=max_new_tokens)

    for name, change in changes.items():
        changed = [_with(t, change(i)) for i, t in enumerate(sequences)]
        logp[name], answers[name] = logprobs(model, changed, of) - base, answer(changed)
    for name, hidden in _hidden(model, hide).items():
        edit = knockout(*hidden)
        logp[name], answers[name] = logprobs(model, own, of, edit) - base, answer(own, edit)
    return logp, answers, answer(own)


def _cut_name(fraction: float) -> str:
    """Return what an analysis is called of which this fraction is left."""
    return f"only the first {fraction:.0%}" if fraction else "removed"


def _beginning(words: Sequence[np.ndarray], fraction: float, i: int) -> np.ndarray:
    return words[i][: round(fraction * len(words[i]))]


def _derange(prompts: Sequence[str], rng: np.random.Generator) -> list[int]:
    """Return for each sequence the index of a random one of another prompt."""
    out = []
    for i, prompt in enumerate(prompts):
        others = [j for j, p in enumerate(prompts) if p != prompt and j != i]
        out.append(int(rng.choice(others)))
    return out


def _answers(
    model: GptOss,
    sequences: Sequence[AnsweredSequence],
    rows: Sequence[Transcript],
    *edits: Edit,
    max_new_tokens: int = _ANSWER_TOKENS,
) -> list[Answer]:
    """Return what the model generates from the beginning of each final message's content."""
    before = [len(row.tokens) - len(a.row.tokens) + a.content for a, row in zip(sequences, rows, strict=True)]
    stems = [replace(row, n_prompt=n) for row, n in zip(rows, before, strict=True)]
    return generate_answers(model, stems, *edits, max_new_tokens=max_new_tokens)
