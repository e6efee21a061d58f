"""What attention kernels are held against: float64, head by head, and the shapes that try them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attend(qkv: Tensor, heads: int) -> Tensor:
    """float64 softmax attention of one image or window, (N, 3·H·d) → (N, H·d), head by head."""
    d = qkv.shape[-1] // (3 * heads)
    if len(qkv) == 0:
        return torch.empty(0, heads * d, dtype=torch.float64, device=qkv.device)
    columns = qkv.double().split(d, dim=-1)
    outputs = []
    for q, k, v in zip(columns[:heads], columns[heads : 2 * heads], columns[2 * heads :], strict=True):
        scores = q @ k.T / math.sqrt(d)
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        outputs.append(weights / weights.sum(-1, keepdim=True) @ v)
    return torch.cat(outputs, -1)


def attention_truth(qkv: Tensor, heads: int, lengths=None, window=None) -> Tensor:
    if lengths is not None:
        return torch.cat([attend(part, heads) for part in qkv.split(lengths)])
    if window is None:
        return torch.stack([attend(image, heads) for image in qkv])
    h, w, k = window
    result = qkv.new_zeros(*qkv.shape[:-1], qkv.shape[-1] // 3, dtype=torch.float64)
    grid = torch.arange(h * w, device=qkv.device).view(h, w)
    for image, attended in zip(qkv, result, strict=True):
        for y in range(0, h, k):
            for x in range(0, w, k):
                tokens = grid[y : y + k, x : x + k].flatten()
                attended[tokens] = attend(image[tokens], heads)
    return result


def continued(size: int, window: int) -> list[int]:
    """0 1 2 3 → 0 1 2 3 2 1 …: the positions that whole windows cover."""
    return [*range(size), *range(size - 2, -1, -1)][: -(-size // window) * window]


def window_truth(qkv: Tensor, heads: int, window: int, bias: Tensor | None) -> Tensor:
    """float64, window by window and head by head."""
    B, H, W, width = qkv.shape
    d = width // (3 * heads)
    out = qkv.new_full((B, H, W, width // 3), math.nan, dtype=torch.float64)
    rows, columns = continued(H, window), continued(W, window)
    for b in range(B):
        for top in range(0, H, window):
            for left in range(0, W, window):
                positions = [(y, x) for y in rows[top : top + window] for x in columns[left : left + window]]
                tokens = torch.stack([qkv[b, y, x] for y, x in positions]).double()
                inside = out[b, top : top + window, left : left + window]
                for head in range(heads):
                    q, k, v = (tokens[:, (part * heads + head) * d :][:, :d] for part in range(3))
                    scores = q @ k.T / math.sqrt(d)
                    if bias is not None:
                        scores += bias[head].double()
                    attended = scores.softmax(-1) @ v
                    grid = attended.view(window, window, d)
                    inside[..., head * d : (head + 1) * d] = grid[: inside.shape[0], : inside.shape[1]]
    return out


def bias_like(heads: int, window: int, *, dtype: torch.dtype, device: str, seed: int = 0, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(heads, window**2, window**2, generator=generator)).to(device, dtype)


MAPS = (  # every window, whole and partial at the bottom, the right and both; padding of size − 1, the most there is
    (1, 2, 3),
    (2, 3, 4),
    (3, 2, 5),
    (4, 8, 5),
    (5, 3, 7),
    (6, 6, 7),
    (7, 8, 4),
    (8, 8, 16),
    (9, 5, 9),
    (10, 11, 6),
    (11, 11, 11),
    (12, 12, 13),
    (13, 7, 14),
    (14, 16, 14),
    (15, 8, 8),
    (16, 16, 17),
)
