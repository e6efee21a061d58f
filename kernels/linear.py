"""Linear layers with LayerNorm on the way in and activation, LayerScale and residual on the way out, in one kernel.

A program makes BLOCK_M × BLOCK_N of the output at a time; SwiGLU keeps two accumulators of that size, one for each
half of the weight. On sm_90 and later the tiles of x and weight come through tensor descriptors (TMA), and as many
programs as run at once walk through the output (persistent); elsewhere, and for strides that TMA can't take, through
pointers with cp.async, one program a tile.

The descriptors are made on the host (`TensorDescriptor`), as kernel arguments. Made in the kernel they would need
`triton.set_allocator`, which replaces the user's allocator and holds for one thread only, and every program would
write its own to memory before its first tile.
"""

from __future__ import annotations

import itertools
import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from radio_fast.kernels.configs import Case, LinearRow, linear_config, linear_rows, precision_of
from radio_fast.kernels.dot import dot

GROUP_M = tl.constexpr(8)


@triton.jit
def gelu(y):
    """The exact GELU, y·Φ(y) = max(y, 0) − |y|·Φ(−|y|), in float32: 13 instructions where erf takes 37.

    Φ(−|y|) is 2^P(|y|), P the polynomial of degree 10 nearest to log2 Φ by the error of the result: 1.5e-10 before
    rounding. In float32 the error is 2.4e-7 for |y| ≤ 12 (0.5·y·(1 + erf(y/√2)): 1.1e-6) and, for |y| ≤ 1, 2.2e-7
    of the result (2.1e-7). P falls all the way to −∞, so there is nothing to clamp.
    """
    a = tl.abs(y)
    p = -5.2650118931296674e-08 * a + 1.320678506999684e-06
    p = p * a - 1.4652241588919424e-05
    p = p * a + 9.205163951264694e-05
    p = p * a - 0.00031727689201943576
    p = p * a + 5.162266461411491e-05
    p = p * a + 0.006909152492880821
    p = p * a - 0.05242926627397537
    p = p * a - 0.45922112464904785
    p = p * a - 1.1511045694351196
    p = p * a - 1.0
    return tl.maximum(y, 0.0) - a * tl.exp2(p)


