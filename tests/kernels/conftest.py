"""Threads of torch for the tests of kernels."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(params=[1, 3])
def number_of_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Set the number of threads of torch, because a pool asks torch itself and would not see a replaced function."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
