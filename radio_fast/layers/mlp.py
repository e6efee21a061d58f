from __future__ import annotations

import torch
from torch import Tensor, nn

from radio_fast import ops
from radio_fast.layers.linear_int8 import LinearInt8
from radio_fast.layers.norm import DynamicTanh, LayerNorm
from radio_fast.ops.linear import rounds_weight


def untouched(module: nn.Module | None, *kinds: type) -> bool:
    """Whether using a layer's parts does what calling it would: no hook, wrapper, patch or compiled form of it."""
    return (
        type(module) in kinds
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and module._compiled_call_impl is None
        and "forward" not in module.__dict__
    )


def add_norm(
    linear: nn.Module, x: Tensor, residual: Tensor, norm: LayerNorm | DynamicTanh | None
) -> tuple[Tensor, Tensor | None]:
    """(s, norm(s)) with s = residual + linear(x), in two launches where both are our layers as they were made."""
    if not untouched(linear, Linear, LinearInt8):
        s = residual + linear(x)
    elif type(linear) is Linear and untouched(norm, LayerNorm):
        return linear.add_norm(x, residual, norm)
    else:
        s = linear(x, residual)
    return s, None if norm is None else norm(s)


class Linear(nn.Linear):
    """residual + act(x·weightᵀ + bias), in x's dtype.

    `.half()` and `.to(dtype)` leave the bias in float32: the kernels add it to float32 sums, and it is the part of a
    model that costs nothing to keep. A weight of another dtype than x, as under autocast, is cast in every call;
    on a CPU by the kernel, as it reads it.
    """

    backend = "auto"
    float32 = ("bias",)

    def __init__(self, in_features: int, out_features: int, bias: bool = True, activation: str | None = None):
        super().__init__(in_features, out_features, bias=bias)
        self.activation = activation

    def _apply(self, fn, recurse=True):
        before = None if self.bias is None else self.bias.detach()
        super()._apply(fn, recurse)
        if before is not None and self.bias.dtype in (torch.float16, torch.bfloat16):
            self.bias.data = (self.bias.detach() if before.is_meta else before).to(self.bias.device, torch.float32)
        return self

    def _weight(self, x: Tensor) -> Tensor:
        weight = self.weight
        if weight.dtype == x.dtype or rounds_weight(x, weight):
            return weight
        return weight.to(x.dtype)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.linear(x, self._weight(x), self.bias, self.activation, residual, backend=self.backend)

    def add_norm(self, x: Tensor, residual: Tensor, norm: LayerNorm) -> tuple[Tensor, Tensor]:
        """(s, norm(s)) with s = residual + x·weightᵀ + bias."""
        return ops.linear_add_norm(
            x, self._weight(x), self.bias, residual, *norm.parameters_as(x.dtype), norm.eps, norm.scale,
            backend=self.backend,
        )  # fmt: skip

    def after_norm(self, x: Tensor, mean: Tensor, rstd: Tensor, norm: LayerNorm) -> Tensor:
        """act(norm(x)·weightᵀ + bias) in one, from the rows' statistics."""
        return ops.ln_linear(
            x, mean, rstd, *norm.parameters_as(x.dtype), norm.scale, self.weight.to(x.dtype), self.bias,
            self.activation, backend=self.backend,
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

    def contract(
        self, hidden: Tensor, residual: Tensor, after: LayerNorm | DynamicTanh | None
    ) -> tuple[Tensor, Tensor | None]:
        """As `add_norm`."""
        return add_norm(self.fc2, hidden if self.norm is None else self.norm(hidden), residual, after)


class SwiGLU(nn.Module):
    """w3(silu(a)·b), (a, b) the halves of w12 x (Shazeer, 2020)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w12 = Linear(dim, 2 * hidden, activation="swiglu")
        self.w3 = Linear(hidden, dim)

    @property
    def expand(self) -> Linear:
        return self.w12

    def contract(
        self, hidden: Tensor, residual: Tensor, after: LayerNorm | DynamicTanh | None
    ) -> tuple[Tensor, Tensor | None]:
        """As `add_norm`."""
        return add_norm(self.w3, hidden, residual, after)
