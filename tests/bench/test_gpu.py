"""The GPU benchmark runs whole on the interpreter, on a small model: it checks first, stops when a kernel is wrong,
and states what it measured. How fast a card is, no test can say.
"""

import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from workbench.bench import gpu
from workbench.bench.cases import row_error
from workbench.bench.models import layers
from workbench.cli import app
from workbench.errors import InputError, JobError
from workbench.model.config import PUBLISHED

SMALL = """
import json
from dataclasses import replace
from workbench.bench import gpu
from workbench.model.config import PUBLISHED
cfg = replace(
    PUBLISHED["20b"], d_model=32, d_mlp=32, n_heads=4, n_key_value_heads=2, d_head=16, num_experts=3,
    experts_per_token=2, n_layers=2, windows=(8, None), d_vocab=256,
)
sizes = gpu.Sizes(prefills=(17,), batches=(1, 3), past=11, model_past=11, checked=19, checked_past=11)
"""


FASTER = """
from tests.interpreted_triton import replace_language_once_for_a_launch
replace_language_once_for_a_launch()
"""


def interpreted(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """What a fresh process with Triton's interpreter makes of the code, with a small model at hand."""
    return subprocess.run(
        [sys.executable, "-c", FASTER + SMALL + code],
        env=os.environ | {"TRITON_INTERPRET": "1", **env},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def run() -> dict[str, object]:
    code = "from workbench.bench import timing; timing._WARM_UP = 0\n"  # the interpreter compiles nothing
    done = interpreted(code + "print(); print(json.dumps(gpu.run('cpu', {'small': cfg}, sizes, repeats=1)))")
    assert done.returncode == 0, done.stderr
    table, result = done.stdout.rsplit("\n", 2)[:2]
    assert "kernels agree with torch" in table
    return json.loads(result)


KERNELS = {
    "mxfp4.dequantise",
    "routing.top_k",
    "routing.gate",
    "routing.group",
    "moe",
    "moe, with gradient",
    "attention",
    "attention, with gradient",
    "moments",
    "norm.rms_norm",
    "rotary.rotate",
    "logits.predict",
}


def test_every_kernel_is_checked_and_timed(run: dict) -> None:
    assert {row["kernel"] for row in run["correct"]} == KERNELS == {row["kernel"] for row in run["kernels"]}
    assert all(row["error"] <= row["allowed"] for row in run["correct"])
    assert all(row["seconds"] > 0 and 0 < row["fraction"] < 1 for row in run["kernels"])


def test_windows_and_batches_are_problems_of_their_own(run: dict) -> None:
    attention = [row["problem"] for row in run["kernels"] if row["kernel"] == "attention"]
    assert attention == [
        f"{what}, {seen}"
        for seen in ("window 8", "full")
        for what in ("prefill of 17", "decode of 1 after 11", "decode of 3 after 11")
    ]


def test_the_whole_model_prefills_decodes_and_is_recorded(run: dict) -> None:
    assert [row["problem"] for row in run["models"]] == [
        "prefill of 17, no logits",
        "decode of 1 after 11",
        "decode of 3 after 11",
    ]
    assert run["models"][0]["recording"] > -1
    assert all(row["tokens_per_s"] > 0 and 0 < row["fraction"] < 1 for row in run["models"])


def test_baselines_are_measured_or_listed_as_missing(run: dict) -> None:
    upstream, *transformers = run["baselines"]
    assert upstream["baseline"] == "gpt_oss.triton (triton_kernels)"
    assert "gpt_oss" in upstream["missing"]
    assert [row["tokens"] for row in transformers] == [1, 3, 17]
    assert all(row["theirs_s"] > 0 and row["difference"] < 0.1 for row in transformers)


def test_the_result_states_where_it_was_measured(run: dict) -> None:
    assert run["card"] == "none: interpreted on the CPU"
    assert run["versions"]["torch"] == torch.__version__
    assert min(run["limits"].values()) > 0


@pytest.mark.parametrize(
    ("module", "function", "wrong"),
    [
        ("moments", "moments", lambda right, args, _: right(args[0], args[1].roll(1), args[2])),
        ("attention", "attention", lambda right, args, more: right(*args[:4], args[4] and args[4] + 1, **more)),
        ("routing", "top_k", lambda right, args, _: right(-args[0], args[1])),
        ("mxfp4", "dequantise", lambda right, args, _: right(args[0], args[1]) * 1.01),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_kernel_stops_it(
    module: str, function: str, wrong: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, which interprets Triton's kernels, too."""
    kernels = importlib.import_module(f"workbench.kernels.gpu.{module}")
    right, small = getattr(kernels, function), dict[str, Any]()
    exec(SMALL, small)
    monkeypatch.setattr(kernels, function, lambda *args, **options: wrong(right, args, options))
    with pytest.raises(JobError, match=rf"^nothing was timed.*{module}"):
        gpu.check({"small": small["cfg"]}, gpu._device("cpu"), small["sizes"])


def test_a_row_is_judged_by_itself() -> None:
    want = torch.ones(100, 8)
    assert row_error(want, want) == 0
    assert row_error(want + torch.eye(100, 8), want) == pytest.approx(8**-0.5, rel=1e-6)
    assert row_error(want * math.nan, want) == math.inf
    assert row_error(torch.tensor([1, 2]), torch.tensor([1, 3])) == math.inf


def test_autotuning_finds_the_faster_tile_and_tiles_takes_it(tmp_path: Path) -> None:
    """On the interpreter fewer, larger programs win; a candidate that computes something else must not."""
    code = f"""
import time
from pathlib import Path
from workbench.bench import autotune
from workbench.bench.cases import Layer, cases
from workbench.bench.timing import Clock
from workbench.kernels.gpu import tiles
time.perf_counter = time.process_time  # on a busy machine, the time of the processor is what a tile needs
clock = Clock(gpu._device("cpu"), 3)
own = tiles.codec_tile()
if not Path({str(tmp_path / "tiles.json")!r}).exists():
    cfg = replace(cfg, d_model=128, d_mlp=128)
    found = autotune.autotune(clock, [next(cases(Layer(cfg, clock.device), 3, (), 3))])
    assert tiles.codec_tile() == own, "the search leaves the tiles as they were"
    Path({str(tmp_path / "tiles.json")!r}).write_text(json.dumps(found))
print(own.blocks["BLOCK"])
"""
    before = interpreted(code)
    assert before.returncode == 0, before.stderr
    after = interpreted(code, WORKBENCH_TILES=str(tmp_path / "tiles.json"))
    assert after.returncode == 0, after.stderr
    assert int(after.stdout.split()[-1]) > int(before.stdout.split()[-1]) == 128


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_reports_it() -> None:
    done = CliRunner().invoke(app, ["bench", "gpu"])
    assert isinstance(done.exception, InputError)
    assert "finds no GPU" in str(done.exception)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_an_assembler_is_measured_by_a_process_of_its_own() -> None:
    with pytest.raises(JobError, match=r"with /bin/true ended with exit code 2"):
        gpu.with_assembler(Path("/bin/true"), repeats=1)


def test_wrong_usage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'kernel' is unknown: choose from kernels, models, baselines"):
        gpu.run(stages=["kernel"])
    with pytest.raises(InputError, match="cannot be run: name a ptxas"):
        gpu.run(assemblers=[tmp_path / "ptxas"])


def test_limits_of_a_model_are_those_of_the_design() -> None:
    """903 and 670 tokens/s: the least a token must read on 3.35 TB/s."""
    read = [
        layers(cfg, 1, 1, 0, cfg.experts_per_token).bytes + 2 * cfg.d_vocab * cfg.d_model for cfg in PUBLISHED.values()
    ]
    assert [3.35e12 / total for total in read] == pytest.approx([903, 670], abs=5)


def test_autotune_tries_no_tile_that_kernels_cannot_use() -> None:
    from workbench.bench.autotune import neighbours
    from workbench.kernels.gpu import tiles

    own = tiles.Tile({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK": 4}, 4, 2)
    tried = list(neighbours(own))
    assert all(tiles.fits(tile) for tile in tried)
    assert {tile.blocks["BLOCK_M"] for tile in tried} == {16, 32}
    assert {tile.blocks["BLOCK"] for tile in tried} == {2, 4, 8}
    assert not tiles.fits(own._replace(blocks={**own.blocks, "BLOCK_M": 8})), "gave NaN when decoding two tokens"
