"""Products of many bfloat16 rows with MXFP4 and bfloat16 matrices by tiles: the launchers of their loops.

Matrices of MXFP4 are multiplied in integers (`integer_tile_loops`), and those of bfloat16 too if the rows are many,
or else in float32 (`dense_tile_loops`). Sums over all inputs are in float32, with the bias;
what is returned is rounded once to bfloat16. A row's result does not depend on the other rows, except on whether they
are many. As many threads take part as torch may use where it is called.

Reference: `workbench.kernels.dense.linear` and `workbench.kernels.mxfp4.linear`.
Cost: unpacks a matrix once for each 1,024 rows, which takes as long as multiplying four rows.
"""

import functools
import threading
from collections.abc import Iterable

import torch
from jaxtyping import BFloat16, Float32, Int
from torch import Tensor

from workbench.kernels.cpu import FEW_ROWS, dense_tile_loops, integer_tile_loops, threads, vectors
from workbench.kernels.cpu.integer_groups import GROUP_NUMBERS
from workbench.kernels.cpu.integer_tile_loops import TOGETHER
from workbench.kernels.cpu.products import Slots
from workbench.kernels.cpu.tile_jobs import JOB_ROWS, LEAST_ROWS, MOST_ROWS, OUTPUTS
from workbench.kernels.cpu.vectors import GROUP
from workbench.kernels.mxfp4 import Mxfp4

_BLOCK_COST = 1  # in rows: a block reads the tile once
_SHARES = 8  # of the tiles of all jobs, at least, for each thread
_JOB_ROWS = JOB_ROWS - MOST_ROWS  # blocks may have rows to spare

_dense = functools.cache(dense_tile_loops.compile_all)
_integer = functools.cache(integer_tile_loops.compile_all)
_own = threading.local()


@functools.cache
def available() -> bool:
    """Return whether this processor has the registers that the loops need."""
    return vectors.instructions() == "AVX-512" and vectors.multiplies_words()


def covers_dense(weight: Tensor) -> bool:
    """Return whether `dense_linear` can multiply by this weight [outputs inputs]."""
    right = weight.dtype == torch.bfloat16 and weight.shape[1] % GROUP == 0 and len(weight) % OUTPUTS == 0
    return right and weight.is_contiguous() and available()


def covers_packed(blocks: Tensor, scales: Tensor) -> bool:
    """Return whether matrices of these blocks [... outputs group 16] can be multiplied."""
    return blocks.is_contiguous() and scales.is_contiguous() and covers_outputs(scales.shape[-2])


def covers_outputs(outputs: int) -> bool:
    """Return whether a packed matrix with this many outputs can be multiplied."""
    return outputs % OUTPUTS == 0 and available()


