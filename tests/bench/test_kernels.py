"""The report of compiled kernels: the committed one is what Triton makes today, and its checks can fail.

Also tests `workbench.bench.command`, and the modules of compile cases:
`workbench.kernels.gpu.compile_cases.attention`, `workbench.kernels.gpu.compile_cases.logits`,
`workbench.kernels.gpu.compile_cases.moe`, `workbench.kernels.gpu.compile_cases.moments`,
`workbench.kernels.gpu.compile_cases.mxfp4`, `workbench.kernels.gpu.compile_cases.norm`,
`workbench.kernels.gpu.compile_cases.rotary` and `workbench.kernels.gpu.compile_cases.routing`.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from workbench.bench import kernels
from workbench.cli import app
from workbench.errors import InputError
from workbench.kernels.gpu import compile_cases
from workbench.kernels.gpu.aot import TARGETS, _blocks, _flops, _main_loop, unguarded_copies

COMMITTED = kernels.REPORT.read_text()
SAME_TRITON = kernels.heading() in COMMITTED


def compiled(code: str) -> str:
    """What a fresh process prints that compiles rather than interprets."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout


def line(row: kernels.Row) -> str:
    return f"| {' | '.join(kernels.cells(row))} |"


@pytest.mark.slow
def test_the_report_of_the_h100_is_what_triton_makes(long: bool) -> None:
    """Of every kernel the first problem, or all with --long, which takes three times as long."""
    rows = kernels.report(["sm_90"], processes=1, first_problem=not long)
    assert [problem for row in rows for problem in kernels.problems(row)] == []
    assert {row.kernel for row in rows} == {
        case.name for m in kernels.MODULES for case in kernels.compile_cases(m, "sm_90")
    }
    section = COMMITTED.split(f"## {kernels.title('sm_90')}\n")[1].split("\n## ")[0]
    assert not SAME_TRITON or [line(row) for row in rows if line(row) not in section] == []
    assert line(replace(rows[0], registers=rows[0].registers + 1)) not in section
    assert not (long and SAME_TRITON) or kernels.section("sm_90", rows) in COMMITTED


MATMULS = """
import json
from workbench.bench import kernels
for place, target in zip(places, targets):
    cases = [case for case in kernels.compile_cases("moe", target) if case.name == "moe.gate_up"]
    for case in cases[place % len(cases) :: step]:
        row = kernels.measure(case, target)
        print(json.dumps([target, kernels.problems(row), kernels.cells(row)]))
"""


@pytest.mark.slow
def test_the_expert_matmul_keeps_its_promises_on_every_other_target(long: bool) -> None:
    """Every problem and every target are compiled at least once; with --long every problem for every target."""
    others = [target for target in TARGETS if target != "sm_90"]
    problems = [case.problem for case in kernels.compile_cases("moe", "sm_90") if case.name == "moe.gate_up"]
    step = 1 if long else len(others)
    places = [0] * len(others) if long else range(len(others))
    code = f"targets, places, step = {others}, {list(places)}, {step}\n{MATMULS}"
    rows = [json.loads(printed) for printed in compiled(code).splitlines()]
    assert {target for target, *_ in rows} == set(others)
    assert {cells[kernels.HEADERS.index("problem")] for *_, cells in rows} == set(problems)
    for target, wrong, cells in rows:
        assert wrong == [], cells
        section = COMMITTED.split(f"## {target}:")[1].split("\n## ")[0]
        assert not SAME_TRITON or f"| {' | '.join(cells)} |" in section


WAITS = """
import json
from workbench.bench import kernels
from workbench.kernels.gpu import aot
every = [c for m in ("moe", "attention") for c in kernels.compile_cases(m, "sm_90")]
cases = [c for c in every if c.products and c.tile.num_warps == 8]
chosen = {c.name: aot.build(c, aot.TARGETS["sm_90"]).asm["ptx"] for c in cases if "120b" not in c.problem}
print(json.dumps(chosen))
"""


@pytest.mark.slow
def test_a_barrier_stands_between_a_wait_for_wgmma_and_the_next_copy() -> None:
    """Of every kernel of eight warps on sm_90. Negative control: the same code without its barriers."""
    texts = json.loads(compiled(WAITS))
    assert {"moe.gate_up backward", "moe.down backward", "attention.forward"} <= set(texts)
    for name, ptx in texts.items():
        assert unguarded_copies(ptx) == 0, name
        without = "\n".join(part for part in ptx.splitlines() if "bar.sync" not in part)
        assert unguarded_copies(without) > 0, name


