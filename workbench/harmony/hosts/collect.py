"""Prompts to a host, answers to a file of transcripts, row by row, so that nothing paid for is lost.

The same call again asks only what is missing.
"""

import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workbench.errors import InputError, JobError
from workbench.harmony.hosts import answers
from workbench.harmony.hosts.client import AbsentError, Host, HostError
from workbench.harmony.rendering import EFFORTS, check_messages, render
from workbench.harmony.transcripts import Prompt, read_prompts
from workbench.harmony.vocabulary import Tokenizer, tokenizer
from workbench.progress import progress

APIS = ("chat", "responses", "completions")


@dataclass(frozen=True)
class Settings:
    """What is asked of the host. body: more fields of each request; `{effort}` in a text of it is the effort."""

    model: str
    efforts: tuple[str, ...] = EFFORTS
    samples: int = 1
    temperature: float | None = None
    max_tokens: int | None = None
    api: str = "auto"
    concurrency: int = 8
    per_minute: float | None = None
    timeout: float = 600.0
    retries: int = 6
    key_env: str = "OPENAI_API_KEY"
    body: Mapping[str, Any] = field(default_factory=dict)
    vocabulary: str | None = None

    def check(self) -> None:
        """Refuse what no host could do."""
        if unknown := [e for e in self.efforts if e not in EFFORTS]:
            raise InputError(f"--effort {unknown[0]}: choose from {', '.join(EFFORTS)}")
        if self.api not in ("auto", *APIS):
            raise InputError(f"--api {self.api}: choose from auto, {', '.join(APIS)}")
        if self.samples > 1 and self.temperature == 0:
            raise InputError(f"--samples {self.samples} at temperature 0 would be the same {self.samples} times")


@dataclass(frozen=True)
class Job:
    """One transcript to be."""

    prompt: Prompt
    effort: str
    sample: int

    @property
    def id(self) -> str:
        return f"{self.prompt.id}/{self.effort}/{self.sample}"


def collect(url: str, prompts: str | Path, out: str | Path, settings: Settings, *, overwrite: bool = False) -> None:
    """Ask the host at `url` every prompt at every effort; transcripts go to `out`, a row when it comes."""
    settings.check()
    out = Path(out)
    jobs = [Job(p, e, s) for p in read_prompts(prompts) for e in settings.efforts for s in range(settings.samples)]
    if overwrite:
        out.unlink(missing_ok=True)
    done = _done(out)
    for job in jobs:
        if job.id in done and done[job.id] != _digest(job, settings):
            raise InputError(f"{out} holds {job.id!r} of another request: name another file, or --overwrite")
    left = [job for job in jobs if job.id not in done]
    host = Host(
        url, key_env=settings.key_env, timeout=settings.timeout, retries=settings.retries, per_minute=settings.per_minute,
        threads=settings.concurrency,
    )  # fmt: skip
    try:
        _collect(host, left, out, settings)
    finally:
        host.close()


def _collect(host: Host, left: list[Job], out: Path, settings: Settings) -> None:
    failed: list[tuple[Job, str]] = []
    reasoning: dict[str, int] = {}
    with _Rows(out) as rows, progress("transcripts", len(left), "answers") as advance:
        for job, result in _asked(host, left, settings):
            if isinstance(result, dict):
                rows.write(result)
                kind = result["meta"]["reasoning"]
                reasoning[kind] = reasoning.get(kind, 0) + 1
            else:
                failed.append((job, str(result)))
            advance(1)
    for job, why in failed[:20]:
        print(f"{job.id}: {why}", file=sys.stderr)
    if missing := reasoning.get("absent", 0) + reasoning.get("summary", 0):
        print(
            f"{missing} of {sum(reasoning.values())} answers came without the model's own reasoning (their meta says "
            "absent or summary): analysis cannot be studied in them",
            file=sys.stderr,
        )
    if failed:
        raise JobError(
            f"{len(failed)} of {len(left)} were not answered; the others are in {out}, the same command asks again"
        )


