"""Attribution through the final norm: f(x) = a · x / rms(x) as a sum over the parts of x, without a fixed scale.

Along the straight way from x0 to x1, f changes by the integral of its gradient. With g the gradient's mean over the
way, f(x1) − f(x0) = g · (x1 − x0) exactly; so g · p is the share of a part p of x1 − x0. It is additive, needs no order
among the parts, and has a closed form: with τ along the way measured from the point nearest to 0, which is `perp`,
mean square(τ) + eps = A τ² + m, and τ = √(m / A) sinh s makes every integral elementary.

x0 = 0 is no good: f does not change along a ray until eps counts, so that the shares would grow with log(1 / eps).

Reference: Aumann and Shapley 1974, Values of Non-Atomic Games; integrated gradients, arXiv 1703.01365.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def normed(
    a: Float[Tensor, "point d"], x: Float[Tensor, "point d"], eps: float
) -> tuple[Float[Tensor, " point"], Float[Tensor, " point"]]:
    """Return f(x) and the norm's scale, for the norm f."""
    scale = (x.square().mean(-1) + eps).sqrt()
    return (a * x).sum(-1) / scale, scale


def mean_gradient(
    a: Float[Tensor, "point d"], x0: Float[Tensor, "point d"], x1: Float[Tensor, "point d"], eps: float
) -> Float[Tensor, "point d"]:
    """Return g with g · (x1 − x0) = f(x1) − f(x0); the gradient itself where x1 is x0. Give it float64.

    Every difference below is written so that short ways lose no digits.
    """
    d, step = x0.shape[-1], x1 - x0
    still = step.norm(dim=-1) <= 1e-9 * (x0.square().sum(-1) + d * eps).sqrt()
    step = torch.where(still[:, None], torch.zeros_like(step), step)
    length = step.square().sum(-1, keepdim=True).clamp(min=torch.finfo(step.dtype).tiny)
    begin = (x0 * step).sum(-1, keepdim=True) / length
    perp = x0 - begin * step
    big_a, m = length / d, perp.square().mean(-1, keepdim=True) + eps

    rate = (big_a / m).sqrt()
    u0, u1 = rate * begin, rate * (begin + 1)  # sinh s at both ends
    u0, u1, sign = torch.where(u0 + u1 < 0, -u1, u0), torch.where(u0 + u1 < 0, -u0, u1), torch.sign(u0 + u1)
    c0, c1 = (1 + u0.square()).sqrt(), (1 + u1.square()).sqrt()
    widen = rate * (u0 + u1) / (c0 + c1)  # c1 − c0
    s = torch.log1p((rate + widen) * torch.where(u0 < 0, c0 - u0, 1 / (c0 + u0)))  # the same by c² − u² = 1
    tanh = torch.sinh(s) / (c0 * c1)

    inverse = s / big_a.sqrt()  # ∫ scale⁻¹, then ∫ τⁿ scale⁻³
    k0 = tanh / (m * big_a.sqrt())
    k1 = sign * widen / (big_a * m.sqrt() * c0 * c1)
    k2 = (s - tanh) / (big_a * big_a.sqrt())
    a_perp, a_step = (a * perp).sum(-1, keepdim=True), (a * step).sum(-1, keepdim=True)
    g = a * inverse - (perp * (a_perp * k0 + a_step * k1) + step * (a_perp * k1 + a_step * k2)) / d
    value, scale = normed(a, x0, eps)
    here = a / scale[:, None] - x0 * (value / scale.square() / d)[:, None]
    return torch.where(still[:, None], here, g)
