from __future__ import annotations

import torch
from torch import Tensor, nn

from radio_fast import ops


class LayerNorm(nn.Module):
    """LayerNorm over the last axis, its output multiplied by `scale` (1/√i in block i of a `scaled_ln` model)."""

    backend = "auto"

    def __init__(self, dim: int, eps: float = 1e-6, scale: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.eps = eps
        self.scale = scale

    def parameters_as(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """weight and bias in `dtype`; under autocast as they are, PyTorch casts them."""
        if self.weight.dtype == dtype or torch.is_autocast_enabled(self.weight.device.type):
            return self.weight, self.bias
        return self.weight.to(dtype), self.bias.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, *self.parameters_as(x.dtype), self.eps, self.scale, backend=self.backend)

    def after_add(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(s, norm(s)) with s = x + y."""
        return ops.add_layer_norm(
            x, y, None, *self.parameters_as(x.dtype), self.eps, self.scale, backend=self.backend
        )  # fmt: skip


class DynamicTanh(nn.Module):
    """weight · tanh(alpha·x) + bias: what stands in for LayerNorm in the `_dyt_` architecture."""

    def __init__(self, dim: int, scale: float = 1.0):
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), 0.5))
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        alpha, weight, bias = (t.to(x.dtype) for t in (self.alpha, self.weight, self.bias))
        return ops.dynamic_tanh(x, alpha, weight, bias, self.scale)