def test_a_copy_at_a_loop_s_beginning_follows_the_wait_at_its_end() -> None:
    loop = ["$L__BB0_1:", "cp.async.cg.shared.global [%r1], [%rd1], 16;", "wgmma.wait_group.sync.aligned 0;"]
    assert unguarded_copies("\n".join([*loop, "@%p1 bra $L__BB0_1;"])) == 1
    assert unguarded_copies("\n".join([*loop, "bar.sync 0;", "@%p1 bra $L__BB0_1;"])) == 0


def test_the_report_covers_every_target_and_kernel() -> None:
    for target in TARGETS:
        section = COMMITTED.split(f"## {kernels.title(target)}\n")[1].split("\n## ")[0]
        assert [module for module in kernels.MODULES if f"| {module}" not in section] == []


def test_every_module_of_kernels_has_compile_cases() -> None:
    """One module of `workbench.kernels.gpu.compile_cases` each: attention, logits, moe, and so on."""
    folder = Path(compile_cases.__file__).parent
    assert sorted(path.stem for path in folder.glob("[!_]*.py")) == sorted(kernels.MODULES)
    for module in kernels.MODULES:
        cases = kernels.compile_cases(module, "sm_90")
        assert cases, module
        assert {case.name.partition(".")[0] for case in cases} == {module}
        own = {case.kernel.fn.__module__.removeprefix("workbench.kernels.gpu.") for case in cases}
        assert own - {f"{module}_gradient"} == {module}


def test_no_kernel_of_the_report_spills() -> None:
    rows = [row.split(" | ") for row in COMMITTED.splitlines() if row.startswith("| ") and "spilled" not in row]
    assert len(rows) > 7 * len(kernels.MODULES)
    assert {row[kernels.HEADERS.index("spilled")] for row in rows} == {"0"}


SPOILED = """
from dataclasses import replace
from workbench.bench import kernels
from workbench.kernels.gpu.tiles import Tile
(good,) = [
    s for s in kernels.compile_cases("moe", "sm_90")
    if s.name == "moe.gate_up" and s.problem.startswith("gpt-oss-20b, prefill")
]
def spoiled(m, n, k, warps, stages):
    tile = Tile({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, warps, stages)
    return replace(good, tile=tile, constants={**good.constants, **tile.blocks})
wide = {name: "*fp32" if kind == "*bf16" else kind for name, kind in good.types.items()}
plain = spoiled(32, 64, 32, 4, 2)
for case in (good, spoiled(128, 256, 128, 8, 2), spoiled(128, 128, 64, 8, 16), replace(plain, types=wide)):
    print(*kernels.problems(kernels.measure(case, "sm_90")), sep="; ")
"""


def test_a_spill_a_missing_product_and_a_block_too_large_are_noticed() -> None:
    good, spilling, large, scalar = compiled(SPOILED).splitlines()
    assert good == ""
    assert "spills" in spilling
    assert "of shared memory of 232,448" in large
    assert "has no wgmma.mma_async" in scalar


@pytest.mark.parametrize(
    ("target", "warps", "registers", "shared", "columns", "blocks"),
    [
        ("sm_90", 8, 128, 0, 0, 2),  # 65,536 registers
        ("sm_90", 8, 129, 0, 0, 1),
        ("sm_90", 4, 32, 116_000, 0, 1),  # 1,024 bytes a block are the system's
        ("sm_90", 4, 32, 115_000, 0, 2),
        ("sm_90", 1, 16, 0, 0, 32),
        ("sm_89", 1, 16, 0, 0, 24),
        ("sm_100", 4, 64, 0, 256, 2),  # tensor memory
        ("gfx942", 4, 128, 0, 0, 4),  # 512 registers a lane of each of four units
        ("gfx942", 1, 300, 0, 0, 4),
        ("gfx942", 4, 64, 32_768, 0, 2),
    ],
)
def test_blocks_that_fit(target: str, warps: int, registers: int, shared: int, columns: int, blocks: int) -> None:
    assert _blocks(TARGETS[target], warps, registers, shared, columns) == blocks