def _asked(host: Host, left: list[Job], settings: Settings) -> Iterator[tuple[Job, dict[str, Any] | Exception]]:
    """Rows or reasons, as they come; at most `concurrency` requests at a time."""
    ask = _Asker(host, settings)
    queue = iter(left)
    with ThreadPoolExecutor(settings.concurrency) as pool:
        running: dict[Future[dict[str, Any]], Job] = {}
        try:
            while True:
                room = settings.concurrency if ask.api != "auto" else 1  # the first finds out what the host speaks
                while len(running) < room and (job := next(queue, None)) is not None:
                    running[pool.submit(ask, job)] = job
                if not running:
                    return
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    job = running.pop(future)
                    try:
                        yield job, future.result()
                    except (HostError, answers.NoAnswerError) as error:
                        yield job, error
        finally:
            host.stop.set()


class _Asker:
    """Asks one job; finds out by the first which API the host has."""

    def __init__(self, host: Host, settings: Settings) -> None:
        self.host, self.settings, self.api = host, settings, settings.api
        self._lock = threading.Lock()

    def __call__(self, job: Job) -> dict[str, Any]:
        if self.api != "auto":
            return self._ask(self.api, job)
        for api in APIS:
            try:
                row = self._ask(api, job)
            except AbsentError:
                continue
            self.api = api
            return row
        raise InputError(f"{self.host.name} has none of /chat/completions, /responses, /completions: check the address")

    def _ask(self, api: str, job: Job) -> dict[str, Any]:
        fields = {"chat": self._chat, "responses": self._responses, "completions": self._completions}[api](job)
        if {"reasoning_effort", "reasoning"} & self.host.dropped and not self._effort_in_body:
            raise InputError(
                f"{self.host.name} takes no reasoning effort: say how it is told, as in "
                '--body \'{"chat_template_kwargs": {"reasoning_effort": "{effort}"}}\''
            )
        about = fields.pop("about")
        return {
            "id": job.id, "prompt_id": job.prompt.id, "effort": job.effort, **fields, "answer": job.prompt.answer,
            "meta": job.prompt.meta | about | {
                "host": self.host.name, "model": self.settings.model, "api": api, "dropped": sorted(self.host.dropped),
                "request": _digest(job, self.settings),
            },
        }  # fmt: skip

    @property
    def _effort_in_body(self) -> bool:
        return "{effort}" in json.dumps(dict(self.settings.body))

    def _body(self, job: Job, limit: str, effort: Mapping[str, Any]) -> dict[str, Any]:
        s = self.settings
        wanted = {"model": s.model, "temperature": s.temperature, limit: s.max_tokens}
        wanted |= {} if self._effort_in_body else effort
        if s.samples > 1:
            wanted["seed"] = job.sample
        return {k: v for k, v in wanted.items() if v is not None} | _filled(dict(s.body), job.effort)

    def _chat(self, job: Job) -> dict[str, Any]:
        sent = _without_reasoning(job.prompt.messages)
        body = self._body(job, "max_tokens", {"reasoning_effort": job.effort})
        reply = self.host.post("/chat/completions", body | {"messages": [_plain(m) for m in sent]})
        return _row(job, sent, answers.from_chat(reply))

    def _responses(self, job: Job) -> dict[str, Any]:
        sent = _without_reasoning(job.prompt.messages)
        body = self._body(job, "max_output_tokens", {"reasoning": {"effort": job.effort}})
        reply = self.host.post("/responses", body | {"input": [_plain(m) for m in sent]})
        return _row(job, sent, answers.from_responses(reply))

    def _completions(self, job: Job) -> dict[str, Any]:
        """The prompt in harmony by our own hand, and the answer's ids from its text, marks kept."""
        with self._lock:
            words = tokenizer(self.settings.vocabulary)
            prompt = render(job.prompt.messages, effort=job.effort, tokenizer=words)
        body = self._body(job, "max_tokens", {}) | {"prompt": words.decode(prompt), "skip_special_tokens": False}
        text, complete, about = answers.from_completion(self.host.post("/completions", body))
        messages, _ = answers.split(text)
        if "<|message|>" not in text:  # the host strips marks: only the messages can be had back
            if not any(m["channel"] == "analysis" for m in messages):
                raise answers.NoAnswerError("the host strips harmony's marks and the channels cannot be told apart")
            answer = answers.Answer(messages, "verbatim", complete, about)
            return _row(job, job.prompt.messages, answer)
        tokens = [*prompt, *_ids(text, words)]
        correct = _correct(job, messages if complete else [])
        kind = "verbatim" if any(m["channel"] == "analysis" for m in messages) else "absent"
        meta = about | {"reasoning": kind, "complete": complete}
        return {"tokens": tokens, "n_prompt": len(prompt), "correct": correct, "about": meta}


