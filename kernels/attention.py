"""Attention without a causal mask on packed q, k, v: whole images, packed images of several lengths, windows.

A head dimension that is no power of two is split, 80 = 64 + 16, 72 = 64 + 8 (padded to 16), 96 = 64 + 32: two products
into one accumulator of scores, two accumulators of outputs. Padding to 128 would cost 1.6 times the products for 80.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from radio_fast.kernels.configs import Case, attention_config, precision_of
from radio_fast.kernels.dot import dot

HEAD_SPLIT = {  # head dimension: widths of its two parts, 0: no second one
    16: (16, 0),
    32: (32, 0),
    64: (64, 0),
    72: (64, 16),
    80: (64, 16),
    96: (64, 32),
    128: (128, 0),
}
FILL = 264  # programs that keep a GPU busy: two for each of an H100's 132 multiprocessors


@triton.jit
def _rows(start, stride, grid_width, ROWS: tl.constexpr, WINDOW: tl.constexpr):
    """What lies before ROWS tokens from token `start` on: a 64-bit scalar and, for each, 32 bits inside the block.

    With 64 bits for each row the short kernel spills; the launcher keeps what is inside a block below 2³¹.
    """
    offs_n = tl.arange(0, ROWS)
    if WINDOW > 0:  # no run of rows: WINDOW of them, then on to the grid's next line
        offs_n += start
        return tl.cast(0, tl.int64), (offs_n // WINDOW * grid_width + offs_n % WINDOW)[:, None] * stride
    else:
        return tl.cast(start, tl.int64) * stride, offs_n[:, None] * stride


@triton.jit
def _load(
    ptr, start, N, stride, grid_width,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Both parts, (ROWS, D1) and (ROWS, D2), of a head of ROWS tokens from `start` on; without D2 the first part twice.

    0 in the columns past HEAD_DIM and, if MASKED, for the tokens from N on.
    """
    before, rows = _rows(start, stride, grid_width, ROWS, WINDOW)
    ptrs = ptr + before + (rows + tl.arange(0, D1)[None, :])
    inside = (start + tl.arange(0, ROWS) < N)[:, None]
    x1 = tl.load(ptrs, mask=inside, other=0.0) if MASKED else tl.load(ptrs)
    x2 = x1
    if D2 > 0:
        offs_d = D1 + tl.arange(0, D2)[None, :]
        ptrs = ptr + before + (rows + offs_d)
        if HEAD_DIM < D1 + D2:
            column = offs_d < HEAD_DIM
            x2 = tl.load(ptrs, mask=inside & column if MASKED else column, other=0.0)
        else:
            x2 = tl.load(ptrs, mask=inside, other=0.0) if MASKED else tl.load(ptrs)
    return x1, x2


