"""The loops of a layer, `workbench.kernels.cpu.layer_loops`, compiled for a processor without AVX-512."""

import platform

import pytest

from tests.kernels.cpu.test_products import HASWELL, other_processor

pytestmark = pytest.mark.long  # it compiles all loops of a layer

LAYER_AGAINST_TORCH = """
import torch
from tests.model.test_fused_block import decode, in_modules, random_model
from workbench.kernels import cpu
from workbench.kernels.cpu import vectors

model = random_model()
for rows in (1, 3):
    got = decode(model, rows, past=150)
    with in_modules():
        assert torch.equal(decode(model, rows, past=150), got)
compiled, cpu.compiled = cpu.compiled, lambda *tensors: None
want = decode(model, 3, past=150)
assert (got - want).norm() / want.norm() < 0.02
assert (got[:1] - want[1:2]).norm() / want[1:2].norm() > 0.2  # of another row
cpu.compiled = compiled
print(vectors.instructions())
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="emulates an x86-64 processor")
def test_a_layer_without_avx512_equals_its_modules_and_torch() -> None:
    assert other_processor(LAYER_AGAINST_TORCH, **HASWELL) == "AVX2"
