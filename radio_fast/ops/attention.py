"""Scaled dot-product attention on packed q, k, v: over whole images, packed images of several sizes, or windows."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from radio_fast import native, native_cpu
from radio_fast.ops._dispatch import (
    CPU_DTYPES,
    HALF,
    Op,
    bucket,
    cpu_limit,
    limit_of,
    native_path,
    register,
    register_cpu,
    sm_of,
    triton_runs,
    why_not_native,
    why_not_native_cpu,
)
from radio_fast.ops._providers import add_attention_providers

HEAD_DIMS = (16, 32, 64, 72, 80, 96, 128)


def to_windows(x: Tensor, h: int, w: int, k: int) -> Tensor:
    """(B, h·w, D) row by row → (B·windows, k·k, D), windows row by row and so are the tokens in each."""
    D = x.shape[-1]
    return x.reshape(-1, h // k, k, w // k, k, D).transpose(2, 3).reshape(-1, k * k, D)


def from_windows(x: Tensor, h: int, w: int, k: int) -> Tensor:
    """The inverse of `to_windows`."""
    D = x.shape[-1]
    return x.reshape(-1, h // k, w // k, k, k, D).transpose(2, 3).reshape(-1, h * w, D)


def attention_ref(
    qkv: Tensor,
    num_heads: int,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    window: tuple[int, int, int] | None = None,
    seqlens: tuple[int, ...] | None = None,
) -> Tensor:
    if cu_seqlens is not None:
        runs = [(N, len([*same])) for N, same in groupby(cu_seqlens.diff().tolist() if seqlens is None else seqlens)]
        parts = qkv.split([N * images for N, images in runs])
        parts = [part.unflatten(0, (run[1], run[0])) for part, run in zip(parts, runs, strict=True)]
        return torch.cat([attention_ref(part, num_heads).flatten(0, 1) for part in parts])
    if window is not None:
        return from_windows(attention_ref(to_windows(qkv, *window), num_heads), *window)
    B, N, width = qkv.shape
    q, k, v = qkv.reshape(B, N, 3, num_heads, width // (3 * num_heads)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, width // 3)


def _limit(qkv: Tensor, num_heads: int, cu_seqlens: Tensor | None, window: tuple[int, int, int] | None) -> str | None:
    rank = 3 if cu_seqlens is None else 2
    if qkv.ndim != rank or num_heads < 1 or qkv.shape[-1] % (3 * num_heads):
        shape = "(B, N, 3·H·d)" if rank == 3 else "(tokens, 3·H·d) beside cu_seqlens"
        return f"qkv must have shape {shape} with H = {num_heads} heads, got {tuple(qkv.shape)}"
    head_dim = qkv.shape[-1] // (3 * num_heads)
    if head_dim not in HEAD_DIMS:
        return f"head dim must be one of {', '.join(map(str, HEAD_DIMS))}, got {head_dim}"
    if cu_seqlens is not None:
        if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.shape[0] < 2:
            return f"cu_seqlens must be int32 of shape (images + 1,), got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        if cu_seqlens.device != qkv.device:
            return f"cu_seqlens is on {cu_seqlens.device}, expected {qkv.device}"
        if window is not None:
            return "cu_seqlens and window can't be combined"
    if window is not None:
        if len(window) != 3 or not all(isinstance(side, int) and side >= 1 for side in window):
            return f"window must be (h, w, k), positive numbers, got {window}"
        h, w, k = window
        if k < 1 or h % k or w % k or h * w != qkv.shape[1]:
            return f"window (h, w, k) needs h·w = {qkv.shape[1]} tokens and k dividing both sides, got {window}"
    return limit_of(qkv)


def attention(
    qkv: Tensor,
    num_heads: int,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    window: tuple[int, int, int] | None = None,
    seqlens: tuple[int, ...] | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """softmax(q·kᵀ / √d)·v for each head, not causal (Vaswani et al., 2017).

    Args:
        qkv: (B, N, 3·H·d), ordered (q, k, v) × heads × d, as one linear layer leaves it; read in place, only the last
            axis must be contiguous. Packed images: (tokens, 3·H·d).
        cu_seqlens: (images + 1,) int32, where each packed image begins: 0, …, tokens. None: B images of N tokens.
        max_seqlen: the longest packed image's tokens; read off `cu_seqlens`, at the cost of a synchronisation, if None.
        window: (h, w, k): the N = h·w tokens are a grid, row by row, and attend inside windows of k × k.
        seqlens: each packed image's tokens, for plain PyTorch, which else reads them off `cu_seqlens` as well.

    Returns:
        (B, N, H·d), or (tokens, H·d), in qkv's dtype; the softmax is float32.
    """
    limit = native_limit = _limit(qkv, num_heads, cu_seqlens, window)
    if limit is None and qkv.shape[-1] // (3 * num_heads) not in native.HEAD_DIMS:
        native_limit = f"head dim must be one of {', '.join(map(str, native.HEAD_DIMS))}"
    elif limit is None and window is not None and window[2] > native.MAX_WINDOW:
        native_limit = f"windows may have 1…{native.MAX_WINDOW} positions a side, got {window[2]}"
    foreign = limit
    if cu_seqlens is not None or window is not None:
        foreign = "packed images and windows are not for it"
    elif limit is None and qkv.stride(-1) != 1:
        foreign = "qkv's last axis must be adjacent"
    limits = dict.fromkeys(ATTENTION.implementations, foreign) | {"triton": limit, "cuda": native_limit}
    limits["reference"] = None
    if limit is None and qkv.device.type == "cpu":
        limits["cpu"] = cpu_limit(CPU_DTYPES, qkv, cu_seqlens)
    else:
        limits["cpu"] = limit
    if max_seqlen is not None and (not isinstance(max_seqlen, int) or not 0 < max_seqlen < 1 << 31) and qkv.numel():
        raise ValueError(f"max_seqlen must be the longest packed image's tokens, got {max_seqlen!r}")
    if seqlens is not None:
        if cu_seqlens is None:
            raise ValueError("seqlens go with cu_seqlens")
        images, tokens = cu_seqlens.shape[0] - 1, qkv.shape[0]
        if len(seqlens) != images or sum(seqlens) != tokens:
            raise ValueError(f"seqlens must have the {images} packed images' tokens, {tokens} together, got {seqlens}")
    return ATTENTION(backend, (qkv, num_heads, cu_seqlens, max_seqlen, window, seqlens), limits)


# -- implementations -------------------------------------------------------------------------------------------


def _key(
    qkv: Tensor,
    num_heads: int,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    window: tuple | None,
    seqlens: tuple | None,
) -> str | None:
    """Packed images are not measured: their lengths vary from call to call."""
    if cu_seqlens is not None or qkv.ndim != 3:
        return None
    B, N, width = qkv.shape
    shape = f"n{bucket(N)}" if window is None else f"n{N} window{window[2]}"
    return f"d{width // (3 * num_heads)} heads{bucket(B * num_heads)} {shape}"


def _call(operator) -> Callable[..., Tensor]:
    def run(
        qkv: Tensor,
        num_heads: int,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        window: tuple | None,
        seqlens: tuple | None,
    ) -> Tensor:
        if cu_seqlens is not None and max_seqlen is None:
            max_seqlen = int(cu_seqlens.diff().max())
        return operator(qkv, num_heads, cu_seqlens, max_seqlen or 0, list(window or ()))

    return run


def _kernel(qkv: Tensor, num_heads: int, cu_seqlens: Tensor | None, max_seqlen: int, window: list[int]) -> Tensor:
    from radio_fast.kernels import attention

    if qkv.stride(-1) != 1:
        qkv = qkv.contiguous()
    return attention.attention(qkv, num_heads, cu_seqlens, max_seqlen, tuple(window) or None, sm_of(qkv.device))


def _native(qkv: Tensor, num_heads: int, cu_seqlens: Tensor | None, max_seqlen: int, window: list[int]) -> Tensor:
    if qkv.numel() == 0:
        return qkv.new_empty((*qkv.shape[:-1], qkv.shape[-1] // 3))
    library, path = native.library(), native_path(qkv.device)
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    if window:  # a map without a bias
        h, w, k = window
        return library.window_attention(qkv.unflatten(1, (h, w)), num_heads, k, arch=path).flatten(1, 2)
    return library.attention(qkv, num_heads, cu_seqlens, max_seqlen, arch=path)


for _name, _implementation in (("attention", _kernel), ("attention_cuda", _native)):
    register(
        _name,
        "(Tensor qkv, int num_heads, Tensor? cu_seqlens, int max_seqlen, int[] window) -> Tensor",
        lambda qkv, num_heads, cu_seqlens, max_seqlen, window: qkv.new_empty((*qkv.shape[:-1], qkv.shape[-1] // 3)),
        _implementation,
    )


def _cpu(
    qkv: Tensor,
    num_heads: int,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    window: tuple | None,
    seqlens: tuple | None,
) -> Tensor:
    return _attention_cpu(qkv, num_heads, cu_seqlens, list(window or ()))


_attention_cpu = register_cpu(
    "attention_cpu",
    "(Tensor qkv, int num_heads, Tensor? cu_seqlens, int[] window) -> Tensor",
    lambda qkv, num_heads, cu_seqlens, window: qkv.new_empty((*qkv.shape[:-1], qkv.shape[-1] // 3)),
    native_cpu.attention,
)

ATTENTION = Op("attention", attention_ref, _key, truth=torch.float32)  # in float64 the scores would be in memory
ATTENTION.add("triton", _call(torch.ops.radio_fast.attention), triton_runs(needs_dot=True))
# The extension has no tensor cores for float32: a simple kernel, by name or by measurement.
ATTENTION.add("cuda", _call(torch.ops.radio_fast.attention_cuda), why_not_native, shipped=HALF)
ATTENTION.add("cpu", _cpu, why_not_native_cpu, shipped=CPU_DTYPES)
add_attention_providers(ATTENTION)
