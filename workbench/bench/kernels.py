"""The resources of every kernel on each listed GPU: compiled ahead of time without a GPU, with an estimate of time.

Registers, spills, shared memory and instructions are read from the compiled code. The estimate is arithmetic and no
measurement: the time at each of three limits of one card, as if nothing else ever waited. Its fraction is therefore
an upper bound: it states where a tile cannot reach the limit, never that it does.

Work is compiled in fresh processes, as Triton decides when it is imported whether it compiles or interprets.
"""

import importlib
import inspect
import itertools
import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from workbench.bench import table
from workbench.child_processes import isolated_children
from workbench.errors import InputError, JobError
from workbench.outputs import staged
from workbench.progress import progress

REPORT = Path(__file__).parents[2] / "kernels" / "gpu" / "REPORT.md"
MODULES = ("mxfp4", "routing", "moe", "attention", "moments", "norm", "rotary", "logits")


class Card(NamedTuple):
    """A card of a target; bandwidth in bytes/s, flops of dense bfloat16 products a second."""

    name: str
    bandwidth: float
    flops: float
    multiprocessors: int
    clock: float  # Hz, the one that the data sheet's peak is counted at
    issued: int  # vector instructions of a whole warp a clock and multiprocessor


# The makers' data sheets (dense, float32 accumulation), but for the H100 the 790 TFLOP/s that large products sustain
# of its 989. A quarter of an NVIDIA multiprocessor issues a warp of 32 every clock, one of AMD's 64 lanes every fourth.
CARDS = {
    "sm_80": Card("A100 80 GB", 2.039e12, 312e12, 108, 1.41e9, 4),
    "sm_89": Card("L40S", 0.864e12, 362e12, 142, 2.52e9, 4),
    "sm_90": Card("H100 SXM", 3.35e12, 790e12, 132, 1.83e9, 4),
    "sm_100": Card("B200", 8.0e12, 2250e12, 148, 1.85e9, 4),
    "sm_120": Card("RTX 5090", 1.792e12, 209.5e12, 170, 2.407e9, 4),
    "gfx942": Card("MI300X", 5.3e12, 1307e12, 304, 2.1e9, 1),
    "gfx950": Card("MI355X", 8.0e12, 2516e12, 256, 2.4e9, 1),
}


@dataclass(frozen=True)
class Row:
    """One kernel and tile on one target; registers and spilled bytes a thread, shared bytes a block.

    The second half is the estimate: seconds of one launch at the limits of memory, of arithmetic and of instruction
    issue (None where no main loop with matrix instructions was found), and the fraction of the first two's larger
    that is left when the third is the largest.
    """

    kernel: str
    problem: str
    target: str
    tile: str
    registers: int
    spilled: int
    shared: int
    blocks_per_sm: int
    matrix: str
    products: bool
    bytes: float
    flops: float
    memory_s: float
    compute_s: float
    issue_s: float | None
    instructions: float | None  # of a thread in the main loop, for 1,000 multiply-adds
    unguarded: int = 0  # see `aot.unguarded_copies`

    @property
    def fraction(self) -> float | None:
        """Return the largest possible fraction of the nearer of the two limits."""
        limit = max(self.memory_s, self.compute_s)
        return None if self.issue_s is None or not limit else limit / max(limit, self.issue_s)


def problems(row: Row) -> list[str]:
    """Return the failures that must not be released.

    A spill, products without the target's matrix instruction, a copy that can overtake another warp's products, a block
    that does not fit.
    """
    from workbench.kernels.gpu.aot import TARGETS

    target = TARGETS[row.target]
    listed = [f"spills {row.spilled} bytes a thread"] if row.spilled else []
    if row.products and target.matrix not in row.matrix:
        listed.append(f"has no {target.matrix}, but {row.matrix or 'no matrix instruction at all'}")
    if row.unguarded:
        listed.append(f"copies into shared memory {row.unguarded} times without a barrier after a wait for wgmma")
    if row.shared > target.shared:
        listed.append(f"takes {row.shared:,} bytes of shared memory of {target.shared:,}")
    elif not row.blocks_per_sm:
        listed.append(f"does not fit a multiprocessor with {row.registers} registers a thread")
    return listed


