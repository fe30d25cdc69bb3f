"""Compiling a kernel for a GPU that is not there, and reading what it would take.

Triton compiles for every target without a driver. The assembler and the disassembler in its wheel tell registers,
spills and shared memory; the assembly tells which matrix instruction was used. What this cannot tell is time.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from workbench.kernels.gpu.tiles import Tile

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.10 changes the default: say it


class Target(NamedTuple):
    """A GPU to compile for; shared: bytes a block may have; registers: 32-bit ones of a multiprocessor."""

    backend: str
    arch: int | str
    warp: int
    shared: int
    registers: int
    threads: int  # resident on one multiprocessor
    matrix: str  # how the matrix instruction is called in its assembly

    @property
    def triton(self) -> GPUTarget:
        return GPUTarget(self.backend, self.arch, self.warp)


# Sizes: CUDA C++ Programming Guide, table of compute capabilities; AMD CDNA 3 and CDNA 4 instruction set manuals.
TARGETS = {
    "sm_80": Target("cuda", 80, 32, 166_912, 65_536, 2048, "mma.sync"),
    "sm_89": Target("cuda", 89, 32, 101_376, 65_536, 1536, "mma.sync"),
    "sm_90": Target("cuda", 90, 32, 232_448, 65_536, 2048, "wgmma.mma_async"),
    "sm_100": Target("cuda", 100, 32, 232_448, 65_536, 2048, "tcgen05.mma"),
    "sm_120": Target("cuda", 120, 32, 101_376, 65_536, 1536, "mma.sync"),
    "gfx942": Target("hip", "gfx942", 64, 65_536, 131_072, 2048, "v_mfma"),
    "gfx950": Target("hip", "gfx950", 64, 163_840, 131_072, 2048, "v_mfma"),
}


@dataclass(frozen=True)
class Specimen:
    """A kernel with everything it is compiled with, as its launcher would launch it for one shipped tile.

    types: argument → Triton type ("*bf16", "*u8", "i32", "fp32", …) of every argument that is not a constexpr.
    constants: the constexprs, the tile's blocks included. aligned: arguments divisible by 16 (pointers, strides).
    products: whether it must contain a matrix instruction. flops, bytes: of one launch at `problem`'s size.
    """

    kernel: Any
    name: str
    problem: str
    tile: Tile
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: frozenset[str] = frozenset()
    products: bool = False
    flops: float = 0.0
    bytes: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)


class Resources(NamedTuple):
    """What a compiled kernel takes; registers and spill bytes a thread, shared bytes a block."""

    registers: int
    spilled: int
    shared: int
    blocks_per_sm: int
    instructions: tuple[str, ...]  # the distinct matrix instructions


def build(specimen: Specimen, target: Target) -> Any:
    """Triton's compiled kernel; its `asm` holds every stage."""
    types = {**specimen.types, **dict.fromkeys(specimen.constants, "constexpr")}
    names = list(specimen.kernel.arg_names)
    attrs = {(names.index(a),): [["tt.divisibility", 16]] for a in specimen.aligned}
    source = ASTSource(
        fn=specimen.kernel, signature={n: types[n] for n in names}, constexprs=dict(specimen.constants), attrs=attrs
    )
    options = {"num_warps": specimen.tile.num_warps, "num_stages": specimen.tile.num_stages, **specimen.options}
    return triton.compile(source, target=target.triton, options=options)


def resources(specimen: Specimen, target: Target) -> Resources:
    """Compiles for a target and reads what it takes there."""
    compiled = build(specimen, target)
    shared = int(compiled.metadata.shared)
    threads = specimen.tile.num_warps * target.warp
    if target.backend == "cuda":
        registers, spilled = _ptxas(compiled.asm["ptx"], int(target.arch))
        found = re.findall(r"(wgmma\.mma_async|tcgen05\.mma|mma\.sync)(?:\S*?\.(m\d+n\d+k\d+))?", compiled.asm["ptx"])
        instructions = {f"{kind} {shape}".strip() for kind, shape in found}
        by_registers = target.registers // (-(-registers // 8) * 8 * threads) if registers else 32
    else:
        text = compiled.asm["amdgcn"]
        facts = {k: int(v) for k, v in re.findall(r"\.(vgpr_count|agpr_count|vgpr_spill_count):\s*(\d+)", text)}
        registers, spilled = facts["vgpr_count"] + facts.get("agpr_count", 0), 4 * facts["vgpr_spill_count"]
        instructions = set(re.findall(r"v_mfma\w+", text))
        by_registers = target.registers // (-(-registers // 8) * 8 * threads) if registers else 32
    by_shared = target.shared // shared if shared else 32
    return Resources(
        registers, spilled, shared, min(by_registers, by_shared, target.threads // threads), tuple(sorted(instructions))
    )


def _ptxas(ptx: str, arch: int) -> tuple[int, int]:
    """Registers and spilled bytes a thread, as the assembler that Triton uses for this target reports them."""
    named = re.search(r"\.target (sm_\w+)", ptx)
    assert named
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={named[1]}", "-o", "/dev/null", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spills = re.search(r"Used (\d+) registers", said), re.findall(r"(\d+) bytes spill", said)
    assert registers
    return int(registers[1]), sum(map(int, spills))
