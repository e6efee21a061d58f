"""Cropped position embedding (CPE) at inference: the position table resized to an image's grid of patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _resize(grid: Tensor, h: int, w: int) -> Tensor:
    return F.interpolate(grid, size=(h, w), mode="bilinear", align_corners=False)


def pos_embed(table: Tensor, h: int, w: int, resize_square: bool = True) -> Tensor:
    """Positions for h × w patches.

    With `resize_square` the table is resized bilinearly (half-pixel centres, no antialias) to m × m, m = max(h, w), and
    the top-left h × w corner is taken; without it the corner is taken from the table as it is, and only if a side is
    then still too short is that corner resized, to h × w.

    Args:
        table: (R·R, D), row by row.

    Returns:
        (h·w, D) in the table's dtype; the arithmetic is float32.
    """
    R = round(table.shape[0] ** 0.5)
    if (h, w) == (R, R):
        return table
    # Autocast would round the result to its own dtype, and the caller keeps it for later calls.
    with torch.autocast(table.device.type, enabled=False):
        grid = table.float().view(1, R, R, -1).permute(0, 3, 1, 2)
        if resize_square:
            grid = _resize(grid, max(h, w), max(h, w))
        grid = grid[:, :, :h, :w]
        if grid.shape[2:] != (h, w):
            grid = _resize(grid, h, w)
        return grid.flatten(2).squeeze(0).t().contiguous().to(table.dtype)
