"""A low-rank update beside an unchanged weight matrix, as an adapter trains it.

Reference: LoRA, Hu et al. 2021, arXiv 2106.09685, section 4.1.
"""

from jaxtyping import Float
from torch import Tensor, nn

from workbench.kernels import dense


class LowRank(nn.Module):
    """x → x · a · b · scale; the experts of a layer have one stacked pair each. A loaded adapter has its scale in b."""

    def __init__(
        self, a: Float[Tensor, "*expert inputs rank"], b: Float[Tensor, "*expert rank outputs"], scale: float = 1.0
    ) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a, requires_grad=False), nn.Parameter(b, requires_grad=False)
        self.scale = scale

    @property
    def scaled_b(self) -> Float[Tensor, "*expert rank outputs"]:
        """Return the second factor, times the scale."""
        return self.b if self.scale == 1.0 else self.b * self.scale

    def forward(self, x: Float[Tensor, "*rows inputs"]) -> Float[Tensor, "*rows outputs"]:
        return x @ self.a.to(x.dtype) @ self.scaled_b.to(x.dtype)


class Linear(nn.Linear):
    """A linear map with an optional low-rank update."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.lora: LowRank | None
        self.register_module("lora", None)

    @property
    def matrix(self) -> Float[Tensor, "outputs inputs"]:
        """Return the weight including the update."""
        return self.weight if self.lora is None else self.weight + (self.lora.a @ self.lora.scaled_b).mT

    def forward(self, x: Float[Tensor, "*rows inputs"]) -> Float[Tensor, "*rows outputs"]:
        out = dense.linear(x, self.weight, self.bias)
        return out if self.lora is None else out + self.lora(x)
