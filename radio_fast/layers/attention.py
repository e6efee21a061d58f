from __future__ import annotations

from torch import Tensor, nn

from radio_fast import ops
from radio_fast.layers.mlp import Linear
from radio_fast.layers.packing import Segments


class Attention(nn.Module):
    """attention(qkv), q, k and v from one linear layer, and the layer `proj` for after it."""

    backend = "auto"

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, proj_bias: bool = True):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim, bias=proj_bias)

    def mix(self, qkv: Tensor, window: tuple[int, int, int] | Segments | None = None) -> Tensor:
        """What comes between the two layers.

        `window`: (h, w, k), inside k × k windows of an h × w grid of tokens; `Segments`, inside each of the images that
        qkv (1, tokens, 3·D) is made of.
        """
        if isinstance(window, Segments):
            starts, lengths = window
            return ops.attention(
                qkv[0], self.num_heads, starts, max(lengths), seqlens=lengths, backend=self.backend
            ).unsqueeze(0)
        return ops.attention(qkv, self.num_heads, window=window, backend=self.backend)
