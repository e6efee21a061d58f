from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from radio_fast import ops
from radio_fast.layers.attention import Attention
from radio_fast.layers.cache import TensorCache, state_of
from radio_fast.ops._state import cacheable


def coords_table(window: int, pretrained: int) -> Tensor:
    """(1, 2k−1, 2k−1, 2), float32: offsets (dy, dx) of −(k−1)…k−1 positions, in units of the pretrained window.

    t = offset / (pretrained − 1) · 8, given as sign(t)·log2(|t| + 1) / log2(8) (Liu et al., Swin Transformer V2, 2022).
    """
    offsets = torch.arange(1 - window, window, dtype=torch.float32) / max(pretrained - 1, 1) * 8
    offsets = offsets.sign() * torch.log2(offsets.abs() + 1) / math.log2(8)
    return torch.stack(torch.meshgrid(offsets, offsets, indexing="ij"), dim=-1).unsqueeze(0)


def offset_index(window: int) -> Tensor:
    """(k², k²): where in the flattened table the offset of query (row) and key (column) stands."""
    y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    y, x = y.flatten(), x.flatten()
    rows, columns = y[:, None] - y + window - 1, x[:, None] - x + window - 1
    return rows * (2 * window - 1) + columns


class PositionBias(nn.Module):
    """bias (heads, k², k²) = 16·σ(MLP(table))[offset of query and key], less its largest value in each head.

    A softmax does not see that constant, but a rounded bias does: in bfloat16 values near 16 are off by up to 0.03, and
    so the values nearest to the largest, which weigh most, become the most exact ones.

    `built`: the window the checkpoint was trained with. For it the stored table is used; for any other one the table is
    made anew, with the built window as its unit.
    """

    def __init__(self, built: int, num_heads: int, hidden: int = 512):
        super().__init__()
        self.built = built
        side = 2 * built - 1
        self.register_buffer("relative_coords_table", torch.zeros(1, side, side, 2))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, num_heads, bias=False))
        self._cache = TensorCache(64 << 20)  # a window of 32 and 16 heads in float32; those up to 16 take 16 MB

    def _apply(self, fn, recurse=True):
        self._cache.clear()
        return super()._apply(fn, recurse)

    def _compute(self, window: int, dtype: torch.dtype) -> Tensor:
        first, last = self.cpb_mlp[0], self.cpb_mlp[2]
        table = self.relative_coords_table
        if window != self.built:
            table = coords_table(window, self.built).to(table.device)
        with torch.autocast(table.device.type, enabled=False):
            hidden = F.relu(F.linear(table.float().reshape(-1, 2), first.weight.float(), first.bias.float()))
            values = 16 * torch.sigmoid(F.linear(hidden, last.weight.float()))  # ((2k−1)², heads)
            values = (values - values.amax(0)).T
        bias = values[:, offset_index(window).to(table.device)].to(dtype)
        # Kernels read aligned rows faster; on the CPU torch's attention would copy them.
        return ops.padded_bias(bias) if bias.device.type == "cuda" else bias.contiguous()

    def forward(self, window: int, dtype: torch.dtype) -> Tensor:
        """(heads, k², k²) in `dtype`, computed once per window while the weights stay as they are.

        Anew in every call while it is differentiated, or traced by torch.compile. Writes to a weight's `.data` are not
        seen: torch does not count them as changes.
        """
        first, last = self.cpb_mlp[0], self.cpb_mlp[2]
        sources = (self.relative_coords_table, first.weight, first.bias, last.weight)
        if not cacheable(*sources):
            return self._compute(window, dtype)
        stamp = state_of(*sources)
        bias = self._cache.get((window, dtype), stamp)
        if bias is None:
            with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not be used under autograd
                bias = self._compute(window, dtype)
            self._cache.put((window, dtype), stamp, bias)
        return bias


class WindowAttention(Attention):
    """window_attention(qkv, bias) on maps (B, H, W, 3·D), and the layers before and after it."""

    def __init__(self, dim: int, num_heads: int, window: int, qkv_bias: bool = False, proj_bias: bool = False):
        super().__init__(dim, num_heads, qkv_bias, proj_bias)
        self.pos_emb_funct = PositionBias(window, num_heads)

    def mix(self, qkv: Tensor, window: int | None = None) -> Tensor:
        """What comes between the two layers; `window`: positions a side, the checkpoint's own if None."""
        window = window or self.pos_emb_funct.built
        bias = self.pos_emb_funct(window, qkv.dtype)
        return ops.window_attention(qkv, self.num_heads, window, bias, backend=self.backend)
