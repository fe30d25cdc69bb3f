"""The plan is what happens: bytes of weights, cache, records, and of a forward pass's stages on Triton's launchers."""

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.model.conftest import BASE, random_model
from tests.model.live_memory import LiveBytes
from workbench.capture import compute, recording
from workbench.errors import InputError
from workbench.hooks.recorders import Recorder
from workbench.kernels import chunking, dispatch
from workbench.model import load, memory
from workbench.model.cache import KVCache
from workbench.model.config import PUBLISHED, Config
from workbench.model.export import RandomTensors, save_random
from workbench.model.names import shapes
from workbench.model.transformer import GptOss

SMALL = replace(BASE, d_vocab=72)  # nano's tokenizer, which a random checkpoint has


@pytest.mark.parametrize("experts", ["mxfp4", "dense"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_are_the_bytes_of_a_loaded_model(experts: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = load(save_random(tmp_path / "random", SMALL, experts=experts), device="cpu", dtype=dtype)
    loaded: dict[str, int] = {}
    for name, tensor in model.state_dict().items():
        loaded[memory.part_of(name)] = loaded.get(memory.part_of(name), 0) + tensor.nbytes
    assert memory.weights(SMALL, experts, dtype) == loaded
    assert list(loaded)[:2] == ["embed", "blocks.0"]


@pytest.mark.parametrize(("size", "gigabytes"), [("20b", 13.8), ("120b", 65.2)])
def test_published_weights(size: str, gigabytes: float) -> None:
    """From the parameters: 17 bytes for 32 of an expert's matrices, 2 for any other."""
    cfg = PUBLISHED[size]
    packed = 3 * cfg.d_model * cfg.d_mlp * cfg.num_experts * cfg.n_layers
    total = sum(memory.weights(cfg).values())
    assert total == packed * 17 // 32 + 2 * (cfg.n_params - packed)
    assert total == pytest.approx(gigabytes * 1e9, rel=0.005)


def test_cache_and_records_are_the_bytes_of_the_tensors() -> None:
    for positions in (50, 400):
        cache = KVCache(BASE, 3, positions, dtype=torch.bfloat16, device=torch.device("cpu"))
        assert memory.cache_row(BASE, positions) * 3 == sum(t.nbytes for t in (*cache.keys, *cache.values))
    spec = recording.parse(["routing", "router_logits", "sinks", "resid_post:0,2", "mlp.experts.post:1"], BASE)
    points = recording.wanted(spec, BASE)
    recorder, model = Recorder(points), random_model(BASE)
    with torch.no_grad(), model.hooks(fwd_hooks=recorder.fwd_hooks):
        model.residual(torch.zeros(1, 30, dtype=torch.long))
    assert memory.records(BASE, points) * 30 == sum(t.nbytes for t in recorder.take().values())


def test_live_bytes_are_counted_until_they_are_freed() -> None:
    there = torch.zeros(1000)
    with LiveBytes([there]) as counted:
        a = torch.ones(100)
        view = a.view(10, 10).mT
        b = there[:10] + 1
        assert counted.live == 440
        del a
        assert counted.live == 440
        del view, b
        assert counted.live == 0
        there.mul_(2)
    assert counted.peak == 440


@dataclass(frozen=True)
class Case:
    """A model and a forward pass that need the most memory in a stage; `hook` within the first block."""

    cfg: Config
    tokens: int = 24
    dtype: torch.dtype = torch.bfloat16
    hook: str = ""
    ends: str = ""


ONE = replace(BASE, n_layers=1, windows=(16,), n_heads=2, n_key_value_heads=1)
FEW = replace(ONE, experts_per_token=1, d_mlp=32, num_experts=3)
WIDE = replace(FEW, d_model=512)
CASES = {
    "experts": Case(replace(ONE, d_mlp=256)),
    "experts, float32": Case(replace(ONE, d_mlp=256), dtype=torch.float32),
    "experts, wider than they are deep": Case(replace(WIDE, experts_per_token=4, num_experts=5), 90, torch.float32),
    "experts, gate tapped": Case(ONE, hook="mlp.experts.hook_gate"),
    "experts, out tapped": Case(ONE, hook="mlp.experts.hook_out"),
    "router": Case(replace(FEW, num_experts=64, d_model=128), 3),
    "attention": Case(replace(FEW, d_head=128), 90),
    "attention, result": Case(replace(FEW, n_heads=8), hook="attn.hook_result"),
    "logits": Case(replace(FEW, d_vocab=9000), ends="logits"),
    "log-probabilities": Case(replace(FEW, d_vocab=9000), 90, ends="predictions"),
    "log-probabilities, float32": Case(replace(FEW, d_vocab=9000), 90, torch.float32, ends="predictions"),
}
ROWS, POSITIONS = 20, 32  # log-probabilities at a time, and positions of `chunked`: far fewer than in earnest


def in_order(t: Tensor, hook: object) -> None:
    """What a recorder asks of a tensor on a GPU before it is copied to the host."""
    t.flatten(0, 1).contiguous()


def measured(case: Case) -> int:
    """The most bytes alive in a forward pass of Triton's launchers; without kernels, outputs are zeros."""
    with torch.device("meta"):
        model = GptOss(case.cfg, packed=True)
    state = {n: t.to(case.dtype) if t.is_floating_point() else t for n, t in RandomTensors(case.cfg).items()}
    model.load_state_dict(state, assign=True)
    model.requires_grad_(False)
    hooks = [(f"blocks.0.{case.hook}", in_order)] if case.hook else []
    lengths = [case.tokens - 1, 1]
    with torch.no_grad(), LiveBytes(model.state_dict().values(), zeroed=True) as counted, model.hooks(fwd_hooks=hooks):
        tokens = torch.arange(case.tokens) % 70
        if case.ends == "logits":
            model(tokens[None], packed=lengths)
        else:
            residual = model.residual(tokens[None], packed=lengths)
            if case.ends == "predictions":
                compute.predictions(model, residual, tokens, lengths)
    return counted.peak


@pytest.mark.parametrize("name", list(CASES))
def test_each_stage_takes_the_memory_of_the_plan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launchers allocate as on a GPU and nothing is computed: no size depends on a value of a tensor."""
    case = CASES[name]
    monkeypatch.setattr("triton.runtime.interpreter.GridExecutor.__call__", lambda *arguments, **options: None)
    monkeypatch.setattr(dispatch, "on_gpu", lambda x: True)
    monkeypatch.setattr(compute, "LOGIT_ROWS", ROWS)
    monkeypatch.setattr(chunking, "POSITIONS", POSITIONS)
    planned = memory.activations(
        case.cfg,
        case.tokens,
        dtype=case.dtype,
        recorded=[f"blocks.0.{case.hook}"] if case.hook else [],
        logits=case.tokens * (case.ends == "logits"),
        predictions=ROWS * (case.ends == "predictions"),
    )
    peak = measured(case)
    (most, stage), (second, _) = sorted(((size, stage) for stage, size in planned.items()), reverse=True)[:2]
    assert stage == name.split(",", maxsplit=1)[0]
    assert most == pytest.approx(peak, rel=0.005)
    assert second < 0.97 * peak, "another stage is as large: this case would not notice"


@given(st.lists(st.integers(1, 50), min_size=2, max_size=9), st.integers(1, 6))
def test_layers_spread_in_contiguous_stages_the_fullest_as_small_as_can_be(sizes: list[int], devices: int) -> None:
    names = ["embed", *(f"blocks.{i}" for i in range(len(sizes) - 2)), "unembed"]
    weights = dict(zip(names, sizes, strict=True))
    places = list(memory.spread(weights, devices).values())
    assert places[0] == 0
    assert all(b - a in (0, 1) for a, b in pairwise(places))
    assert places[-1] < devices
    assert sum(memory.stages(weights, devices)) == sum(sizes)
    assert max(memory.stages(weights, devices)) == fullest(sizes, devices)


def fullest(sizes: list[int], devices: int) -> int:
    """The smallest that the largest of `devices` runs can be, by trying every first run."""
    if devices == 1 or len(sizes) == 1:
        return sum(sizes)
    return min(max(sum(sizes[:i]), fullest(sizes[i:], devices - 1)) for i in range(1, len(sizes)))


def test_a_plan_is_the_largest_that_fits() -> None:
    cfg, weights_bytes = PUBLISHED["120b"], sum(memory.weights(PUBLISHED["120b"]).values())

    def fits(tokens: int) -> bool:
        return weights_bytes + max(memory.activations(cfg, tokens, predictions=512).values()) <= 80 * 10**9

    longest = memory.largest(fits)
    assert fits(longest)
    assert not fits(longest + 1)
    assert memory.largest(lambda n: False) == 0
    assert memory.devices_for(memory.weights(cfg), 80 * 10**9) == 1
    assert memory.devices_for(memory.weights(cfg), 24 * 10**9) == 3
    assert memory.devices_for(memory.weights(cfg), 10**9) is None


@pytest.mark.parametrize(("text", "want"), [("80GB", 80e9), ("24 GiB", 24 * 2**30), ("1.5gb", 1.5e9), ("4096", 4096)])
def test_memory_is_read_with_its_unit(text: str, want: float) -> None:
    assert memory.parse(text) == want


@pytest.mark.parametrize("text", ["", "much", "80 gallons", "-1GB", "9" * 400 + "GB"])
def test_other_memory_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="80GB or 24GiB"):
        memory.parse(text)


def test_every_tensor_belongs_to_a_part() -> None:
    parts = memory.weights(BASE)
    assert {memory.part_of(name) for name in shapes(BASE, "mxfp4")} == set(parts)
    assert next(iter(parts)) == "embed"
    assert list(parts)[-1] == "unembed"
