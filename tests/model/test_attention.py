"""Reading activations changes no bit of the model, in bfloat16, at every hook point and on both paths."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.model.conftest import BASE, random_model
from workbench.hooks.names import hook_points
from workbench.kernels import attention as attend
from workbench.kernels import chunking, dispatch, moe
from workbench.kernels.mxfp4 import quantise
from workbench.model import load
from workbench.model.attention import Attention
from workbench.model.cache import KVCache
from workbench.model.config import Config
from workbench.model.layers import ExpertMatrix
from workbench.model.transformer import GptOss

ODD = replace(
    BASE,
    d_model=96,
    d_mlp=32,
    n_layers=2,
    windows=(5, None),
    n_heads=6,
    n_key_value_heads=2,
    d_head=24,
    num_experts=5,
    experts_per_token=3,
)
Pass = Callable[[GptOss], Tensor]
# Points whose tensors the fused path does not compute; on Triton, one of each kind: an interpreted pass takes a second.
BESIDE_THE_FUSED_PATH = (
    "attn.hook_attn_scores",
    "attn.hook_sink",
    "attn.hook_pattern",
    "attn.hook_result",
    "ln1.hook_scale",
    "mlp.experts.hook_gate",
    "mlp.experts.hook_pre",
    "mlp.experts.hook_post",
    "mlp.experts.hook_out",
)
TRITON_POINTS = (
    "attn.hook_sink",
    "attn.hook_pattern",
    "ln2.hook_scale",
    "mlp.experts.hook_pre",
    "mlp.experts.hook_out",
)


def packed_model(cfg: Config = ODD) -> GptOss:
    """A random model in bfloat16 with packed experts, which both the torch and the Triton path compute."""
    dense, packed = random_model(cfg), GptOss(cfg, packed=True)
    state = dict(dense.state_dict())
    for name, module in dense.named_modules():
        if isinstance(module, ExpertMatrix):
            blocks, scales = quantise(state.pop(f"{name}.weight").mT.contiguous())
            state |= {f"{name}.blocks": blocks, f"{name}.scales": scales}
    packed.load_state_dict(state)
    return packed.to(torch.bfloat16).requires_grad_(False).eval()


@pytest.fixture(scope="module", params=["nano", "odd sizes"])
def model(request: pytest.FixtureRequest) -> GptOss:
    return load("nano", device="cpu", dtype=torch.bfloat16) if request.param == "nano" else packed_model()


def ids(model: GptOss, *shape: int) -> Tensor:
    return torch.randint(model.cfg.d_vocab, shape, generator=torch.Generator().manual_seed(3))


def padded(model: GptOss) -> Tensor:
    return model(ids(model, 2, 37), n_real=[37, 21])[1, :21]


def packed(model: GptOss) -> Tensor:
    return model(ids(model, 1, 40), packed=[23, 1, 16])


def decoded(model: GptOss) -> Tensor:
    """The last of several passes into a cache whose rows have unequal lengths."""
    cache = KVCache(model.cfg, 2, 48, dtype=model.dtype, device=model.device)
    x = ids(model, 2, 41)
    model(x[:, :29], cache=cache, n_real=[29, 18])
    cache.truncate(torch.tensor([29, 18]))
    parts = [model(x[:, 29:33], cache=cache), model(x[:, 33:34], cache=cache)]
    return torch.cat(parts, 1)


PASSES: dict[str, Pass] = {"padded": padded, "packed": packed, "decode": decoded}


def recorded(model: GptOss, run: Pass, names: list[str]) -> tuple[Tensor, dict[str, list[Tensor]]]:
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def record_hook(t: Tensor, hook: object) -> None:
        seen[hook.name].append(t.clone())  # type: ignore[attr-defined]

    with model.hooks(fwd_hooks=[(name, record_hook) for name in names]):
        return run(model), seen


@torch.no_grad()
def check_reading_changes_nothing(model: GptOss, run: Pass, names: list[str]) -> None:
    """Each point alone and all together: the logits and every recorded value are the same bits."""
    plain = run(model)
    everything, together = recorded(model, run, names)
    assert torch.equal(everything, plain), "all points together"
    for name in names:
        logits, alone = recorded(model, run, [name])
        assert torch.equal(logits, plain), name
        assert all(torch.equal(a, b) for a, b in zip(alone[name], together[name], strict=True)), name


@pytest.mark.parametrize("run", PASSES)
def test_reading_any_point_changes_no_bit(model: GptOss, run: str) -> None:
    everywhere = list(hook_points(model.cfg.n_layers))
    one_layer = [name for name in everywhere if not name.startswith("blocks.") or name.startswith("blocks.1.")]
    check_reading_changes_nothing(model, PASSES[run], one_layer)
    with torch.no_grad():
        assert torch.equal(recorded(model, PASSES[run], everywhere)[0], PASSES[run](model))


def test_reading_changes_no_bit_of_a_prompt_in_chunks(model: GptOss, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "POSITIONS", 8)
    monkeypatch.setattr(moe, "_TOKENS", 16)
    check_reading_changes_nothing(model, packed, [f"blocks.1.{name}" for name in BESIDE_THE_FUSED_PATH])


@torch.no_grad()
@pytest.mark.parametrize("point", ["attn_scores", "pattern", "sink", "result"])
def test_a_hook_that_returns_a_copy_changes_no_bit(model: GptOss, point: str) -> None:
    plain = packed(model)
    with model.hooks(fwd_hooks=[(f"blocks.1.attn.hook_{point}", lambda t, hook: t.clone())]):
        assert torch.equal(packed(model), plain)


@torch.no_grad()
@pytest.mark.parametrize("point", ["attn_scores", "pattern", "sink", "result"])
def test_an_edit_in_place_that_changes_nothing_changes_no_bit(model: GptOss, point: str) -> None:
    plain = packed(model)
    with model.hooks(fwd_hooks=[(f"blocks.1.attn.hook_{point}", lambda t, hook: t.mul_(1))]):
        assert torch.equal(packed(model), plain)
        with torch.inference_mode():
            assert torch.equal(packed(model), plain)


@torch.no_grad()
@pytest.mark.parametrize("point", ["attn_scores", "pattern", "sink", "result"])
@pytest.mark.parametrize("in_place", [False, True])
def test_an_edit_of_one_token_leaves_every_bit_of_those_before_it(model: GptOss, point: str, in_place: bool) -> None:
    def edit(t: Tensor, hook: object) -> Tensor:
        out = t if in_place else t.clone()
        row = out[:, :, 12] if point in ("attn_scores", "pattern") else out[:, 12]
        row.mul_(0.25)
        return out

    plain = model(ids(model, 1, 20))
    with model.hooks(fwd_hooks=[(f"blocks.0.attn.hook_{point}", edit)]):
        edited = model(ids(model, 1, 20))
    assert torch.equal(edited[:, :12], plain[:, :12])
    assert not torch.equal(edited[:, 12], plain[:, 12])


@pytest.mark.parametrize("point", ["attn_scores", "pattern", "sink", "result"])
def test_the_same_bits_with_gradients(model: GptOss, point: str) -> None:
    leaves: list[Tensor] = []

    def add_leaf(t: Tensor, hook: object) -> Tensor:
        leaves.append(torch.zeros_like(t, requires_grad=True))
        return t + leaves[-1]

    # Products that compute a gradient take another path on a CPU, hooked or not: a leaf at the next point makes the
    # later ones the same.
    later = "hook_attn_out" if point == "result" else "attn.hook_z"
    with model.hooks(fwd_hooks=[(f"blocks.0.{later}", add_leaf)]):
        plain = packed(model).detach()
    leaves.clear()
    with model.hooks(fwd_hooks=[(f"blocks.0.attn.hook_{point}", add_leaf)]):
        logits = packed(model)
    assert torch.equal(logits, plain)
    logits.float().logsumexp(-1).sum().backward()
    assert leaves[0].grad is not None
    assert leaves[0].grad.abs().sum() > 0


def materialized_when_hooked(self: Attention, q: Tensor, k: Tensor, v: Tensor, context: object) -> Tensor:
    """Negative control: another path, with other roundings, as soon as a point inside it is hooked."""
    z, lse, _ = attend.attention(
        q,
        k,
        v,
        context.positions,
        self.window,
        lengths=context.lengths,
        sinks=self.sinks,  # type: ignore[attr-defined]
    )
    points = (self.hook_attn_scores, self.hook_sink, self.hook_pattern)
    if not any(point.fwd_hooks for point in points):
        return z
    keys_only, lse, _ = attend.attention(
        q,
        k,
        v,
        context.positions,
        self.window,
        lengths=context.lengths,  # type: ignore[attr-defined]
    )
    scores = attend.scores(q, k, context.visible(q.shape[1], k.shape[1], self.window))  # type: ignore[attr-defined]
    pattern, _ = attend.softmax(self.hook_attn_scores(scores))
    p = self.hook_sink(torch.sigmoid(self.sinks.to(lse.dtype) - lse))
    pattern = self.hook_pattern(pattern * (1 - p).mT[..., None])
    if self.hook_sink.fwd_hooks:
        return attend.shrink(keys_only, p)
    return attend.combine(pattern, v).to(q.dtype)


@pytest.mark.parametrize("run", PASSES)
def test_another_path_when_hooked_fails(model: GptOss, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Attention, "_attend", materialized_when_hooked)
    with pytest.raises(AssertionError, match=r"hook_pattern|together"):
        check_reading_changes_nothing(model, PASSES[run], ["blocks.1.attn.hook_pattern"])


@contextmanager
def on_triton() -> Iterator[None]:
    """CPU tensors take the Triton path, interpreted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "on_gpu", lambda x: True)
        yield


