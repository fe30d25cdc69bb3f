"""Compile kernels ahead of time for GPUs that this machine does not have, and read the resources that they need.

Triton compiles for every target without a driver. The disassembler in its wheel shows registers and spills of the
machine code itself, its metadata the shared memory; the assembly shows which matrix instruction was used, and what the
main loop issues beside it. What this cannot tell is time.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
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
    blocks: int = 32  # resident on one multiprocessor
    reserved: int = 1024  # bytes of shared memory the system takes beside each block's own

    @property
    def triton(self) -> GPUTarget:
        return GPUTarget(self.backend, self.arch, self.warp)


# Sizes: CUDA C++ Programming Guide, table of compute capabilities; AMD CDNA 3 and CDNA 4 instruction set manuals.
TARGETS = {
    "sm_80": Target("cuda", 80, 32, 166_912, 65_536, 2048, "mma.sync"),
    "sm_89": Target("cuda", 89, 32, 101_376, 65_536, 1536, "mma.sync", blocks=24),
    "sm_90": Target("cuda", 90, 32, 232_448, 65_536, 2048, "wgmma.mma_async"),
    "sm_100": Target("cuda", 100, 32, 232_448, 65_536, 2048, "tcgen05.mma"),
    "sm_120": Target("cuda", 120, 32, 101_376, 65_536, 1536, "mma.sync", blocks=24),
    "gfx942": Target("hip", "gfx942", 64, 65_536, 131_072, 2048, "v_mfma", reserved=0),
    "gfx950": Target("hip", "gfx950", 64, 163_840, 131_072, 2048, "v_mfma", reserved=0),
}


@dataclass(frozen=True)
class CompileCase:
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


class Loop(NamedTuple):
    """One trip of one warp through the loop that multiplies most an instruction.

    instructions: all that NVIDIA's scheduler issues, on AMD those of the vector unit; the products are not among them.
    """

    instructions: int
    flops: int  # of the matrix instructions


class Resources(NamedTuple):
    """The resources of a compiled kernel; registers and spill bytes a thread, shared bytes a block."""

    registers: int
    spilled: int
    shared: int
    blocks_per_sm: int
    instructions: tuple[str, ...]  # the distinct matrix instructions
    loop: Loop | None = None  # none without a matrix instruction whose size its name states
    unguarded: int = 0  # copies into shared memory that no barrier divides from a wait for wgmma before them


def build(case: CompileCase, target: Target) -> Any:
    """Return Triton's compiled kernel; its `asm` holds every stage."""
    types = {**case.types, **dict.fromkeys(case.constants, "constexpr")}
    names = list(case.kernel.arg_names)
    attrs = {(names.index(a),): [["tt.divisibility", 16]] for a in case.aligned}
    source = ASTSource(
        fn=case.kernel, signature={n: types[n] for n in names}, constexprs=dict(case.constants), attrs=attrs
    )
    options = {**case.tile.options, **case.options}
    return triton.compile(source, target=target.triton, options=options)


def resources(case: CompileCase, target: Target) -> Resources:
    """Compile a case for a target and return the resources it takes there."""
    return resources_of(build(case, target), target)


def resources_of(compiled: Any, target: Target) -> Resources:
    """Return the resources of a compiled kernel."""
    read = _nvidia if target.backend == "cuda" else _amd
    facts = compiled.metadata
    registers, spilled, instructions, loop = read(compiled.asm, facts.num_warps)
    blocks = _blocks(target, facts.num_warps, registers, facts.shared, getattr(facts, "tmem_size", 0) or 0)
    unguarded = unguarded_copies(compiled.asm["ptx"]) if target.backend == "cuda" else 0
    return Resources(registers, spilled, facts.shared, blocks, tuple(sorted(set(instructions))), loop, unguarded)


_LABEL, _BRANCH = re.compile(r"\s*(\$L\w+):"), re.compile(r"\bbra(?:\.uni)?\s+(\$L\w+)")


def unguarded_copies(ptx: str) -> int:
    """Return how many asynchronous copies follow a wait for wgmma without a barrier between the two.

    A warp that has waited for its own products could otherwise overwrite shared memory that another warp's products
    still read. The text is followed in its order, and every loop once more from its beginning.

    Reference: triton-lang/triton issues 11047 and 11056.
    """
    lines = ptx.splitlines()
    labels = {match[1]: i for i, line in enumerate(lines) if (match := _LABEL.match(line))}
    jumps = [(i, labels.get(match[1], i)) for i, line in enumerate(lines) if (match := _BRANCH.search(line))]
    bodies = [lines[start : end + 1] * 2 for end, start in jumps if start < end]
    return max(map(_unguarded, [lines, *bodies]))


def _unguarded(lines: Sequence[str]) -> int:
    waited, count = False, 0
    for line in lines:
        if "wgmma.wait_group" in line:
            waited = True
        elif re.search(r"\bbar(?:rier)?\.(?:cta\.)?sync", line):
            waited = False
        elif waited and re.search(r"\bcp\.async\.(?:ca|cg|bulk)", line):
            count += 1
    return count


