"""Attention in square windows of a feature map, with a bias on the scores. sm_80 and newer.

Windows are cut out by the addresses that queries, keys and values are read at, and put back by those that outputs are
written at: one launch, no copies. A window has at most 32² positions, in real models 7² to 16².
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from radio_fast.kernels.attention import HEAD_SPLIT, _add, _scores, _tail
from radio_fast.kernels.configs import Case, precision_of, window_attention_config

NARROW = 1 << 31  # offsets inside a window below it are kept in 32 bits
LOWEST = tl.constexpr(-3.0e38)  # where the largest score starts: −∞ − −∞, were a bias −∞ for a block of keys, is NaN


@triton.jit
def _rows(
    start, stride_h, stride_w, edge_h, edge_w,
    ROWS: tl.constexpr, WINDOW: tl.constexpr, PARTIAL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What lies between a window's corner and each of its positions start … start + ROWS − 1.

    edge − y is the row that y is reflected to, if it is past the map; for y inside, edge − y ≥ y: the smaller is right.
    """
    offs_n = start + tl.arange(0, ROWS)
    y, x = offs_n // WINDOW, offs_n % WINDOW
    if PARTIAL:
        y, x = tl.minimum(y, edge_h - y), tl.minimum(x, edge_w - x)
    if WIDE:
        y, x = y.to(tl.int64), x.to(tl.int64)
    return (y * stride_h + x * stride_w)[:, None]