def test_flops_of_one_warp() -> None:
    assert _flops("HGMMA.64x128x16.F32.BF16 R24, R92, gdesc[UR16], R24", 0) == 2 * 64 * 128 * 16 // 4
    assert _flops("HMMA.16816.F32.BF16 R96, R136, R178, R96", 0) == 2 * 16 * 8 * 16
    assert _flops("v_mfma_f32_32x32x8_bf16 a[0:15], v[2:3], v[4:5], a[0:15]", 0) == 2 * 32 * 32 * 8
    assert _flops("UTCHMMA tmem[UR24], gdesc[UR16]", 1024) == 1024
    assert _flops("IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28]", 1024) == 0


def test_the_main_loop_is_the_one_that_multiplies_most_an_instruction() -> None:
    product = "HMMA.16816.F32.BF16 R96, R136, R178, R96"
    lines = ["MOV"] * 4 + [product] * 2 + ["BRA"] + ["MOV"] + [product] * 2 + ["BRA"]
    loop = _main_loop(lines, [(0, 6), (7, 10), (3, 10), (4, 3)])  # the third holds the second, the last goes forward
    assert loop == (2, 2 * 2 * 16 * 8 * 16)
    assert _main_loop(["MOV", "BRA"], [(0, 1)]) is None


def test_the_estimate_counts_half_empty_tiles() -> None:
    """256 slots on 32 experts are 8 an expert: half of a tile of 16 rows."""
    cases = [c for c in kernels.compile_cases("moe", "sm_90") if c.name == "moe.gate_up" and c.products]
    filled = {case.problem: kernels._filled(case) for case in cases}
    assert filled["gpt-oss-20b, decode of 64 tokens"] == pytest.approx(0.5, abs=0.01)
    assert filled["gpt-oss-20b, prefill of 8,192 tokens"] == 1


def test_the_command_compiles_prints_and_writes_json(tmp_path: Path) -> None:
    options = ["--target", "sm_90", "--kernel", "routing.gate", "--json", str(tmp_path / "rows.json")]
    done = CliRunner().invoke(app, ["bench", "kernels", *options])
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["kernel"] for row in rows] == ["routing.gate"] * 2
    for row in rows:
        assert 0 < row["registers"] < 256
        assert row["problem"] in done.output


def test_a_problem_is_printed_and_exits_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    row = kernels.Row(
        "moe.gate_up",
        "prefill",
        "sm_90",
        "128×128×64",
        255,
        16,
        78_080,
        1,
        "mma.sync m16n8k16",
        True,
        1e6,
        1e9,
        1e-6,
        1e-6,
        2e-6,
        60.0,
    )
    assert row.fraction == 0.5
    monkeypatch.setattr(kernels, "report", lambda *args: [row])
    done = CliRunner().invoke(app, ["bench", "kernels"])
    assert done.exit_code == 1
    assert "sm_90: moe.gate_up (prefill, 128×128×64) spills 16 bytes a thread" in done.output
    assert "has no wgmma.mma_async, but mma.sync m16n8k16" in done.output


def test_wrong_usage_is_refused() -> None:
    with pytest.raises(InputError, match="'sm_75' is unknown: choose from sm_80"):
        kernels.run(["sm_75"])
    with pytest.raises(InputError, match="leave --target and --kernel out"):
        kernels.run(["sm_90"], write=True)


FLOAT32_DECODE = """
from dataclasses import replace
import torch
from workbench.kernels.gpu import attention, tiles
from workbench.kernels.gpu.compile_cases import attention as cases
from workbench.kernels.gpu.aot import TARGETS, resources
for target in ("sm_90", "sm_100", "sm_120"):
    case = next(c for c in cases.compile_cases(target) if c.kernel is attention._split)
    types = {name: "*fp32" if kind == "*bf16" else kind for name, kind in case.types.items()}
    own = tiles.decode_tile(8, torch.float32, target)
    for tile in (own, own._replace(blocks={"BLOCK_M": 16, "BLOCK_N": 64})):
        made = replace(case, types=types, tile=tile, constants={**case.constants, **tile.blocks})
        print(resources(made, TARGETS[target]).spilled)
"""


@pytest.mark.slow
def test_decoding_in_float32_does_not_spill() -> None:
    spilled = [int(line) for line in compiled(FLOAT32_DECODE).splitlines()]
    assert spilled[0::2] == [0, 0, 0]
    assert all(n > 0 for n in spilled[1::2]), "the tile before, of 64 keys, is the negative control"
