"""Every tile choice in one place: by kernel, problem size and target, with the reason beside it.

A tile is the constants a kernel is compiled with. The resources each takes on every target are in REPORT.md, made by
`workbench bench kernels`; `workbench bench gpu --autotune` measures the alternatives on a card.
"""

import inspect
import json
import os
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """Block sizes by name (the kernel's constexprs), warps, software pipeline stages, and a cap on registers.

    The cap (NVIDIA only) is the assembler's: set where it buys another block on the multiprocessor without a spill.
    """

    blocks: dict[str, int]
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """Return the launch and compiler options beside the blocks."""
        cap = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **cap}


SMALLEST_OPERAND = 16  # rows and columns: what a matrix instruction takes at least
MOST_ROWS_TO_SPLIT = 16  # queries × heads of a key-value head, up to which a decoding step divides the keys
_MATRIX_BLOCKS = ("BLOCK_M", "BLOCK_N", "BLOCK_K")


def fits(tile: Tile) -> bool:
    """Return whether kernels can be compiled with this tile: powers of two, and operands of at least 16 by 16."""
    sizes = tile.blocks.items()
    return all(n & (n - 1) == 0 and n >= (SMALLEST_OPERAND if name in _MATRIX_BLOCKS else 1) for name, n in sizes)


def _power_of_two(most: int) -> int:
    """Return the largest power of two that is not above `most`; Triton's blocks are powers of two."""
    return 1 << (most.bit_length() - 1)


@cache
def _arch(device: torch.device) -> str:
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def target(x: torch.Tensor) -> str:
    """Return the name in `aot.TARGETS` of the GPU that holds x [...], or "interpreter" for a CPU tensor."""
    return _arch(x.device) if x.is_cuda else "interpreter"


def measured(family: Callable[..., Tile]) -> Callable[..., Tile]:
    """Apply the winners of `workbench bench gpu --autotune` in place of a family's own tiles.

    They are read once, from the file that WORKBENCH_TILES names or tiles.json beside this one: target → family →
    pairs of its own tile and the one to take. A tile that has changed since it was measured stands.
    """
    configured = os.environ.get("WORKBENCH_TILES")
    path = Path(configured or Path(__file__).with_name("tiles.json"))
    tiles_by_target = json.loads(path.read_text()) if configured or path.exists() else {}
    winners = {
        (target, str(Tile(*own))): Tile(*taken)
        for target, families in tiles_by_target.items()
        for own, taken in families.get(family.__name__, [])
    }
    signature = inspect.signature(family)

    @wraps(family)
    def choose(*args: object) -> Tile:
        own = family(*args)
        here = _arch(torch.device("cuda")) if torch.cuda.is_available() else "interpreter"
        return winners.get((signature.bind(*args).arguments.get("target", here), str(own)), own)

    return choose if winners else family


@measured
def codec_tile() -> Tile:
    """Return the MXFP4 groups of a program: 128 of them are 4,096 values, 32 a thread."""
    return Tile({"BLOCK": 128}, num_warps=4, num_stages=1)


