"""Compiled products of a few rows against float64, for every number of rows and both ways of unpacking MXFP4."""

import ctypes
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from workbench.kernels import cpu
from workbench.kernels.cpu import threads
from workbench.kernels.mxfp4 import Mxfp4, dequantise, quantise

pytest.importorskip("numba")
if cpu.unavailable():
    pytest.skip(f"the compiled kernels are not available: {cpu.unavailable()}", allow_module_level=True)

from workbench.kernels.cpu import products, vectors

ROOT = Path(__file__).parents[3]
EXPERTS, INPUTS = 5, 96
ROWS = [1, 2, 3, 4, 5, 9, 32]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stack(outputs: int) -> tuple[Mxfp4, Tensor]:
    rng = generator(0)
    return Mxfp4(*quantise(torch.randn(EXPERTS, outputs, INPUTS, generator=rng))), torch.randn(
        EXPERTS, outputs, generator=rng
    )


def slow(x: Tensor, weight: Mxfp4, bias: Tensor, experts: Tensor) -> Tensor:
    """Every slot of every token in float64."""
    dense = dequantise(*weight, torch.float64)[experts]
    return torch.einsum("ti,tsoi->tso", x.double(), dense) + bias.double()[experts]


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("outputs", [4, 131, 300])
def test_expert_products_equal_float64(rows: int, outputs: int, number_of_threads: int) -> None:
    weight, bias = stack(outputs)
    x = torch.randn(rows, INPUTS, generator=generator(1))
    experts = torch.randint(EXPERTS, (rows, 3), generator=generator(2))
    slots = products.Slots(experts, EXPERTS)
    got, want = products.expert_linear(x, weight, bias, slots), slow(x, weight, bias, experts)
    assert error(got, want) < 2e-7
    rounded = products.expert_linear(x.bfloat16(), weight, bias.bfloat16(), slots)
    want = slow(x.bfloat16(), weight, bias.bfloat16(), experts)
    assert torch.equal(rounded, want.bfloat16()) or error(rounded, want) < 2**-8
    # One row for each slot instead of one for each token.
    assert torch.equal(products.expert_linear(x.repeat_interleave(3, 0), weight, bias, slots), got)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("outputs", [4, 131])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dense_products_equal_float64(rows: int, outputs: int, dtype: torch.dtype, number_of_threads: int) -> None:
    weight = torch.randn(outputs, INPUTS, generator=generator(0)).bfloat16()
    bias = torch.randn(outputs, generator=generator(1)).bfloat16()
    x = torch.randn(rows, INPUTS, generator=generator(2)).to(dtype)
    want = x.double() @ weight.double().mT
    assert error(products.linear(x, weight, None), want) < (2**-8 if dtype == torch.bfloat16 else 2e-7)
    assert error(products.linear(x, weight, bias), want + bias.double()) < (2**-8 if dtype == torch.bfloat16 else 2e-7)


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    weight, bias = stack(131)
    x = torch.randn(32, INPUTS, generator=generator(1)).bfloat16()
    experts = torch.randint(EXPERTS, (32, 3), generator=generator(2))
    matrix = torch.randn(131, INPUTS, generator=generator(0)).bfloat16()
    complete = products.expert_linear(x, weight, bias, products.Slots(experts, EXPERTS))
    dense = products.linear(x, matrix, None)
    for rows in (slice(0, 1), slice(3, 5), slice(7, 10), slice(1, 30)):
        alone = products.expert_linear(x[rows], weight, bias, products.Slots(experts[rows], EXPERTS))
        assert torch.equal(alone, complete[rows])
        assert torch.equal(products.linear(x[rows], matrix, None), dense[rows])