def _row(job: Job, sent: Sequence[Mapping[str, Any]], answer: answers.Answer) -> dict[str, Any]:
    messages = [*sent, *answer.messages]
    try:
        check_messages(messages)
    except InputError as error:
        raise answers.NoAnswerError(str(error)) from error
    correct = _correct(job, answer.messages if answer.complete else [])
    about = answer.about | {"reasoning": answer.reasoning, "complete": answer.complete}
    return {"messages": messages, "correct": correct, "about": about}


def _correct(job: Job, messages: Sequence[Mapping[str, Any]]) -> bool | None:
    if job.prompt.answer is None:
        return None
    last = messages[-1] if messages else {}
    return last.get("channel") == "final" and last["content"].strip() == job.prompt.answer


def _ids(text: str, words: Tokenizer) -> list[int]:
    """Ids of a text in which marks are marks: the host wrote it, not a user."""
    marks = "|".join(map(re.escape, sorted(words.special, key=len, reverse=True)))
    ids: list[int] = []
    for i, piece in enumerate(re.split(f"({marks})", text)):
        ids += [words.special[piece]] if i % 2 else words.encode(piece)
    return ids


def _without_reasoning(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What hosts show a model of earlier turns: everything but the analysis."""
    return [dict(m) for m in messages if m.get("channel") != "analysis"]


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as chat completions have it."""
    return {k: v for k, v in message.items() if k in ("role", "content", "name")}


def _filled(value: Any, effort: str) -> Any:
    if isinstance(value, dict):
        return {k: _filled(v, effort) for k, v in value.items()}
    if isinstance(value, list):
        return [_filled(v, effort) for v in value]
    return value.replace("{effort}", effort) if isinstance(value, str) else value


def _digest(job: Job, settings: Settings) -> str:
    """Names a request: all that could change its answer."""
    asked = [job.prompt.messages, job.effort, job.sample, settings.model, settings.temperature, settings.max_tokens]
    text = json.dumps([*asked, dict(settings.body)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _done(out: Path) -> dict[str, str]:
    """Request digests of the rows that are there, by id; half a line that a kill left is cut off."""
    if not out.exists():
        return {}
    content = out.read_bytes()
    if content and not content.endswith(b"\n"):
        content = content[: content.rfind(b"\n") + 1]
        with open(out, "r+b") as file:
            file.truncate(len(content))
    found = {}
    for number, line in enumerate(content.splitlines(), 1):
        try:
            row = json.loads(line)
            found[row["id"]] = row["meta"]["request"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{out}, line {number}: not a transcript that this command wrote: name another file, or --overwrite"
            ) from error
    return found


class _Rows:
    """Appends rows, each on the disk before the next."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("a", encoding="utf-8", newline="\n")
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}") from error

    def __enter__(self) -> "_Rows":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({k: v for k, v in row.items() if v is not None}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
