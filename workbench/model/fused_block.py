"""A block on one new token of each of a few rows, on a CPU: one launch of compiled loops in place of its modules.

Hook points inside the launch are called with values that it has recorded: the sinks, the router's logits, choice and
gates, and what both halves of the block add to the residual stream. Hooks that change values divide the launch where
they do, hooks that only read them do not (`_run_with_hooks`). A hook elsewhere inside attention or the experts sends
that half through the modules, whose steps use the same loops and so give the same bits. So do gradients, adapters,
modules that were replaced or that have hooks of torch's own, packed matrices that stay in a file, and all dtypes but
bfloat16.

Whether weights are still the same is asked at every step: they are read at the addresses they had.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import BFloat16
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from workbench.hooks.hook_points import check_experts
from workbench.kernels import attention as attend
from workbench.kernels import cpu
from workbench.model.low_rank import Linear
from workbench.model.pass_context import PassContext

ROWS = 4  # at most; the products of `workbench.kernels.dense` take as many
_MOST_READERS = 256  # entries of a layer, as every run of a notebook's cell makes new code
_HookIds = tuple[int, ...]
_HookCode = tuple[object, ...]
_GLOBAL_HOOKS = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)


class _Half(NamedTuple):
    """Modules of half a block that are not called; a hook on one of them needs the modules."""

    modules: tuple[nn.Module, ...]

    @property
    def observed(self) -> bool:
        """Return whether a module has hooks, or a forward method of its own."""
        return any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in self.modules)


class FusedBlock:
    """What is known of a block: its weights and their addresses, and which modules it replaces."""

    def __init__(self, block: Any, weights: Any, links: list[tuple[dict[str, Any], str, Any]]) -> None:
        from workbench.kernels.cpu import layer

        self._links, self._addresses = links, _addresses(links)
        self.weights = layer.LayerWeights(_sizes(block), weights)
        mlp = block.mlp
        self.attention = _Half(_inside(block.ln1, block.attn, without=(block.attn.hook_sink,)))
        chosen = (mlp.router.hook_out, mlp.hook_expert_indices, mlp.hook_expert_weights)
        self.experts = _Half(_inside(block.ln2, mlp, without=chosen))
        self._changed: dict[int, tuple[_HookIds, bool]] = {}  # by point: its hooks, and whether they changed its value
        self._readers: set[tuple[int, _HookCode]] = set()  # points, and the code of hooks that left the value as it was

    @property
    def current(self) -> bool:
        """Return whether the block still has these modules and weights, where they were."""
        return all(of.get(name) is one for of, name, one in self._links) and _addresses(self._links) == self._addresses

    def reads_only(self, point: Any) -> bool:
        """Return whether the hooks of a point are expected to leave its value as it is.

        They are where they did so in the last step, or hooks of the same code have done so in a generation before.
        Where this is wrong it costs time alone: a change is noticed after the launch.
        """
        ids = _hook_ids(point)
        last_ids, changed = self._changed.get(id(point), (None, True))
        return not changed if last_ids == ids else (id(point), _hook_code(point)) in self._readers

    def note(self, point: Any, changed: bool) -> None:
        """Record whether the hooks of a point have changed its value: once they have, they may do so again."""
        ids = _hook_ids(point)
        before = self._changed.get(id(point))
        state = ids, changed or before == (ids, True)
        if state == before:
            return
        self._changed[id(point)] = state
        key = id(point), _hook_code(point)
        if state[1]:
            self._readers.discard(key)
        elif len(self._readers) < _MOST_READERS:
            self._readers.add(key)


def _hook_ids(point: Any) -> _HookIds:
    """Return the numbers of the hooks of a point, which torch gives to no other hook."""
    return (*point._forward_pre_hooks, *point._forward_hooks)


def _hook_code(point: Any) -> _HookCode:
    """Return the code of the hooks of a point: hooks that are made anew for every generation have the same."""
    given = {handle.hook.id: handle.user_hook for handle in point.fwd_hooks}
    hooks = (*point._forward_pre_hooks.items(), *point._forward_hooks.items())
    return tuple(_code(given.get(number) or function) for number, function in hooks)


def _code(function: Any) -> object:
    """Return the code of a function, or the type of another callable; neither keeps what a function refers to."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(getattr(function, "__func__", function), "__code__", type(function))


def _inside(*modules: nn.Module, without: tuple[nn.Module, ...]) -> tuple[nn.Module, ...]:
    return tuple(inside for module in modules for inside in module.modules() if inside not in without)


def _addresses(links: list[tuple[dict[str, Any], str, Any]]) -> list[int]:
    return [one.data_ptr() for _, _, one in links if isinstance(one, Tensor)]


