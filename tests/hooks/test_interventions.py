"""Each intervention equals a model that was changed by hand, on every way through the model, and leaves no trace.

Tests `workbench.hooks.activations`, `workbench.hooks.attention`, `workbench.hooks.edits`, `workbench.hooks.experts`,
`workbench.hooks.observation` and `workbench.hooks.targets`.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens import ActivationCache

from tests.model.conftest import BASE, random_model
from workbench.errors import InputError
from workbench.hooks.edits import Edit
from workbench.hooks.interventions import (
    ablate,
    applied,
    expert_means,
    forbid,
    force,
    knockout,
    patch,
    remove_sinks,
    replace,
    resample,
    reweight,
    route,
    scale_heads,
    scale_sinks,
    set_sinks,
    steer,
)
from workbench.hooks.targets import at_layers
from workbench.model.cache import KVCache
from workbench.model.transformer import GptOss

X = torch.randint(BASE.d_vocab, (2, 30), generator=torch.Generator().manual_seed(1))
LATE = slice(10, None)
CLOSE = dict(rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def base() -> GptOss:
    return random_model(BASE).requires_grad_(False)


def changed(model: GptOss, change: Callable[[Any], None]) -> GptOss:
    twin = deepcopy(model)
    change(twin.blocks[1])
    return twin


def run(model: GptOss, *edits: Edit, x: Tensor = X, **options: Any) -> Tensor:
    with applied(model, *edits):
        return model(x, **options)


def scale(matrix: Any, experts: list[int], factor: float) -> None:
    for e in experts:
        matrix.weight.data[e] *= factor
        matrix.bias.data[e] *= factor


def scale_columns(matrix: Tensor, columns: list[int], factor: float) -> None:
    matrix.data[:, columns] *= factor


def mean_for(model: GptOss, e: int) -> Tensor:
    return expert_means(model, X, 1)[1][e]


def say_always(block: Any, e: int, what: Tensor) -> None:
    block.mlp.experts.down.weight.data[e] = 0
    block.mlp.experts.down.bias.data[e] = what


def set_(tensor: Tensor, at: Any, value: Any) -> None:
    tensor.data[at] = value


CHANGES: dict[str, tuple[Callable[[GptOss], Edit], Callable[[GptOss, Any], None]]] = {
    "forbid": (lambda m: forbid(1, [2, 5]), lambda m, b: set_(b.mlp.router.bias, [2, 5], -1e9)),
    "ablate, zero": (lambda m: ablate(1, [2, 5]), lambda m, b: scale(b.mlp.experts.down, [2, 5], 0.0)),
    "ablate, mean": (
        lambda m: ablate(1, [2], how="mean", means=expert_means(m, X, 1)),
        lambda m, b: say_always(b, 2, mean_for(m, 2)),
    ),
    "reweight": (lambda m: reweight(1, [2, 5], 3.0), lambda m, b: scale(b.mlp.experts.down, [2, 5], 3.0)),
    "route": (
        lambda m: route(1, lambda x, logits: x @ m.blocks[0].mlp.router.weight.T + m.blocks[0].mlp.router.bias),
        lambda m, b: b.mlp.router.load_state_dict(m.blocks[0].mlp.router.state_dict()),
    ),
    "remove sinks": (lambda m: remove_sinks(1), lambda m, b: set_(b.attn.sinks, slice(None), -1e9)),
    "one head's sink removed": (lambda m: remove_sinks(1, [3]), lambda m, b: set_(b.attn.sinks, 3, -1e9)),
    "set sinks": (lambda m: set_sinks(1, logit=2.5), lambda m, b: set_(b.attn.sinks, slice(None), 2.5)),
    "heads wholly on their sinks": (
        lambda m: set_sinks(1, probability=1.0),
        lambda m, b: set_(b.attn.o.weight, slice(None), 0.0),
    ),
    "zero a head": (
        lambda m: replace("blocks.1.attn.hook_z", 0.0, index=3),
        lambda m, b: set_(b.attn.o.weight, (slice(None), slice(3 * 16, 4 * 16)), 0.0),
    ),
    "scale heads": (
        lambda m: scale_heads(1, 0.3, [2, 5]),
        lambda m, b: scale_columns(b.attn.o.weight, [*range(2 * 16, 3 * 16), *range(5 * 16, 6 * 16)], 0.3),
    ),
    "steer": (
        lambda m: steer("blocks.1.hook_mlp_out", torch.ones(64), 0.5),
        lambda m, b: b.mlp.register_forward_hook(lambda module, args, out: out + 0.5) and None,
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CHANGES)
def test_an_intervention_is_the_model_changed_by_hand(base: GptOss, name: str) -> None:
    make, change = CHANGES[name]
    want = changed(base, lambda block: change(base, block))(X)
    assert not torch.allclose(want, base(X), **CLOSE), "the change does nothing: the test would pass without an edit"
    torch.testing.assert_close(run(base, make(base)), want, **CLOSE)


@torch.no_grad()
def test_the_ways_to_ablate_an_expert_differ(base: GptOss) -> None:
    ways = [forbid(1, [2]), *(ablate(1, [2], how=how) for how in ("zero", "renormalise", "resample"))]
    ways.append(ablate(1, [2], how="mean", means=expert_means(base, X, 1)))
    outs = [run(base, way) for way in ways]
    for i, a in enumerate(outs):
        assert not any(torch.allclose(a, b, **CLOSE) for b in outs[:i]), ways[i].description


@torch.no_grad()
def test_renormalised_gates_keep_their_sum(base: GptOss) -> None:
    with applied(base, ablate(1, [2], how="renormalise")):
        _, cache = base.run_with_cache(X)
    gates, experts = cache["blocks.1.mlp.hook_expert_weights"], cache["blocks.1.mlp.hook_expert_indices"]
    assert (gates[experts == 2] == 0).all()
    assert (experts == 2).any()
    torch.testing.assert_close(gates.sum(-1), torch.ones(X.shape))


@torch.no_grad()
def test_promoted_experts_are_chosen_first_and_their_gates_follow(base: GptOss) -> None:
    with applied(base, force(1, [6, 7], tokens=LATE)) as report:
        _, cache = base.run_with_cache(X)
    _, plain = base.run_with_cache(X)
    experts = cache["blocks.1.mlp.hook_expert_indices"]
    assert ((experts[:, 10:] == 6).any(-1) & (experts[:, 10:] == 7).any(-1)).all()
    assert torch.equal(experts[:, :10], plain["blocks.1.mlp.hook_expert_indices"][:, :10])
    gates = cache["blocks.1.mlp.hook_expert_weights"]
    first = torch.where(torch.isin(experts[:, 10:, 0], torch.tensor([6, 7])), gates[:, 10:, 0], torch.nan)
    torch.testing.assert_close(first, gates[:, 10:, 1], msg="promoted experts share the largest gate")
    assert (gates[:, 10:].diff(dim=-1) <= 0).all()
    assert report[0].tokens == 40
    before = torch.isin(plain["blocks.1.mlp.hook_expert_indices"][:, 10:], torch.tensor([6, 7])).sum()
    assert report[0].changed == 80 - before


@torch.no_grad()
def test_swapped_in_experts_inherit_the_weakest_places(base: GptOss) -> None:
    _, plain = base.run_with_cache(X)
    with applied(base, force(1, [6, 7], how="swap")):
        _, cache = base.run_with_cache(X)
    was, now = (c["blocks.1.mlp.hook_expert_indices"] for c in (plain, cache))
    torch.testing.assert_close(
        cache["blocks.1.mlp.hook_expert_weights"], plain["blocks.1.mlp.hook_expert_weights"], **CLOSE
    )
    for old, new in zip(was.flatten(0, 1).tolist(), now.flatten(0, 1).tolist(), strict=True):
        want = list(old)
        for expert in (6, 7):
            if expert not in want:
                want[max(i for i, e in enumerate(want) if e not in (6, 7))] = expert
        assert new == want


@torch.no_grad()
def test_resampled_outputs_are_the_experts_own_on_other_tokens(base: GptOss) -> None:
    name = "blocks.1.mlp.experts.hook_out"
    _, plain = base.run_with_cache(X)
    with applied(base, ablate(1, [2], how="resample")):
        _, cache = base.run_with_cache(X)
    slots = plain["blocks.1.mlp.hook_expert_indices"] == 2
    old, new = plain[name][slots], cache[name][slots]
    source = torch.cdist(new, old).argmin(1)
    torch.testing.assert_close(new, old[source], **CLOSE)
    assert (source != torch.arange(len(old))).all()
    assert torch.equal(plain[name][~slots], cache[name][~slots])


@torch.no_grad()
def test_scaled_sinks_give_their_share_to_the_keys(base: GptOss) -> None:
    _, plain = base.run_with_cache(X)
    with applied(base, scale_sinks(1, 0.5)):
        _, cache = base.run_with_cache(X)
    sink = plain["blocks.1.attn.hook_sink"] / 2
    torch.testing.assert_close(cache["blocks.1.attn.hook_sink"], sink, **CLOSE)
    torch.testing.assert_close(cache["blocks.1.attn.hook_pattern"].sum(-1), 1 - sink.mT, **CLOSE)


@torch.no_grad()
def test_a_beginning_that_nobody_sees_is_a_beginning_that_is_not_there(base: GptOss) -> None:
    """Rotations are relative: hidden from all that follow, in every layer, the first tokens change nothing."""
    layers = range(BASE.n_layers)
    torch.testing.assert_close(
        run(base, knockout(layers, LATE, slice(10)))[:, 10:], base(X[:, 10:]), rtol=1e-3, atol=1e-3
    )
    part = run(base, knockout(layers[:-1], LATE, slice(10)))[:, 10:]
    assert not torch.allclose(part, base(X[:, 10:]), rtol=1e-3, atol=1e-3), "one layer still sees: it must matter"


@torch.no_grad()
def test_knockout_of_some_heads_leaves_the_others(base: GptOss) -> None:
    name = "blocks.1.attn.hook_pattern"
    with applied(base, knockout(1, [20], [3, 4], heads=[2])) as report:
        _, cache = base.run_with_cache(X, names_filter=name)
    _, plain = base.run_with_cache(X, names_filter=name)
    same = (cache[name] == plain[name]).all(-1)
    assert (cache[name][:, 2, 20, 3:5] == 0).all()
    assert not same[:, 2, 20].any()
    assert int((~same).sum()) == 2
    assert (report[0].tokens, report[0].changed) == (2, 4)


@torch.no_grad()
def test_scaled_heads_are_scaled_at_their_tokens_only(base: GptOss) -> None:
    name = "blocks.1.attn.hook_z"
    _, plain = base.run_with_cache(X, names_filter=name)
    with applied(base, scale_heads(1, 0.5, [2, 5], tokens=[20])) as report:
        _, cache = base.run_with_cache(X, names_filter=name)
    ratio = cache[name] / plain[name]
    assert (ratio[:, 20, [2, 5]] == 0.5).all()
    assert int((ratio != 1).sum()) == 2 * 2 * 16, "negative control: other heads and tokens are as they were"
    assert repr(report) == "[heads 2, 5 of layer 1 × 0.5: 2 tokens, 4 entries changed]"
    with applied(base, scale_heads([0, 2], 0.0)) as report:
        base(X)
    assert repr(report) == f"[all heads of layers 0, 2 × 0: 120 tokens, {120 * BASE.n_heads} entries changed]"


@torch.no_grad()
def test_patching_the_first_residual_gives_the_other_run(base: GptOss) -> None:
    other = X.flip(1)
    want, cache = base.run_with_cache(other)
    for source in (cache, ActivationCache(dict(cache), base), cache["blocks.0.hook_resid_pre"]):
        torch.testing.assert_close(run(base, patch("blocks.0.hook_resid_pre", source)), want, **CLOSE)
    every = [f"blocks.{layer}.attn.hook_pattern" for layer in range(BASE.n_layers)]
    _, mixed = base.run_with_cache(X, names_filter=every)
    with applied(base, patch(every, cache)):
        _, mixed = base.run_with_cache(X, names_filter=every)
    assert all(torch.equal(mixed[name], cache[name]) for name in every)


@torch.no_grad()
def test_a_patch_may_come_from_elsewhere_in_a_sequence(base: GptOss) -> None:
    name = "blocks.1.hook_resid_mid"
    _, plain = base.run_with_cache(X, names_filter=name)
    with applied(base, patch(name, plain[name][:1], tokens=[20, 21], shift=-5)):
        _, cache = base.run_with_cache(X, names_filter=name)
    assert torch.equal(cache[name][:, 20:22], plain[name][:1, 15:17].expand(2, -1, -1))
    assert torch.equal(cache[name][:, 22:], plain[name][:, 22:])


EVERY: dict[str, Callable[[GptOss], Edit]] = {
    **{name: make for name, (make, _) in CHANGES.items()},
    "forbid late": lambda m: forbid([0, 1], [1], tokens=LATE),
    "promote": lambda m: force([0, 1], [6], tokens=LATE),
    "swap": lambda m: force([0, 1], [6], tokens=LATE, how="swap"),
    "renormalise": lambda m: ablate(1, [2], tokens=LATE, how="renormalise"),
    "knockout": lambda m: knockout([0, 2], LATE, [3, 11, 12], heads=[0, 5]),
    "patch": lambda m: patch("blocks.1.hook_resid_mid", m.run_with_cache(X.flip(1))[1], tokens=[3, 12, 17]),
    "resample": lambda m: resample("blocks.1.hook_resid_mid", torch.randn(9, 64), tokens=LATE, seed=3),
    "steer the end": lambda m: steer("ln_final.hook_normalized", torch.ones(64), tokens=LATE),
}


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY)
def test_batched_packed_and_step_by_step_are_one_intervention(base: GptOss, name: str) -> None:
    torch.manual_seed(0)
    edit = EVERY[name](base)
    want = run(base, edit)
    packed = run(base, edit, x=X.flatten()[None], packed=[30, 30])
    torch.testing.assert_close(packed.view_as(want), want, rtol=1e-3, atol=1e-3)
    padded = run(base, edit, x=torch.nn.functional.pad(X, (0, 9), value=1), n_real=[30, 30])
    torch.testing.assert_close(padded[:, :30], want, rtol=1e-3, atol=1e-3)
    cache = KVCache(BASE, 2, 30, dtype=torch.float32, device=torch.device("cpu"))
    with applied(base, edit):
        steps = [base(part, cache=cache) for part in X.split([8, *[1] * 22], 1)]
    torch.testing.assert_close(torch.cat(steps, 1), want, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_edits_act_in_their_order_and_nest(base: GptOss) -> None:
    name = "blocks.1.hook_mlp_out"
    add, zero = steer(name, torch.ones(64)), replace(name, 0.0)
    twice = run(base, zero, add)
    assert not torch.allclose(twice, run(base, add, zero), **CLOSE)
    with applied(base, zero), applied(base, add):
        torch.testing.assert_close(base(X), twice)
    torch.testing.assert_close(run(base, forbid(1, [2]), forbid(1, [5])), run(base, forbid(1, [2, 5])))


@torch.no_grad()
def test_no_hook_remains_not_even_after_a_failure(base: GptOss) -> None:
    plain = base(X)

    class StopError(Exception):
        pass

    with pytest.raises(StopError), applied(base, forbid(1, [2]), force(0, [3], how="swap"), knockout(1, [4], [2])):
        raise StopError
    assert not any(point.fwd_hooks for point in base.hook_dict.values())
    assert torch.equal(base(X), plain)


@torch.no_grad()
def test_an_intervention_that_meets_no_token_is_an_error(base: GptOss) -> None:
    with pytest.raises(ValueError, match=r"no token matched forbid experts \[2\] in layer 1: .*token_set"):
        run(base, forbid(1, [2], tokens=[99]))
    with pytest.raises(ValueError, match="no token matched knockout"):
        run(base, knockout(0, [29], [2]))  # outside its window
    with pytest.raises(ValueError, match="no token matched"), applied(base, forbid(1, [2])):
        pass


def test_an_edit_that_changes_the_shape_is_refused(base: GptOss) -> None:
    def first_rows(n: int) -> Edit:
        return Edit("first rows", at_layers(1, "hook_resid_pre", lambda x, at: (x[:n], 1, 1)))

    run(base, first_rows(2))  # the negative control: all rows
    with pytest.raises(InputError, match=r"first rows: \(2, 30, 64\) became \(1, 30, 64\); return a tensor"):
        run(base, first_rows(1))


def test_what_an_edit_met_is_said(base: GptOss) -> None:
    with torch.no_grad(), applied(base, reweight(1, [2], 2.0, tokens=LATE)) as report:
        _, cache = base.run_with_cache(X)
    hits = int((cache["blocks.1.mlp.hook_expert_indices"][:, 10:] == 2).sum())
    assert repr(report) == f"[gates of experts [2] in layer 1 × 2: 40 tokens, {hits} entries changed]"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda: forbid(3, [1]), r"layers \[3\]: the model has layers 0 to 2"),
        (lambda: forbid(1, [8]), r"experts \[8\]: the model has experts 0 to 7"),
        (lambda: forbid(1, []), "experts none"),
        (lambda: forbid(1, range(5)), "leaves fewer than the 4"),
        (lambda: force(1, range(5)), "5 experts: expected at most the 4"),
        (lambda: remove_sinks(0, [8]), r"heads \[8\]"),
        (lambda: steer("blocks.1.hook_resid_pos", torch.ones(64)), "blocks.1.hook_resid_post"),
        (lambda: steer("blocks.1.hook_resid_post", torch.ones(63)), r"\(63,\) does not fit .*64"),
        (lambda: steer("blocks.1.attn.hook_pattern", torch.ones(30)), "for each query and key"),
        (lambda: replace("blocks.1.attn.hook_z", torch.ones(7)), r"\(7,\) does not fit"),
        (lambda: replace("blocks.1.attn.hook_z", 0.0, index=8), r"index \[8\]"),
        (lambda: patch("blocks.1.hook_resid_mid", torch.ones(2, 30, 63)), "does not fit"),
        (lambda: patch("blocks.1.hook_resid_mid", torch.ones(2, 30, 64)[:0]), "0 rows, this pass 2 sequences"),
        (lambda: resample("blocks.1.hook_resid_mid", torch.ones(3, 63)), "donors of .* do not fit"),
        (lambda: ablate(1, [2], how="mean"), "expert_means"),
        (lambda: scale_heads(1, 0.0, [8]), r"heads \[8\]: the model has heads 0 to 7"),
        (lambda: set_sinks(1), "either a probability"),
        (lambda: set_sinks(1, probability=1.5), "from 0 to 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(base: GptOss, edit: Callable[[], Edit], message: str) -> None:
    with pytest.raises(ValueError, match=message), torch.no_grad():
        run(base, edit())


def test_interventions_let_gradients_through(base: GptOss) -> None:
    direction = torch.zeros(64, requires_grad=True)
    with applied(base, steer("blocks.0.hook_resid_mid", direction, tokens=LATE), scale_sinks(1, 0.5), forbid(2, [1])):
        base(X).logsumexp(-1).sum().backward()
    assert direction.grad is not None
    assert direction.grad.abs().sum() > 0
