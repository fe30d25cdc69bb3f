"""Is the answer made by the thought? The analysis is cut short, replaced or hidden, and the answer looked at again.

Cut to a fraction, exchanged for another prompt's, or put out of order, the analysis is closed and the model is made to
answer at once; hidden, it stands there but the final message's tokens do not see it, in all layers, in the full ones
alone, or in those with a window alone (final reaches far analysis only through full layers).

Reference: Lanham et al. 2023, arXiv 2307.13702 (early answering, area over the curve); Geva et al. 2023 (knockout).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import xarray as xr

from workbench import harmony
from workbench.capture.generation import final_text
from workbench.errors import InputError
from workbench.experiments.effects import logprobs, paired
from workbench.harmony.token_sets import token_set
from workbench.harmony.transcripts import Transcript
from workbench.hooks.edits import Edit, applied
from workbench.hooks.interventions import knockout
from workbench.model.transformer import GptOss
from workbench.registry import Experiment

EXPERIMENT = Experiment(
    name="chain-of-thought",
    title="Chain-of-thought ablation",
    question="Does the final answer depend on the chain of thought before it?",
    compute="forward passes and new answers for the sequences: one for each of about nine changes",
    aliases=("cot",),
    order=110,
)
FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)
_ANSWER_TOKENS = 64


class Thought(NamedTuple):
    """Where a transcript's last analysis lies, [start, stop), and the final message behind it, content and end."""

    row: Transcript
    start: int
    stop: int
    content: int
    end: int


def thoughts(model: GptOss, rows: Sequence[Transcript]) -> list[Thought]:
    """Of the transcripts that end in a final message with an analysis before it."""
    found = []
    for row in rows:
        messages = harmony.label(row.tokens, tokenizer=model.tokenizer).messages
        final = messages[-1] if messages else None
        analysis = next((m for m in reversed(messages[:-1]) if m.channel == "analysis"), None)
        if final is None or analysis is None or final.channel != "final" or final.closed_by not in ("return", "end"):
            continue
        if analysis.stop > analysis.content and final.stop > final.content:
            found.append(Thought(row, analysis.content, analysis.stop, final.content, final.stop))
    return found


def _with(thought: Thought, words: np.ndarray) -> Transcript:
    """The transcript with other words for its analysis."""
    t = thought.row.tokens
    tokens = np.concatenate([t[: thought.start], words, t[thought.stop :]]).astype(np.int32)
    return Transcript(
        thought.row.id, thought.row.prompt_id, thought.row.effort, tokens, thought.row.n_prompt, thought.row.answer
    )


def experiment(model: GptOss, rows: Sequence[Transcript], *, seed: int = 0) -> dict[str, xr.Dataset]:
    """Return the effects of ablating the chain of thought, with their summary."""
    result = study(model, rows, seed=seed)
    lines = [f"{result.attrs['rests_on']}; accuracy with the whole analysis {result.attrs['accuracy']:.3f}."]
    for change in map(str, result["change"].values):
        one = {str(k): float(v) for k, v in result.sel(change=change).data_vars.items()}
        moved = one["logprob_low"] * one["logprob_high"] > 0
        lines.append(
            f"{change}: {one['same']:.0%} of answers stay the same [{one['same_low']:.0%}, "
            f"{one['same_high']:.0%}]; log-probability "
            + ("" if moved else "not shown to change, ")
            + f"{one['logprob']:+.2f} nats [{one['logprob_low']:+.2f}, {one['logprob_high']:+.2f}]."
        )
    lines.append(
        f"Area over the curve of early answering: {float(result['area']):.3f} [{float(result['area_low']):.3f}, "
        f"{float(result['area_high']):.3f}]."
    )
    method = __doc__ or ""
    return {
        "thought": result.assign_attrs(
            title="Is the answer made by the thought?",
            summary="\n".join(lines),
            method=" ".join(method.split("Reference:")[0].split()),
        )
    }


