"""Prompts to transcripts: our own model answers each prompt at each effort, and is marked where the answer is known.

Transcripts are written batch by batch; the same call again answers what is missing.
"""

import hashlib
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from workbench import harmony
from workbench.errors import InputError
from workbench.harmony.rendering import EFFORTS
from workbench.harmony.transcripts import Prompt, Transcript, read_prompts, read_transcripts, row_of
from workbench.inputs import regular_file
from workbench.model.generation_loop import GenerationSpeed, GenerationStep
from workbench.model.sampling import Sampling
from workbench.model.transformer import GptOss
from workbench.outputs import sha256
from workbench.progress import progress
from workbench.row_output import KEY, RowOutput, stamp
from workbench.signals import StopSignal

_Job = tuple[Prompt, str, int]  # a prompt, an effort and the number of the sample


def generate_transcripts(
    model: GptOss,
    prompts: str | Path,
    out: str | Path,
    *,
    efforts: Sequence[str] = EFFORTS,
    samples: int = 1,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    max_new_tokens: int = 512,
    batch: int = 64,
    overwrite: bool = False,
) -> list[Transcript]:
    """Generate an answer to every prompt at every effort and write the transcripts to `out` (JSONL).

    With several samples a temperature above 0 is needed; top_k, top_p and min_p restrict the sampling, as in
    `generate`. A row whose prompt has an answer is marked correct when the text of its final message is that answer.
    Rows that `out` has of the same job are not generated again. Speed and time to the first token are printed on
    standard error.

    Raises:
        InputError: an option or a prompt is invalid, or `out` is another job's or another command's.
        JobError: SIGINT or SIGTERM stopped the job; the rows written are kept.
    """
    efforts = list(dict.fromkeys(efforts))
    if unknown := [e for e in efforts if e not in EFFORTS]:
        raise InputError(f"effort {unknown[0]!r}: choose from {', '.join(EFFORTS)}")
    if not 0 <= temperature < math.inf:
        raise InputError(f"--temperature {temperature}: choose a finite number from 0")
    if samples > 1 and temperature == 0:
        raise InputError(
            f"--samples {samples} at temperature 0 would give {samples} equal transcripts: set --temperature"
        )
    truncation = {
        name: value for name, value in (("top_k", top_k), ("top_p", top_p), ("min_p", min_p)) if value is not None
    }
    if truncation and temperature == 0:
        raise InputError(f"--{next(iter(truncation)).replace('_', '-')} restricts sampling: set --temperature above 0")
    Sampling.of(temperature, do_sample=None, top_k=top_k, top_p=top_p, min_p=min_p)
    with regular_file(prompts) as file:
        digest = sha256(file)
        try:
            asked = read_prompts(file)
        except InputError as error:
            raise InputError(str(error).replace(str(file), str(prompts))) from error
    jobs: list[_Job] = [(p, e, s) for p in asked for e in efforts for s in range(samples)]
    rendered = [harmony.render(p.messages, effort=e, tokenizer=model.tokenizer, **p.options) for p, e, _ in jobs]
    if too_long := [p.id for (p, _, _), ids in zip(jobs, rendered, strict=True) if len(ids) >= model.cfg.n_ctx]:
        raise InputError(f"{prompts}: prompt {too_long[0]!r} leaves no room in the context of {model.cfg.n_ctx} tokens")
    about = {
        **_model(model),
        "prompts": digest,
        "efforts": efforts,
        "samples": samples,
        "temperature": float(temperature),
        "seed": seed,
        "max_new_tokens": max_new_tokens,
        **truncation,
    }
    # Prompts of like length together: a batch pads to its longest and runs until its last row stops.
    order = sorted(range(len(jobs)), key=lambda i: (jobs[i][1], len(rendered[i])))
    ids = [_id(job) for job in jobs]
    with RowOutput(out, command="generate", inputs=[prompts, model.checkpoint.path], overwrite=overwrite) as rows:
        _refuse_another_job(out, rows.known, ids, about)
        left = {i for i in order if ids[i] not in rows.known}
        if rows.known:
            print(f"{out}: {len(left):,} of {len(jobs):,} transcripts are missing", file=sys.stderr, flush=True)
        speed = GenerationSpeed()
        report = progress("generate", len(left), "transcripts", lambda: str(speed))
        with StopSignal(str(out)) as interrupt, report as advance:

            def heard(step: GenerationStep) -> None:
                speed.add(step)
                advance(0)

            # always the same batches, so that a resumed file equals an uninterrupted one
            for chosen in (order[start : start + batch] for start in range(0, len(order), batch)):
                missing = left.intersection(chosen)
                if not missing:
                    continue
                interrupt.check()
                continued = model.generate(
                    [rendered[i] for i in chosen],
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    seed=[seed * 1_000_003 + i for i in chosen],
                    on_step=heard,
                    **truncation,
                )
                for i in sorted(missing):
                    new = continued[chosen.index(i)]
                    rows.write(stamp(row_of(_transcript(model, jobs[i], rendered[i], new)), "generate", **about))
                advance(len(missing))
        rows.finish(ids)
        if speed.tokens:
            print(f"{out}: {speed.tokens:,} new tokens, {speed}", file=sys.stderr, flush=True)
    return read_transcripts(out, tokenizer=model.tokenizer)[0]


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
    """Return the model's responses to every prompt at every effort, in this order, samples last; nothing is written.

    Raises:
        InputError: an effort is unknown, a prompt is too long, or samples would be equal.
    """
    if unknown := [e for e in efforts if e not in EFFORTS]:
        raise InputError(f"effort {unknown[0]!r}: choose from {', '.join(EFFORTS)}")
    if samples > 1 and temperature == 0:
        raise InputError(f"samples={samples} at temperature 0 would give {samples} equal answers: set temperature")
    jobs: list[_Job] = [(p, e, s) for p in prompts for e in dict.fromkeys(efforts) for s in range(samples)]
    rendered = [harmony.render(p.messages, effort=e, tokenizer=model.tokenizer, **p.options) for p, e, _ in jobs]
    if too_long := [p.id for (p, _, _), ids in zip(jobs, rendered, strict=True) if len(ids) >= model.cfg.n_ctx]:
        raise InputError(f"prompt {too_long[0]!r} leaves no room in the context of {model.cfg.n_ctx} tokens")
    order = sorted(range(len(jobs)), key=lambda i: (jobs[i][1], len(rendered[i])))
    done: dict[int, list[int]] = {}
    with progress("generate", len(jobs), "transcripts") as advance:
        for chosen in (order[start : start + batch] for start in range(0, len(order), batch)):
            seeds = [seed * 1_000_003 + i for i in chosen]
            continued = model.generate(
                [rendered[i] for i in chosen], max_new_tokens=max_new_tokens, temperature=temperature, seed=seeds
            )
            done.update(zip(chosen, continued, strict=True))
            advance(len(chosen))
    return [_transcript(model, job, rendered[i], done[i]) for i, job in enumerate(jobs)]