def _sizes(block: Any) -> Any:
    from workbench.kernels.cpu.layer import LayerSizes

    cfg, attn, mlp = block.cfg, block.attn, block.mlp
    return LayerSizes(
        cfg.d_model,
        cfg.n_heads,
        cfg.n_key_value_heads,
        cfg.d_head,
        -1 if attn.window is None else attn.window,
        len(mlp.router.bias),
        mlp.k,
        cfg.d_mlp,
        block.ln1.eps,
        cfg.swiglu_limit,
        cfg.swiglu_alpha,
    )


def _links(block: Any) -> list[tuple[dict[str, Any], str, Any]]:
    """Return every module and weight of the block, and where it is held: (dictionary, name, module or tensor)."""
    links: list[tuple[dict[str, Any], str, Any]] = []
    for module in block.modules():
        for held in (module._modules, module._parameters, module._buffers):
            links += [(held, name, one) for name, one in held.items()]
    return links


def _prepare(block: Any) -> FusedBlock | None:
    """Return the block's weights, or None if its modules or their weights are of other kinds."""
    from workbench.kernels.cpu.layer import LayerWeights

    attn, mlp = block.attn, block.mlp
    gate_up, down = mlp.experts.gate_up, mlp.experts.down
    linears = (attn.q, attn.k, attn.v, attn.o)
    if any(type(linear) is not Linear for linear in linears) or not (gate_up.packed and down.packed):
        return None
    if any(matrix.mapped is not None for matrix in (gate_up, down)) or block.ln1.eps != block.ln2.eps:
        return None
    if any(module.lora is not None for module in (*linears, mlp.router, gate_up, down)):
        return None
    weights = [
        block.ln1.weight,
        attn.q.weight,
        attn.q.bias,
        attn.k.weight,
        attn.k.bias,
        attn.v.weight,
        attn.v.bias,
        attn.sinks,
        attn.o.weight,
        attn.o.bias,
        block.ln2.weight,
        mlp.router.weight,
        mlp.router.bias,
        gate_up.blocks,
        gate_up.scales,
        gate_up.bias,
        down.blocks,
        down.scales,
        down.bias,
    ]
    if not LayerWeights.covers(weights) or not _sizes(block).covered:
        return None
    return FusedBlock(block, weights, _links(block))


def fused(block: Any, x: Tensor, context: PassContext) -> FusedBlock | None:
    """Return the block's fused form if it can compute this pass: new tokens x [row 1 d_model] that follow a cache."""
    if context.cache is None or x.shape[1] != 1 or not 0 < len(x) <= ROWS or x.dtype != torch.bfloat16:
        return None
    if torch.is_grad_enabled() or block.attn.ungrouped or any(_GLOBAL_HOOKS) or not cpu.compiled(x):
        return None
    known: FusedBlock | None = block.__dict__.get("_fused_block")
    if known is None or not known.current:
        known = block.__dict__["_fused_block"] = _prepare(block)
    return known


def fused_forward(block: Any, known: FusedBlock, x: BFloat16[Tensor, "row 1 d_model"], context: PassContext) -> Tensor:
    """Return the residual stream after the block [row 1 d_model]; `x` is what its first hook point let through."""
    from workbench.kernels.cpu.layer import LayerStep, Phase

    in_experts = not known.experts.observed and block.get_point("hook_mlp_in") is None
    step = None
    if not known.attention.observed and not _edits_inputs(block):
        step = _begin_attention(block, known, x, context)
    if step is None:
        middle = block.add_attention(x, context)
        if not in_experts:
            return block.add_experts(middle)
        step = LayerStep(known.weights, len(x), Phase.EXPERT_NORM)
        step.set("middle", middle)
        _run_with_hooks(known, step, _router_points(block.mlp), Phase.END)
    elif in_experts:
        _run_with_hooks(known, step, (*_attention_points(block, x), *_router_points(block.mlp)), Phase.END)
    else:
        _run_with_hooks(known, step, _attention_points(block, x), Phase.EXPERT_NORM)
        middle = _stream(step, "middle")
        step.release()
        return block.add_experts(middle)
    if _observed(block.hook_mlp_out):
        result = _stream(step, "middle") + block.hook_mlp_out(_stream(step, "mlp_out"))
    else:
        result = _stream(step, "result")
    step.release()
    return block.hook_resid_post(result)


def _observed(*points: Any) -> bool:
    return any(point._forward_hooks or point._forward_pre_hooks for point in points)


def _edits_inputs(block: Any) -> bool:
    names = ("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input")
    return any(block.get_point(name) is not None for name in names)


