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

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps, self.scale, backend=self.backend)

    def after_add(self, x: Tensor, y: Tensor, layer_scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """(s, norm(s)) with s = x + y · layer_scale."""
        return ops.add_layer_norm(x, y, layer_scale, self.weight, self.bias, self.eps, self.scale, backend=self.backend)


class DynamicTanh(nn.Module):
    """weight · tanh(alpha·x) + bias: what stands in for LayerNorm in the `_dyt_` architecture."""

    def __init__(self, dim: int, scale: float = 1.0):
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), 0.5))
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return ops.dynamic_tanh(x, self.alpha, self.weight, self.bias, self.scale)

    def after_add(self, x: Tensor, y: Tensor, layer_scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """(s, norm(s)) with s = x + y · layer_scale."""
        s = x + (y if layer_scale is None else y * layer_scale)
        return s, self(s)


class LayerScale(nn.Module):
    """gamma, one factor per channel of what a block adds to its input (Touvron et al., 2021)."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