@pytest.fixture(scope="module")
def one_layer() -> GptOss:
    """Of a layer with a window, as an interpreted layer takes most of a second."""
    return packed_model(replace(ODD, n_layers=1, windows=(5,)))


@pytest.fixture(scope="module")
def prompt_cache(one_layer: GptOss) -> KVCache:
    cache = KVCache(one_layer.cfg, 2, 12, dtype=one_layer.dtype, device=one_layer.device)
    with on_triton():
        one_layer(ids(one_layer, 2, 9), cache=cache)
    return cache


def short(model: GptOss) -> Tensor:
    return model(ids(model, 1, 14), packed=[9, 5])


def test_reading_any_point_changes_no_bit_on_triton(one_layer: GptOss) -> None:
    with on_triton():
        check_reading_changes_nothing(one_layer, short, [f"blocks.0.{name}" for name in TRITON_POINTS])


def test_reading_any_point_of_a_decode_changes_no_bit_on_triton(one_layer: GptOss, prompt_cache: KVCache) -> None:
    def decode(model: GptOss) -> Tensor:
        return model(ids(model, 2, 10)[:, 9:], cache=copy.deepcopy(prompt_cache))

    with on_triton():
        check_reading_changes_nothing(one_layer, decode, [f"blocks.0.{name}" for name in TRITON_POINTS])


def test_two_roundings_of_the_sink_fail_on_triton(one_layer: GptOss, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Attention, "_attend", materialized_when_hooked)
    with on_triton(), pytest.raises(AssertionError, match=r"hook_sink|together"):
        check_reading_changes_nothing(one_layer, short, ["blocks.0.attn.hook_sink"])