def _blocks(target: Target, warps: int, registers: int, shared: int, tensor_columns: int) -> int:
    """Return blocks that fit a multiprocessor, of whose registers and threads each of four partitions has a quarter."""
    lanes = -(-max(registers, 1) // 8) * 8 * target.warp
    resident = 4 * min(target.registers // 4 // lanes, target.threads // 4 // target.warp)
    limits = [target.blocks, resident // warps]
    if shared:
        limits.append((target.shared + target.reserved) // (shared + target.reserved))
    if tensor_columns:  # tensor memory: 512 columns a multiprocessor
        limits.append(512 // tensor_columns)
    return min(limits)


def _nvidia(asm: Mapping[str, Any], warps: int) -> tuple[int, int, list[str], Loop | None]:
    """Return registers, spilled bytes, matrix instructions and the main loop, from the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers = re.search(r"REG:(\d+)", text)
    assert registers, text
    code = re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*?);", text)
    lines = [line for _, line in code]
    spills = [re.search(r"\b(?:STL|LDL)(?:\.[A-Z]\w*)*(?:\.(\d+))? ", line) for line in lines]
    products = re.findall(r"(wgmma\.mma_async|tcgen05\.mma|mma\.sync)(?:\S*?\.(m\d+n\d+k\d+))?", asm["ptx"])
    place = {int(address, 16): i for i, (address, _) in enumerate(code)}
    jumps = [re.search(r"\bBRA\S* (?:\S+, )?0x([0-9a-f]+)", line) for line in lines]
    spans = [(place[int(jump[1], 16)], i) for i, jump in enumerate(jumps) if jump]
    return (
        int(registers[1]),
        sum(int(spill[1] or 32) // 8 for spill in spills if spill),
        [f"{kind} {shape}".strip() for kind, shape in products],
        _main_loop(lines, spans, _tcgen05_flops(asm["ptx"]) // warps),
    )


def _tcgen05_flops(ptx: str) -> int:
    """Of one UTCHMMA, whose size only its descriptor states (bits 17 … 22: columns / 8; 24 … 28: rows / 16).

    Reference: PTX ISA, tcgen05, instruction descriptor of .kind::f16, whose depth is 16.
    """
    names = set(re.findall(r"tcgen05\.mma\S* .*?, .*?, .*?, (%r\d+)", ptx))
    sizes = {bits for name in names for bits in re.findall(rf"mov\.b32\s+{name}, (\d+);", ptx)}
    if len(sizes) != 1:  # none, or products of two sizes that the machine code does not distinguish
        return 0
    bits = int(sizes.pop())
    return 2 * (bits >> 24 & 31) * 16 * (bits >> 17 & 63) * 8 * 16


def _amd(asm: Mapping[str, Any], warps: int) -> tuple[int, int, list[str], Loop | None]:
    """Return the same from the assembly; registers are those of both files, vector and accumulation."""
    text = asm["amdgcn"]
    facts = {k: int(v) for k, v in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s*(\d+)", text)}
    lines = [line.strip() for line in text.splitlines()]
    place = {line.split(":")[0]: i for i, line in enumerate(lines) if line.startswith(".LBB")}
    jumps = [re.match(r"s_c?branch\w* (\.LBB\w+)", line) for line in lines]
    spans = [(place[jump[1]], i) for i, jump in enumerate(jumps) if jump]
    return facts["vgpr_count"], 4 * facts["vgpr_spill_count"], re.findall(r"v_mfma\w+", text), _main_loop(lines, spans)


_PRODUCTS = ((r"HGMMA\.(\d+)x(\d+)x(\d+)", 4), (r"\bHMMA\.(16)(8)(16|8)", 1), (r"v_mfma_\w+?_(\d+)x(\d+)x(\d+)", 1))


def _flops(line: str, tensor: int) -> int:
    """Of one warp's part in a matrix instruction (four warps share an HGMMA), 0 of any other."""
    if "UTCHMMA" in line:
        return tensor
    for pattern, warps in _PRODUCTS:
        if match := re.search(pattern, line):
            m, n, k = map(int, match.groups())
            return 2 * m * n * k // warps
    return 0


def _main_loop(lines: Sequence[str], spans: Sequence[tuple[int, int]], tensor: int = 0) -> Loop | None:
    """Return the innermost loop with the most flops an instruction, among spans from a jump's goal to the jump."""
    flops = [_flops(line, tensor) for line in lines]
    loops = {span for span in spans if any(flops[span[0] : span[1] + 1])}
    inner = [(a, b) for a, b in loops if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops)]
    candidates = []
    for start, end in inner:
        others = [line for line, f in zip(lines[start : end + 1], flops[start : end + 1], strict=True) if not f]
        vector = [line for line in others if line.startswith("v_")]
        candidates.append(Loop(len(vector or others), sum(flops[start : end + 1])))
    return max(candidates, key=lambda loop: loop.flops / loop.instructions, default=None)
