"""Prompts to a host, answers to a file of transcripts, row by row, so that nothing paid for is lost.

The same call again asks only what is missing.
"""

import hashlib
import json
import math
import queue as queues
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from workbench.errors import InputError, JobError
from workbench.harmony.flags import counted, flags_of_row, sequence_flags
from workbench.harmony.grammar import marked_ids
from workbench.harmony.hosts import answers, requests, routing
from workbench.harmony.hosts.client import AbsentError, Host, HostError
from workbench.harmony.labels import label
from workbench.harmony.marked_text import is_marked, read_output
from workbench.harmony.messages import EFFORTS, check_messages, settled_effort, shown
from workbench.harmony.rendering import render
from workbench.harmony.transcripts import Prompt, read_prompts
from workbench.harmony.vocabulary import Tokenizer, tokenizer
from workbench.progress import progress
from workbench.row_output import KEY, RowOutput, is_stamped
from workbench.signals import StopSignal

_COMMAND = "transcripts"
_POLL_S = 0.25  # how often a waiting job looks for a signal
APIS = ("chat", "responses", "completions")  # those that are tried; `generate` is vLLM's own and must be named


@dataclass(frozen=True)
class Settings:
    """What is asked of the host.

    body: more fields of each request; `{effort}` in a text of it is the effort. routing: ask for routed experts and
    refuse answers without them.
    """

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
    routing: bool = False

    def check(self) -> None:
        """Check the settings before a host is asked.

        Raises:
            InputError: an effort, an API or a number of samples that no host could serve.
        """
        if unknown := [e for e in self.efforts if e not in EFFORTS]:
            raise InputError(f"--effort {unknown[0]}: choose from {', '.join(EFFORTS)}")
        if self.api not in ("auto", *APIS, "generate"):
            raise InputError(f"--api {self.api}: choose from auto, {', '.join(APIS)}, generate")
        numbers = {
            "--temperature": self.temperature,
            "--requests-per-minute": self.per_minute,
            "--timeout": self.timeout,
        }
        for option, value in numbers.items():
            if value is not None and not 0 <= value < math.inf:
                raise InputError(f"{option} {value}: choose a finite number from 0")
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
    """Send every prompt at every effort to the host at `url` and append a transcript row to `out` for each response.

    Raises:
        InputError: a setting or a prompt is invalid, or `out` is another job's or another command's.
        JobError: some responses are missing, or SIGINT or SIGTERM stopped the job; the rows written are kept.
    """
    settings.check()
    asked = read_prompts(prompts)
    jobs = [Job(p, e, s) for p in asked for e in settings.efforts for s in range(settings.samples)]
    host = Host(
        url,
        key_env=settings.key_env,
        timeout=settings.timeout,
        retries=settings.retries,
        per_minute=settings.per_minute,
        threads=settings.concurrency,
    )
    try:
        with (
            RowOutput(out, command=_COMMAND, inputs=[prompts], overwrite=overwrite, is_own=_is_own) as rows,
            StopSignal(str(out)) as interrupt,
        ):
            _refuse_other_requests(out, rows.known, jobs, settings, host.name)
            left = [job for job in jobs if job.id not in rows.known]
            _collect(host, left, rows, settings, interrupt)
            rows.finish(job.id for job in jobs)
    finally:
        host.close()


def _is_own(row: Mapping[str, Any]) -> bool:
    """Whether this command wrote a row; before 0.8 rows were not stamped."""
    meta = row.get("meta")
    return is_stamped(row, _COMMAND) or (isinstance(meta, dict) and {"host", "request"} <= meta.keys())


