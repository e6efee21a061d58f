from __future__ import annotations

from torch import Tensor, nn

from radio_fast import ops
from radio_fast.layers.norm import LayerNorm


class Linear(nn.Linear):
    """residual + layer_scale · act(x·weightᵀ + bias)."""

    backend = "auto"

    def __init__(self, in_features: int, out_features: int, bias: bool = True, activation: str | None = None):
        super().__init__(in_features, out_features, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor, residual: Tensor | None = None, layer_scale: Tensor | None = None) -> Tensor:
        return ops.linear(x, self.weight, self.bias, self.activation, residual, layer_scale, backend=self.backend)

    def after_norm(self, x: Tensor, mean: Tensor, rstd: Tensor, norm: LayerNorm) -> Tensor:
        """act(norm(x)·weightᵀ + bias) in one, from the rows' statistics."""
        return ops.ln_linear(
            x, mean, rstd, norm.weight, norm.bias, norm.scale, self.weight, self.bias, self.activation,
            backend=self.backend,
        )  # fmt: skip


class Mlp(nn.Module):
    """fc2(norm(act(fc1 x))), the norm only in the `_mlpnorm` architecture; act is "gelu" or "swiglu"."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        norm: bool = False,
        eps: float = 1e-6,
        activation: str = "gelu",
        bias: tuple[bool, bool] = (True, True),
    ):
        super().__init__()
        self.fc1 = Linear(dim, hidden * (2 if activation == "swiglu" else 1), bias=bias[0], activation=activation)
        self.norm = LayerNorm(hidden, eps) if norm else None
        self.fc2 = Linear(hidden, dim, bias=bias[1])

    @property
    def expand(self) -> Linear:
        return self.fc1

    def contract(self, hidden: Tensor, residual: Tensor, layer_scale: Tensor | None) -> Tensor:
        return self.fc2(hidden if self.norm is None else self.norm(hidden), residual, layer_scale)


class SwiGLU(nn.Module):
    """w3(silu(a)·b), (a, b) the halves of w12 x (Shazeer, 2020)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w12 = Linear(dim, 2 * hidden, activation="swiglu")
        self.w3 = Linear(hidden, dim)

    @property
    def expand(self) -> Linear:
        return self.w12

    def contract(self, hidden: Tensor, residual: Tensor, layer_scale: Tensor | None) -> Tensor:
        return self.w3(hidden, residual, layer_scale)
