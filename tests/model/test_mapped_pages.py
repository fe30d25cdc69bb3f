"""Pages of memory-mapped weights are mapped by a few calls: they are there before they are read."""

import itertools
import platform
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from workbench.model import mapped_pages
from workbench.model.mapped_pages import map_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux maps pages on request")
MEGABYTES = 48


@pytest.fixture
def weights(tmp_path: Path) -> nn.ParameterDict:
    """A module with two weights in a file, of which no page is mapped."""
    names = ("a", "b")
    numbers = torch.arange(MEGABYTES * 2**18, dtype=torch.float32)  # below 2^24: exact
    save_file(dict(zip(names, numbers.chunk(2), strict=True)), tmp_path / "weights.safetensors")
    mapped = safe_open(tmp_path / "weights.safetensors", framework="pt")
    return nn.ParameterDict({name: nn.Parameter(mapped.get_tensor(name), requires_grad=False) for name in names})


def resident_share(weights: nn.ParameterDict) -> float:
    """Return which share of the weights' memory has pages, as the system reports it."""
    resident, inside = 0, False
    addresses = {weight.data_ptr() for weight in weights.values()}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if "-" in name and not name.endswith(":"):
            first, last = (int(number, 16) for number in name.split("-"))
            inside = any(first <= address < last for address in addresses)
        elif inside and name == "Rss:":
            resident += 1024 * int(rest[0])
    return resident / sum(weight.nbytes for weight in weights.values())


def test_all_pages_of_large_weights_are_mapped_before_they_are_read(weights: nn.ParameterDict) -> None:
    assert resident_share(weights) < 0.5
    map_pages(weights)
    if tuple(map(int, platform.release().split(".")[:2])) < (5, 14):
        pytest.skip("this Linux is older than 5.14")
    assert resident_share(weights) > 0.95


def test_a_system_that_refuses_the_call_maps_pages_when_they_are_read(
    weights: nn.ParameterDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the negative control: without the call the pages are not there."""
    monkeypatch.setattr(mapped_pages, "_POPULATE_READ", -1)
    map_pages(weights)
    assert resident_share(weights) < 0.5
    total = sum(int(weight[:: 2**10].double().sum()) for weight in weights.values())
    assert total == sum(range(0, MEGABYTES * 2**18, 2**10))


def test_parts_cover_the_pages_within_a_tensor_once() -> None:
    tensor = torch.empty(150 * 2**20 + 12_345, dtype=torch.uint8)[77:]
    parts = list(mapped_pages._parts(tensor))
    assert len(parts) == 3
    assert all(address % 4096 == size % 4096 == 0 for address, size in parts)
    assert all(a + n == b for (a, n), (b, _) in itertools.pairwise(parts))
    assert 0 <= parts[0][0] - tensor.data_ptr() < 2**16
    assert 0 <= tensor.data_ptr() + tensor.nbytes - sum(parts[-1]) < 2**16


def test_a_module_is_mapped_once_and_small_or_other_tensors_never(monkeypatch: pytest.MonkeyPatch) -> None:
    advised: list[tuple[int, int]] = []
    monkeypatch.setattr(mapped_pages, "_advise", lambda: lambda *part: advised.append(part))
    large: Tensor = torch.empty(2**19)
    module = nn.ParameterDict({"large": nn.Parameter(large), "small": nn.Parameter(torch.empty(8))})
    module.register_buffer("elsewhere", torch.empty(2**20, device="meta"))
    map_pages(module)
    assert len(advised) == 1
    assert large.data_ptr() <= advised[0][0] < large.data_ptr() + large.nbytes
    map_pages(module)
    assert len(advised) == 1