@pytest.mark.parametrize("broken", ["neighbouring expert", "nibbles exchanged", "even and odd exchanged", "one scale"])
def test_the_comparison_rejects_broken_implementations(broken: str) -> None:
    weight, bias = stack(131)
    x = torch.randn(3, INPUTS, generator=generator(1))
    experts = torch.randint(EXPERTS - 1, (3, 2), generator=generator(2))
    want = slow(x, weight, bias, experts)
    if broken == "neighbouring expert":
        experts = experts + 1
    elif broken == "nibbles exchanged":
        weight = weight._replace(blocks=(weight.blocks << 4) | (weight.blocks >> 4))
    elif broken == "even and odd exchanged":
        x = x.unflatten(1, (-1, 2)).flip(-1).flatten(1)
    else:
        scales = weight.scales.clone()
        scales[:, 7, 1] += 1
        weight = weight._replace(scales=scales)
    got = products.expert_linear(x, weight, bias, products.Slots(experts, EXPERTS))
    assert error(got, want) > 1e-4


EVERY_SCALE = """
import torch
from workbench.kernels import cpu
from workbench.kernels.cpu import products, vectors
from workbench.kernels.mxfp4 import Mxfp4, dequantise
blocks = torch.arange(256, dtype=torch.uint8).view(16, 1, 16).repeat(256, 1, 1)[None].contiguous()
scales = torch.arange(256, dtype=torch.uint8).repeat_interleave(16)[None, :, None].contiguous()
values = [0, .5, 1, 1.5, 2, 3, 4, 6, 0, -.5, -1, -1.5, -2, -3, -4, -6]
for byte in range(16):
    for half in (0, 1):
        x = torch.zeros(1, 32)
        x[0, 2 * byte + half] = 1
        slots = products.Slots(torch.zeros(1, 1, dtype=torch.long), 1)
        got = products.expert_linear(x, Mxfp4(blocks, scales), torch.zeros(1, 4096), slots)[0, 0].view(256, 16)
        nibbles = blocks[0, :16, 0, byte] >> 4 if half else blocks[0, :16, 0, byte] & 15
        table = torch.tensor(values, dtype=torch.float64)[nibbles.long()]
        want = (table * 2.0 ** (torch.arange(255, dtype=torch.float64)[:, None] - 127))
        small = want.abs() < 2.0**128
        # The other 31 values are infinite or NaN for the largest scales, times 0: those scales are compared below.
        finite = torch.arange(255) < 253
        assert torch.equal(got[:255][finite].double(), want[finite]), (byte, half)
        assert got[255].isnan().all()
want = dequantise(blocks, scales)
numbers = ~want.isnan()
assert numbers.sum() == 255 * 16 * 32


def same_bits(blocks):
    unpacked = torch.empty_like(want)
    products.unpack(blocks, scales, unpacked)
    assert torch.equal(unpacked.isnan(), ~numbers)
    return torch.equal(unpacked.view(torch.int16)[numbers], want.view(torch.int16)[numbers])


def same_bits_by_columns(blocks):
    unpacked = torch.empty(32, 4096)
    products.unpack_columns(blocks[0], scales[0], unpacked)
    unpacked = unpacked.mT[None]
    assert torch.equal(unpacked.isnan(), ~numbers)
    finite = torch.finfo(torch.bfloat16).max  # float32 holds larger values, of the largest scales
    got, wide = (t.float().clamp(-finite, finite)[numbers].view(torch.int32) for t in (unpacked, want))
    return torch.equal(got, wide)


for same in (same_bits, same_bits_by_columns):
    assert same(blocks) and not same((blocks << 4) | (blocks >> 4)) and not same(blocks.roll(1, -1))
matrix = torch.arange(-24576, 24576).to(torch.int16).view(96, 512).view(torch.bfloat16)
widened = torch.empty(512, 96)
products.widen_columns(matrix, widened)
assert torch.equal(widened.mT.view(torch.int32), matrix.view(torch.int16).int() << 16)
assert not torch.equal(widened.mT[8:].view(torch.int32), matrix[:-8].view(torch.int16).int() << 16)
print(vectors.instructions())
"""