def _refuse_other_requests(
    out: str | Path, known: Mapping[str, Mapping[str, Any]], jobs: Sequence[Job], settings: Settings, host: str
) -> None:
    """Check that every row that is there answers a request of this job.

    Raises:
        InputError: one does not; the message names what differs.
    """
    by_id = {job.id: job for job in jobs}
    for id, row in known.items():
        meta = row["meta"]
        if id not in by_id:
            raise InputError(f"{out} holds {id!r}, which is no request of this job: name another file, or --overwrite")
        if meta.get("request") == _digest(by_id[id], settings):
            continue
        begun = meta.get(KEY) or {"model": meta.get("model")}
        now = _about(by_id[id], settings)
        other = [
            f"{name} {shown(begun[name])}, now {shown(now[name])}"
            for name in begun
            if begun[name] != now.get(name, begun[name])
        ]
        raise InputError(
            f"{out} holds {id!r} of another request ({'; '.join(other) or 'its prompt or settings differ'}): "
            "name another file, or --overwrite"
        )


def _collect(host: Host, left: list[Job], rows: RowOutput, settings: Settings, interrupt: StopSignal) -> None:
    failed: list[tuple[Job, str]] = []
    reasoning: dict[str, int] = {}
    flags: list[tuple[str, ...]] = []
    with progress("transcripts", len(left), "answers") as advance:
        for job, result in _asked(host, left, settings, interrupt):
            if isinstance(result, dict):
                experts = result.pop("routed_experts", None)
                if experts is not None:
                    routing.write_experts(rows.path, result["id"], experts)
                rows.write(result)
                flags.append(_flags(result, settings.vocabulary))
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
    if found := counted(flags):
        print(f"{rows.path}: {len(flags):,} answers, {found}", file=sys.stderr)
    interrupt.check()
    if failed:
        raise JobError(
            f"{len(failed)} of {len(left)} were not answered; the others are in {rows.path}, the same command asks "
            "again"
        )


_Result = dict[str, Any] | Exception