def study(model: GptOss, rows: Sequence[Transcript], *, n_boot: int = 2000, seed: int = 0) -> xr.Dataset:
    """Answers with the analysis changed: log-probability of what was answered, and how often it is answered again.

    Variables over `change`: logprob (nats a sequence, less the whole analysis'), same (the same answer is given),
    accuracy, each with its paired interval; `area` is the area over the curve of early answering.
    """
    found = thoughts(model, rows)
    prompts = sorted({t.row.prompt_id for t in found})
    if len(prompts) < 2:
        raise InputError(f"{len(prompts)} prompts have an analysis and a closed final message; at least 2 are needed")
    rng = np.random.default_rng(seed)
    words = [t.row.tokens[t.start : t.stop] for t in found]
    others = _derange([t.row.prompt_id for t in found], rng)
    changes: dict[str, Callable[[int], np.ndarray]] = {}
    for fraction in FRACTIONS[:-1]:
        changes[f"first {fraction:.0%}"] = partial(_beginning, words, fraction)
    changes |= {"shuffled": lambda i: rng.permutation(words[i]), "another prompt's": lambda i: words[others[i]]}
    of = token_set(tokenizer=model.tokenizer, channel="final")
    layers = range(model.cfg.n_layers)
    kinds = {
        "hidden in all layers": list(layers),
        "hidden in full layers": [i for i in layers if model.cfg.windows[i] is None],
        "hidden in window layers": [i for i in layers if model.cfg.windows[i] is not None],
    }
    thinking = token_set(tokenizer=model.tokenizer, channel="analysis")
    behind = token_set(tokenizer=model.tokenizer, message=-1)
    own = [t.row for t in found]
    units = [t.row.prompt_id for t in found]
    base = logprobs(model, own, of)
    whole = _answers(model, found, own)
    logp: dict[str, np.ndarray] = {}
    said: dict[str, list[str | None]] = {}
    for name, change in changes.items():
        changed = [_with(t, change(i)) for i, t in enumerate(found)]
        logp[name], said[name] = logprobs(model, changed, of) - base, _answers(model, found, changed)
    for name, chosen in kinds.items():
        if chosen:
            edit = knockout(chosen, behind, thinking)
            logp[name], said[name] = logprobs(model, own, of, edit) - base, _answers(model, found, own, edit)
    same = np.array([[a == b for a, b in zip(said[n], whole, strict=True)] for n in said], dtype=np.float64)
    known = np.array([t.row.answer is not None for t in found])
    right = np.array(
        [[a == t.row.answer for a, t in zip(s, found, strict=True)] for s in (*said.values(), whole)], float
    )
    right[:, ~known] = np.nan
    variables: dict[str, tuple[str | tuple[()], np.ndarray]] = {}
    for name, each in (
        ("logprob", np.stack(list(logp.values()))),
        ("same", same),
        ("accuracy_change", right[:-1] - right[-1]),
    ):
        if np.isfinite(each).any():
            value, low, high = paired(each, units, n_boot=n_boot, seed=seed)
            variables |= {name: ("change", value), f"{name}_low": ("change", low), f"{name}_high": ("change", high)}
    curve = np.append(same[: len(FRACTIONS) - 1], np.ones((1, len(found))), axis=0)
    area = paired(1 - np.trapezoid(curve, FRACTIONS, axis=0), units, n_boot=n_boot, seed=seed)
    variables |= {n: ((), v) for n, v in zip(("area", "area_low", "area_high"), area, strict=True)}
    result = xr.Dataset(variables, coords={"change": list(logp)})
    result.attrs = {
        "definition": "logprob: change of the summed log-probability of the final message; same: share of "
        "prompts that get the "
        "same answer; area: over the curve of same against the fraction of the analysis kept",
        "ci": f"95 %, percentile, {n_boot} bootstrap draws of prompts",
        "rests_on": f"{len(found)} sequences of {len(prompts)} prompts",
        "accuracy": float(np.nanmean(right[-1])) if known.any() else float("nan"),
    }
    return result


def _beginning(words: Sequence[np.ndarray], fraction: float, i: int) -> np.ndarray:
    return words[i][: round(fraction * len(words[i]))]


def _derange(prompts: Sequence[str], rng: np.random.Generator) -> list[int]:
    """For each sequence one of another prompt."""
    out = []
    for i, prompt in enumerate(prompts):
        others = [j for j, p in enumerate(prompts) if p != prompt and j != i]
        out.append(int(rng.choice(others)))
    return out


@torch.no_grad()
def _answers(model: GptOss, found: Sequence[Thought], rows: Sequence[Transcript], *edits: Edit) -> list[str | None]:
    """What the model says when it stands at the beginning of each final message's content."""
    stems = []
    for thought, row in zip(found, rows, strict=True):
        behind = len(thought.row.tokens) - thought.content
        stems.append([int(t) for t in row.tokens[: len(row.tokens) - behind]])
    said: list[str | None] = []
    with applied(model, *edits):
        for start in range(0, len(stems), 64):
            batch = stems[start : start + 64]
            for stem, new in zip(batch, model.generate(batch, max_new_tokens=_ANSWER_TOKENS), strict=True):
                said.append(final_text([*stem, *new], model.tokenizer))
    return said
