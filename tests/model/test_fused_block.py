"""A block in one launch against the same block in modules: bit for bit, under hooks, and after its weights changed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.conftest import BASE
from workbench.hooks.edits import applied
from workbench.hooks.experts import forbid
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
    got = decode(model, 3)
    monkeypatch.setattr(cpu, "compiled", lambda *tensors: None)
    want = decode(model, 3)
    assert (got - want).norm() / want.norm() < 0.02
    assert (got[:1] - want[1:2]).norm() / want[1:2].norm() > 0.2  # of another row


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

    with pytest.raises(InputError, match=r"a hook set expert \d+ in mlp.hook_expert_indices: expected 0 to 7"):
        decode(model, hooks=[("blocks.0.mlp.hook_expert_indices", beyond)])
