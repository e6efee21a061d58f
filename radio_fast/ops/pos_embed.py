"""Cropped position embedding (CPE) at inference: the position table resized to images' grids of patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from radio_fast.ops._dispatch import Op, limit_of, register, sm_of, triton_runs

CHANNELS = 128  # resized at a time


def _resize(grid: Tensor, h: int, w: int) -> Tensor:
    return F.interpolate(grid, size=(h, w), mode="bilinear", align_corners=False)


def pos_embed_ref(table: Tensor, h: int, w: int, resize_square: bool = True) -> Tensor:
    R = round(table.shape[0] ** 0.5)
    if (h, w) == (R, R):
        return table
    if table.dtype == torch.float32 or torch.compiler.is_compiling():
        return _resized(table, h, w, R, resize_square)
    # Not all of the table in float32 at a time, which can be more than all else that a first call needs.
    parts = [_resized(part, h, w, R, resize_square) for part in table.split(CHANNELS, dim=1)]
    return torch.cat(parts, dim=1)


def _resized(table: Tensor, h: int, w: int, R: int, resize_square: bool) -> Tensor:
    # Autocast would round the result to its own dtype, and the caller keeps it for later calls.
    with torch.autocast(table.device.type, enabled=False):
        grid = table.float().view(1, R, R, -1).permute(0, 3, 1, 2)
        if resize_square:
            grid = _resize(grid, max(h, w), max(h, w))
        grid = grid[:, :, :h, :w]
        if grid.shape[2:] != (h, w):
            grid = _resize(grid, h, w)
        return grid.flatten(2).squeeze(0).t().contiguous().to(table.dtype)


def pos_embed(table: Tensor, h: int, w: int, resize_square: bool = True, *, backend: str = "auto") -> Tensor:
    """Positions for h × w patches.

    With `resize_square` the table is resized bilinearly (half-pixel centres, no antialias) to m × m, m = max(h, w), and
    the top-left h × w corner is taken; without it the corner is taken from the table as it is, and only if a side is
    then still too short is that corner resized, to h × w.

    Args:
        table: (R·R, D), row by row.

    Returns:
        (h·w, D) in the table's dtype; the arithmetic is float32.
    """
    return pos_embed_varlen(table, [(h, w)], resize_square, backend=backend)


def pos_embed_varlen(
    table: Tensor, sizes: list[tuple[int, int]], resize_square: bool = True, *, backend: str = "auto"
) -> Tensor:
    """`pos_embed` for several sizes (h, w), one after another: (Σ h·w, D), by one launch of the kernel."""
    if not sizes or not all(h > 0 and w > 0 for h, w in sizes):
        raise ValueError(f"sizes must be one or more (rows, columns) of at least one patch, got {sizes}")
    limit = limit_of(table)
    if table.ndim != 2 or round(table.shape[0] ** 0.5) ** 2 != table.shape[0]:
        limit = f"table must have shape (R·R, D), got {tuple(table.shape)}"
    return POS_EMBED(backend, (table, sizes, resize_square), {"triton": limit})


def _varlen_ref(table: Tensor, sizes: list[tuple[int, int]], resize_square: bool) -> Tensor:
    parts = [pos_embed_ref(table, h, w, resize_square) for h, w in sizes]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


# -- implementations -------------------------------------------------------------------------------------------


def _call(table: Tensor, sizes: list[tuple[int, int]], resize_square: bool) -> Tensor:
    heights, widths = map(list, zip(*sizes, strict=True))
    return torch.ops.radio_fast.pos_embed(table, heights, widths, resize_square)


def _kernel(table: Tensor, heights: list[int], widths: list[int], resize_square: bool) -> Tensor:
    from radio_fast.kernels import pos_embed

    return pos_embed.pos_embed(table.contiguous(), heights, widths, resize_square, sm_of(table.device))


register(
    "pos_embed",
    "(Tensor table, int[] heights, int[] widths, bool resize_square) -> Tensor",
    lambda table, heights, widths, resize_square: table.new_empty(
        (sum(h * w for h, w in zip(heights, widths, strict=True)), table.shape[1])
    ),
    _kernel,
)

POS_EMBED = Op("pos_embed", _varlen_ref, key=lambda *args: None)  # once per image size: not worth a measurement
POS_EMBED.add("triton", _call, triton_runs(needs_dot=False))
