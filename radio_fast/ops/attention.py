"""Scaled dot-product attention on packed q, k, v."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attention(qkv: Tensor, num_heads: int) -> Tensor:
    """softmax(q·kᵀ / √d)·v for each head, not causal (Vaswani et al., 2017).

    Args:
        qkv: (B, N, 3·H·d), ordered (q, k, v) × heads × d, as one linear layer leaves it.

    Returns:
        (B, N, H·d) in qkv's dtype.
    """
    B, N, width = qkv.shape
    q, k, v = qkv.view(B, N, 3, num_heads, width // (3 * num_heads)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, width // 3)
