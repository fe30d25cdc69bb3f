"""One job as one transcript row: the request in the API of the host, and its reply as messages or token ids."""

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from workbench.errors import InputError
from workbench.harmony.grammar import marked_ids
from workbench.harmony.hosts import answers, requests, routing
from workbench.harmony.hosts.client import AbsentError, Host
from workbench.harmony.hosts.settings import APIS, COMMAND, Job, Settings, request_digest, request_fields
from workbench.harmony.marked_text import is_marked, read_output
from workbench.harmony.messages import check_messages, settled_effort
from workbench.harmony.rendering import render
from workbench.harmony.vocabulary import Tokenizer, tokenizer
from workbench.row_output import KEY


class Asker:
    """Requests the response of a job; the first job determines which API the host has.

    Raises:
        InputError: the host has none of the APIs, or takes no reasoning effort.
        NoAnswerError: the reply cannot be used.
    """

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
        raise InputError(
            f"{self.host.name} answers at none of /chat/completions, /responses and /completions: check the address"
        )

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
                f"{self.host.name} has no option for the reasoning effort: state how to pass it, as in "
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
                "request": request_digest(job, self.settings),
                KEY: {"command": COMMAND, **request_fields(job, self.settings)},
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
        """Return the prompt's ids, rendered here."""
        with self._lock:
            encoding = tokenizer(self.settings.vocabulary)
            return render(job.prompt.messages, effort=job.effort, tokenizer=encoding, **job.prompt.options), encoding

    def _completions(self, job: Job) -> dict[str, Any]:
        """Return the answer to a prompt rendered here: its ids, or else those of its text with marks."""
        prompt, encoding = self._prompt(job)
        body = self._body(job, "max_tokens", {}) | {"prompt": encoding.decode(prompt), "skip_special_tokens": False}
        reply = self.host.post("/completions", body | {"return_token_ids": True})
        text, complete, about, ids = answers.from_completion(reply)
        output = read_output(text, truncated=not complete)
        has_analysis = any(m.get("channel") == "analysis" for m in output.messages)
        answer = answers.Answer(
            output.messages, "verbatim" if has_analysis else "absent", complete, about, ids, output.irregular
        )
        if ids is None and is_marked(text):
            answer = replace(answer, ids=(prompt, marked_ids(text, encoding)))
            about["ids"] = "from text"
        elif ids is None and not has_analysis:  # the host strips marks: only the messages can be had back
            raise answers.NoAnswerError("the host strips harmony's marks, so that the channels cannot be distinguished")
        return self._row(job, answer, reply)

    def _generate(self, job: Job) -> dict[str, Any]:
        """Return the answer of vLLM's `/inference/v1/generate`: ids to ids."""
        prompt, encoding = self._prompt(job)
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
        output = read_output(encoding.decode(ids))
        has_analysis = any(m.get("channel") == "analysis" for m in output.messages)
        complete = choice.get("finish_reason") == "stop"
        answer = answers.Answer(output.messages, "verbatim" if has_analysis else "absent", complete, {}, (prompt, ids))
        return self._row(job, answer, reply)

    def _row(self, job: Job, answer: answers.Answer, reply: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of a transcript; ids that the host gave are never made again from text."""
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
            fields |= {"notes": ["irregular"]} if answer.irregular else {}
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
