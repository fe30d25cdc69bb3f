"""A model at an OpenAI-compatible host as the source of branches: prefixes of ids in, ids of continuations out.

The host's `/completions` takes a prompt of ids, as vLLM, SGLang and llama.cpp do. Ids of continuations are those that
the host gives (`return_token_ids`), else those of its text with harmony's marks.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Literal

from workbench import harmony
from workbench.errors import InputError, JobError
from workbench.harmony.grammar import marked_ids
from workbench.harmony.hosts.answers import first_choice
from workbench.harmony.hosts.client import Host, HostError
from workbench.runs import Run, conversations

_ENDS: tuple[Literal["return", "call", "end"], ...] = ("return", "call", "end")
_ENDED = "stop"  # finish_reason of an answer that ended by itself


class HostModel:
    """Continues prefixes at a host; has what branching uses of a model.

    n_ctx: the longest sequence of the model. concurrency: prefixes that are continued at the same time.
    """

    def __init__(
        self, host: Host, name: str, tokenizer: harmony.Tokenizer, *, n_ctx: int = 131_072, concurrency: int = 8
    ) -> None:
        self.host, self.name, self.tokenizer, self.concurrency = host, name, tokenizer, concurrency
        self.cfg = SimpleNamespace(n_ctx=n_ctx)
        self.checkpoint = SimpleNamespace(digest=f"{name} at {host.name}", path=host.name)

    def generate(
        self,
        tokens: Sequence[Sequence[int]],
        *,
        samples: int,
        temperature: float,
        max_new_tokens: int,
        seed: Sequence[int],
        return_type: str = "new_tokens",
    ) -> list[list[int]]:
        """Return the ids of `samples` continuations of each prefix, one prefix after the other.

        seed: one for each continuation; the host is given that of the first of a request.

        Raises:
            JobError: the host refuses a request, gives up, or its answers cannot be read.
        """
        assert return_type == "new_tokens"
        options = {"model": self.name, "temperature": temperature, "max_tokens": max_new_tokens}

        def continued(i: int) -> list[list[int]]:
            continuations: list[list[int]] = []
            while len(continuations) < samples:  # a host may give fewer choices than it was asked for
                own = int(seed[i * samples + len(continuations)]) % 2**31
                body = options | {"prompt": list(map(int, tokens[i])), "n": samples - len(continuations), "seed": own}
                body |= {"skip_special_tokens": False, "return_token_ids": True}
                continuations += self._continuations(body)
            return continuations[:samples]

        with ThreadPoolExecutor(self.concurrency) as pool:
            return [ids for own in pool.map(continued, range(len(tokens))) for ids in own]

    def ask(self, prompt: str) -> str:
        """Return the answer of the model to a prompt, as a chat.

        Raises:
            JobError: the host refuses the request or gives up.
        """
        body = {"model": self.name, "temperature": 0, "messages": [{"role": "user", "content": prompt}]}
        message = first_choice(self._posted("/chat/completions", body)).get("message")
        content = message.get("content") if isinstance(message, dict) else None
        return content if isinstance(content, str) else ""

    def _continuations(self, body: dict[str, Any]) -> list[list[int]]:
        choices = self._posted("/completions", body).get("choices")
        if not isinstance(choices, list) or not choices or not all(isinstance(choice, dict) for choice in choices):
            raise JobError(f"{self.host.name}: the reply has no choices")
        return [self._ids(choice) for choice in choices]

    def _posted(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            reply = self.host.post(path, body)
        except HostError as error:
            raise JobError(f"{self.host.name}{path}: {error}") from error
        if not isinstance(reply, dict):
            raise JobError(f"{self.host.name}{path}: the reply is not a JSON object")
        return reply

    def _ids(self, choice: dict[str, Any]) -> list[int]:
        """Return the ids of a continuation, with the token that ended it.

        Raises:
            JobError: the reply has neither ids nor a text with marks.
        """
        ended, ids, text = choice.get("finish_reason") == _ENDED, choice.get("token_ids"), choice.get("text")
        try:
            if isinstance(ids, list):
                if not all(type(token) is int and 0 <= token < self.tokenizer.d_vocab for token in ids):
                    raise InputError(f"its ids are not in the vocabulary of {self.tokenizer.d_vocab:,}")
            elif isinstance(text, str):
                ids = marked_ids(text, self.tokenizer)
                if ended and not set(ids) & set(self.tokenizer.special.values()):
                    raise InputError(
                        "the host removes harmony's marks, so the channels cannot be separated: serve "
                        "the model without parsing of channels by the host"
                    )
            else:
                raise InputError("the reply has neither token_ids nor a text")
        except InputError as error:
            raise JobError(f"{self.host.name}: a continuation cannot be read: {error}") from error
        ends = [self.tokenizer.mark(name) for name in _ENDS]
        if ended and (not ids or ids[-1] not in ends):
            stop = choice.get("stop_reason")
            ids = [*ids, stop if type(stop) is int and stop in ends else ends[0]]
        return list(ids)


@contextmanager
def connected(
    url: str, name: str, run: Run, *, key_env: str = "OPENAI_API_KEY", concurrency: int = 8
) -> Iterator[HostModel]:
    """Yield the model of this name at a host, with the tokenizer and the context of a run.

    Raises:
        InputError: the URL is not the address of a host, or the run's tokenizer is not installed.
    """
    host = Host(url, key_env=key_env, timeout=600.0, retries=4, per_minute=None, threads=concurrency)
    try:
        tokenizer = conversations.tokenizer(run)
        yield HostModel(host, name, tokenizer, n_ctx=int(run.model["n_ctx"]), concurrency=concurrency)
    finally:
        host.close()
