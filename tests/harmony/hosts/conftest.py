"""A mock server for each test, and two prompts."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harmony.hosts.mock_server import FakeHost, write


@pytest.fixture
def host() -> Iterator[FakeHost]:
    fake = FakeHost()
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write(tmp_path, 2)
