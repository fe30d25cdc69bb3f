"""The loops of a layer compiled for other processors: run with AVX2 only, and translated for 64-bit ARM."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.cpu.test_products import HASWELL, other_processor

pytestmark = pytest.mark.long  # each test compiles all loops of a layer

ROOT = Path(__file__).parents[3]

LAYER_AGAINST_TORCH = """
import torch
from tests.model.test_fused_block import decode, in_modules, random_model
from workbench.kernels import cpu
from workbench.kernels.cpu import loops

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
print(loops.instructions())
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="emulates an x86-64 processor")
def test_a_layer_without_avx512_equals_its_modules_and_torch() -> None:
    assert other_processor(LAYER_AGAINST_TORCH, **HASWELL) == "AVX2"


# LLVM translates the same loops that it compiles for this processor. Their vectors have no instruction of x86-64 in
# them, unless values of MXFP4 are looked up by AVX-512.
TRANSLATION = """
import re, sys
import llvmlite.binding as llvm
from numba import from_dtype, njit, types
from workbench.kernels.cpu import layer_loops, loops
from workbench.kernels.cpu.layer_records import LAYER, STEP

if sys.argv[1] == "generic":
    loops._wide_registers = lambda context: False
records = [types.Array(from_dtype(kind), 1, "C") for kind in (LAYER, STEP)]
signature = types.void(types.int64, types.int64, *records, types.int64, types.int64)
(code,) = njit(signature, nogil=True)(layer_loops._run_phases).inspect_llvm().values()
llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()
triple = "aarch64-unknown-linux-gnu"
machine = llvm.Target.from_triple(triple).create_target_machine(opt=3, features="+neon")
code = re.sub(r"^target (triple|datalayout) = .*$", "", code, flags=re.M)
code = re.sub(r'"target-(cpu|features)"="[^"]*"', "", code)
module = llvm.parse_assembly(f'target triple = "{triple}"\\ntarget datalayout = "{machine.target_data}"\\n{code}')
module.verify()
assembly = machine.emit_assembly(module)
patterns = {
    "multiply-adds": r"fmla\\s+v\\d+\\.4s",
    "conversions": r"fcvtl2?\\s",
    "foreign": r"\\bbl\\s+(?:fma|__ext)",
}
for name, pattern in patterns.items():
    print(name, len(re.findall(pattern, assembly)))
"""


def translated(vectors: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", TRANSLATION, vectors],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"NUMBA_DISABLE_INTEL_SVML": "1"},
    )


def test_the_loops_of_a_layer_compile_for_64_bit_arm() -> None:
    """Products become vector instructions, and half-precision values are converted by the processor."""
    done = translated("generic")
    assert done.returncode == 0, done.stderr
    counts = {name: int(n) for name, n in (line.split() for line in done.stdout.splitlines())}
    assert counts["multiply-adds"] > 100
    assert counts["conversions"] > 10
    assert counts["foreign"] == 0


@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs instructions of x86-64 in the loops")
def test_instructions_of_another_processor_are_noticed() -> None:
    """The lookup of AVX-512 has no translation."""
    from workbench.kernels.cpu import loops

    if loops.instructions() != "AVX-512":
        pytest.skip("this processor has no AVX-512")
    assert translated("avx512").returncode != 0