@measured
def top_k_tile(width: int) -> Tile:
    """Return the rows of `width` (experts, or slots) of a program: about 2,048 values, at least one row a warp."""
    return Tile({"BLOCK": max(4, min(128, _power_of_two(max(1, 2048 // width))))}, num_warps=4, num_stages=1)


@measured
def group_tile(slots: int, num_experts: int) -> Tile:
    """Return slots of a program, slots of a step and partial counts of a step, whose one-hots stay in registers.

    About 128 programs, so that each takes few steps, one after the other: with 1,024 slots a program 8,192 tokens took
    40 µs on an H100 for 32 experts and 115 for 128, a single token 23.
    """
    step = max(16, min(128, _power_of_two(max(1, 2048 // num_experts))))
    block = max(step, min(1024, _power_of_two(max(1, slots // 64))))
    return Tile({"BLOCK": block, "STEP": step, "CHUNK": 16}, num_warps=4, num_stages=1)


@measured
def moe_tile(slots: int, num_experts: int, dtype: torch.dtype, target: str) -> Tile:
    """Return slots × outputs × inputs of the expert matmul. A step of 64 inputs divides 2880; 128 would not."""
    amd = target.startswith("gfx")  # its pipeline is two deep: more stages cost shared memory and blocks
    if target == "interpreter":  # several tiles each way, also in small problems
        return Tile({"BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_K": 64}, 4, 1)
    if dtype == torch.float32:  # no tensor cores: bounded by the registers of the unpacked weight
        return Tile({"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 32}, 4, 2)
    if target == "sm_90":
        return _hopper_moe_tile(slots, num_experts)
    if slots <= 32 * num_experts:  # decode, bounded by the weights' bytes: small blocks keep them coming
        return Tile({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128}, 4, 2 if amd else 5)
    if amd:
        return Tile({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, 8, 2)
    return Tile({"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64}, 4, 4)  # 128 slots spill with two blocks


def _hopper_moe_tile(slots: int, num_experts: int) -> Tile:
    """Return the tile of `moe_tile` in bfloat16 on sm_90, as measured on an H100 (docs/bench_gpu.json).

    Four warps everywhere: with eight (and at most 128 registers) Triton 3.6 computed wrong values in prefills, by up to
    0.17 of the largest, and was 2 % faster.
    """
    if slots <= 64:  # few programs, each of which waits for memory step by step: long steps
        return Tile({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 256}, 4, 3)
    if slots <= 32 * num_experts:
        return Tile({"BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_K": 128}, 4, 4)
    # Below 96 slots an expert, 64 a tile take 0.73 of the time of 128.
    return Tile({"BLOCK_M": 64 if slots <= 96 * num_experts else 128, "BLOCK_N": 128, "BLOCK_K": 64}, 4, 4)


@measured
def moe_transposed_tile(slots: int, num_experts: int, dtype: torch.dtype, target: str) -> Tile:
    """Return the tile of the backward product: BLOCK_N is summed over, BLOCK_K is written."""
    amd = target.startswith("gfx")
    if target == "interpreter":
        return Tile({"BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_K": 64}, 4, 1)
    if dtype == torch.float32:
        return Tile({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 64}, 4, 2)
    if slots <= 32 * num_experts:
        return Tile({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128}, 4, 2 if amd else 3)
    if amd:
        return Tile({"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_K": 128}, 8, 2)
    if target in ("sm_90", "sm_100"):  # 32 outputs a step: with 64 it takes 147 registers, one block an SM
        return Tile({"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_K": 128}, 8, 4)
    return Tile({"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_K": 64}, 8, 4)


@measured
def combine_tile() -> Tile:
    """Return the columns of a program of the sum over slots: 8 a thread."""
    return Tile({"BLOCK": 1024}, num_warps=4, num_stages=1)


@measured
def swiglu_tile() -> Tile:
    """Return the columns of a step of the activation's gradient, one slot a program: 4 gates and 4 ups a thread."""
    return Tile({"BLOCK": 512}, num_warps=4, num_stages=1)


@measured
def moments_tile() -> Tile:
    """Return tokens that a program adds up before partial sums are combined, and tokens and columns of a step."""
    return Tile({"SPLIT": 512, "BLOCK_M": 32, "BLOCK_D": 128}, num_warps=4, num_stages=2)


@measured
def attention_tile(width: int, dtype: torch.dtype, target: str) -> Tile:
    """Return queries × keys of prefill: as many queries as two blocks an SM have registers for."""
    if target == "interpreter":  # several tiles each way, also in small problems
        return Tile({"BLOCK_M": 16, "BLOCK_N": 16}, 4, 1)
    if dtype == torch.float32 or width > 64:  # no tensor cores, or wide heads: bounded by registers
        return Tile({"BLOCK_M": 64, "BLOCK_N": 32}, 8, 2)
    if target.startswith("gfx"):
        return Tile({"BLOCK_M": 128, "BLOCK_N": 64}, 4, 2)
    if target == "sm_90":
        return Tile({"BLOCK_M": 128, "BLOCK_N": 64}, 8, 3)
    return Tile({"BLOCK_M": 64, "BLOCK_N": 64}, 4, 3)  # 128 queries spill, or leave one block


@measured
def decode_tile(rows: int, dtype: torch.dtype, target: str) -> Tile:
    """Return rows × keys of decoding, which is limited by reading the keys: small tiles, deep pipeline."""
    if target == "interpreter":
        return Tile({"BLOCK_M": 16, "BLOCK_N": 16}, 4, 1)
    if dtype == torch.float32:  # no tensor cores: 64 keys spill 832 to 920 bytes on every NVIDIA target
        return Tile({"BLOCK_M": 16, "BLOCK_N": 32}, 4, 2)
    return Tile({"BLOCK_M": 16, "BLOCK_N": 64}, 4, 2 if target.startswith("gfx") else 4)


@cache
def splits(programs: int, device: torch.device) -> int:
    """Return the number of parts of the keys that fills the card twice: a power of two up to 64."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    wanted = max(1, 2 * processors // max(1, programs))
    return min(64, 1 << (wanted.bit_length() - 1))


@measured
def queries_gradient_tile(dtype: torch.dtype, target: str) -> Tile:
    """Return queries × keys: scores and gradients are held beside the accumulator, so half the forward's queries."""
    if target == "interpreter":
        return Tile({"BLOCK_M": 16, "BLOCK_N": 16}, 4, 1)
    if dtype == torch.float32:
        return Tile({"BLOCK_M": 32, "BLOCK_N": 32}, 8, 1)
    if target in ("sm_90", "sm_100"):
        return Tile({"BLOCK_M": 64, "BLOCK_N": 64}, 4, 2)
    return Tile({"BLOCK_M": 64, "BLOCK_N": 32}, 4, 2)  # three blocks; 64 keys take 255 registers


@measured
def keys_gradient_tile(dtype: torch.dtype, target: str) -> Tile:
    """Return queries × keys: two accumulators of the keys' rows, and two operands made in registers."""
    if target == "interpreter":
        return Tile({"BLOCK_M": 16, "BLOCK_N": 16}, 4, 1)
    if dtype == torch.float32:
        return Tile({"BLOCK_M": 32, "BLOCK_N": 32}, 8, 1)
    if target == "sm_90":
        return Tile({"BLOCK_M": 64, "BLOCK_N": 64}, 4, 2)
    return Tile({"BLOCK_M": 32, "BLOCK_N": 64}, 4, 2)  # 64 queries spill; 8 warps too, on sm_100 with Triton 3.7.1


@measured
def norm_tile(d: int) -> Tile:
    """Return the columns of a program, which normalises one row: all of them."""
    return Tile({"WIDTH": _power_of_two(2 * d - 1)}, num_warps=4, num_stages=1)


@measured
def rotary_tile(heads: int, half: int) -> Tile:
    """Return the heads and pairs of a program, which rotates one token: all of them."""
    return Tile({"ROWS": _power_of_two(2 * heads - 1), "WIDTH": _power_of_two(2 * half - 1)}, num_warps=4, num_stages=1)


@measured
def logits_tile() -> Tile:
    """Return the logits of a step of a program, which reads one row: 16 a thread."""
    return Tile({"BLOCK": 4096}, num_warps=8, num_stages=2)
