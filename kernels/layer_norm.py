"""Row-wise normalisation and its statistics, alone or with the residual add before them: one kernel body.

A row stays in registers from its one read to its one write. Statistics are the stable two-pass form, the mean first and
then Σ(x − mean)²: RADIO's residual stream has channels a hundred times larger than the rest, and E[x²] − E[x]² would
cancel there. All arithmetic is float32. sm_70 and newer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from radio_fast.kernels.configs import Case, layer_norm_config


@triton.jit(do_not_specialize=["M"])
def _layer_norm_kernel(
    x_ptr,
    y_ptr,
    layer_scale_ptr,
    weight_ptr,
    bias_ptr,
    s_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    M,
    stride_xm,
    stride_xd,
    stride_ym,
    stride_yd,
    eps,
    scale,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_ADD: tl.constexpr,
    HAS_LAYER_SCALE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    WRITE_NORM: tl.constexpr,
    WRITE_STATS: tl.constexpr,
):
    """BLOCK_M rows of D: s = x + y · layer_scale, mean and 1/√(var + eps) of s, scale · (norm(s) · weight + bias)."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < M
    mask_d = offs_d < D
    mask = mask_m[:, None] & mask_d[None, :]
    offs_out = offs_m[:, None] * D + offs_d[None, :]

    s = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_d[None, :] * stride_xd, mask=mask, other=0.0).to(tl.float32)
    if HAS_ADD:
        y_ptrs = y_ptr + offs_m[:, None] * stride_ym + offs_d[None, :] * stride_yd
        y = tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
    if WRITE_NORM:  # loaded here, so that they arrive while the row is being summed
        weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0)
        bias = tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0)
    if HAS_ADD:
        if HAS_LAYER_SCALE:
            y *= tl.load(layer_scale_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
        stored = (s + y).to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + offs_out, stored, mask=mask)
        s = stored.to(tl.float32)  # the statistics are of s as the next layers will read it

    mean = tl.sum(s, axis=1) * (1.0 / D)
    centred = tl.where(mask_d[None, :], s - mean[:, None], 0.0)
    var = tl.sum(centred * centred, axis=1) * (1.0 / D)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(var + eps))  # not rsqrt.approx, wrong in every second last bit: an output too
    if WRITE_STATS:
        tl.store(mean_ptr + offs_m, mean, mask=mask_m)
        tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)
    if WRITE_NORM:
        out = centred * rstd[:, None] * weight.to(tl.float32)[None, :] + bias.to(tl.float32)[None, :]
        if HAS_SCALE:
            out *= scale
        # An fp8 output goes here: tl.max(tl.abs(out), axis=1) is the row's amax (masked channels are 0), one more
        # store of amax/448 per row beside mean and rstd, and `out` divided by it in place of the cast below.
        tl.store(out_ptr + offs_out, out.to(out_ptr.dtype.element_ty), mask=mask)


# -- launchers -------------------------------------------------------------------------------------------------


def _launch(x, y, layer_scale, weight, bias, eps, scale, sm, *, write_norm, write_stats) -> list[Tensor]:
    """The outputs asked for, in the order s, norm, mean, rstd."""
    D = x.shape[-1]
    rows = x.reshape(-1, D)  # a view wherever one row stride can tell where the rows are, else a copy
    y_rows = None if y is None else y.reshape(-1, D)
    M = rows.shape[0]
    s = None if y is None else x.new_empty(x.shape)
    out = x.new_empty(x.shape) if write_norm else None
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32) if write_stats else None
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32) if write_stats else None
    if M > 0:
        config = layer_norm_config(sm, x.element_size(), D)
        _layer_norm_kernel[(triton.cdiv(M, config["BLOCK_M"]),)](
            rows,
            y_rows,
            None if layer_scale is None else layer_scale.contiguous(),
            None if weight is None else weight.contiguous(),
            None if bias is None else bias.contiguous(),
            s,
            out,
            mean,
            rstd,
            M,
            rows.stride(0),
            rows.stride(1),
            0 if y is None else y_rows.stride(0),
            0 if y is None else y_rows.stride(1),
            eps,
            scale,
            D=D,
            HAS_ADD=y is not None,
            HAS_LAYER_SCALE=layer_scale is not None,
            HAS_SCALE=scale != 1.0,
            WRITE_NORM=write_norm,
            WRITE_STATS=write_stats,
            **config,
        )
    return [t for t in (s, out, mean, rstd) if t is not None]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, scale: float, sm: int) -> Tensor:
    """scale · ((x − mean) / √(var + eps) · weight + bias): x (..., D), any strides → (..., D), contiguous, x's dtype.

    float16, bfloat16 or float32; D ≤ 16384; float32 arithmetic, rounded once; sm_70 and newer.
    """
    return _launch(x, None, None, weight, bias, eps, scale, sm, write_norm=True, write_stats=False)[0]