@cache
def compile_cases(module: str, target: str) -> list[Any]:
    """Return the compile cases of a kernel module, with the tiles that the target gets."""
    make = importlib.import_module(f"workbench.kernels.gpu.compile_cases.{module}").compile_cases
    return make(target) if inspect.signature(make).parameters else make()


def measure(case: Any, target: str) -> Row:
    """Compile a case in this process."""
    from workbench.kernels.gpu.aot import TARGETS, resources

    took, card, warp = resources(case, TARGETS[target]), CARDS[target], TARGETS[target].warp
    issue = card.multiprocessors * card.clock * card.issued  # warp instructions a second
    peak = card.flops if case.products else issue * warp * 2
    flops = case.flops / _filled(case)
    loop = took.loop if case.products else None
    return Row(
        case.name,
        case.problem,
        target,
        _tile(case),
        took.registers,
        took.spilled,
        took.shared,
        took.blocks_per_sm,
        ", ".join(took.instructions),
        case.products,
        case.bytes,
        case.flops,
        case.bytes / card.bandwidth,
        case.flops / peak,
        flops * loop.instructions / loop.flops / issue if loop else None,
        loop.instructions * warp / loop.flops * 2000 if loop else None,
        took.unguarded,
    )


def _filled(case: Any) -> float:
    """Return the share of a routed matmul's tile rows that hold a slot, each drawn uniformly; 1 for other kernels."""
    sizes = case.constants
    if not (case.products and {"E", "N", "K", "BLOCK_M"} <= set(sizes)):
        return 1.0
    slots = case.flops / (2 * sizes["N"] * sizes["K"])
    rows = slots / (sizes["E"] * (1 - (1 - 1 / sizes["E"]) ** slots))  # of an expert that has any
    return rows / (math.ceil(rows / sizes["BLOCK_M"]) * sizes["BLOCK_M"])


def _tile(case: Any) -> str:
    tile = case.tile
    parts = ["×".join(map(str, tile.blocks.values())), f"{tile.num_warps} warps", f"{tile.num_stages} stages"]
    parts += [f"≤ {tile.max_registers} registers"] if tile.max_registers else []
    return ", ".join(filter(None, parts))


def _compile(item: tuple[str, str, int]) -> Row:
    module, target, index = item
    case = compile_cases(module, target)[index]
    try:
        return measure(case, target)
    except Exception as error:  # the error of Triton or the assembler, with the kernel's name
        raise JobError(f"{case.name} ({case.problem}) does not compile for {target}: {error}") from None


def _names(item: tuple[str, str]) -> list[str]:
    return [case.name for case in compile_cases(*item)]


