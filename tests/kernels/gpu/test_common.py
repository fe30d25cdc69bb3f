"""Launchers choose the GPU of their first argument, wherever they are called from."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.kernels.gpu import attention, common, logits, moe, moments, mxfp4, norm, rotary, routing

LAUNCHERS = {
    "routing.top_k": lambda x: routing.top_k(x, 2),
    "routing.gate": lambda x: routing.gate(x, torch.zeros(len(x), 1, dtype=torch.long)),
    "mxfp4.quantise": mxfp4.quantise,
    "moments.moments": lambda x: moments.moments(x, torch.zeros(len(x), dtype=torch.long), 1),
    "attention.attention": lambda x: attention.attention(
        x.view(1, -1, 1, 32), x.view(1, -1, 1, 32), x.view(1, -1, 1, 32), torch.arange(len(x))[None], None
    ),
}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_runs_on_the_device_of_its_first_argument(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def device_of(x: Any) -> AbstractContextManager[None]:
        seen.append(x)
        return nullcontext()

    monkeypatch.setattr(common.torch.cuda, "device_of", device_of)
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    LAUNCHERS[name](x)
    assert isinstance(seen[0], Tensor)
    assert seen[0].data_ptr() == x.data_ptr()


def test_every_launcher_of_a_kernel_module_is_guarded() -> None:
    names = {"top_k", "gate", "group", "moe", "attention", "dequantise", "quantise", "moments"}
    names |= {"rms_norm", "rms_scale", "rotate", "predict"}
    modules = (routing, moe, attention, mxfp4, moments, norm, rotary, logits)
    own = [
        (m, n) for m in modules for n in sorted(names) if getattr(getattr(m, n, None), "__module__", "") == m.__name__
    ]
    assert {name for _, name in own} == names
    assert [f"{m.__name__}.{n}" for m, n in own if not hasattr(getattr(m, n), "__wrapped__")] == []