def _stream(step: Any, name: str) -> BFloat16[Tensor, "row 1 d_model"]:
    return step.value(name)[:, None].to(torch.bfloat16)


def _begin_attention(block: Any, known: FusedBlock, x: Tensor, context: PassContext) -> Any:
    """Return the step before its first phase, or None where the cache has no room for it."""
    from workbench.kernels.cpu.layer import LayerStep

    assert context.cache is not None
    reserved = context.cache.reserve(block.layer)
    if reserved is None or reserved.keys.dtype != torch.bfloat16:
        return None
    step = LayerStep(known.weights, len(x))
    step.give_tensors(x=x.float().contiguous(), cos=context.cos.contiguous(), sin=context.sin.contiguous())
    step.give_cache(reserved.keys, reserved.values, reserved.positions)
    return step


class _InnerPoint(NamedTuple):
    """A hook point inside a launch: before which phase its value is read, and how to call its hooks.

    `call` returns whether they changed the value; then it has written what follows from it into the step.
    """

    point: Any
    phase: int
    call: Callable[[Any], bool]


def _run_with_hooks(known: FusedBlock, step: Any, points: Iterable[_InnerPoint], end: int) -> None:
    """Compute the step to before `end`, and call the hooks of these points, in their order, with its values.

    A launch ends at a point whose hooks may change its value. Where the same hooks, or hooks of the same code, left the
    value as it was the last time, the launch goes on beyond the point, and they are called afterwards, with the value
    that it has recorded. If they do change it then, the phases after the point are computed again, and from then on a
    launch ends there.
    """
    observed = [inner for inner in points if _observed(inner.point)]
    dividing = [inner.phase for inner in observed if not known.reads_only(inner.point)]
    for inner in observed:
        if step.next_phase < inner.phase:
            step.run_to(min((phase for phase in dividing if phase >= inner.phase), default=end))
        changed = inner.call(step)
        known.note(inner.point, changed)
        if changed:
            step.go_back(inner.phase)
    step.run_to(end)


def _attention_points(block: Any, x: Tensor) -> Iterable[_InnerPoint]:
    """Return the points of attention, after which the residual stream `x` [row 1 d_model] has its output added."""
    from workbench.kernels.cpu.layer import Phase

    def sink(step: Any) -> bool:
        before = step.value("sink")[:, None]
        p = block.attn.hook_sink(before.clone())
        if _same(p, before):
            return False
        changed = p != before
        z = attend.shrink(step.value("weighted")[:, None].to(x.dtype), p)
        step.set("z", torch.where(changed[..., None], z.float(), step.value("z")[:, None]))
        return True

    def attention_out(step: Any) -> bool:
        before = _stream(step, "attention_out")
        out = block.hook_attn_out(before.clone())
        if _same(out, before):
            return False
        step.set("middle", x + out)
        return True

    def middle(step: Any) -> bool:
        return _call_and_set(step, "middle", block.hook_resid_mid, _stream(step, "middle"))

    return (
        _InnerPoint(block.attn.hook_sink, Phase.OUTPUT, sink),
        _InnerPoint(block.hook_attn_out, Phase.EXPERT_NORM, attention_out),
        _InnerPoint(block.hook_resid_mid, Phase.EXPERT_NORM, middle),
    )


def _router_points(mlp: Any) -> Iterable[_InnerPoint]:
    """Return the points of the router: its logits, the choice of experts and their gates."""
    from workbench.kernels.cpu.layer import Phase

    def logits(step: Any) -> bool:
        return _call_and_set(step, "logits", mlp.router.hook_out, step.value("logits")[:, None])

    def choice(step: Any) -> bool:
        before = step.value("choice")[:, None]
        return _call_and_set(step, "choice", mlp.hook_expert_indices, before, len(mlp.router.bias))

    def gates(step: Any) -> bool:
        return _call_and_set(step, "gates", mlp.hook_expert_weights, step.value("gates")[:, None])

    return (
        _InnerPoint(mlp.router.hook_out, Phase.CHOOSE, logits),
        _InnerPoint(mlp.hook_expert_indices, Phase.GATE, choice),
        _InnerPoint(mlp.hook_expert_weights, Phase.GROUP, gates),
    )


def _same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have equal values; asked of values, as torch does not count every change in place."""
    return a.dtype == b.dtype and torch.equal(a, b)


def _call_and_set(step: Any, name: str, point: Any, before: Tensor, num_experts: int | None = None) -> bool:
    """Let the hooks of a point see a value [row 1 ...]; where they change it, write it into the step."""
    out = point(before.clone())
    if _same(out, before):
        return False
    if num_experts is not None:
        check_experts(point, out, num_experts)
    step.set(name, out)
    return True