def _asked(host: Host, left: list[Job], settings: Settings, interrupt: StopSignal) -> Iterator[tuple[Job, _Result]]:
    """Yield rows or reasons as they come; at most `concurrency` requests at a time.

    Whatever is wrong with one answer is the reason of one row. After a signal nothing more is asked, and the answers
    under way are waited for.
    """
    ask = _Asker(host, settings)
    queue = iter(left)
    results: queues.SimpleQueue[tuple[Job, _Result]] = queues.SimpleQueue()
    running = 0

    def work(job: Job) -> None:
        try:
            results.put((job, ask(job)))
        except Exception as error:
            results.put((job, error))

    try:
        while True:
            room = settings.concurrency if ask.api != "auto" else 1  # the first finds out what the host speaks
            while running < room and not interrupt.asked and (job := next(queue, None)) is not None:
                # daemons, so that a second Ctrl-C need not wait for the host
                threading.Thread(target=work, args=(job,), daemon=True).start()
                running += 1
            if interrupt.asked:
                host.stop_retrying()
            if not running:
                return
            try:
                job, result = results.get(timeout=_POLL_S)
            except queues.Empty:
                continue
            running -= 1
            if isinstance(result, InputError):
                raise result
            if isinstance(result, Exception) and not isinstance(result, HostError | answers.NoAnswerError):
                result = answers.NoAnswerError(f"the reply cannot be read ({type(result).__name__}: {result})")
            yield job, result
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
        ask = {
            "chat": self._chat,
            "responses": self._responses,
            "completions": self._completions,
            "generate": self._generate,
        }
        fields = ask[api](job)
        if {"reasoning_effort", "reasoning"} & self.host.dropped and not self._effort_in_body:
            raise InputError(
                f"{self.host.name} takes no reasoning effort: say how it is told, as in "
                '--body \'{"chat_template_kwargs": {"reasoning_effort": "{effort}"}}\''
            )
        about = fields.pop("about")
        try:
            json.dumps([fields.get("messages"), about], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise answers.NoAnswerError("the reply has half a surrogate pair in a text") from error
        return {
            "id": job.id,
            "prompt_id": job.prompt.id,
            "effort": job.effort,
            **fields,
            "expected": job.prompt.answer,
            "meta": job.prompt.meta
            | about
            | {
                "host": self.host.name,
                "model": self.settings.model,
                "api": api,
                "dropped": sorted(self.host.dropped),
                "request": _digest(job, self.settings),
                KEY: {"command": _COMMAND, **_about(job, self.settings)},
            },
        }

    @property
    def _effort_in_body(self) -> bool:
        return "{effort}" in json.dumps(dict(self.settings.body))

    def _body(self, job: Job, limit: str, effort: Mapping[str, Any]) -> dict[str, Any]:
        s = self.settings
        wanted = {"model": s.model, "temperature": s.temperature, limit: s.max_tokens}
        wanted |= {} if self._effort_in_body else effort
        if s.samples > 1:
            wanted["seed"] = job.sample
        wanted |= {"return_routed_experts": True} if s.routing else {}
        return {k: v for k, v in wanted.items() if v is not None} | _filled(dict(s.body), job.effort)

    def _chat(self, job: Job) -> dict[str, Any]:
        body = self._body(job, "max_tokens", {"reasoning_effort": job.effort}) | {"return_token_ids": True}
        body |= {"tools": job.prompt.options["tools"]} if "tools" in job.prompt.options else {}
        reply = self.host.post("/chat/completions", body | {"messages": requests.chat_messages(job.prompt.messages)})
        return self._row(job, answers.from_chat(reply), reply)

    def _responses(self, job: Job) -> dict[str, Any]:
        body = self._body(job, "max_output_tokens", {"reasoning": {"effort": job.effort}})
        if "tools" in job.prompt.options:
            body["tools"] = requests.responses_tools(job.prompt.options["tools"])
        reply = self.host.post("/responses", body | {"input": requests.responses_input(job.prompt.messages)})
        return self._row(job, answers.from_responses(reply), reply)

    def _prompt(self, job: Job) -> tuple[list[int], Tokenizer]:
        """The prompt's ids, rendered here."""
        with self._lock:
            words = tokenizer(self.settings.vocabulary)
            return render(job.prompt.messages, effort=job.effort, tokenizer=words, **job.prompt.options), words

    def _completions(self, job: Job) -> dict[str, Any]:
        """The answer to a prompt rendered here: its ids, or else those of its text with marks."""
        prompt, words = self._prompt(job)
        body = self._body(job, "max_tokens", {}) | {"prompt": words.decode(prompt), "skip_special_tokens": False}
        reply = self.host.post("/completions", body | {"return_token_ids": True})
        text, complete, about, ids = answers.from_completion(reply)
        output = read_output(text, truncated=not complete)
        has_analysis = any(m.get("channel") == "analysis" for m in output.messages)
        answer = answers.Answer(output.messages, "verbatim" if has_analysis else "absent", complete, about, ids)
        if ids is None and is_marked(text):
            answer = replace(answer, ids=(prompt, marked_ids(text, words)))
            about["ids"] = "from text"
        elif ids is None and not has_analysis:  # the host strips marks: only the messages can be had back
            raise answers.NoAnswerError("the host strips harmony's marks and the channels cannot be told apart")
        return self._row(job, answer, reply)

    def _generate(self, job: Job) -> dict[str, Any]:
        """The answer of vLLM's `/inference/v1/generate`: ids to ids."""
        prompt, words = self._prompt(job)
        s = self.settings
        sampling = {
            "temperature": s.temperature,
            "max_tokens": s.max_tokens,
            "seed": job.sample if s.samples > 1 else None,
        }
        sampling = {name: value for name, value in sampling.items() if value is not None}
        body = {"model": s.model, "token_ids": prompt, "sampling_params": sampling} | _filled(dict(s.body), job.effort)
        reply = self.host.post("/inference/v1/generate", body, root=True)
        choice = answers.first_choice(reply)
        ids = choice.get("token_ids")
        if not isinstance(ids, list) or not ids:
            raise answers.NoAnswerError("the reply has no token_ids")
        output = read_output(words.decode(ids))
        has_analysis = any(m.get("channel") == "analysis" for m in output.messages)
        complete = choice.get("finish_reason") == "stop"
        answer = answers.Answer(output.messages, "verbatim" if has_analysis else "absent", complete, {}, (prompt, ids))
        return self._row(job, answer, reply)

    def _row(self, job: Job, answer: answers.Answer, reply: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a transcript: ids where the host gave them, which are then never made again from text."""
        fields: dict[str, Any] = {
            "complete": answer.complete,
            "correct": _correct(job, answer.messages if answer.complete else []),
            "about": answer.about | {"reasoning": answer.reasoning, "complete": answer.complete},
        }
        if answer.ids is not None:
            prompt, ids = answer.ids
            n_tokens = len(prompt) + len(ids)
            if max(map(max, (prompt, ids))) >= 2**31:
                raise answers.NoAnswerError("the reply has token ids beyond 32 bits")
            if self.host.has_key and self.host.holds_key(self._decoded(ids)):
                raise answers.NoAnswerError("the answer repeats the key, which is stored nowhere")
            fields |= {"tokens": [*prompt, *ids], "n_prompt": len(prompt)}
        else:
            messages = [*job.prompt.messages, *answer.messages]
            try:
                check_messages(messages)
                settled_effort(job.effort, messages)
            except InputError as error:
                raise answers.NoAnswerError(str(error)) from error
            about = answer.about
            n_tokens = sum(v for k in ("prompt_tokens", "completion_tokens") if isinstance(v := about.get(k), int))
            fields |= {"messages": messages} | job.prompt.options
        return fields | self._routing(reply, n_tokens, exact=answer.ids is not None)

    def _decoded(self, ids: Sequence[int]) -> str:
        """Return the text of ids; "" for ids that the vocabulary lacks, which are refused when they are read."""
        try:
            return tokenizer(self.settings.vocabulary).decode(list(ids))
        except (KeyError, IndexError, ValueError, OverflowError, InputError):
            return ""

    def _routing(self, reply: Mapping[str, Any], n_tokens: int, exact: bool) -> dict[str, Any]:
        try:
            experts = routing.routed_experts(reply, n_tokens=n_tokens)
        except routing.RoutingError as error:
            raise answers.NoAnswerError(str(error)) from error
        if experts is None and self.settings.routing:
            raise answers.NoAnswerError(
                "the reply has no routed experts: start vLLM with --enable-return-routed-experts, sglang with "
                "--enable-return-routed-experts"
            )
        if experts is not None and not exact:
            if self.settings.routing:
                raise answers.NoAnswerError("the reply has routed experts but no token ids, which they belong to")
            return {}
        return {} if experts is None else {"routed_experts": experts}


def _flags(row: Mapping[str, Any], vocabulary: str | None) -> tuple[str, ...]:
    if "messages" in row:
        return flags_of_row(dict(row))
    words = tokenizer(vocabulary)
    labels = label(row["tokens"], tokenizer=words, n_prompt=row["n_prompt"])
    return sequence_flags(labels, row["n_prompt"], complete=row.get("complete"))


def _correct(job: Job, messages: Sequence[Mapping[str, Any]]) -> bool | None:
    if job.prompt.answer is None:
        return None
    last = messages[-1] if messages else {}
    return last.get("channel") == "final" and last["content"].strip() == job.prompt.answer


def _filled(value: Any, effort: str) -> Any:
    if isinstance(value, dict):
        return {k: _filled(v, effort) for k, v in value.items()}
    if isinstance(value, list):
        return [_filled(v, effort) for v in value]
    return value.replace("{effort}", effort) if isinstance(value, str) else value


def _about(job: Job, settings: Settings) -> dict[str, Any]:
    """Return the fields of a request that could change its answer, by name; long texts are replaced by a digest."""

    def digest(value: Any) -> str:
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]

    return {
        "model": settings.model,
        "temperature": settings.temperature,
        "max_tokens": settings.max_tokens,
        "prompt": digest([job.prompt.messages, job.prompt.options]),
        "body": digest(dict(settings.body)),
    }


def _digest(job: Job, settings: Settings) -> str:
    """Names a request: all that could change its answer."""
    asked = [job.prompt.messages, job.effort, job.sample, settings.model, settings.temperature, settings.max_tokens]
    asked += [job.prompt.options] if job.prompt.options else []
    text = json.dumps([*asked, dict(settings.body)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
