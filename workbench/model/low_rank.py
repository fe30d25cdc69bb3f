"""A low-rank update beside a weight matrix that stays as it is: what an adapter trains, and what an edit can add.

Reference: LoRA, Hu et al. 2021, arXiv 2106.09685, section 4.1.
"""

from jaxtyping import Float
from torch import Tensor, nn


class LowRank(nn.Module):
    """x → x · a · b, the scale folded into b; the experts of a layer have a pair each, stacked."""

    def __init__(self, a: Float[Tensor, "*expert inputs rank"], b: Float[Tensor, "*expert rank outputs"]) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a, requires_grad=False), nn.Parameter(b, requires_grad=False)

    def forward(self, x: Float[Tensor, "*rows inputs"]) -> Float[Tensor, "*rows outputs"]:
        return x @ self.a.to(x.dtype) @ self.b.to(x.dtype)


class Linear(nn.Linear):
    """A linear map, and the update beside its weight while there is one."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.lora: LowRank | None
        self.register_module("lora", None)

    @property
    def matrix(self) -> Float[Tensor, "outputs inputs"]:
        """The weight with the update in it, for those who need its columns."""
        return self.weight if self.lora is None else self.weight + (self.lora.a @ self.lora.b).mT

    def forward(self, x: Float[Tensor, "*rows inputs"]) -> Float[Tensor, "*rows outputs"]:
        out = super().forward(x)
        return out if self.lora is None else out + self.lora(x)