def _model(model: GptOss) -> dict[str, Any]:
    """Return what of a model decides its answers."""
    template = hashlib.sha256((model.tokenizer.chat_template or "").encode()).hexdigest()
    return {
        "model": model.checkpoint.digest,
        "tokenizer": model.tokenizer.digest,
        "chat_template": template,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _refuse_another_job(
    out: str | Path, known: Mapping[str, Mapping[str, Any]], ids: Sequence[str], about: Mapping[str, Any]
) -> None:
    """Check that every row that is there is one of this job.

    Raises:
        InputError: one is not; the message names what differs.
    """
    for id, row in known.items():
        for name, wanted in about.items():
            if (begun := row["meta"][KEY].get(name)) != wanted:
                raise InputError(
                    f"{out} was begun with {name} {_shown(begun)}, this command has {_shown(wanted)}: "
                    "name another file, or --overwrite"
                )
        if id not in ids:
            raise InputError(f"{out} has the row {id!r}, which is none of this job: name another file, or --overwrite")


def _shown(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text[:16] if len(text) == 64 else text  # a digest


def _id(job: _Job) -> str:
    prompt, effort, sample = job
    return f"{prompt.id}/{effort}/{sample}"


def _transcript(model: GptOss, job: _Job, rendered: list[int], new: list[int]) -> Transcript:
    prompt, effort, _ = job
    tokens = np.array([*rendered, *new], dtype=np.int32)
    correct = None if prompt.answer is None else final_text(tokens, model.tokenizer) == prompt.answer
    return Transcript(
        id=_id(job),
        prompt_id=prompt.id,
        effort=effort,
        tokens=tokens,
        n_prompt=len(rendered),
        answer=prompt.answer,
        correct=correct,
        meta=prompt.meta,
    )


def final_text(tokens: Sequence[int] | np.ndarray, tokenizer: harmony.Tokenizer) -> str | None:
    """Return the content of the last message of the ids [token], if it is a closed one of the final channel."""
    labels = harmony.label(tokens, tokenizer=tokenizer)
    last = labels.messages[-1] if labels.messages else None
    if last is None or last.channel != "final" or last.closed_by not in ("return", "end"):
        return None
    return tokenizer.decode([int(token) for token in tokens[last.content : last.stop]]).strip()
