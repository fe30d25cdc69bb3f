"""An S3 server for tests: `python -m tests.runs.s3_server PORT` serves moto's, one request at a time.

S3 promises that of several conditional puts of one object exactly one succeeds. moto looks for the object and then
stores it, in threads, so that two could succeed.

Reference: https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html
"""

import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import run_simple


def one_at_a_time(app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
    """Return a WSGI application that answers no request before the one before it is answered."""
    lock = threading.Lock()

    def serialized(*request: Any) -> Iterable[bytes]:
        with lock:
            return list(app(*request))

    return serialized


if __name__ == "__main__":
    app = one_at_a_time(DomainDispatcherApplication(create_backend_app))
    run_simple("127.0.0.1", int(sys.argv[1]), app, threaded=True, request_handler=MotoRequestHandler)