def dense_linear(
    x: BFloat16[Tensor, "rows inputs"],
    weight: BFloat16[Tensor, "outputs inputs"],
    bias: BFloat16[Tensor, " outputs"] | None,
) -> BFloat16[Tensor, "rows outputs"]:
    """Return x times the transposed matrix, plus the bias.

    More than `FEW_ROWS` rows are multiplied in integers, if the processor needs one instruction for it.
    """
    x = x.contiguous()
    results, width = x.new_empty(len(x), len(weight)), x.shape[1]
    in_integers = len(x) > FEW_ROWS and vectors.adds_products_of_words()
    for start in range(0, len(x), _JOB_ROWS):
        some, target = x[start : start + _JOB_ROWS], results[start : start + _JOB_ROWS]
        jobs = _jobs([(0, 0, len(some))])
        if in_integers:
            inputs = _rounded(some, jobs, width // GROUP)
            _multiply_integers(jobs, None, weight, None, inputs, bias, target)
        else:
            inputs = _widened(some, jobs)
            threads.run(
                _dense().multiply, len(weight) // OUTPUTS, _thread_memory().data_ptr(), jobs.data_ptr(), len(jobs),
                weight.data_ptr(), width, len(weight), inputs.data_ptr(), _address(bias), target.data_ptr(),
            )  # fmt: skip
    return results


def _widened(x: Tensor, jobs: Tensor) -> Tensor:
    """Return the rows of x as jobs multiply them in float32."""
    most, inputs = int(jobs[:, 3].max()), _job_memory(jobs, x.shape[1])
    threads.run(
        _dense().arrange, len(jobs) * most, jobs.data_ptr(), len(jobs), most, x.data_ptr(), x.shape[1],
        inputs.data_ptr(),
    )  # fmt: skip
    return inputs


def _rounded(x: Tensor, jobs: Tensor, groups: int, sources: Tensor | None = None, limited: bool = True) -> Tensor:
    """Return the rows of x, or those of `sources`, as jobs multiply them in integers, of limited size or not."""
    most, inputs = int(jobs[:, 3].max()), _job_memory(jobs, groups * GROUP_NUMBERS)
    threads.run(
        _integer().arrange, len(jobs) * most, jobs.data_ptr(), len(jobs), most, _address(sources), x.data_ptr(),
        groups, int(limited), inputs.data_ptr(),
    )  # fmt: skip
    return inputs


def packed_linear(
    x: BFloat16[Tensor, "rows inputs"],
    weight: Mxfp4,
    bias: BFloat16[Tensor, " outputs"] | None = None,
    rows: Int[Tensor, " number"] | None = None,
) -> BFloat16[Tensor, "number outputs"]:
    """Return these rows of x, all by default, times the transposed packed matrix, plus the bias."""
    number = len(x) if rows is None else len(rows)
    results = x.new_empty(number, weight.scales.shape[0])
    jobs = _jobs([(0, start, min(_JOB_ROWS, number - start)) for start in range(0, number, _JOB_ROWS)])
    _multiply_packed(x.contiguous(), weight, bias, jobs, rows, None, results)
    return results


def expert_linear(
    x: BFloat16[Tensor, "rows inputs"], weight: Mxfp4, bias: BFloat16[Tensor, "expert outputs"], slots: Slots
) -> BFloat16[Tensor, "tokens slot outputs"]:
    """Return x times its expert's matrix, plus its bias, for every slot; x has one row for each token or slot."""
    ends = slots.ends.tolist()
    counts = [end - first for first, end in zip([0, *ends[:-1]], ends, strict=True)]
    results = x.new_empty(*slots.experts.shape, weight.scales.shape[-2])
    sources = slots.order // (slots.experts.numel() // len(x))
    write_expert_rows(x, weight, bias, zip(slots.hit.tolist(), counts, strict=True), sources, slots.order, results)
    return results


def write_expert_rows(
    x: BFloat16[Tensor, "rows inputs"],
    weight: Mxfp4,
    bias: BFloat16[Tensor, "expert outputs"],
    counts: Iterable[tuple[int, int]],
    sources: Int[Tensor, " number"] | None,
    targets: Int[Tensor, " number"] | None,
    results: BFloat16[Tensor, "*results outputs"],
) -> None:
    """Write products of rows with their experts' matrices, plus their biases, into the results.

    counts: experts, and how many rows each of them multiplies. sources, targets: rows of x and of the results, in the
    order of the experts; the rows in their order by default.
    """
    jobs, first = [], 0
    for expert, count in counts:
        jobs += [
            (expert, start, min(_JOB_ROWS, first + count - start)) for start in range(first, first + count, _JOB_ROWS)
        ]
        first += count
    _multiply_packed(x.contiguous(), weight, bias, _jobs(jobs), sources, targets, results)


def _multiply_packed(
    x: Tensor,
    weight: Mxfp4,
    bias: Tensor | None,
    jobs: Tensor,
    sources: Tensor | None,
    targets: Tensor | None,
    results: Tensor,
) -> None:
    """Write the products of jobs [job field] with their matrices into the results [... outputs]."""
    inputs = _rounded(x, jobs, weight.scales.shape[-1], sources, limited=False)
    _multiply_integers(jobs, targets, weight.blocks, weight.scales, inputs, bias, results)


def _multiply_integers(
    jobs: Tensor,
    targets: Tensor | None,
    matrix: Tensor,
    scales: Tensor | None,
    inputs: Tensor,
    bias: Tensor | None,
    results: Tensor,
) -> None:
    """Write the products of arranged inputs with packed matrices or, without scales, one of bfloat16."""
    outputs, groups = (len(matrix), matrix.shape[1] // GROUP) if scales is None else scales.shape[-2:]
    pieces = len(jobs) * (outputs // OUTPUTS)
    together = max(1, min(TOGETHER, pieces // (_SHARES * torch.get_num_threads())))
    threads.run(
        _integer().multiply, pieces, _thread_memory().data_ptr(), jobs.data_ptr(), len(jobs), together,
        _address(targets), matrix.data_ptr(), _address(scales), groups, outputs, inputs.data_ptr(), _address(bias),
        results.data_ptr(),
    )  # fmt: skip


def _job_memory(jobs: Int[Tensor, "job field"], row_numbers: int) -> Float32[Tensor, " numbers"]:
    """Return memory of this thread for the rows of all jobs, of 32-bit numbers; the next call gives the same again."""
    size = row_numbers * int((jobs[:, 3] * jobs[:, 4]).sum())
    if getattr(_own, "inputs", None) is None or len(_own.inputs) < size:
        _own.inputs = torch.empty(size)
    inputs: Tensor = _own.inputs
    return inputs


def _thread_memory() -> Tensor:
    """Return memory for the tiles and sums of every thread, aligned to 64 bytes, after a counter of 0."""
    size = 64 + torch.get_num_threads() * max(dense_tile_loops.THREAD_BYTES, integer_tile_loops.THREAD_BYTES)
    if getattr(_own, "memory", None) is None or len(_own.memory) < size + 64:
        _own.memory = torch.empty(size + 64, dtype=torch.uint8)
    memory: Tensor = _own.memory[-_own.memory.data_ptr() % 64 :]
    memory[:8] = 0
    return memory


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _jobs(ranges: list[tuple[int, int, int]]) -> Int[Tensor, "job field"]:
    """Return jobs as the loops read them, of (matrix, position of the first row, rows)."""
    jobs, before = [], 0
    for matrix, first, count in ranges:
        blocks, rows = _blocks(count)
        jobs.append((matrix, first, count, blocks, rows, before))
        before += blocks * rows
    return torch.tensor(jobs)


@functools.cache
def _blocks(rows: int) -> tuple[int, int]:
    """Return the number of blocks of rows, and how many rows are in each: at least as many as there are."""
    choices = [(-(-rows // count), count) for count in range(MOST_ROWS, LEAST_ROWS - 1, -1)]
    return min(choices, key=lambda choice: choice[0] * (choice[1] + _BLOCK_COST))
