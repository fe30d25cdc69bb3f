"""A block on one new token of each of a few rows, on a CPU: one launch of compiled loops in place of its modules.

Between two phases a hook point is called where it has hooks: the sinks, the router's logits, choice and gates, and what
both halves of the block add to the residual stream. A hook elsewhere inside attention or the experts sends that half
through the modules, whose steps use the same loops and so give the same bits. So do gradients, adapters, modules that
were replaced or that have hooks of torch's own, packed matrices that stay in a file, and all dtypes but bfloat16.

Whether weights are still the same is asked at every step: they are read at the addresses they had.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import BFloat16
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from workbench.errors import InputError
from workbench.hooks.observation import observe
from workbench.kernels import attention as attend
from workbench.kernels import cpu
from workbench.model.low_rank import Linear
from workbench.model.pass_context import PassContext

ROWS = 4  # at most; the products of `workbench.kernels.dense` take as many
_GLOBAL_HOOKS = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)


class _Half(NamedTuple):
    """Modules of half a block that are not called; a hook on one of them needs the modules."""

    modules: tuple[nn.Module, ...]

    @property
    def observed(self) -> bool:
        """Whether a module has hooks, or a forward method of its own."""
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

    @property
    def current(self) -> bool:
        """Return whether the block still has these modules and weights, where they were."""
        return all(of.get(name) is one for of, name, one in self._links) and _addresses(self._links) == self._addresses


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
    middle, step = None, None
    if not known.attention.observed and not _edits_inputs(block):
        step = _attention(block, known, x, context)
    if step is None:
        middle = block.add_attention(x, context)
    elif not in_experts or _observed(block.hook_attn_out, block.hook_resid_mid):
        step.run_to(Phase.EXPERT_NORM)
        out = block.hook_attn_out(_stream(step, "attention_out"))
        middle = block.hook_resid_mid(x + out if _observed(block.hook_attn_out) else _stream(step, "middle"))
    if not in_experts:
        return block.add_experts(middle)
    if middle is not None:
        step = LayerStep(known.weights, len(x), Phase.EXPERT_NORM)
        step.set("middle", middle)
    assert step is not None
    _choose_experts(block.mlp, step)
    step.run_to(Phase.END)
    if not _observed(block.hook_mlp_out):
        return block.hook_resid_post(_stream(step, "result"))
    return block.hook_resid_post(_stream(step, "middle") + block.hook_mlp_out(_stream(step, "mlp_out")))


def _observed(*points: Any) -> bool:
    return any(point._forward_hooks or point._forward_pre_hooks for point in points)


def _edits_inputs(block: Any) -> bool:
    names = ("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input")
    return any(block.get_point(name) is not None for name in names)


def _stream(step: Any, name: str) -> BFloat16[Tensor, "row 1 d_model"]:
    return step.value(name)[:, None].to(torch.bfloat16)


def _attention(block: Any, known: FusedBlock, x: Tensor, context: PassContext) -> Any:
    """Return the step, ready to be computed to the end of attention, or None where the cache has no room for it."""
    from workbench.kernels.cpu.layer import LayerStep, Phase

    assert context.cache is not None
    reserved = context.cache.reserve(block.layer)
    if reserved is None or reserved.keys.dtype != torch.bfloat16:
        return None
    step = LayerStep(known.weights, len(x))
    step.give_tensors(x=x.float().contiguous(), cos=context.cos.contiguous(), sin=context.sin.contiguous())
    step.give_cache(reserved.keys, reserved.values, reserved.positions)
    point = block.attn.hook_sink
    if _observed(point):
        step.run_to(Phase.OUTPUT)
        sink = step.value("sink")[:, None].clone()
        p, changed = observe(point, sink.clone(), lambda: sink)
        if changed is not None:
            z = attend.shrink(step.value("weighted")[:, None].to(x.dtype), p)
            step.set("z", torch.where(changed[..., None], z.float(), step.value("z")[:, None]))
    return step


def _choose_experts(mlp: Any, step: Any) -> None:
    """Compute the router and the choice of experts, as far as hooks see them."""
    from workbench.kernels.cpu.layer import Phase

    for phase, name, point in (
        (Phase.CHOOSE, "logits", mlp.router.hook_out),
        (Phase.GATE, "choice", mlp.hook_expert_indices),
        (Phase.GROUP, "gates", mlp.hook_expert_weights),
    ):
        if _observed(point):
            step.run_to(phase)
            before = step.value(name)[:, None].clone()
            after = point(before)
            if name == "choice":
                _check_experts(after, len(mlp.router.bias))
            step.set(name, after)


def _check_experts(experts: Tensor, num_experts: int) -> None:
    """Raise an InputError if a hook has left experts that the layer does not have."""
    wrong = experts[(experts < 0) | (experts >= num_experts)]
    if len(wrong):
        raise InputError(
            f"a hook set expert {int(wrong[0])} in mlp.hook_expert_indices: expected 0 to {num_experts - 1}, the "
            "experts of the layer"
        )
