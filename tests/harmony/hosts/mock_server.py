"""A mock server of an OpenAI-compatible host, and prompts and settings for it."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from workbench.harmony.hosts.collect import Settings

KEY = "sk-the-key-that-must-not-appear"
Reply = tuple[int, Any, dict[str, str]]


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # of 5, the default, some of many requests at once wait a second for their connection


class FakeHost:
    """Answers what a test sets; remembers what it was asked."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.reply: Callable[[str, dict[str, Any], int], Reply] = lambda path, body, n: (200, chat("6"), {})
        self._lock = threading.Lock()
        host = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with host._lock:
                    n = len(host.requests)
                    host.requests.append(body)
                    host.headers.append(dict(self.headers))
                    host.paths.append(self.path)
                status, reply, headers = host.reply(self.path, body, n)
                data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()


def chat(content: str | None, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content} | more}
    return {"choices": [choice], "model": "served", "usage": {"prompt_tokens": 3, "completion_tokens": 5}}


def write(folder: Path, n: int) -> Path:
    path = folder / "prompts.jsonl"
    rows = [
        {
            "id": f"p{i}",
            "messages": [{"role": "user", "content": f"2*{i} é <script>"}],
            "expected": str(2 * i),
            "meta": {"task": "t"},
        }
        for i in range(n)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def settings(**changes: Any) -> Settings:
    return Settings(**({"model": "m", "efforts": ("low",), "retries": 2, "key_env": "TEST_KEY"} | changes))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
