"""Render a checkpoint's chat template in an isolated process.

A template is a program from elsewhere. It runs in jinja's sandbox, in a process of its own, which has no more than
a few seconds, a gigabyte and a megabyte of output: a loop that yields nothing and `'x' * 10**10` end with it.
Names and settings are those transformers gives to templates.
"""

import datetime
import functools
import json
import subprocess
import sys
from typing import Any

_LIMIT_S = 5
_MEMORY_BYTES = 1 << 30
_OUTPUT_CHARACTERS = 1_000_000


class TemplateError(ValueError):
    """What a template did wrong, in one line."""


def render_template(source: str, variables: str, date: datetime.date) -> str:
    """Return the text of a jinja template with these variables (a JSON object); `strftime_now` gives the date."""
    answer = _answer(source, variables, date)
    if "error" in answer:
        raise TemplateError(answer["error"])
    return answer["text"]


@functools.lru_cache(maxsize=256)  # a file of prompts has a handful of shapes, a process costs a tenth of a second
def _answer(source: str, variables: str, date: datetime.date) -> dict[str, str]:
    request = json.dumps([source, variables, date.isoformat()])
    command = [sys.executable, "-P", __file__]  # -P: this folder holds no top-level modules
    try:
        done = subprocess.run(command, input=request.encode(), capture_output=True, timeout=_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"it was not done after {_LIMIT_S} s"}
    if done.returncode:
        return {"error": f"its process died ({done.returncode}): {done.stderr.decode(errors='replace')[-200:]!r}"}
    return json.loads(done.stdout)


def _render(source: str, variables: dict[str, Any], date: datetime.date) -> str:
    from jinja2 import TemplateRuntimeError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateRuntimeError(message)

    def tojson(value: Any, indent: int | None = None) -> str:  # jinja's own escapes for HTML
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = date.strftime
    written: list[str] = []
    total = 0
    for chunk in environment.from_string(source).generate(**variables):
        written.append(chunk)
        total += len(chunk)
        if total > _OUTPUT_CHARACTERS:
            raise TemplateRuntimeError(f"it writes more than {_OUTPUT_CHARACTERS:,} characters")
    return "".join(written)


def _main() -> None:
    """The process: a request on standard input, the answer on standard output."""
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    source, variables, date = json.load(sys.stdin.buffer)
    try:
        answer = {"text": _render(source, json.loads(variables), datetime.date.fromisoformat(date))}
    except Exception as error:  # whatever a template can raise is its answer
        reason = f"{type(error).__name__}: {error}"[:500]
        answer = {"error": reason.encode("unicode_escape").decode()}  # one line, no control characters
    print(json.dumps(answer))


if __name__ == "__main__":
    _main()