def other_processor(code: str, **environment: str) -> str:
    """Run code in a process that compiles for another processor, into a cache of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


HASWELL = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+sse4.2,+ssse3"}


def test_every_byte_under_every_scale_is_exact(capsys: pytest.CaptureFixture[str]) -> None:
    """Subnormal scales and NaN included."""
    exec(EVERY_SCALE, {})
    assert cpu.description().endswith(capsys.readouterr().out.strip())


@pytest.mark.skipif(platform.machine() != "x86_64", reason="emulates an x86-64 processor")
def test_every_byte_under_every_scale_is_exact_without_avx512() -> None:
    assert other_processor(EVERY_SCALE, **HASWELL) == "AVX2"


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    """The choice is made once a process: make it again within the test, and again after it."""
    cpu.unavailable.cache_clear()
    yield
    cpu.unavailable.cache_clear()


@pytest.mark.usefixtures("fresh_choice")
@pytest.mark.parametrize(
    ("triple", "features", "expected"),
    [
        ("x86_64-unknown-linux-gnu", ["+sse4.2", "+ssse3"], None),
        ("x86_64-unknown-linux-gnu", ["+avx2", "+fma"], None),
        ("x86_64-unknown-linux-gnu", ["+avx2", "+fma", "+f16c"], "AVX2"),
        ("x86_64-pc-windows-msvc", ["+avx2", "+fma", "+f16c", "+avx512f"], "AVX-512"),
        ("arm64-apple-darwin25.0.0", [""], "NEON"),
        ("aarch64-unknown-linux-gnu", ["+neon"], "NEON"),
    ],
)
def test_the_choice_follows_the_instruction_set(
    triple: str, features: list[str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors, "_target", lambda context: (triple, features))
    wanted = f"compiled by numba for {expected}" if expected else "torch (the processor"
    assert cpu.description().startswith(wanted)


@pytest.mark.parametrize(
    ("triple", "processor", "features", "expected"),
    [
        ("x86_64-unknown-linux-gnu", "sapphirerapids", "+avx512f,+avx512bf16,+amx-bf16", True),
        ("x86_64-unknown-linux-gnu", "sapphirerapids", "+avx512f,+avx512bf16,-amx-bf16", False),
        ("x86_64-unknown-linux-gnu", "znver4", "+avx512f,+avx512bf16", True),
        ("x86_64-unknown-linux-gnu", "znver3", "+avx2,-avx512bf16", False),
        ("x86_64-pc-windows-msvc", "haswell", "+avx2,+fma,+f16c", False),
        ("aarch64-unknown-linux-gnu", "neoverse-v1", "+neon,+bf16", True),
        ("aarch64-unknown-linux-gnu", "cortex-a72", "+neon", False),
        ("arm64-apple-darwin25.0.0", "apple-m2", "+neon,+bf16", False),
    ],
)
def test_bfloat16_is_widened_where_the_processor_multiplies_it_slowly(
    triple: str, processor: str, features: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors, "_processor", lambda: (triple, processor, features))
    assert vectors.multiplies_bfloat16() is expected
    cpu._widens.cache_clear()
    x = torch.zeros(1, 32)
    assert cpu.product_dtype(x.bfloat16()) == (torch.bfloat16 if expected else torch.float32)
    assert cpu.product_dtype(x.double()) == torch.float64
    assert cpu.product_dtype(x.bfloat16().requires_grad_()) == torch.bfloat16
    cpu._widens.cache_clear()


@pytest.mark.usefixtures("fresh_choice")
def test_without_numba_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "workbench.kernels.cpu.vectors")
    assert cpu.description().startswith("torch (numba cannot be imported")
    assert cpu.compiled(torch.zeros(1, 32)) is None
    cpu.unavailable.cache_clear()
    monkeypatch.setenv(cpu.VARIABLE, "compiled")
    with pytest.raises(ValueError, match="is 'compiled', but numba cannot be imported"):
        cpu.unavailable()


@pytest.mark.usefixtures("fresh_choice")
def test_the_environment_variable_chooses_and_refuses_unknown_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.VARIABLE, "torch")
    assert cpu.description() == "torch (WORKBENCH_CPU_KERNELS is 'torch')"
    cpu.unavailable.cache_clear()
    monkeypatch.setenv(cpu.VARIABLE, "fast")
    with pytest.raises(ValueError, match="'fast': expected one of auto, compiled, torch"):
        cpu.unavailable()


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    """Neither beside the code nor in the user's folder."""
    code = """
from numba.core import caching
caching.CacheImpl._locator_classes = []
from workbench.kernels import cpu
print(cpu.description())
from workbench.kernels.cpu import products
products._loops()
"""
    assert other_processor(code).startswith("compiled")


