"""The mean of two feature maps, one of them perhaps still to be shuffled from channels to positions.

sm_70 and newer.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from radio_fast.kernels.configs import Case, blend_config


@triton.jit(do_not_specialize=["M", "H", "W"])
def _blend_kernel(
    x_ptr,
    skip_ptr,
    out_ptr,
    stride_xb,
    stride_xh,
    stride_xw,
    stride_xc,
    stride_sb,
    stride_sh,
    stride_sw,
    stride_sc,
    M,
    H,
    W,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SHUFFLED: tl.constexpr,
):
    """BLOCK_M of the M = B·H·W positions, BLOCK_D channels."""
    start = tl.program_id(0).to(tl.int64) * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    # 64-bit divisions, a hundred instructions each, once a program; from the tile's first position on 32 bits will do.
    x = (start % W).to(tl.int32) + offs_m
    y = (start // W % H).to(tl.int32) + x // W
    image = start // W // H + y // H
    x, y = (x % W).to(tl.int64), (y % H).to(tl.int64)
    offs_d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    mask = (start + offs_m < M)[:, None] & (offs_d < C)[None, :]

    skip_rows = image * stride_sb + y * stride_sh + x * stride_sw
    skip = tl.load(skip_ptr + skip_rows[:, None] + (offs_d * stride_sc)[None, :], mask=mask, other=0.0)
    if SHUFFLED:
        channel = (y % 2 * 2 + x % 2) * C
        x_rows = image * stride_xb + y // 2 * stride_xh + x // 2 * stride_xw + channel * stride_xc
    else:
        x_rows = image * stride_xb + y * stride_xh + x * stride_xw
    shuffled = tl.load(x_ptr + x_rows[:, None] + (offs_d * stride_xc)[None, :], mask=mask, other=0.0)
    out = 0.5 * shuffled.to(tl.float32) + 0.5 * skip.to(tl.float32)
    tl.store(out_ptr + (start + offs_m)[:, None] * C + offs_d[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


def blend(x: Tensor, skip: Tensor, sm: int) -> Tensor:
    """0.5·x + 0.5·skip: x like skip or (B, H/2, W/2, 4·C), channels ordered (row, column, C); skip (B, H, W, C).

    Any strides; float16, bfloat16 or float32 → (B, H, W, C), contiguous, in skip's dtype; float32 arithmetic, rounded
    once; sm_70 and newer.
    """
    B, H, W, C = skip.shape
    out = skip.new_empty((B, H, W, C))
    if out.numel() > 0:
        config = blend_config(sm, skip.element_size(), C)
        _blend_kernel[(triton.cdiv(B * H * W, config["BLOCK_M"]), triton.cdiv(C, config["BLOCK_D"]))](
            x,
            skip,
            out,
            *x.stride(),
            *skip.stride(),
            B * H * W,
            H,
            W,
            C=C,
            SHUFFLED=x.shape != skip.shape,
            **config,
        )
    return out


def compile_cases(sm: int) -> list[Case]:
    """E-RADIO's widths, and narrow and odd ones; both forms of x."""
    dtypes = {"fp16": 2, "bf16": 2, "fp32": 4} if sm >= 80 else {"fp16": 2, "fp32": 4}
    cases = []
    for dtype, size in dtypes.items():
        for C in (16, 100, 192, 384, 768):
            for shuffled in (False, True):
                config = blend_config(sm, size, C)
                signature = dict.fromkeys(("x_ptr", "skip_ptr", "out_ptr"), f"*{dtype}")
                constexprs = {"C": C, "BLOCK_M": config["BLOCK_M"], "BLOCK_D": config["BLOCK_D"], "SHUFFLED": shuffled}
                constexprs |= {"stride_xc": 1, "stride_sc": 1}  # Triton makes a stride of 1 a constant
                others = [name for name in _blend_kernel.arg_names if name not in signature | constexprs]
                signature |= dict.fromkeys(others, "i32")
                label = f"{dtype} C={C}{' shuffled' if shuffled else ''}"
                cases.append(Case("blend", label, _blend_kernel, signature, constexprs, config["num_warps"], 1))
    return cases
