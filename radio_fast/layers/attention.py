from __future__ import annotations

from torch import Tensor, nn

from radio_fast import ops
from radio_fast.layers.mlp import Linear


class Attention(nn.Module):
    """attention(qkv), q, k and v from one linear layer, and the layer `proj` for after it."""

    backend = "auto"

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, proj_bias: bool = True):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim, bias=proj_bias)

    def mix(self, qkv: Tensor, window: tuple[int, int, int] | None = None) -> Tensor:
        """What comes between the two layers; `window` (h, w, k): inside k × k windows of an h × w grid of tokens."""
        return ops.attention(qkv, self.num_heads, window=window, backend=self.backend)
