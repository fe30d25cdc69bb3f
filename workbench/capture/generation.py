"""Prompts to transcripts: our own model answers each prompt at each effort, and is marked where the answer is known."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from workbench import harmony
from workbench.errors import InputError
from workbench.harmony.rendering import EFFORTS
from workbench.harmony.transcripts import Prompt, Transcript, read_prompts, write_transcripts
from workbench.model.transformer import GptOss
from workbench.progress import progress


def generate_transcripts(
    model: GptOss,
    prompts: str | Path,
    out: str | Path,
    *,
    efforts: Sequence[str] = EFFORTS,
    samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    max_new_tokens: int = 512,
    batch: int = 64,
    overwrite: bool = False,
) -> list[Transcript]:
    """Answer every prompt at every effort and write the transcripts, ids as generated, to `out` (JSONL).

    With several samples a temperature above 0 is needed. A row whose prompt has an answer is marked correct when
    the text of its final message, without white space around it, is that answer.
    """
    if Path(out).exists() and not overwrite:
        raise InputError(f"{out} exists: choose another name, or --overwrite")
    transcripts = answer_prompts(
        model, read_prompts(prompts), efforts=efforts, samples=samples, temperature=temperature, seed=seed,
        max_new_tokens=max_new_tokens, batch=batch,
    )  # fmt: skip
    write_transcripts(out, transcripts, overwrite=overwrite)
    return transcripts


def answer_prompts(
    model: GptOss,
    prompts: Sequence[Prompt],
    *,
    efforts: Sequence[str] = EFFORTS,
    samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    max_new_tokens: int = 512,
    batch: int = 64,
) -> list[Transcript]:
    """Return the model's responses to every prompt at every effort, in this order, samples last.

    Raises:
        InputError: an effort is unknown, a prompt is too long, or samples would be equal.
    """
    if unknown := [e for e in efforts if e not in EFFORTS]:
        raise InputError(f"effort {unknown[0]!r}: choose from {', '.join(EFFORTS)}")
    if samples > 1 and temperature == 0:
        raise InputError(
            f"--samples {samples} at temperature 0 would give {samples} equal transcripts: set --temperature"
        )
    jobs = [(p, e, s) for p in prompts for e in dict.fromkeys(efforts) for s in range(samples)]
    rendered = [harmony.render(p.messages, effort=e, tokenizer=model.tokenizer, **p.options) for p, e, _ in jobs]
    if too_long := [p.id for (p, _, _), ids in zip(jobs, rendered, strict=True) if len(ids) >= model.cfg.n_ctx]:
        raise InputError(f"prompt {too_long[0]!r} leaves no room in the context of {model.cfg.n_ctx} tokens")

    # Prompts of like length together: a batch pads to its longest and runs until its last row stops.
    order = sorted(range(len(jobs)), key=lambda i: (jobs[i][1], len(rendered[i])))
    done: dict[int, list[int]] = {}
    with progress("generate", len(jobs), "transcripts") as advance:
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            continued = model.generate(
                [rendered[i] for i in rows], max_new_tokens=max_new_tokens, temperature=temperature,
                seed=[seed * 1_000_003 + i for i in rows],
            )  # fmt: skip
            done.update(zip(rows, continued, strict=True))
            advance(len(rows))
    return [_transcript(model, *job, rendered[i], done[i]) for i, job in enumerate(jobs)]


def _transcript(
    model: GptOss, prompt: Prompt, effort: str, sample: int, rendered: list[int], new: list[int]
) -> Transcript:
    tokens = np.array([*rendered, *new], dtype=np.int32)
    correct = None if prompt.answer is None else final_text(tokens, model.tokenizer) == prompt.answer
    return Transcript(
        id=f"{prompt.id}/{effort}/{sample}",
        prompt_id=prompt.id,
        effort=effort,
        tokens=tokens,
        n_prompt=len(rendered),
        answer=prompt.answer,
        correct=correct,
        meta=prompt.meta,
    )


def final_text(tokens: Sequence[int] | np.ndarray, tokenizer: harmony.Tokenizer) -> str | None:
    """The content of the last message, if it is a closed one of the final channel."""
    labels = harmony.label(tokens, tokenizer=tokenizer)
    last = labels.messages[-1] if labels.messages else None
    if last is None or last.channel != "final" or last.closed_by not in ("return", "end"):
        return None
    return tokenizer.decode([int(token) for token in tokens[last.content : last.stop]]).strip()