def test_followed_and_differentiated_tensors_are_left_to_torch() -> None:
    from torch.autograd import forward_ad
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.zeros(1, 32)
    assert cpu.compiled(x)
    assert not cpu.compiled(x, torch.zeros(1, requires_grad=True))
    assert not cpu.compiled(torch.zeros(1, device="meta"))
    with FlopCounterMode(display=False):
        assert not cpu.compiled(x)
    with forward_ad.dual_level():
        assert not cpu.compiled(x)
    choices = []
    torch.func.vmap(lambda t: choices.append(cpu.compiled(t)) or t)(x)
    assert choices == [None]
    assert cpu.compiled(x)


def test_an_expert_beyond_the_last_is_refused() -> None:
    with pytest.raises(IndexError, match="expert 5 of 5"):
        products.Slots(torch.tensor([[1, 5]]), 5)
    with pytest.raises(RuntimeError, match="negative"):
        products.Slots(torch.tensor([[1, -1]]), 5)


def test_every_piece_of_work_is_done_once_by_any_number_of_threads() -> None:
    done: list[int] = []
    taking = threading.Lock()
    before = torch.get_num_threads()

    def loop(counter: int, pieces: int) -> None:
        while True:
            with taking:
                number = ctypes.c_int64.from_address(counter)
                piece, number.value = number.value, number.value + 1
            if piece >= pieces:
                return
            done.append(piece)

    for count in (1, 2, 4):
        torch.set_num_threads(count)
        done.clear()
        threads.run(loop, 10, 10)
        assert sorted(done) == list(range(10))
    torch.set_num_threads(before)


@pytest.mark.parametrize("broken", [False, True])
def test_a_helper_that_has_not_begun_is_not_waited_for(broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its only helper is busy with another's loop. Negative control: a caller that waits for it in any case."""
    monkeypatch.setattr(threads, "_helpers", threads._Helpers())
    if broken:
        monkeypatch.setattr(threads._Job, "end", lambda job: job._finished.acquire())
    begun, released, ran = threading.Event(), threading.Event(), list[str]()

    def occupy(counter: int) -> None:
        ran.append(threading.current_thread().name)
        if ran[-1] == "cpu-kernels":
            begun.set()
            released.wait()
        else:
            begun.wait()

    def note(counter: int) -> None:
        ran.append(threading.current_thread().name)

    def call(loop: Callable[[int], None]) -> threading.Thread:
        def run() -> None:
            torch.set_num_threads(2)
            threads.run(loop, 2)

        caller = threading.Thread(target=run, name="caller", daemon=True)
        caller.start()
        return caller

    before = torch.get_num_threads()
    first = call(occupy)
    assert begun.wait(60)
    second = call(note)
    second.join(0.3 if broken else 60)
    assert second.is_alive() == broken
    released.set()
    for caller in (first, second):
        caller.join(60)
        assert not caller.is_alive()
    torch.set_num_threads(before)
    assert sorted(ran) == ["caller"] * 2 + ["cpu-kernels"] * (2 if broken else 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_process_has_helpers_of_its_own() -> None:
    code = """
import os, torch
from workbench.kernels.cpu import products
torch.set_num_threads(2)
weight, x = torch.randn(400, 32).bfloat16(), torch.randn(1, 32)
want = products.linear(x, weight, None)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(products.linear(x, weight, None), want) else 1)
print(os.waitpid(child, 0)[1])
"""
    assert other_processor(code) == "0"
