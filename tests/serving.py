"""Ports for servers that tests start, and waiting until they answer."""

import itertools
import os
import random
import re
import socket
import subprocess
import time
from typing import Any

import pytest

# Below 32,768, where the system chooses ports for connections and for servers that ask for any: a server takes seconds
# to start, and its port would be given away meanwhile. The processes of one run of the tests have ranges of their own.
_RANGE = 1_000
_worker = int(re.sub(r"\D", "", os.environ.get("PYTEST_XDIST_WORKER", "")) or 0) % 20
_numbers = itertools.count(random.SystemRandom().randrange(_RANGE))


def free_port() -> int:
    """A port that nobody uses now, and that this process did not return lately."""
    for number in itertools.islice(_numbers, _RANGE):
        port = 11_000 + _RANGE * _worker + number % _RANGE
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else a closed connection would keep it
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    pytest.fail(f"no port of the range of {_RANGE:,} is free")


def wait_for(port: int, server: "subprocess.Popen[Any]") -> None:
    """Wait until the server listens there: ten minutes at most, and not after it has ended."""
    for _ in range(12_000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if server.poll() is not None:
            pytest.fail(f"the server ended with {server.returncode}")
        time.sleep(0.05)
    pytest.fail(f"nothing answers at port {port}")
