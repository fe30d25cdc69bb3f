"""What is requested of a host: the settings of a collection and its jobs, one for each prompt, effort and sample."""

import functools
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from workbench.errors import InputError
from workbench.harmony.messages import EFFORTS
from workbench.harmony.transcripts import Prompt
from workbench.harmony.vocabulary import tokenizer

COMMAND = "transcripts"
APIS = ("chat", "responses", "completions")  # those that are tried; `generate` is vLLM's own and must be named


@dataclass(frozen=True)
class Settings:
    """How to request responses from a host.

    body: more fields of each request; `{effort}` in a string of it is replaced by the effort. routing: request the
    routed experts and refuse responses without them.
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
            raise InputError(
                f"--samples {self.samples} at temperature 0 would give {self.samples} equal answers: "
                "set --temperature above 0"
            )


@dataclass(frozen=True)
class Job:
    """One transcript to collect: a prompt at an effort, and which of its samples."""

    prompt: Prompt
    effort: str
    sample: int

    @property
    def id(self) -> str:
        """Return the id of the transcript."""
        return f"{self.prompt.id}/{self.effort}/{self.sample}"


@functools.lru_cache(maxsize=8)
def _vocabulary(folder: str) -> str:
    """Return a digest of the vocabulary and the chat template of a checkpoint folder."""
    words = tokenizer(folder)
    return hashlib.sha256(f"{words.digest} {words.chat_template or ''}".encode()).hexdigest()[:16]


def request_fields(job: Job, settings: Settings) -> dict[str, Any]:
    """Return the fields of a request that could change its answer, by name; long texts are replaced by a digest."""

    def digest(value: Any) -> str:
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]

    return {
        "model": settings.model,
        "temperature": settings.temperature,
        "max_tokens": settings.max_tokens,
        "prompt": digest([job.prompt.messages, job.prompt.options]),
        "body": digest(dict(settings.body)),
    } | ({"tokenizer": _vocabulary(settings.vocabulary)} if settings.vocabulary else {})


def request_digest(job: Job, settings: Settings) -> str:
    """Return the digest of everything in a request that could change its response."""
    asked = [job.prompt.messages, job.effort, job.sample, settings.model, settings.temperature, settings.max_tokens]
    asked += [job.prompt.options] if job.prompt.options else []
    asked += [_vocabulary(settings.vocabulary)] if settings.vocabulary else []  # with it prompts are made and ids read
    text = json.dumps([*asked, dict(settings.body)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