def _environment(folder: str) -> None:
    """Of a fresh process, before it imports Triton."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_CACHE_DIR", folder)


def report(
    targets: Sequence[str] = tuple(CARDS),
    kernels: Sequence[str] = (),
    processes: int | None = None,
    *,
    first_problem: bool = False,
) -> list[Row]:
    """Return the resources of every kernel, or of the named ones, for every target, in order.

    Compiled by as many processes as there are cores, unless told. first_problem: of each kernel only the first of the
    problems that it is compiled for.

    Raises:
        InputError: Triton is not installed, or a target or kernel is unknown.
    """
    if find_spec("triton") is None:
        raise InputError("bench kernels compiles with Triton, which is not installed here: run it on Linux")
    if unknown := sorted(set(targets) - set(CARDS)):
        raise InputError(f"target {unknown[0]!r} is unknown: choose from {', '.join(CARDS)}")
    with (
        tempfile.TemporaryDirectory() as folder,
        isolated_children(),
        ProcessPoolExecutor(
            processes or len(os.sched_getaffinity(0)), get_context("spawn"), _environment, (folder,)
        ) as pool,
    ):
        pairs = [(module, target) for target in targets for module in MODULES]
        names = list(pool.map(_names, pairs))
        known = dict.fromkeys(itertools.chain(*names))
        if unknown := sorted(set(kernels) - set(known)):
            raise InputError(f"kernel {unknown[0]!r} is unknown: choose from {', '.join(known)}")
        items = [
            (*pair, i)
            for pair, its in zip(pairs, names, strict=True)
            for i, name in enumerate(its)
            if (not kernels or name in kernels) and (not first_problem or name not in its[:i])
        ]
        rows = []
        with progress("bench kernels", len(items), "kernels") as advance:
            for row in pool.map(_compile, items):
                rows.append(row)
                advance(1)
    return rows


HEADERS = (
    "kernel",
    "problem",
    "tile",
    "registers",
    "spilled",
    "shared",
    "blocks/SM",
    "matrix instruction",
    "MB",
    "GFLOP",
    "memory µs",
    "compute µs",
    "instructions / 1,000",
    "at most",
)


def cells(row: Row) -> tuple[str, ...]:
    """Return the one row as the tables show it."""
    none = "–"
    return (
        row.kernel,
        row.problem,
        row.tile,
        f"{row.registers}",
        f"{row.spilled}",
        f"{row.shared:,}",
        f"{row.blocks_per_sm}",
        row.matrix or none,
        f"{row.bytes / 1e6:.1f}",
        f"{row.flops / 1e9:.2f}",
        f"{row.memory_s * 1e6:.1f}",
        f"{row.compute_s * 1e6:.1f}",
        none if row.instructions is None else f"{row.instructions:.0f}",
        none if row.fraction is None else f"{row.fraction:.0%}",
    )


def title(target: str) -> str:
    """Return the target, and the card that its estimates are for."""
    card = CARDS[target]
    return f"{target}: {card.name}, {card.bandwidth / 1e12:g} TB/s, {card.flops / 1e12:g} TFLOP/s"


def section(target: str, rows: Iterable[Row]) -> str:
    """Return the committed table of one target."""
    return f"## {title(target)}\n\n{table.markdown(HEADERS, [cells(row) for row in rows], text=3)}\n"


def heading() -> str:
    """Return the versions that made the tables: Triton's decides every number but the limits of the estimates."""
    return f"Triton {version('triton')}; made by `workbench bench kernels --write`."


def markdown(rows: Sequence[Row]) -> str:
    """Return the committed report."""
    tables = [section(target, group) for target, group in itertools.groupby(rows, key=lambda row: row.target)]
    return "\n".join(
        [
            "# What the kernels take",
            "",
            heading(),
            "",
            "Compiled without a card. Registers and spilled bytes are a thread's, shared bytes a block's.",
            "From MB on it is an **estimate**, not a measurement: a launch's bytes and flops, their time at the limits "
            "of the card, the instructions a thread issues in the main loop beside 1,000 multiply-adds, and the "
            "fraction of the nearer limit that this leaves if nothing else ever waits: an upper bound, which counts "
            "neither barriers, nor loads that are not pipelined, nor the host's time for a launch. On an H100 the "
            "experts reached about half of it, and attention between half and all: docs/benchmarks.md has what was "
            "measured.",
            "",
            *tables,
        ]
    )


def run(
    targets: Sequence[str] = (), kernels: Sequence[str] = (), *, write: bool = False
) -> tuple[list[dict[str, Any]], list[str]]:
    """Compile the kernels and print their resources; return the rows as plain values and a line for each problem.

    Raises:
        InputError: a report is to be written of some kernels or targets only.
    """
    if write and (targets or kernels):
        raise InputError("--write needs every kernel for every target: leave --target and --kernel out")
    rows = report(targets or tuple(CARDS), kernels)
    for name, group in itertools.groupby(rows, key=lambda row: row.target):
        table.show(title(name), HEADERS, [cells(row) for row in group])
    wrong = [f"{row.target}: {row.kernel} ({row.problem}, {row.tile}) {p}" for row in rows for p in problems(row)]
    for line in wrong:
        print(line)
    if write:
        with staged(REPORT, command="bench kernels --write", overwrite=True, owned=Path.is_file) as part:
            part.write_text(markdown(rows))
    return [asdict(row) | {"fraction": row.fraction} for row in rows], wrong
