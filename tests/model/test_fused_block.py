"""A block in one launch against the same block in modules: bit for bit, under hooks, and after its weights changed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.conftest import BASE
from workbench.hooks.edits import applied
from workbench.hooks.experts import forbid
from workbench.hooks.recorders import Recorder
from workbench.kernels import cpu
from workbench.model import fused_block
from workbench.model.cache import KVCache
from workbench.model.export import RandomTensors
from workbench.model.names import shapes
from workbench.model.transformer import GptOss

pytest.importorskip("numba")
if cpu.unavailable():
    pytest.skip(f"the compiled kernels are not available: {cpu.unavailable()}", allow_module_level=True)

CFG = replace(BASE, n_layers=2, windows=(16, None), n_heads=8, n_key_value_heads=2)
STEPS = 3


@pytest.fixture(scope="module")
def model() -> GptOss:
    return random_model()


def random_model() -> GptOss:
    drawn = RandomTensors(CFG)
    with torch.device("meta"):
        model = GptOss(CFG, packed=True)
    model.load_state_dict({name: drawn[name] for name in shapes(CFG, "mxfp4")}, assign=True)
    return model.requires_grad_(False)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The blocks that were computed in one launch."""
    launched: list[Any] = []
    forward = fused_block.fused_forward
    monkeypatch.setattr(
        fused_block, "fused_forward", lambda block, *rest: launched.append(block) or forward(block, *rest)
    )
    return launched


@contextmanager
def in_modules() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_block, "fused", lambda *arguments: None)
        yield


@torch.no_grad()
def decode(model: GptOss, rows: int = 1, past: int = 20, hooks: list[tuple[str, Any]] | None = None) -> Tensor:
    """Return the logits of a few new tokens of every row."""
    rng = torch.Generator().manual_seed(rows)
    tokens = torch.randint(CFG.d_vocab, (rows, past + STEPS), generator=rng)
    cache = KVCache(model.cfg, rows, past + STEPS, dtype=model.dtype, device=model.device)
    logits = []
    with model.hooks(fwd_hooks=hooks or []):
        model.residual(tokens[:, :past], cache=cache)
        for step in range(past, past + STEPS):
            residual = model.residual(tokens[:, step : step + 1], cache=cache)
            logits.append(model.unembed(model.ln_final(residual)))
    return torch.cat(logits, 1)


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("past", [1, 20, 150])
def test_one_launch_equals_the_modules(model: GptOss, rows: int, past: int, launches: list[Any]) -> None:
    got = decode(model, rows, past)
    steps = STEPS + (past == 1)
    assert len(launches) == 2 * steps
    with in_modules():
        want = decode(model, rows, past)
    assert len(launches) == 2 * steps
    assert torch.equal(got, want)


