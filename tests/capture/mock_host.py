"""A mock server with an OpenAI-compatible API in a process of its own: the answer depends on the request alone."""

import hashlib
import json
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        time.sleep(0.01)
        content = hashlib.sha256(body).hexdigest()[:8]
        message = {"role": "assistant", "content": content, "reasoning_content": "1+2=3;"}
        reply = {"model": "m", "choices": [{"message": message, "finish_reason": "stop"}]}
        data = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """Stay silent."""


@contextmanager
def serving() -> Iterator[str]:
    """Yield the URL of a server that answers as long as the block lasts."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    process = multiprocessing.get_context("fork").Process(target=server.serve_forever, daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        process.kill()
        process.join()
        server.server_close()
