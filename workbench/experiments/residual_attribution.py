"""The projection on a direction of what every part of a model writes into the residual stream, during one pass.

A part is weighed where it passes: a layer's activations at the points are all that is ever kept, and numbers. Heads
are weighed through the output matrix, so that no head's output is made; experts by what their slots put out.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.experiments.norm_attribution import mean_gradient, normed
from workbench.experiments.token_selection import SelectedTokens
from workbench.model.attention import Attention
from workbench.model.layers import MoE
from workbench.model.transformer import GptOss

Norm = Literal["frozen", "path", "layers"]


def heads(
    attn: Attention, z: Float[Tensor, "point head d_head"], g: Float[Tensor, "point d_model"]
) -> dict[str, Float[Tensor, "point *head"]]:
    """Return g · every head's output, and · the bias of them all."""
    by_value = (g @ attn.o.matrix.to(g.dtype)).unflatten(1, z.shape[1:])
    return {"heads": (by_value * z).sum(-1), "attn_bias": g @ attn.o.bias.to(g.dtype)}


def experts(
    mlp: MoE,
    out: Float[Tensor, "point slot d_model"],
    gates: Float[Tensor, "point slot"],
    chosen: Int[Tensor, "point slot"],
    g: Float[Tensor, "point d_model"],
) -> dict[str, Float[Tensor, "point slot"]]:
    """Return g · every slot's gated output, what its matrices and what its bias put out apart."""
    bias = (g @ mlp.experts.down.bias.to(g.dtype).mT).gather(-1, chosen)
    outputs = torch.einsum("psm,pm->ps", out, g)
    return {"experts": gates * (outputs - bias), "expert_bias": gates * bias}


class Meter:
    """Hooks that weigh what every block writes by the block's direction, and keep the numbers alone."""

    def __init__(
        self, model: GptOss, chosen: SelectedTokens, a: Tensor, norm: Norm, ends: tuple[Tensor, Tensor] | None
    ) -> None:
        """Prepare the attribution of the selected tokens along the directions a [point d_model]."""
        self._model, self._chosen, self._a, self._norm = model, chosen, a, norm
        self._wide = torch.promote_types(model.dtype, torch.float32)
        self._g = a if ends is None else mean_gradient(a, *ends, model.cfg.eps)
        self._stream = torch.empty(0)
        self._seen: dict[str, Tensor] = {}
        self._values: dict[str, list[Tensor]] = {}

    @property
    def hooks(self) -> list[tuple[str, Callable[..., None]]]:
        """Return the hooks of a pass; every block ends at a point of the stream, where all of its parts are known."""
        inside = ("attn.hook_z", "mlp.hook_expert_indices", "mlp.hook_expert_weights", "mlp.experts.hook_out")
        hooks: list[tuple[str, Callable[..., None]]] = [("hook_embed", self._embed)]
        for layer in range(self._model.cfg.n_layers):
            hooks += [(f"blocks.{layer}.{name}", self._see) for name in inside]
            hooks += [(f"blocks.{layer}.hook_resid_mid", self._attn), (f"blocks.{layer}.hook_resid_post", self._mlp)]
        return hooks

    def parts(self) -> dict[str, Float[Tensor, "point *part"]]:
        """Return the contribution of every component [point layer …], and `expert` and `gate` of every slot."""
        parts = {name: torch.stack(values, 1) for name, values in self._values.items() if name != "embed"}
        parts["rest"] = parts["rest"].unflatten(1, (-1, 2))
        return parts | {"embed": self._values["embed"][0]}

    def _see(self, x: Tensor, hook: Any) -> None:
        self._seen[hook.name.split(".", 2)[2]] = x[0, self._chosen.column.to(x.device)]

    def _embed(self, x: Tensor, hook: Any) -> None:
        self._stream = x[0, self._chosen.column.to(x.device)].cpu().double()
        alone = self._norm != "frozen"
        value = normed(self._a, self._stream, self._model.cfg.eps)[0] if alone else (self._a * self._stream).sum(-1)
        self._keep({"embed": value})

    def _attn(self, x: Tensor, hook: Any) -> None:
        g, step = self._step(x)
        parts = heads(self._block(hook).attn, self._seen["attn.hook_z"].to(self._wide), g)
        self._keep(parts | {"rest": step - _sum(parts)})

    def _mlp(self, x: Tensor, hook: Any) -> None:
        g, step = self._step(x)
        chosen, gates = self._seen["mlp.hook_expert_indices"], self._seen["mlp.hook_expert_weights"].to(self._wide)
        out = self._seen["mlp.experts.hook_out"].to(self._wide)
        parts = experts(self._block(hook).mlp, out, gates, chosen, g)
        self._keep(parts | {"rest": step - _sum(parts), "expert": chosen, "gate": gates})
        self._seen.clear()

    def _block(self, hook: Any) -> Any:
        return self._model.blocks[int(hook.name.split(".")[1])]

    def _step(self, x: Tensor) -> tuple[Float[Tensor, "point d_model"], Float[Tensor, " point"]]:
        """Return the direction to weigh this block's parts by, and what the block adds as a whole."""
        before, self._stream = self._stream, x[0, self._chosen.column.to(x.device)].cpu().double()
        own = self._norm == "layers"
        g = mean_gradient(self._a, before, self._stream, self._model.cfg.eps) if own else self._g
        return g.to(x.device, self._wide), (g * (self._stream - before)).sum(-1)

    def _keep(self, values_of: dict[str, Tensor]) -> None:
        for name, values in values_of.items():
            self._values.setdefault(name, []).append(values.cpu() if name == "expert" else values.cpu().double())


def _sum(parts: dict[str, Tensor]) -> Float[Tensor, " point"]:
    return torch.stack([t.cpu().double().view(len(t), -1).sum(-1) for t in parts.values()]).sum(0)
