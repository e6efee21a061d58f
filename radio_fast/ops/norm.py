"""Row-wise normalisations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, scale: float = 1.0) -> Tensor:
    """scale · ((x − mean) / √(var + eps) · weight + bias) over the last axis (Ba et al., 2016)."""
    y = F.layer_norm(x, weight.shape, weight, bias, eps)
    return y if scale == 1.0 else y * scale


def dynamic_tanh(x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor, scale: float = 1.0) -> Tensor:
    """scale · (weight · tanh(alpha·x) + bias), a norm without statistics (Zhu et al., 2025)."""
    y = torch.tanh(alpha * x) * weight + bias
    return y if scale == 1.0 else y * scale
