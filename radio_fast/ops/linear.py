"""Linear layers with the activation that follows them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
    """act(x·weightᵀ + bias).

    Args:
        x: (..., K). weight: (M, K). bias: (M) or None.
        activation: None; "gelu", the exact one, y·Φ(y) with erf; "swiglu": silu(a)·b of the halves (a, b) of y.

    Returns:
        (..., M), or (..., M/2) for "swiglu".
    """
    y = F.linear(x, weight, bias)
    if activation == "gelu":
        return F.gelu(y)
    if activation == "swiglu":
        a, b = y.chunk(2, dim=-1)
        return F.silu(a) * b
    if activation is not None:
        raise ValueError(f"activation must be None, 'gelu' or 'swiglu', got {activation!r}")
    return y
