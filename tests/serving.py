"""Ports for servers that tests start, and waiting until they answer."""

import socket
import subprocess
import time
from typing import Any

import pytest


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