@triton.jit
def _store(
    out, start, N, stride, grid_width, acc1, acc2, l_i,
    HEAD_DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Write both parts of acc / l_i for the tokens before N."""
    ROWS: tl.constexpr = acc1.shape[0]
    before, rows = _rows(start, stride, grid_width, ROWS, WINDOW)
    inside = (start + tl.arange(0, ROWS) < N)[:, None]
    o = (acc1 / l_i[:, None]).to(out.dtype.element_ty)
    tl.store(out + before + (rows + tl.arange(0, D1)[None, :]), o, mask=inside)
    if D2 > 0:
        offs_d = D1 + tl.arange(0, D2)[None, :]
        if HEAD_DIM < D1 + D2:
            inside = inside & (offs_d < HEAD_DIM)
        o = (acc2 / l_i[:, None]).to(out.dtype.element_ty)
        tl.store(out + before + (rows + offs_d), o, mask=inside)


@triton.jit
def _image(
    qkv, out, cu_seqlens, image, head, stride_b, stride_n, N, H, grid_width, windows,
    HEAD_DIM: tl.constexpr, VARLEN: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Where q and the output of this head of an image (or of a window) begin, and its number of tokens."""
    image = image.to(tl.int64)
    if VARLEN:
        first = tl.load(cu_seqlens + image)
        N = tl.load(cu_seqlens + image + 1) - first
        row = first.to(tl.int64)
        qkv += row * stride_n
    elif WINDOW > 0:  # windows line by line over the grid; an image has windows·WINDOW² tokens
        window = image % windows
        across = grid_width // WINDOW
        corner = (window // across * grid_width + window % across) * WINDOW
        row = image // windows * windows * (WINDOW * WINDOW) + corner
        qkv += image // windows * stride_b + corner * stride_n
    else:
        row = image * N
        qkv += image * stride_b
    return qkv + head * HEAD_DIM, out + row * (H * HEAD_DIM) + head * HEAD_DIM, N


@triton.jit
def _scores(q1, q2, k1, k2, start, N, D2: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """q·kᵀ in float32, (BLOCK_M, keys), of both parts of the head; −∞ for the keys from N on."""
    qk = dot(q1, tl.trans(k1), tl.zeros([q1.shape[0], k1.shape[0]], tl.float32), PRECISION)
    if D2 > 0:
        qk = dot(q2, tl.trans(k2), qk, PRECISION)
    if MASKED:
        qk = tl.where((start + tl.arange(0, k1.shape[0]) < N)[None, :], qk, float("-inf"))
    return qk


@triton.jit
def _add(acc1, acc2, l_i, qk, m_i, v1, v2, qk_scale, D2: tl.constexpr, PRECISION: tl.constexpr):
    """Add the keys of scores qk; m_i: their largest, scaled. exp2, as qk_scale = log2(e) / √HEAD_DIM."""
    p = tl.math.exp2(tl.fma(qk, qk_scale, -m_i[:, None]))
    l_i += tl.sum(p, 1)
    p = p.to(v1.dtype)
    acc1 = dot(p, v1, acc1, PRECISION)
    if D2 > 0:
        acc2 = dot(p, v2, acc2, PRECISION)
    return acc1, acc2, l_i


@triton.jit
def _online(
    acc1, acc2, l_i, m_i, q1, q2, k1, k2, v1, v2, start, N, qk_scale,
    D2: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add more keys, rescaling what was added before to the new maximum."""
    qk = _scores(q1, q2, k1, k2, start, N, D2, MASKED, PRECISION)
    m_new = tl.maximum(m_i, tl.max(qk, 1) * qk_scale)
    alpha = tl.math.exp2(m_i - m_new)
    acc1 *= alpha[:, None]
    if D2 > 0:
        acc2 *= alpha[:, None]
    acc1, acc2, l_i = _add(acc1, acc2, l_i * alpha, qk, m_new, v1, v2, qk_scale, D2, PRECISION)
    return acc1, acc2, l_i, m_new


@triton.jit(do_not_specialize=["tiles", "N", "H", "grid_width", "windows"])
def _attention_stream(
    qkv, out, cu_seqlens, stride_b, stride_n, tiles, N, H, grid_width, windows, qk_scale,
    HEAD_DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
    VARLEN: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of a head against its keys, block by block.

    The tiles of a head run side by side, then the heads of an image: they share K and V in L2.
    """
    pid = tl.program_id(0)
    start_m = pid % tiles * BLOCK_M
    head = pid // tiles % H
    q, out, N = _image(
        qkv, out, cu_seqlens, pid // tiles // H, head, stride_b, stride_n, N, H, grid_width, windows,
        HEAD_DIM, VARLEN, WINDOW,
    )  # fmt: skip
    if start_m >= N:  # past the end of a packed image shorter than the longest
        return
    k = q + H * HEAD_DIM
    v = k + H * HEAD_DIM
    q1, q2 = _load(q, start_m, N, stride_n, grid_width, BLOCK_M, HEAD_DIM, D1, D2, WINDOW, True)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    acc2 = tl.zeros([BLOCK_M, D2 if D2 > 0 else 1], tl.float32)

    # Whole blocks of keys need no mask. The rest (10 keys of 1034) goes through narrower blocks, mostly one.
    whole = N // BLOCK_N * BLOCK_N
    for start_n in tl.range(0, whole, BLOCK_N):
        k1, k2 = _load(k, start_n, N, stride_n, grid_width, BLOCK_N, HEAD_DIM, D1, D2, WINDOW, False)
        v1, v2 = _load(v, start_n, N, stride_n, grid_width, BLOCK_N, HEAD_DIM, D1, D2, WINDOW, False)
        acc1, acc2, l_i, m_i = _online(
            acc1, acc2, l_i, m_i, q1, q2, k1, k2, v1, v2, start_n, N, qk_scale, D2, False, PRECISION
        )
    for start_n in tl.range(whole, N, TAIL, num_stages=1):
        k1, k2 = _load(k, start_n, N, stride_n, grid_width, TAIL, HEAD_DIM, D1, D2, WINDOW, True)
        v1, v2 = _load(v, start_n, N, stride_n, grid_width, TAIL, HEAD_DIM, D1, D2, WINDOW, True)
        acc1, acc2, l_i, m_i = _online(
            acc1, acc2, l_i, m_i, q1, q2, k1, k2, v1, v2, start_n, N, qk_scale, D2, True, PRECISION
        )
    _store(out, start_m, N, H * HEAD_DIM, grid_width, acc1, acc2, l_i, HEAD_DIM, D1, D2, WINDOW)


@triton.jit(do_not_specialize=["parts", "N", "H", "grid_width", "windows"])
def _attention_short(
    qkv, out, cu_seqlens, stride_b, stride_n, parts, N, H, grid_width, windows, qk_scale,
    HEAD_DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK_M: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, ONLINE: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: every `parts`-th tile of BLOCK_M queries of a head; all keys and values stay on chip.

    N1 + N2 + N3 ≥ N keys, 0 for a block that is not needed: 206 = 128 + 64 + 16 − 2. Their scores take one softmax
    for the whole row, or, ONLINE, where so many don't fit in the registers, one a block. cu_seqlens is None.
    """
    pid = tl.program_id(0)
    head = pid // parts % H
    q, out, N = _image(
        qkv, out, cu_seqlens, pid // parts // H, head, stride_b, stride_n, N, H, grid_width, windows,
        HEAD_DIM, False, WINDOW,
    )  # fmt: skip
    k = q + H * HEAD_DIM
    v = k + H * HEAD_DIM
    MASK1: tl.constexpr = N2 == 0  # only the last block has keys past the end
    MASK2: tl.constexpr = N3 == 0
    k11, k12 = _load(k, 0, N, stride_n, grid_width, N1, HEAD_DIM, D1, D2, WINDOW, MASK1)
    if N2 > 0:
        k21, k22 = _load(k, N1, N, stride_n, grid_width, N2, HEAD_DIM, D1, D2, WINDOW, MASK2)
    if N3 > 0:
        k31, k32 = _load(k, N1 + N2, N, stride_n, grid_width, N3, HEAD_DIM, D1, D2, WINDOW, True)
    v11, v12 = _load(v, 0, N, stride_n, grid_width, N1, HEAD_DIM, D1, D2, WINDOW, MASK1)
    if N2 > 0:
        v21, v22 = _load(v, N1, N, stride_n, grid_width, N2, HEAD_DIM, D1, D2, WINDOW, MASK2)
    if N3 > 0:
        v31, v32 = _load(v, N1 + N2, N, stride_n, grid_width, N3, HEAD_DIM, D1, D2, WINDOW, True)

    for start_m in tl.range(pid % parts * BLOCK_M, N, parts * BLOCK_M):
        q1, q2 = _load(q, start_m, N, stride_n, grid_width, BLOCK_M, HEAD_DIM, D1, D2, WINDOW, True)
        l_i = tl.zeros([BLOCK_M], tl.float32)
        acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
        acc2 = tl.zeros([BLOCK_M, D2 if D2 > 0 else 1], tl.float32)
        if ONLINE:
            m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
            acc1, acc2, l_i, m_i = _online(
                acc1, acc2, l_i, m_i, q1, q2, k11, k12, v11, v12, 0, N, qk_scale, D2, MASK1, PRECISION
            )
            if N2 > 0:
                acc1, acc2, l_i, m_i = _online(
                    acc1, acc2, l_i, m_i, q1, q2, k21, k22, v21, v22, N1, N, qk_scale, D2, MASK2, PRECISION
                )
            if N3 > 0:
                acc1, acc2, l_i, m_i = _online(
                    acc1, acc2, l_i, m_i, q1, q2, k31, k32, v31, v32, N1 + N2, N, qk_scale, D2, True, PRECISION
                )
        else:
            s1 = _scores(q1, q2, k11, k12, 0, N, D2, MASK1, PRECISION)
            m_i = tl.max(s1, 1)
            if N2 > 0:
                s2 = _scores(q1, q2, k21, k22, N1, N, D2, MASK2, PRECISION)
                m_i = tl.maximum(m_i, tl.max(s2, 1))
            if N3 > 0:
                s3 = _scores(q1, q2, k31, k32, N1 + N2, N, D2, True, PRECISION)
                m_i = tl.maximum(m_i, tl.max(s3, 1))
            m_i *= qk_scale
            acc1, acc2, l_i = _add(acc1, acc2, l_i, s1, m_i, v11, v12, qk_scale, D2, PRECISION)
            if N2 > 0:
                acc1, acc2, l_i = _add(acc1, acc2, l_i, s2, m_i, v21, v22, qk_scale, D2, PRECISION)
            if N3 > 0:
                acc1, acc2, l_i = _add(acc1, acc2, l_i, s3, m_i, v31, v32, qk_scale, D2, PRECISION)
        _store(out, start_m, N, H * HEAD_DIM, grid_width, acc1, acc2, l_i, HEAD_DIM, D1, D2, WINDOW)


def attention(
    qkv: Tensor,
    num_heads: int,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    window: tuple[int, int, int] | None,
    sm: int,
) -> Tensor:
    """softmax(q·kᵀ / √d)·v for each head of each image, packed image or window.

    Args:
        qkv: (B, N, 3·H·d), or (tokens, 3·H·d) beside cu_seqlens, float16, bfloat16 or float32, d in HEAD_SPLIT; ordered
            (q, k, v) × heads × d, the last axis contiguous, any other strides.
        num_heads: H.
        cu_seqlens: (images + 1,) int32, where each packed image begins; images may be empty.
        max_seqlen: the longest packed image's tokens; what a longer one has beyond is not written.
        window: (h, w, k): the N = h·w tokens are a grid, line by line, and attend inside windows of k × k.
        sm: picks the configuration; 80 and newer.

    Returns:
        (B, N, H·d) or (tokens, H·d), contiguous, in qkv's dtype; scores, softmax and sums are float32.
    """
    out = qkv.new_empty((*qkv.shape[:-1], qkv.shape[-1] // 3))
    head_dim = qkv.shape[-1] // (3 * num_heads)
    grid_width, windows, side = 0, 1, 0
    if cu_seqlens is not None:
        images, N = cu_seqlens.shape[0] - 1, max_seqlen
    elif window is not None:
        h, grid_width, side = window
        windows = (h // side) * (grid_width // side)
        images, N = qkv.shape[0] * windows, side * side
    else:
        images, N = qkv.shape[:2]
    if images * N == 0 or out.numel() == 0:
        return out
    if max(128, side * grid_width) * qkv.stride(-2) >= 1 << 31:  # the kernels' offsets inside a block are 32 bits
        qkv = qkv.contiguous()

    kernel, constexprs, options = _choose(sm, qkv.element_size(), head_dim, N, cu_seqlens is not None, side)
    tiles = triton.cdiv(N, constexprs["BLOCK_M"])
    if kernel is _attention_short:  # as few programs a head as fill the GPU: each loads all its keys
        tiles = min(tiles, triton.cdiv(FILL, images * num_heads))
    kernel[(tiles * num_heads * images,)](
        qkv,
        out,
        cu_seqlens,
        0 if cu_seqlens is not None else qkv.stride(0),
        qkv.stride(-2),
        tiles,
        N,
        num_heads,
        grid_width,
        windows,
        math.log2(math.e) / math.sqrt(head_dim),
        **constexprs,
        **options,
    )
    return out


def _choose(sm: int, dtype_bytes: int, head_dim: int, N: int, varlen: bool, side: int):
    """The kernel, its constexprs, its num_warps and num_stages."""
    config = attention_config(sm, dtype_bytes, head_dim, N, packed=varlen)
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    config["D1"], config["D2"] = HEAD_SPLIT[head_dim]
    config |= {"HEAD_DIM": head_dim, "WINDOW": side, "PRECISION": precision_of(dtype_bytes)}
    if "N1" in config:
        return _attention_short, config, options
    config |= {"VARLEN": varlen, "TAIL": _tail(N, config["BLOCK_N"], varlen)}
    return _attention_stream, config, options


def _tail(N: int, BLOCK_N: int, varlen: bool) -> int:
    """The width of the masked blocks for the keys after the whole blocks: one or two if all images have N tokens.

    At most half of BLOCK_N: a second full-sized block in the program spilled on sm_80.
    """
    if BLOCK_N <= 32:
        return BLOCK_N
    return min(BLOCK_N // 2, 32 if varlen else max(16, triton.next_power_of_2(N % BLOCK_N)))


def compile_cases(sm: int) -> list[Case]:
    """For the compile report: every configuration on RADIO's head dimensions and token counts."""
    cases = []
    for dtype, head_dim, N, varlen, side in _shipped():
        fn, constexprs, options = _choose(sm, 4 if dtype == "fp32" else 2, head_dim, N, varlen, side)
        signature = {"qkv": f"*{dtype}", "out": f"*{dtype}", "cu_seqlens": "*i32", "qk_scale": "fp32"}
        if not varlen:
            del signature["cu_seqlens"]
            constexprs["cu_seqlens"] = None
        signature |= {name: "i32" for name in fn.arg_names if name not in signature | constexprs}
        kind = " packed" if varlen else f" window {side}" if side else ""
        label = f"{fn.__name__[11:]} {dtype} d={head_dim} N={N}{kind}"
        keys = sum(constexprs.get(name, 0) for name in ("N1", "N2", "N3", "BLOCK_N", "TAIL"))
        macs = 2 * constexprs["BLOCK_M"] * keys * (constexprs["D1"] + constexprs["D2"])
        cases.append(Case("attention", label, fn, signature, constexprs, **options, dot_macs=macs))
    return cases


def _shipped():
    """(dtype, head dim, N, packed images, window side) of the compile report's cases."""
    for head_dim in HEAD_SPLIT:
        for N in (206, 266, 1034):
            yield "fp16", head_dim, N, False, 0
    for head_dim in (64, 80):
        for N in (206, 1034):
            yield "bf16", head_dim, N, False, 0
            yield "fp16", head_dim, N, True, 0
        yield "fp16", head_dim, 256, False, 16
    for head_dim in HEAD_SPLIT:
        yield "fp32", head_dim, 1034, False, 0
    yield "fp32", 80, 1034, True, 0