def add_layer_norm(
    x: Tensor,
    y: Tensor,
    layer_scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: float,
    sm: int,
) -> tuple[Tensor, Tensor]:
    """(s, layer_norm(s)), s = x + y · layer_scale rounded to x's dtype. x, y: (..., D), any strides, each its own."""
    s, out = _launch(x, y, layer_scale, weight, bias, eps, scale, sm, write_norm=True, write_stats=False)
    return s, out


def norm_stats(x: Tensor, eps: float, sm: int) -> tuple[Tensor, Tensor]:
    """(mean, 1/√(var + eps)) of the rows of x (..., D): both (...), float32."""
    mean, rstd = _launch(x, None, None, None, None, eps, 1.0, sm, write_norm=False, write_stats=True)
    return mean, rstd


def add_norm_stats(
    x: Tensor, y: Tensor, layer_scale: Tensor | None, eps: float, sm: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(s, mean, 1/√(var + eps)), s = x + y · layer_scale rounded to x's dtype, the statistics those of s."""
    s, mean, rstd = _launch(x, y, layer_scale, None, None, eps, 1.0, sm, write_norm=False, write_stats=True)
    return s, mean, rstd


# -- ahead-of-time compilation ---------------------------------------------------------------------------------


def compile_cases(sm: int) -> list[Case]:
    """Every row of the table in fp16, the outputs that RADIO runs; the other dtypes and forms at its widths."""
    dtypes = {"fp16": 2, "bf16": 2, "fp32": 4} if sm >= 80 else {"fp16": 2, "fp32": 4}
    forms = {  # op: (HAS_ADD, WRITE_NORM)
        "layer_norm": (False, True),
        "add_layer_norm": (True, True),
        "norm_stats": (False, False),
        "add_norm_stats": (True, False),
    }
    cases = []
    for dtype, size in dtypes.items():
        for op, (has_add, write_norm) in forms.items():
            for D in (384, 768, 1280, 4096, 16384) if write_norm and dtype == "fp16" else (1280, 16384):
                config = layer_norm_config(sm, size, D)
                pointer, absent = f"*{dtype}", {}
                signature = {"x_ptr": pointer, "M": "i32", "stride_xm": "i32", "eps": "fp32", "scale": "fp32"}
                optional = {"y_ptr": has_add, "layer_scale_ptr": has_add, "s_ptr": has_add}
                optional |= {"weight_ptr": write_norm, "bias_ptr": write_norm, "out_ptr": write_norm}
                for name, present in optional.items():
                    (signature if present else absent)[name] = pointer if present else None
                for name in ("mean_ptr", "rstd_ptr"):
                    (absent if write_norm else signature)[name] = None if write_norm else "*fp32"
                strides = {"stride_xd": 1, "stride_yd": int(has_add)}  # Triton makes a stride of 1 a constant
                (signature if has_add else strides)["stride_ym"] = "i32" if has_add else 0
                flags = {"HAS_ADD": has_add, "HAS_LAYER_SCALE": has_add, "HAS_SCALE": False}
                flags |= {"WRITE_NORM": write_norm, "WRITE_STATS": not write_norm}
                tiles = {"D": D, "BLOCK_M": config["BLOCK_M"], "BLOCK_D": config["BLOCK_D"]}
                constexprs = absent | strides | flags | tiles
                label = f"{dtype} D={D}"
                cases.append(Case(op, label, _layer_norm_kernel, signature, constexprs, config["num_warps"], 1))
    return cases
