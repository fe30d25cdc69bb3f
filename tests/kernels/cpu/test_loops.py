"""The loops translated for 64-bit ARM, on which none of them has run: LLVM makes its code from them.

Their vectors have no instruction of x86-64 in them, except that AVX-512 looks values of MXFP4 up.
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from workbench.kernels import cpu

pytest.importorskip("numba")
if cpu.unavailable():
    pytest.skip(f"the compiled kernels are not available: {cpu.unavailable()}", allow_module_level=True)

ROOT = Path(__file__).parents[3]

TRANSLATION = r"""
import re, sys
import llvmlite.binding as llvm
from numba import from_dtype, njit, types
from workbench.kernels.cpu import layer_loops, loops, position_loops, row_loops, slot_loops, unpacking_loops, vectors
from workbench.kernels.cpu.layer_records import LAYER, STEP

triple = "aarch64-unknown-linux-gnu"
if sys.argv[1] == "arm64":
    vectors._target = row_loops._target = lambda context: (triple, ["+neon"])
llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()
machine = llvm.Target.from_triple(triple).create_target_machine(opt=3, features="+neon")
patterns = {
    "multiply-adds": r"fmla\s+v\d+\.4s",
    "conversions": r"fcvtl2?\s",
    "interleavings": r"\b(?:zip|trn|uzp)[12]\s",
    "emulations": r"\bbl\s+(?:fma|__(?:ext|trunc|gnu|float))\w*",
}
integer = types.int64
products = {"dense_rows": 8, "expert_rows": 17}
unpacking = {"unpack_groups": 5, "unpack_columns": 6, "widen_columns": 4}
cases = {
    name: (getattr(module, "_" + name), [integer] * count)
    for module, names in ((loops, products), (unpacking_loops, unpacking))
    for name, count in names.items()
}
number = types.float32
cases["activate"] = slot_loops._activate, [integer, integer, integer, number, number, integer]
cases["combine"] = slot_loops._combine, [integer] * 7
cases["norm"] = position_loops._norm, [*[integer] * 5, number, integer, integer]
cases["rotate"] = position_loops._rotate, [integer] * 8
records = [types.Array(from_dtype(kind), 1, "C") for kind in (LAYER, STEP)]
layer = layer_loops._run_phases, [integer, integer, *records, integer, integer]
for name, (loop, arguments) in ({"layer": layer} if sys.argv[2] == "layer" else cases).items():
    (code,) = njit(types.void(*arguments), nogil=True)(loop).inspect_llvm().values()
    code = re.sub(r"^target (triple|datalayout) = .*$", "", code, flags=re.M)
    code = re.sub(r'"target-(cpu|features)"="[^"]*"', "", code)
    # numba's own release of arrays, which it has already made for this processor
    code = re.sub(r"(?:tail )?call i8 @llvm\.x86\.atomic\.sub\.cc\.i64\(.*\)", "add i8 0, 0", code)
    module = llvm.parse_assembly(f'target triple = "{triple}"\ntarget datalayout = "{machine.target_data}"\n{code}')
    module.verify()
    assembly = machine.emit_assembly(module)
    print(name, *(len(re.findall(pattern, assembly)) for pattern in patterns.values()))
"""


def translated(instructions: str, loops: str = "products") -> subprocess.CompletedProcess[str]:
    """Translate in a process of its own, because LLVM ends it at an instruction that the target does not have."""
    return subprocess.run(
        [sys.executable, "-c", TRANSLATION, instructions, loops],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=dict(os.environ),
    )


def instruction_counts(done: subprocess.CompletedProcess[str]) -> dict[str, list[int]]:
    """Return for each loop how many multiply-adds, conversions, interleavings and emulations its code has."""
    assert done.returncode == 0, done.stderr
    return {name: [int(n) for n in numbers] for name, *numbers in (line.split() for line in done.stdout.splitlines())}


def test_the_loops_of_products_compile_for_64_bit_arm() -> None:
    """Products are vector instructions, half precision is converted by the processor, and nothing is emulated."""
    counts = instruction_counts(translated("arm64"))
    assert counts["dense_rows"][0] > 30
    assert counts["expert_rows"][0] > 30
    for name in ("expert_rows", "unpack_groups", "unpack_columns"):
        assert counts[name][1] >= 8, name
    assert counts["activate"][0] >= 8  # of the exponential
    assert counts["norm"][0] >= 4  # squares
    for name in ("unpack_columns", "widen_columns"):
        assert counts[name][2] >= 32, name
    assert all(numbers[3] == 0 for numbers in counts.values()), counts


@pytest.mark.long
def test_the_loops_of_a_layer_compile_for_64_bit_arm() -> None:
    multiply_adds, conversions, _, emulations = instruction_counts(translated("arm64", "layer"))["layer"]
    assert multiply_adds > 100
    assert conversions > 10
    assert emulations == 0


@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs instructions of x86-64 in the loops")
def test_instructions_of_another_processor_are_noticed() -> None:
    """Negative control: the lookup of AVX-512 has no translation."""
    from workbench.kernels.cpu import vectors

    if vectors.instructions() != "AVX-512":
        pytest.skip("this processor has no AVX-512")
    done = translated("x86-64")
    assert done.returncode != 0
    assert "permvar" in done.stderr