def test_the_modules_equal_torch_within_the_rounding_of_bfloat16(
    model: GptOss, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token whose rounding exchanges one expert differs by more: on a Xeon with AMX 1 of 9 did."""
    got = decode(model, 3)
    monkeypatch.setattr(cpu, "compiled", lambda *tensors: None)
    want = decode(model, 3)

    def close(other: Tensor) -> int:
        return int(((got - other).norm(dim=-1) / other.norm(dim=-1) < 0.02).sum())

    assert close(want) >= 8
    assert close(want.roll(1, 0)) == 0  # of another row


POINTS = [name for name in random_model().hook_dict if name.startswith("blocks.1.")]


@pytest.mark.parametrize("name", POINTS)
def test_a_hook_sees_and_changes_the_same_values(model: GptOss, name: str) -> None:
    def run(change: Callable[[Tensor], Tensor | None]) -> tuple[list[Tensor], Tensor]:
        seen: list[Tensor] = []

        def hook(tensor: Tensor, hook: Any) -> Tensor | None:
            seen.append(tensor.clone())
            return change(tensor)

        return seen, decode(model, 2, hooks=[(name, hook)])

    def edit(tensor: Tensor) -> Tensor:
        return (tensor + 1) % CFG.num_experts if "indices" in name else tensor * 0.75

    plain = decode(model, 2)
    for change in (lambda tensor: None, edit):
        (seen, got), (with_modules, want) = run(change), (None, None)
        with in_modules():
            with_modules, want = run(change)
        assert all(torch.equal(a, b) for a, b in zip(seen, with_modules, strict=True))
        assert torch.equal(got, want)
        assert torch.equal(got, plain) == (change is not edit)


def test_an_edit_acts_and_in_place_changes_count(model: GptOss) -> None:
    with applied(model, forbid(0, [0, 1, 2]), forbid(1, [3])) as report:
        got = decode(model)
    with in_modules(), applied(model, forbid(0, [0, 1, 2]), forbid(1, [3])):
        assert torch.equal(decode(model), got)
    assert not torch.equal(decode(model), got)
    assert report[0].changed > 0

    def halve(tensor: Tensor, hook: Any) -> None:
        tensor.mul_(0.5)

    for name in ("blocks.0.attn.hook_sink", "blocks.0.mlp.router.hook_out", "blocks.0.hook_mlp_out"):
        got = decode(model, hooks=[(name, halve)])
        assert not torch.equal(got, decode(model))
        with in_modules():
            assert torch.equal(decode(model, hooks=[(name, halve)]), got)


INNER = [
    "attn.hook_sink",
    "hook_attn_out",
    "hook_resid_mid",
    "mlp.router.hook_out",
    "mlp.hook_expert_indices",
    "mlp.hook_expert_weights",
]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The launches of phases of a block."""
    from workbench.kernels.cpu.layer import LayerStep, Phase

    launched: list[Any] = []
    run_to = LayerStep.run_to

    def counted(step: LayerStep, end: int) -> None:
        if step.next_phase < end and end > Phase.PROJECT:  # the last norm of the model is a phase of its own
            launched.append((step.next_phase, int(end)))
        run_to(step, end)

    monkeypatch.setattr(LayerStep, "run_to", counted)
    return launched


def test_hooks_that_read_divide_no_launch_after_their_first_step(model: GptOss, runs: list[Any]) -> None:
    seen: list[Tensor] = []
    hooks = [
        (f"blocks.{layer}.{name}", lambda tensor, hook: seen.append(tensor.clone()))
        for layer in (0, 1)
        for name in INNER
    ]
    recorded = decode(model, 2, hooks=hooks)
    assert len(runs) > 2 * STEPS
    first, later = runs[: len(runs) - 2 * (STEPS - 1)], runs[-2 * (STEPS - 1) :]
    assert set(later) == {(0, 13)}
    assert len(first) == 2 * 6  # launches end at the sink, before the experts, and at each value of the router
    values, seen[:] = list(seen), []
    with in_modules():
        assert torch.equal(decode(model, 2, hooks=hooks), recorded)
    assert len(seen) == len(values)
    assert all(torch.equal(a, b) for a, b in zip(seen, values, strict=True))


def test_hooks_of_known_code_divide_no_launch_at_all(runs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorders are made anew for every generation; that their code only reads is known after the first."""
    model, names = random_model(), {f"blocks.{layer}.{name}": torch.float32 for layer in (0, 1) for name in INNER}

    def record() -> Tensor:
        return decode(model, hooks=Recorder(names).fwd_hooks)

    def edit() -> Tensor:
        return decode(model, hooks=[(name, partial(lambda factor, tensor, hook: tensor * factor, 0.5))])

    record()
    runs.clear()
    want = record()
    assert runs[-2 * STEPS :] == [(0, 13)] * 2 * STEPS  # the prompt's come before
    name = "blocks.0.mlp.router.hook_out"
    edited = edit()
    assert torch.equal(record(), want)
    assert torch.equal(edit(), edited)
    assert not torch.equal(edited, want)
    monkeypatch.setattr(fused_block, "_hook_code", lambda point: (object(),))  # code that is never the same
    runs.clear()
    record()
    assert runs[-2 * STEPS :] != [(0, 13)] * 2 * STEPS


def edited_at_last(name: str, in_place: bool) -> tuple[str, Callable[..., Tensor | None]]:
    """Return a hook that reads in every step but the last one, in which it changes the value."""
    calls = 0

    def hook(tensor: Tensor, hook: Any) -> Tensor | None:
        nonlocal calls
        calls += 1
        if calls <= STEPS:  # the prompt and every step but the last
            return None
        new = (tensor + 1) % CFG.num_experts if "indices" in name else tensor * 0.75
        if not in_place:
            return new
        tensor.data.copy_(new)  # torch does not count this change
        return None

    return name, hook


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", INNER)
def test_a_change_after_the_point_is_computed_again(
    model: GptOss, name: str, in_place: bool, runs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Points after an edit see what follows from it, though the launch had gone on with the value before it."""
    seen: list[Tensor] = []

    def run() -> Tensor:
        seen.clear()
        edit = edited_at_last(f"blocks.0.{name}", in_place and name != "attn.hook_sink")
        looks = [
            (f"blocks.{layer}.{point}", lambda tensor, hook: seen.append(tensor.clone()))
            for layer in (0, 1)
            for point in INNER
        ]
        return decode(model, 2, hooks=[edit, *looks])

    got, values = run(), list(seen)
    again = [launch for launch in runs[-4:] if launch[0] and launch[1] == 13]
    assert again  # the last step of block 0 went back
    with in_modules():
        want = run()
    assert torch.equal(got, want)
    assert all(torch.equal(a, b) for a, b in zip(values, seen, strict=True))
    plain = decode(model, 2)
    assert torch.equal(got[:, :-1], plain[:, :-1])
    assert not torch.equal(got[:, -1], plain[:, -1])

    from workbench.kernels.cpu.layer import LayerStep

    monkeypatch.setattr(LayerStep, "go_back", lambda step, phase: None)
    assert not torch.equal(run(), want)


def test_a_hook_that_edits_divides_its_layer_alone(model: GptOss, runs: list[Any]) -> None:
    decode(model, hooks=[("blocks.1.mlp.router.hook_out", lambda tensor, hook: tensor * 0.5)])
    assert runs[-3 * STEPS :] == [(0, 13), (0, 6), (6, 13)] * STEPS  # of block 0, then of block 1


def test_a_pass_within_a_hook_has_memory_of_its_own(model: GptOss, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of one size use the same memory one after the other, but never at once."""
    from workbench.kernels.cpu.layer import LayerStep

    other, want = random_model(), decode(model)

    def another_pass(tensor: Tensor, hook: Any) -> None:
        decode(other, past=9)

    hooks = [("blocks.0.mlp.router.hook_out", another_pass)]
    assert torch.equal(decode(model, hooks=hooks), want)
    begin = LayerStep.__init__

    def begin_and_share(step: LayerStep, *arguments: Any) -> None:
        begin(step, *arguments)
        step._unused.append(step._memory)

    monkeypatch.setattr(LayerStep, "__init__", begin_and_share)
    monkeypatch.setattr(LayerStep, "release", lambda step: None)
    assert not torch.equal(decode(model, hooks=hooks), want)


def test_changed_weights_and_modules_are_noticed(launches: list[Any]) -> None:
    model = random_model()
    before = decode(model)
    block = model.blocks[0]
    block.attn.q.weight = torch.nn.Parameter(block.attn.q.weight.roll(1, 0), requires_grad=False)
    after = decode(model)
    assert not torch.equal(after, before)
    with in_modules():
        assert torch.equal(decode(model), after)
    launches.clear()
    seen: list[Any] = []
    handle = block.mlp.register_forward_hook(lambda *arguments: seen.append(1))
    assert torch.equal(decode(model), after)
    assert len(seen) == STEPS + 1
    handle.remove()
    model.double()
    launches.clear()
    decode(model)
    assert not launches


def test_an_expert_that_the_layer_lacks_is_refused(model: GptOss) -> None:
    from workbench.errors import InputError

    def beyond(tensor: Tensor, hook: Any) -> Tensor:
        return tensor + CFG.num_experts if tensor.shape[1] == 1 else tensor

    with pytest.raises(InputError, match=r"blocks.0.mlp.hook_expert_indices selected .* the layer has 0 to 7"):
        decode(model, hooks=[("blocks.0.mlp.hook_expert_indices", beyond)])
