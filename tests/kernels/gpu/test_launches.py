"""Every launch of the launchers compiles for real targets, without a spill, within a budget of launches a layer."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from workbench.kernels.gpu.aot import TARGETS

# Kernels that multiply matrices, and must use the target's matrix instruction in bfloat16.
PRODUCTS = {"_linear", "_transposed", "_forward", "_split", "_queries_gradient", "_keys_gradient"}
QUICK = (
    "prefill of 100 tokens",
    "prefill of 1,030 tokens",
    "packed sequences",
    "decode",
    "decode of two tokens",
    "hooked",
)
DECODE_LAUNCHES, PREFILL_LAUNCHES = 13, 12  # of Triton, a layer: norms and rotations are four of them


def measured(target: str, *scenarios: str, spoil: str = "") -> dict[str, Any]:
    """Run the pretended driver in a process of its own, after the statements of `spoil`."""
    code = f"from tests.kernels.gpu import pretend_driver as p\n{spoil}\nimport json\n"
    code += f"print(json.dumps(p.measure({target!r}, {list(scenarios)!r} or list(p.SCENARIOS))))"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def problems(report: dict[str, Any], target: str) -> list[str]:
    """Return kernels that spill, do not fit, or lack the matrix instruction."""
    facts = TARGETS[target]
    wrong = []
    for kernel in report["kernels"]:
        name = kernel["kernel"]
        if kernel["spilled"]:
            wrong.append(f"{name} spills {kernel['spilled']} bytes a thread")
        if kernel["shared"] > facts.shared or not kernel["blocks_per_sm"]:
            wrong.append(f"{name} does not fit")
        if name in PRODUCTS and not any(facts.matrix in used for used in kernel["instructions"]):
            wrong.append(f"{name} has no {facts.matrix}")
    return wrong


@pytest.mark.slow
def test_every_launch_on_an_h100_compiles_and_stays_within_the_budget() -> None:
    report = measured("sm_90", *QUICK)
    assert problems(report, "sm_90") == []
    per_layer = {name: len(launched) / report["layers"] for name, launched in report["launches"].items()}
    assert per_layer["decode"] <= DECODE_LAUNCHES
    assert per_layer["prefill of 100 tokens"] <= PREFILL_LAUNCHES
    assert per_layer["prefill of 1,030 tokens"] == per_layer["prefill of 100 tokens"], "independent of the length"
    assert per_layer["packed sequences"] == per_layer["prefill of 100 tokens"], "independent of the sequences"


SPOILED = {
    "a tile that spills": (
        "p.tiles.attention_tile = lambda *_: p.tiles.Tile({'BLOCK_M': 128, 'BLOCK_N': 128}, 4, 2)",
        "_forward spills",
    ),
    "a tile too large for shared memory": (
        "p.tiles.attention_tile = lambda *_: p.tiles.Tile({'BLOCK_M': 128, 'BLOCK_N': 256}, 8, 4)",
        "",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SPOILED)
def test_a_bad_tile_is_noticed(name: str) -> None:
    spoil, wanted = SPOILED[name]
    if wanted:
        assert wanted in " ".join(problems(measured("sm_90", "prefill of 100 tokens", spoil=spoil), "sm_90"))
    else:  # Triton itself refuses it at the launch
        with pytest.raises(AssertionError, match=r"OutOfResources|out of resource"):
            measured("sm_90", "prefill of 100 tokens", spoil=spoil)


SPILLS = """
from workbench.kernels.gpu.spills import spilled
model = p.model_of("20b", layers=1)
with p.pretending("sm_90"):
    p.SCENARIOS["decode"](*model)
    before = spilled()
    p.PretendDriver.load_binary = lambda self, name, *_: (1, 1, 0, 7 * (name == "_linear"), 1024)
    p.SCENARIOS["prefill of 100 tokens"](*model)  # other variants: loaded after the change
print(json.dumps([before, spilled()]))
"""


@pytest.mark.slow
def test_spills_of_loaded_kernels_are_listed() -> None:
    code = f"import json\nfrom tests.kernels.gpu import pretend_driver as p\n{SPILLS}"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [{}, {"_linear": 7}], "none before, and one then"


@pytest.mark.long
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_every_launch_compiles_for_every_target(target: str) -> None:
    assert problems(measured(target), target) == []
