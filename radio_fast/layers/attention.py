from __future__ import annotations

from torch import Tensor, nn

from radio_fast import ops
from radio_fast.layers.mlp import Linear


class Attention(nn.Module):
    """proj(attention(qkv x)), q, k and v from one linear layer."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(ops.attention(self.qkv(x), self.num_heads))
