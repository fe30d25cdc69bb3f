"""Generate transcripts from prompts: one answer for each prompt and effort, graded where the answer is known.

Transcripts are written batch by batch; the same call again answers what is missing.
"""

import hashlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from workbench import harmony
from workbench.counting import count_of
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


@dataclass(frozen=True)
class _Job:
    """A prompt that is answered at an effort. sample: the number of the answer. rendered: the ids of the prompt."""

    prompt: Prompt
    effort: str
    sample: int
    rendered: list[int]

    @property
    def id(self) -> str:
        return f"{self.prompt.id}/{self.effort}/{self.sample}"


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
    truncation = {k: v for k, v in (("top_k", top_k), ("top_p", top_p), ("min_p", min_p)) if v is not None}
    efforts = list(dict.fromkeys(efforts))
    _check_options(efforts, samples, temperature, truncation)
    asked, digest = _read_prompts(prompts)
    jobs = _jobs(model, asked, efforts, samples, f"{prompts}: ")
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
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, **truncation}
    ids = [job.id for job in jobs]
    with RowOutput(out, command="generate", inputs=[prompts, model.checkpoint.path], overwrite=overwrite) as rows:
        _refuse_another_job(out, rows.known, ids, about)
        left = {i for i, id in enumerate(ids) if id not in rows.known}
        if rows.known:
            print(
                f"{out}: {len(left):,} of {count_of(len(jobs), 'transcript')} are missing", file=sys.stderr, flush=True
            )
        speed = GenerationSpeed()
        report = progress("generate", len(left), "transcripts", lambda: str(speed))
        with StopSignal(str(out)) as interrupt, report as advance:

            def heard(step: GenerationStep) -> None:
                speed.add(step)
                advance(0)

            for chosen in _batches(jobs, batch):
                if not (missing := left.intersection(chosen)):
                    continue
                interrupt.check()
                for i, made in _answers(model, jobs, chosen, seed, on_step=heard, **options):
                    if i in missing:
                        rows.write(stamp(row_of(made), "generate", **about))
                advance(len(missing))
        rows.finish(ids)
        if speed.tokens:
            print(f"{out}: {count_of(speed.tokens, 'new token')}, {speed}", file=sys.stderr, flush=True)
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
    efforts = list(dict.fromkeys(efforts))
    _check_options(efforts, samples, temperature, {})
    jobs = _jobs(model, prompts, efforts, samples)
    done: dict[int, Transcript] = {}
    with progress("generate", len(jobs), "transcripts") as advance:
        for chosen in _batches(jobs, batch):
            done |= _answers(model, jobs, chosen, seed, max_new_tokens=max_new_tokens, temperature=temperature)
            advance(len(chosen))
    return [done[i] for i in range(len(jobs))]


def _check_options(efforts: Sequence[str], samples: int, temperature: float, truncation: Mapping[str, Any]) -> None:
    """Check the options of a job that generates.

    Raises:
        InputError: an effort is unknown, a number is out of range, or samples would be equal.
    """
    if unknown := [e for e in efforts if e not in EFFORTS]:
        raise InputError(f"effort {unknown[0]!r}: choose from {', '.join(EFFORTS)}")
    if not 0 <= temperature < math.inf:
        raise InputError(f"--temperature {temperature}: choose a finite number from 0")
    if samples > 1 and temperature == 0:
        raise InputError(
            f"--samples {samples} at temperature 0 would give {samples} equal transcripts: set --temperature above 0"
        )
    if truncation and temperature == 0:
        raise InputError(f"--{next(iter(truncation)).replace('_', '-')} restricts sampling: set --temperature above 0")
    Sampling.of(temperature, do_sample=None, **{"top_k": None, "top_p": None, "min_p": None, **truncation})


def _read_prompts(prompts: str | Path) -> tuple[list[Prompt], str]:
    """Return the prompts of a file and the SHA-256 of its bytes; errors name the path that the user gave."""
    with regular_file(prompts) as file:
        digest = sha256(file)
        try:
            return read_prompts(file), digest
        except InputError as error:
            raise InputError(str(error).replace(str(file), str(prompts))) from error


def _jobs(
    model: GptOss, prompts: Sequence[Prompt], efforts: Sequence[str], samples: int, source: str = ""
) -> list[_Job]:
    """Return a job for each prompt, effort and sample, in this order. source: begins the error.

    Raises:
        InputError: a prompt is too long.
    """
    jobs = []
    for prompt in prompts:
        for effort in efforts:
            ids = harmony.render(prompt.messages, effort=effort, tokenizer=model.tokenizer, **prompt.options)
            if len(ids) >= model.cfg.n_ctx:
                raise InputError(
                    f"{source}prompt {prompt.id!r} fills the context of {model.cfg.n_ctx} tokens: shorten it"
                )
            jobs += [_Job(prompt, effort, sample, ids) for sample in range(samples)]
    return jobs


def _batches(jobs: Sequence[_Job], batch: int) -> Iterator[list[int]]:
    """Yield the numbers of jobs that are answered together: always the same, so that a resumed file is equal.

    Prompts of like length are together: a batch pads to its longest and runs until its last row stops.
    """
    order = sorted(range(len(jobs)), key=lambda i: (jobs[i].effort, len(jobs[i].rendered)))
    yield from (order[start : start + batch] for start in range(0, len(order), batch))


def _answers(
    model: GptOss, jobs: Sequence[_Job], chosen: Sequence[int], seed: int, **options: Any
) -> Iterator[tuple[int, Transcript]]:
    """Yield the transcripts of these jobs with their numbers. A job's random numbers depend on its number alone."""
    seeds = [seed * 1_000_003 + i for i in chosen]
    continued = model.generate([jobs[i].rendered for i in chosen], seed=seeds, **options)
    for i, new in sorted(zip(chosen, continued, strict=True)):
        yield i, _transcript(model, jobs[i], new)


def _model(model: GptOss) -> dict[str, Any]:
    """Return the properties of a model that decide its answers."""
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
                    f"{out} was started with {name} {_shown(begun)}, and this command has {_shown(wanted)}: "
                    "choose another file, or --overwrite"
                )
        if id not in ids:
            raise InputError(
                f"{out} has the row {id!r}, which does not belong to this job: choose another file, or --overwrite"
            )


def _shown(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text[:16] if len(text) == 64 else text  # a digest


def _transcript(model: GptOss, job: _Job, new: list[int]) -> Transcript:
    prompt = job.prompt
    tokens = np.array([*job.rendered, *new], dtype=np.int32)
    correct = None if prompt.answer is None else final_text(tokens, model.tokenizer) == prompt.answer
    return Transcript(
        id=job.id,
        prompt_id=prompt.id,
        effort=job.effort,
        tokens=tokens,
        n_prompt=len(job.rendered),
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