@triton.jit
def _load(
    ptr, rows, start, S: tl.constexpr, HEAD_DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Both parts, (ROWS, D1) and (ROWS, D2), of a head; without D2 the first twice.

    0 in the columns past HEAD_DIM and, if MASKED, for the positions from S on.
    """
    inside = (start + tl.arange(0, rows.shape[0]) < S)[:, None]
    ptrs = ptr + (rows + tl.arange(0, D1)[None, :])
    x1 = tl.load(ptrs, mask=inside, other=0.0) if MASKED else tl.load(ptrs)
    x2 = x1
    if D2 > 0:
        offs_d = D1 + tl.arange(0, D2)[None, :]
        ptrs = ptr + (rows + offs_d)
        if HEAD_DIM < D1 + D2:
            column = offs_d < HEAD_DIM
            x2 = tl.load(ptrs, mask=inside & column if MASKED else column, other=0.0)
        else:
            x2 = tl.load(ptrs, mask=inside, other=0.0) if MASKED else tl.load(ptrs)
    return x1, x2


@triton.jit
def _block(
    q1, q2, k, v, bias_rows, start, stride_h, stride_w, edge_h, edge_w, bias_scale,
    ROWS: tl.constexpr, S: tl.constexpr, HEAD_DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    WINDOW: tl.constexpr, PARTIAL: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr,
    HAS_BIAS: tl.constexpr, BIAS_PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The scores q·kᵀ + bias·√d of ROWS keys from `start` on, and their values. MASKED: some are past the window."""
    rows = _rows(start, stride_h, stride_w, edge_h, edge_w, ROWS, WINDOW, PARTIAL, WIDE)
    k1, k2 = _load(k, rows, start, S, HEAD_DIM, D1, D2, MASKED)
    v1, v2 = _load(v, rows, start, S, HEAD_DIM, D1, D2, MASKED)
    offs_n = (start + tl.arange(0, ROWS))[None, :]
    if HAS_BIAS:  # asked for before the product, so that it arrives meanwhile
        ptrs = bias_rows + offs_n
        bias = tl.load(ptrs, mask=offs_n < S, other=0.0) if MASKED and not BIAS_PADDED else tl.load(ptrs)
    qk = _scores(q1, q2, k1, k2, start, S, D2, False, PRECISION)
    if HAS_BIAS:
        qk = tl.fma(bias.to(tl.float32), bias_scale, qk)
    if MASKED:  # after the bias, whose padding may hold anything
        qk = tl.where(offs_n < S, qk, float("-inf"))
    return qk, v1, v2


@triton.jit
def _online(acc1, acc2, l_i, m_i, qk, v1, v2, qk_scale, D2: tl.constexpr, PRECISION: tl.constexpr):
    """Add the keys of scores qk, rescaling what was added before to the new maximum."""
    m_new = tl.maximum(m_i, tl.max(qk, 1) * qk_scale)
    alpha = tl.math.exp2(m_i - m_new)
    acc1 *= alpha[:, None]
    if D2 > 0:
        acc2 *= alpha[:, None]
    acc1, acc2, l_i = _add(acc1, acc2, l_i * alpha, qk, m_new, v1, v2, qk_scale, D2, PRECISION)
    return acc1, acc2, l_i, m_new


@triton.jit
def _store(
    out, image, y0, x0, start, head, heads, H, W, acc1, acc2, l_i,
    S: tl.constexpr, HEAD_DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    WINDOW: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Write both parts of acc / l_i for the positions inside the window and the map."""
    offs_m = start + tl.arange(0, acc1.shape[0])
    y, x = y0 + offs_m // WINDOW, x0 + offs_m % WINDOW
    inside = offs_m < S
    if PARTIAL:
        inside = inside & (y < H) & (x < W)
    inside = inside[:, None]
    ptrs = out + (((image * H + y) * W + x) * (heads * HEAD_DIM) + head * HEAD_DIM)[:, None]
    l_i = tl.where(l_i == 0.0, 1.0, l_i)  # the bias has shut out every key: 0
    o = (acc1 / l_i[:, None]).to(out.dtype.element_ty)
    tl.store(ptrs + tl.arange(0, D1)[None, :], o, mask=inside)
    if D2 > 0:
        offs_d = D1 + tl.arange(0, D2)[None, :]
        if HEAD_DIM < D1 + D2:
            inside = inside & (offs_d < HEAD_DIM)
        o = (acc2 / l_i[:, None]).to(out.dtype.element_ty)
        tl.store(ptrs + offs_d, o, mask=inside)


@triton.jit(do_not_specialize=["heads", "H", "W", "keys"])
def _window_attention(
    qkv, bias, out, stride_b, stride_h, stride_w, stride_bias_h, stride_bias_m, heads, H, W, keys, qk_scale, bias_scale,
    HEAD_DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_TAIL: tl.constexpr, WINDOW: tl.constexpr,
    PARTIAL: tl.constexpr, WIDE: tl.constexpr, HAS_BIAS: tl.constexpr, BIAS_PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of a window's head. qk_scale = log2(e) / √d.

    The tiles of a window's head run side by side: K and V, and theirs alone, are in L2 for the second. Then the heads,
    which together read whole lines of the map. The windows share the bias: that of all heads, 2 MB at 16 heads of
    16 × 16, stays in L2 however long the others take.
    """
    S: tl.constexpr = WINDOW * WINDOW
    TILES: tl.constexpr = (S + BLOCK_M - 1) // BLOCK_M
    pid = tl.program_id(0)
    start_m = pid % TILES * BLOCK_M
    head = pid // TILES % heads
    window = pid // TILES // heads
    across = tl.cdiv(W, WINDOW)
    windows = tl.cdiv(H, WINDOW) * across
    image = (window // windows).to(tl.int64)
    y0 = window % windows // across * WINDOW
    x0 = window % across * WINDOW
    if PARTIAL and start_m >= (H - y0) * WINDOW:  # all its queries are below the map
        return
    edge_h, edge_w = 2 * (H - 1 - y0), 2 * (W - 1 - x0)

    q = qkv + image * stride_b + y0.to(tl.int64) * stride_h + x0.to(tl.int64) * stride_w + head * HEAD_DIM
    k = q + heads * HEAD_DIM
    v = k + heads * HEAD_DIM
    bias_rows = bias
    if HAS_BIAS:  # the queries past the window take its last row: no mask for what is never written
        offs_m = tl.minimum(start_m + tl.arange(0, BLOCK_M), S - 1)
        bias_rows += head.to(tl.int64) * stride_bias_h + (offs_m * stride_bias_m)[:, None]
    rows = _rows(start_m, stride_h, stride_w, edge_h, edge_w, BLOCK_M, WINDOW, PARTIAL, WIDE)
    q1, q2 = _load(q, rows, start_m, S, HEAD_DIM, D1, D2, S % BLOCK_M != 0)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    acc2 = tl.zeros([BLOCK_M, D2 if D2 > 0 else 1], tl.float32)

    if S <= BLOCK_N:
        qk, v1, v2 = _block(
            q1, q2, k, v, bias_rows, 0, stride_h, stride_w, edge_h, edge_w, bias_scale,
            BLOCK_N, S, HEAD_DIM, D1, D2, WINDOW, PARTIAL, WIDE, S < BLOCK_N, HAS_BIAS, BIAS_PADDED, PRECISION,
        )  # fmt: skip
        m_i = tl.maximum(tl.max(qk, 1) * qk_scale, LOWEST)
        acc1, acc2, l_i = _add(acc1, acc2, l_i, qk, m_i, v1, v2, qk_scale, D2, PRECISION)
    else:
        m_i = tl.full([BLOCK_M], LOWEST, tl.float32)
        # `keys` is S, but not known before the run: a loop of one block would be taken apart, and with the rest's loads
        # moved before it that spilled.
        whole = keys // BLOCK_N * BLOCK_N if BLOCK_TAIL > 0 else S
        for start_n in tl.range(0, whole, BLOCK_N):
            qk, v1, v2 = _block(
                q1, q2, k, v, bias_rows, start_n, stride_h, stride_w, edge_h, edge_w, bias_scale,
                BLOCK_N, S, HEAD_DIM, D1, D2, WINDOW, PARTIAL, WIDE, False, HAS_BIAS, BIAS_PADDED, PRECISION,
            )  # fmt: skip
            acc1, acc2, l_i, m_i = _online(acc1, acc2, l_i, m_i, qk, v1, v2, qk_scale, D2, PRECISION)
        if BLOCK_TAIL > 0:  # 196 keys are 3 · 64 and 4, for which a block of 16 will do
            for start_n in tl.range(whole, keys, BLOCK_TAIL, num_stages=1):
                qk, v1, v2 = _block(
                    q1, q2, k, v, bias_rows, start_n, stride_h, stride_w, edge_h, edge_w, bias_scale,
                    BLOCK_TAIL, S, HEAD_DIM, D1, D2, WINDOW, PARTIAL, WIDE, S % BLOCK_TAIL > 0, HAS_BIAS, BIAS_PADDED,
                    PRECISION,
                )  # fmt: skip
                acc1, acc2, l_i, m_i = _online(acc1, acc2, l_i, m_i, qk, v1, v2, qk_scale, D2, PRECISION)
    _store(
        out, image, y0, x0, start_m, head, heads, H, W, acc1, acc2, l_i, S, HEAD_DIM, D1, D2, WINDOW, PARTIAL
    )  # fmt: skip


def window_attention(qkv: Tensor, num_heads: int, window: int, bias: Tensor | None, sm: int) -> Tensor:
    """softmax(q·kᵀ / √d + bias)·v for each head of each window, the map continued by reflection where they reach out.

    Args:
        qkv: (B, H, W, 3·heads·d), float16, bfloat16 or float32, d in HEAD_SPLIT; ordered (q, k, v) × heads × d, the
            last axis contiguous, any other strides.
        num_heads: heads.
        window: k, at most 2·H − 1 and 2·W − 1, as no more can be reflected.
        bias: (heads, k², k²), query by key, in qkv's dtype, the last axis contiguous.
        sm: picks the configuration; 80 and newer.

    Returns:
        (B, H, W, heads·d), contiguous, in qkv's dtype; scores, bias, softmax and sums are float32.
    """
    B, H, W, width = qkv.shape
    out = qkv.new_empty((B, H, W, width // 3))
    if out.numel() == 0:
        return out
    head_dim = width // (3 * num_heads)
    if bias is not None and window**2 * bias.stride(1) >= NARROW:
        bias = bias.contiguous()
    constexprs, options = _choose(sm, qkv.element_size(), head_dim, window)
    constexprs |= {
        "PARTIAL": H % window > 0 or W % window > 0,
        "WIDE": window * (qkv.stride(1) + qkv.stride(2)) + width >= NARROW,
        "HAS_BIAS": bias is not None,
        "BIAS_PADDED": bias is not None and _whole_blocks_fit(bias, _padded_keys(constexprs)),
    }
    tiles = triton.cdiv(window**2, constexprs["BLOCK_M"])
    _window_attention[(tiles * num_heads * triton.cdiv(H, window) * triton.cdiv(W, window) * B,)](
        qkv,
        bias,
        out,
        *qkv.stride()[:3],
        *((0, 0) if bias is None else bias.stride()[:2]),
        num_heads,
        H,
        W,
        window**2,
        math.log2(math.e) / math.sqrt(head_dim),
        math.sqrt(head_dim),
        **constexprs,
        **options,
    )
    return out


def _choose(sm: int, dtype_bytes: int, head_dim: int, window: int) -> tuple[dict, dict]:
    """The kernel's constexprs that the shape decides, and its num_warps and num_stages."""
    config = window_attention_config(sm, dtype_bytes, head_dim, window)
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    config["D1"], config["D2"] = HEAD_SPLIT[head_dim]
    S, BLOCK_N = window**2, config["BLOCK_N"]
    config["BLOCK_TAIL"] = _tail(S, BLOCK_N, False) if S > BLOCK_N and S % BLOCK_N else 0
    return config | {"HEAD_DIM": head_dim, "WINDOW": window, "PRECISION": precision_of(dtype_bytes)}, options


def _padded_keys(constexprs: dict) -> int:
    """The keys of all blocks, those past the window included."""
    block = constexprs["BLOCK_TAIL"] or constexprs["BLOCK_N"]
    return triton.cdiv(constexprs["WINDOW"] ** 2, block) * block


def _whole_blocks_fit(bias: Tensor, keys: int) -> bool:
    """Whether each row of the bias can be read up to column `keys`: what is there won't matter, but it must exist."""
    last_row = bias.storage_offset() + (bias.shape[0] - 1) * bias.stride(0) + (bias.shape[1] - 1) * bias.stride(1)
    return (last_row + keys) * bias.element_size() <= bias.untyped_storage().nbytes()


def compile_cases(sm: int) -> list[Case]:
    """For the compile report: E-RADIO's head dimensions and windows, the others' widths, and every flag."""
    cases = []
    for dtype, head_dim, window, flags in _shipped():
        constexprs, options = _choose(sm, 4 if dtype == "fp32" else 2, head_dim, window)
        has_bias = "plain" not in flags
        constexprs |= {"PARTIAL": "partial" in flags, "WIDE": "wide" in flags, "HAS_BIAS": has_bias}
        constexprs["BIAS_PADDED"] = has_bias and "unpadded" not in flags
        signature = {"qkv": f"*{dtype}", "bias": f"*{dtype}", "out": f"*{dtype}"}
        if not has_bias:
            del signature["bias"]
            constexprs |= {"bias": None, "stride_bias_h": 0, "stride_bias_m": 0}
        signature |= {"qk_scale": "fp32", "bias_scale": "fp32"}
        signature |= {name: "i32" for name in _window_attention.arg_names if name not in signature | constexprs}
        label = " ".join((f"{dtype} d={head_dim} k={window}", *flags))
        keys = constexprs["BLOCK_N"] + constexprs["BLOCK_TAIL"]
        macs = 2 * constexprs["BLOCK_M"] * keys * (constexprs["D1"] + constexprs["D2"])
        fn = _window_attention
        cases.append(Case("window_attention", label, fn, signature, constexprs, **options, dot_macs=macs))
    return cases


def _shipped():
    """(dtype, head dim, window, flags) of the compile report's cases."""
    for dtype in ("fp16", "bf16"):
        for window in (7, 8, 14, 16):
            yield dtype, 96, window, ("partial",)
    yield "fp16", 96, 16, ()
    yield "fp16", 96, 14, ("partial", "unpadded", "wide")
    for window in (1, 5, 10):
        yield "fp16", 96, window, ("partial", "unpadded")
    for head_dim in (16, 32, 128):
        yield "fp16", head_dim, 14, ("partial",)
        yield "fp16", head_dim, 16, ("partial",)
    for head_dim in (64, 72, 80):
        yield "fp16", head_dim, 16, ("plain",)
        yield "fp16", head_dim, 14, ("partial", "unpadded")
    for head_dim in HEAD_SPLIT:
        yield "fp32", head_dim, 16, ("partial",)
    for window in (1, 5, 7, 14):
        yield "fp32", 96, window, ("partial", "unpadded")
