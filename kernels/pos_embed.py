"""The position table resized to images' grids of patches: bilinear, half-pixel centres, no antialias; cut to size.

sm_70 and newer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from radio_fast.kernels.configs import Case, pos_embed_config


@triton.jit
def _neighbours(dst, src_size, dst_size):
    """The two source cells of output cells `dst` and the weight of the second, as F.interpolate has them."""
    # IEEE division: with equal sizes the ratio is exactly 1, and the table comes through to the bit.
    ratio = tl.div_rn(src_size.to(tl.float32), dst_size.to(tl.float32))
    src = tl.maximum((dst.to(tl.float32) + 0.5) * ratio - 0.5, 0.0)
    first = tl.minimum(src.to(tl.int32), src_size - 1)
    weight = src - first.to(tl.float32)
    # No step to a neighbour of weight 0: half as much to read wherever a side keeps its size.
    second = tl.minimum(first + (weight > 0.0).to(tl.int32), src_size - 1)
    return first, second, weight


@triton.jit
def _row(index, D: tl.constexpr):
    return index.to(tl.int64)[:, None] * D  # all rows together may pass 2³¹ entries


@triton.jit(do_not_specialize=["h", "w", "tiles", "R"])
def _pos_embed_kernel(
    table_ptr,
    sizes_ptr,
    out_ptr,
    h,
    w,
    tiles,
    R,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_SIZES: tl.constexpr,
    RESIZE_SQUARE: tl.constexpr,
):
    """BLOCK_M patches of one image, BLOCK_D channels. sizes: (images, 3) of (first output row, h, w), or one h × w."""
    tile = tl.program_id(0) % tiles
    first_row = 0
    if HAS_SIZES:
        sizes_ptr += tl.program_id(0) // tiles * 3
        first_row = tl.load(sizes_ptr)
        h = tl.load(sizes_ptr + 1)
        w = tl.load(sizes_ptr + 2)
    if tile * BLOCK_M >= h * w:  # as many tiles for all images as the largest needs
        return
    # The source is the whole table, resized to a square of the longer side; or its corner, resized where it is short.
    if RESIZE_SQUARE:
        src_h, src_w = R, R
        dst_h = tl.maximum(h, w)
        dst_w = dst_h
    else:
        src_h, src_w = tl.minimum(h, R), tl.minimum(w, R)
        dst_h, dst_w = h, w

    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_m = offs_m < h * w
    mask = mask_m[:, None] & (offs_d < D)[None, :]
    top, bottom, weight_y = _neighbours(offs_m // w, src_h, dst_h)
    left, right, weight_x = _neighbours(offs_m % w, src_w, dst_w)

    cells = table_ptr + offs_d[None, :]
    top_left = tl.load(cells + _row(top * R + left, D), mask=mask, other=0.0).to(tl.float32)
    top_right = tl.load(cells + _row(top * R + right, D), mask=mask, other=0.0).to(tl.float32)
    bottom_left = tl.load(cells + _row(bottom * R + left, D), mask=mask, other=0.0).to(tl.float32)
    bottom_right = tl.load(cells + _row(bottom * R + right, D), mask=mask, other=0.0).to(tl.float32)

    weight_x, weight_y = weight_x[:, None], weight_y[:, None]
    upper = (1.0 - weight_x) * top_left + weight_x * top_right
    lower = (1.0 - weight_x) * bottom_left + weight_x * bottom_right
    out = (1.0 - weight_y) * upper + weight_y * lower
    tl.store(out_ptr + _row(first_row + offs_m, D) + offs_d[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


def pos_embed(table: Tensor, heights: list[int], widths: list[int], resize_square: bool, sm: int) -> Tensor:
    """(R·R, D), contiguous → (Σ h·w, D): for every image the table resized to m × m, m = max(h, w), cut to h × w.

    Without `resize_square` the table's min(h, R) × min(w, R) corner, resized to h × w. One launch; float16, bfloat16 or
    float32, float32 arithmetic rounded once; (h, w) = (R, R) returns the table to the bit. Several sizes are a small
    copy to the GPU first, which waits and can't be captured in a CUDA graph; one size has none. sm_70 and newer.
    """
    rows = [h * w for h, w in zip(heights, widths, strict=True)]
    D = table.shape[1]
    out = table.new_empty((sum(rows), D))
    sizes = None
    if len(rows) > 1:
        first_rows = [sum(rows[:i]) for i in range(len(rows))]
        sizes = torch.tensor(list(zip(first_rows, heights, widths, strict=True)), dtype=torch.int32)
        sizes = sizes.to(table.device)
    if out.numel() > 0:
        config = pos_embed_config(sm, table.element_size(), D)
        tiles = triton.cdiv(max(rows), config["BLOCK_M"])
        _pos_embed_kernel[(tiles * len(rows), triton.cdiv(D, config["BLOCK_D"]))](
            table,
            sizes,
            out,
            heights[0],
            widths[0],
            tiles,
            round(table.shape[0] ** 0.5),
            D=D,
            HAS_SIZES=sizes is not None,
            RESIZE_SQUARE=resize_square,
            **config,
        )
    return out


def compile_cases(sm: int) -> list[Case]:
    """RADIO's widths: one size and several, both rules."""
    dtypes = {"fp16": 2, "bf16": 2, "fp32": 4} if sm >= 80 else {"fp16": 2, "fp32": 4}
    cases = []
    for dtype, size in dtypes.items():
        for D, has_sizes, resize_square in ((768, False, True), (1280, True, True), (1152, False, False)):
            config = pos_embed_config(sm, size, D)
            signature = {"table_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"}
            signature |= dict.fromkeys(("h", "w", "tiles", "R"), "i32")
            constexprs = {"D": D, "BLOCK_M": config["BLOCK_M"], "BLOCK_D": config["BLOCK_D"]}
            constexprs |= {"HAS_SIZES": has_sizes, "RESIZE_SQUARE": resize_square}
            if has_sizes:
                signature["sizes_ptr"] = "*i32"
            else:
                constexprs["sizes_ptr"] = None
            label = f"{dtype} D={D} {'sizes' if has_sizes else 'one'} {'square' if resize_square else 'native'}"
            cases.append(Case("pos_embed", label, _pos_embed_kernel, signature, constexprs, config["num_warps"], 1))
    return cases