@triton.jit
def _store(
    acc, gate, start_m, start_n, bias, residual, layer_scale, out, M, N, stride_rm,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """out = residual + layer_scale · act(acc + bias), in SPLIT pieces of BLOCK_N // SPLIT columns.

    In one piece 128 × 256 spills on sm_90 (300 loads and stores) and takes 64 KB to change the layout in; in four it
    takes 179 registers and 16 KB, which leaves room for a fourth stage.
    """
    if SPLIT > 1:
        HALF: tl.constexpr = BLOCK_N // 2
        acc_0, acc_1 = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        gate_0, gate_1 = acc_0, acc_1
        if ACTIVATION == "swiglu":
            gate_0, gate_1 = tl.split(tl.permute(tl.reshape(gate, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        _store(acc_0, gate_0, start_m, start_n, bias, residual, layer_scale, out, M, N, stride_rm,
               ACTIVATION, HAS_BIAS, HAS_SCALE, HAS_RESIDUAL, ALIGN, BLOCK_M, HALF, SPLIT // 2)  # fmt: skip
        _store(acc_1, gate_1, start_m, start_n + HALF, bias, residual, layer_scale, out, M, N, stride_rm,
               ACTIVATION, HAS_BIAS, HAS_SCALE, HAS_RESIDUAL, ALIGN, BLOCK_M, HALF, SPLIT // 2)  # fmt: skip
    else:
        offs_m = start_m + tl.arange(0, BLOCK_M)
        offs_n = start_n + tl.arange(0, BLOCK_N)
        in_n = offs_n < N
        in_tile = (offs_m < M)[:, None] & in_n[None, :]
        if HAS_BIAS:
            acc += tl.load(bias + offs_n, mask=in_n, other=0.0).to(tl.float32)[None, :]
            if ACTIVATION == "swiglu":
                gate += tl.load(bias + N + offs_n, mask=in_n, other=0.0).to(tl.float32)[None, :]
        if ACTIVATION == "gelu":
            acc = gelu(acc)
        elif ACTIVATION == "silu":
            acc = acc * tl.sigmoid(acc)
        elif ACTIVATION == "swiglu":
            acc = acc * tl.sigmoid(acc) * gate
        if HAS_SCALE:
            acc *= tl.load(layer_scale + offs_n, mask=in_n, other=0.0).to(tl.float32)[None, :]
        if HAS_RESIDUAL:
            r_rows = tl.multiple_of(offs_m.to(tl.int64) * stride_rm, ALIGN)
            acc += tl.load(residual + r_rows[:, None] + offs_n[None, :], mask=in_tile, other=0.0).to(tl.float32)
        out_rows = tl.multiple_of(offs_m.to(tl.int64) * N, ALIGN)
        tl.store(out + out_rows[:, None] + offs_n[None, :], acc.to(out.dtype.element_ty), mask=in_tile)


# Shapes and strides are not specialised, so that all shapes share kernels; ALIGN says what divides them.
@triton.jit(do_not_specialize=["M", "N", "K", "stride_xm", "stride_wn", "stride_rm"])
def _linear_kernel(
    x, weight,  # tensor descriptors with USE_TMA, else pointers
    bias, mean, rstd, norm_weight, norm_bias, residual, layer_scale, out,
    M, N, K, norm_scale, stride_xm, stride_wn, stride_rm,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, USE_TMA: tl.constexpr, EVEN_K: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # multiple_of has no effect on arguments; a product the compiler understands
    N = N // ALIGN * ALIGN
    K = K // ALIGN * ALIGN
    tl.assume(K > 0)
    num_m = tl.cdiv(M, BLOCK_M)
    num_n = tl.cdiv(N, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # A loop known to run once leaves no trace: 14 registers fewer than with the real count on sm_80.
    turns = tl.cdiv(num_m * num_n - tl.program_id(0), tl.num_programs(0)) if USE_TMA else 1
    # flatten: the first loads of the next tile start before this one's epilogue
    for turn in tl.range(0, turns, flatten=USE_TMA):
        tile = tl.program_id(0) + turn * tl.num_programs(0)
        # Tiles in groups of GROUP_M rows, down the columns of a group: the programs at work share few tiles of x and
        # weight, which stay in L2.
        first_m = tile // (GROUP_M * num_n) * GROUP_M
        size_m = tl.minimum(num_m - first_m, GROUP_M)
        in_group = tile % (GROUP_M * num_n)
        start_m = (first_m + in_group % size_m) * BLOCK_M
        start_n = in_group // size_m * BLOCK_N

        # Rows past the end read the last one again, which is cheaper than a mask, and are not stored.
        rows_m = tl.minimum(start_m + tl.arange(0, BLOCK_M), M - 1).to(tl.int64)
        if not USE_TMA:
            rows_n = tl.minimum(start_n + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
            x_ptrs = x + tl.multiple_of(rows_m * stride_xm, ALIGN)[:, None] + offs_k[None, :]
            w_ptrs = weight + tl.multiple_of(rows_n * stride_wn, ALIGN)[:, None] + offs_k[None, :]
            gate_ptrs = w_ptrs + tl.multiple_of(N.to(tl.int64) * stride_wn, ALIGN)
        if HAS_NORM:
            row_mean = tl.load(mean + rows_m)[:, None]
            row_rstd = tl.load(rstd + rows_m)[:, None]

        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start_k in range(0, K, BLOCK_K):
            in_k = offs_k < K - start_k
            if USE_TMA:  # descriptors read zeros past the end
                a = x.load([start_m, start_k])
                w = weight.load([start_n, start_k])
            elif EVEN_K:
                a = tl.load(x_ptrs + start_k)
                w = tl.load(w_ptrs + start_k)
            else:
                a = tl.load(x_ptrs + start_k, mask=in_k[None, :], other=0.0)
                w = tl.load(w_ptrs + start_k, mask=in_k[None, :], other=0.0)
            if HAS_NORM:
                # Past the end of K weight and bias are 0, and so is the normalised row.
                if EVEN_K:
                    k_weight = tl.load(norm_weight + start_k + offs_k)
                    k_bias = tl.load(norm_bias + start_k + offs_k)
                else:
                    k_weight = tl.load(norm_weight + start_k + offs_k, mask=in_k, other=0.0)
                    k_bias = tl.load(norm_bias + start_k + offs_k, mask=in_k, other=0.0)
                k_weight = k_weight.to(tl.float32) * norm_scale
                k_bias = k_bias.to(tl.float32) * norm_scale
                normalised = (a.to(tl.float32) - row_mean) * row_rstd * k_weight[None, :] + k_bias[None, :]
                a = normalised.to(a.dtype)
            acc = dot(a, w.T, acc, PRECISION)
            if ACTIVATION == "swiglu":
                if USE_TMA:
                    w = weight.load([start_n + N, start_k])
                elif EVEN_K:
                    w = tl.load(gate_ptrs + start_k)
                else:
                    w = tl.load(gate_ptrs + start_k, mask=in_k[None, :], other=0.0)
                gate = dot(a, w.T, gate, PRECISION)
        _store(acc, gate, start_m, start_n, bias, residual, layer_scale, out, M, N, stride_rm,
               ACTIVATION, HAS_BIAS, HAS_SCALE, HAS_RESIDUAL, ALIGN, BLOCK_M, BLOCK_N, SPLIT)  # fmt: skip


@cache
def _sm_count(device: torch.device) -> int:
    """SMs of a GPU; 2 in the interpreter, so that programs walk through several tiles there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _matrix(t: Tensor) -> Tensor:
    """(…, C) as rows of adjacent elements: a view where the strides allow."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def _tma_reads(t: Tensor) -> bool:
    """Whether a tensor descriptor can describe (rows, columns): 16-byte aligned start and rows that don't overlap."""
    stride, size = t.stride(0), t.element_size()
    return t.data_ptr() % 16 == 0 and stride * size % 16 == 0 and stride >= t.shape[1] and t.stride(1) == 1


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    sm: int,
    norm: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    norm_scale: float = 1.0,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
) -> Tensor:
    N = weight.shape[0] // (2 if activation == "swiglu" else 1)
    out = x.new_empty((*x.shape[:-1], N))
    if out.numel() == 0:
        return out
    x, weight = _matrix(x), _matrix(weight)
    residual = None if residual is None else _matrix(residual)
    bias, layer_scale, mean, rstd, norm_weight, norm_bias = (
        None if t is None else t.reshape(-1).contiguous() for t in (bias, layer_scale, *(norm or 4 * [None]))
    )
    M, K = x.shape
    tma = _tma_reads(x) and _tma_reads(weight)
    config = linear_config(sm, x.element_size(), M, N, activation, tma, norm is not None)
    tile = {name: config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT", "num_warps", "num_stages")}
    stride_rm = 0 if residual is None else residual.stride(0)
    tiles = triton.cdiv(M, tile["BLOCK_M"]) * triton.cdiv(N, tile["BLOCK_N"])
    x_arg, weight_arg, programs = x, weight, tiles
    if config["tma"]:
        x_arg = TensorDescriptor.from_tensor(x, [tile["BLOCK_M"], tile["BLOCK_K"]])
        weight_arg = TensorDescriptor.from_tensor(weight, [tile["BLOCK_N"], tile["BLOCK_K"]])
        programs = min(tiles, config["per_sm"] * _sm_count(x.device))
    arguments = (x_arg, weight_arg, bias, mean, rstd, norm_weight, norm_bias, residual, layer_scale, out)
    _linear_kernel[(programs,)](
        *arguments,
        *(M, N, K, norm_scale, x.stride(0), weight.stride(0), stride_rm),
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
        HAS_NORM=norm is not None,
        HAS_SCALE=layer_scale is not None,
        HAS_RESIDUAL=residual is not None,
        USE_TMA=config["tma"],
        EVEN_K=K % tile["BLOCK_K"] == 0 or (config["tma"] and norm is None),
        ALIGN=math.gcd(16, K, N, x.stride(0), weight.stride(0), stride_rm),
        PRECISION=precision_of(x.element_size()),
        **tile,
    )
    return out


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    layer_scale: Tensor | None,
    sm: int,
) -> Tensor:
    """residual + layer_scale · act(x·weightᵀ + bias), accumulated in float32 and rounded once, on sm_80 and later.

    Args:
        x: (..., K) and weight: (N', K), float16, bfloat16 or float32; rows of adjacent elements are read in place,
            other strides are copied. bias: (N') or None.
        activation: None, "gelu" (exact) or "silu" (N = N'); "swiglu", silu(a)·b with a of the first N = N'/2 rows
            of weight and b of the others.
        residual: (..., N) or None, as x. layer_scale: (N) or None.
        sm: the architecture whose configuration is taken.

    Returns:
        (..., N), contiguous, in x's dtype.
    """
    return _launch(x, weight, bias, activation, sm, residual=residual, layer_scale=layer_scale)


def ln_linear(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    norm_scale: float,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    sm: int,
) -> Tensor:
    """act(norm_scale·((x − mean)·rstd·norm_weight + norm_bias)·weightᵀ + bias), the normalised rows never in memory.

    They are made in float32 on the way from x into the product, and rounded to x's dtype as the product takes it.

    Args:
        x, weight, bias, activation, sm: as for `linear`.
        mean, rstd: (...), float32. norm_weight, norm_bias: (K), as x.

    Returns:
        As `linear`.
    """
    norm = (mean, rstd, norm_weight, norm_bias)
    return _launch(x, weight, bias, activation, sm, norm=norm, norm_scale=norm_scale)


def compile_cases(sm: int) -> list[Case]:
    """All tiles of `sm`: every activation with the first of unlimited M, the heaviest ones with the others."""
    cases = []
    descriptors = (True, False) if 90 <= sm < 120 else (False,)
    for dtype, tma, norm in itertools.product(("fp16", "bf16", "fp32") if sm >= 80 else (), descriptors, (False, True)):
        rows = linear_rows(sm, 4 if dtype == "fp32" else 2, tma, norm)
        main = next(row for row in rows if row.max_m == math.inf)
        aligned = tma or len(descriptors) == 1  # else only what is not aligned comes without descriptors
        for row in rows if dtype != "bf16" else (main,):
            for activation in (None, "gelu", "swiglu") if row is main else ("gelu", "swiglu"):
                cases.append(_case(dtype, row, activation, norm, tma, aligned))
        if aligned and norm:
            cases.append(_case(dtype, main, "gelu", norm, tma, aligned=False))
    return cases


def _case(dtype: str, row: LinearRow, activation: str | None, norm: bool, tma: bool, aligned: bool) -> Case:
    block_n = row.block_n(activation)
    last = not norm and activation is None  # residual and LayerScale follow proj and fc2, which have no activation
    optional = {
        "mean": norm,
        "rstd": norm,
        "norm_weight": norm,
        "norm_bias": norm,
        "residual": last,
        "layer_scale": last,
    }
    signature = {
        "x": f"tensordesc<{dtype}[{row.BLOCK_M}, {row.BLOCK_K}]>" if tma else f"*{dtype}",
        "weight": f"tensordesc<{dtype}[{block_n}, {row.BLOCK_K}]>" if tma else f"*{dtype}",
        "bias": "*fp32",  # as layers.mlp.Linear keeps it
        **dict.fromkeys(("out", *(name for name, given in optional.items() if given)), f"*{dtype}"),
        **dict.fromkeys(("mean", "rstd") if norm else (), "*fp32"),
        **dict.fromkeys(("M", "N", "K", "stride_xm", "stride_wn", "stride_rm"), "i32"),
        "norm_scale": "fp32",
    }
    constexprs = {
        **{name: None for name, given in optional.items() if not given},
        "BLOCK_M": row.BLOCK_M,
        "BLOCK_N": block_n,
        "BLOCK_K": row.BLOCK_K,
        "SPLIT": row.SPLIT,
        "ACTIVATION": activation,
        "HAS_BIAS": True,
        "HAS_NORM": norm,
        "HAS_SCALE": last,
        "HAS_RESIDUAL": last,
        "USE_TMA": tma,
        "EVEN_K": aligned,
        "ALIGN": 16 if aligned else 4,
        "PRECISION": precision_of(4 if dtype == "fp32" else 2),
    }
    return Case(
        op="ln_linear" if norm else "linear",
        label=f"{dtype} {row.BLOCK_M}×{block_n}×{row.BLOCK_K} {activation or 'none'}"
        f"{' tma' if tma else ''}{'' if aligned else ' unaligned'}{'' if row.max_m == math.inf else f' M≤{row.max_m}'}",
        fn=_linear_kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=row.num_warps,
        num_stages=row.num_stages,
        dot_macs=row.BLOCK_M * block_n * row.BLOCK_K * (2 if activation == "swiglu" else 1),
    )
