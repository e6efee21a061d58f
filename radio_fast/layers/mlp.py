from __future__ import annotations

from torch import Tensor, nn

from radio_fast import ops
from radio_fast.layers.norm import LayerNorm


class Linear(nn.Linear):
    """x·weightᵀ + bias, with the activation that follows it."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, activation: str | None = None):
        super().__init__(in_features, out_features, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias, self.activation)


class Mlp(nn.Module):
    """fc2(norm(gelu(fc1 x))), the norm only in the `_mlpnorm` architecture."""

    def __init__(self, dim: int, hidden: int, norm: bool = False, eps: float = 1e-6):
        super().__init__()
        self.fc1 = Linear(dim, hidden, activation="gelu")
        self.norm = LayerNorm(hidden, eps) if norm else nn.Identity()
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(self.fc1(x)))


class SwiGLU(nn.Module):
    """w3(silu(a)·b), (a, b) the halves of w12 x (Shazeer, 2020)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w12 = Linear(dim, 2 * hidden, activation="swiglu")
        self.w3 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(self.w12(x))
