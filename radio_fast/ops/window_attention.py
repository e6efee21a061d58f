"""Attention inside square windows of a feature map, with a bias on the scores."""

from __future__ import annotations

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
from radio_fast.ops.attention import HEAD_DIMS

MAX_WINDOW = 32  # k⁴ entries of bias a head: 1024² here


def reflected(size: int, window: int, device: torch.device) -> Tensor:
    """0 … size − 1, then back from size − 2 on, up to the next multiple of `window`: padding by reflection."""
    index = torch.arange(-(-size // window) * window, device=device)
    return torch.where(index < size, index, 2 * (size - 1) - index)


def window_attention_ref(qkv: Tensor, num_heads: int, window: int, bias: Tensor | None = None) -> Tensor:
    B, H, W, width = qkv.shape
    k, d = window, width // (3 * num_heads)
    if H % k:
        qkv = qkv.index_select(1, reflected(H, k, qkv.device))
    if W % k:
        qkv = qkv.index_select(2, reflected(W, k, qkv.device))
    rows, columns = qkv.shape[1] // k, qkv.shape[2] // k
    q, k_, v = (
        qkv.reshape(B, rows, k, columns, k, 3, num_heads, d)
        .permute(5, 0, 1, 3, 6, 2, 4, 7)
        .reshape(3, B * rows * columns, num_heads, k * k, d)
    )
    y = F.scaled_dot_product_attention(q, k_, v, attn_mask=None if bias is None else bias.unsqueeze(0))
    y = y.view(B, rows, columns, num_heads, k, k, d).permute(0, 1, 4, 2, 5, 3, 6)
    return y.reshape(B, rows * k, columns * k, num_heads * d)[:, :H, :W].contiguous()


def _check(qkv: Tensor, num_heads: int, window: int, bias: Tensor | None) -> None:
    """What no implementation can do.

    Raises:
        ValueError: the shapes contradict each other, or the window's padding reaches past what can be reflected.
    """
    if isinstance(window, bool) or not isinstance(window, int) or not 1 <= window <= MAX_WINDOW:
        raise ValueError(f"window must be a number of positions in 1…{MAX_WINDOW}, got {window!r}")
    if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f"num_heads must be a positive number, got {num_heads!r}")
    if qkv.ndim != 4 or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(f"qkv must have shape (B, H, W, 3·{num_heads}·d), got {tuple(qkv.shape)}")
    for name, size in zip("HW", qkv.shape[1:3], strict=True):
        if -size % window > max(size - 1, 0):
            raise ValueError(
                f"window {window} is too large for a map with {name} = {size}: reflection pads it by at most "
                f"{max(size - 1, 0)} positions"
            )
    if bias is not None and bias.shape != (num_heads, window**2, window**2):
        raise ValueError(f"bias must have shape {(num_heads, window**2, window**2)}, got {tuple(bias.shape)}")
    if bias is not None and (bias.dtype != qkv.dtype or bias.device != qkv.device):
        raise ValueError(f"bias is {bias.dtype} on {bias.device}, expected {qkv.dtype} on {qkv.device} like qkv")


def window_attention(
    qkv: Tensor, num_heads: int, window: int, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """softmax(q·kᵀ / √d + bias)·v for each head, among the positions of each window (Liu et al., 2021, not shifted).

    Windows of k × k positions cover the map from its top left corner. Where they reach past its right or bottom edge
    the map is continued by reflection (position W + i is W − 2 − i): those positions are keys and values like any
    other, and have no output.

    Args:
        qkv: (B, H, W, 3·heads·d), channels ordered (q, k, v) × heads × d, as a linear layer leaves them on a
            channels-last map; read in place, only the last axis must be contiguous.
        window: k, 1…32, at most 2·H − 1 and 2·W − 1.
        bias: (heads, k², k²), query by key, both row by row in the window, in qkv's dtype; any strides. Rows laid out
            by `padded_bias` are read faster.

    Returns:
        (B, H, W, heads·d), contiguous, in qkv's dtype; scores, bias, softmax and sums are float32.

    Raises:
        ValueError: window or shapes are off, or the backend asked for can't run.
    """
    _check(qkv, num_heads, window, bias)
    head_dim = qkv.shape[-1] // (3 * num_heads)
    limit = native_limit = cpu = limit_of(qkv, bias=bias)
    if limit is None and qkv.device.type == "cpu":
        cpu = _cpu_limit(qkv, num_heads, window, bias)
    if head_dim not in HEAD_DIMS:
        limit = f"head dim must be one of {', '.join(map(str, HEAD_DIMS))}, got {head_dim}"
    if head_dim not in native.HEAD_DIMS:
        native_limit = f"head dim must be one of {', '.join(map(str, native.HEAD_DIMS))}, got {head_dim}"
    limits = {"triton": limit, "cuda": native_limit, "cpu": cpu}
    return WINDOW_ATTENTION(backend, (qkv, num_heads, window, bias), limits)


def _cpu_limit(qkv: Tensor, num_heads: int, window: int, bias: Tensor | None) -> str | None:
    _, H, W, width = qkv.shape
    if H % window or W % window:
        return f"H and W must be multiples of the window {window}, got {H} × {W}"
    if width // (3 * num_heads) not in HEAD_DIMS:
        return f"head dim must be one of {', '.join(map(str, HEAD_DIMS))}, got {width // (3 * num_heads)}"
    return cpu_limit(CPU_DTYPES, qkv, bias)


def padded_bias(bias: Tensor) -> Tensor:
    """The same (heads, k², k²) in rows that begin at multiples of 64 entries: k² = 49 is odd, and its rows unaligned.

    The padding is zeros; it belongs to the tensor's memory, so that kernels may read whole blocks.
    """
    heads, rows, columns = bias.shape
    room = bias.new_zeros(heads, rows, -(-columns // 64) * 64)
    room[..., :columns] = bias
    return room[..., :columns]


# -- operator --------------------------------------------------------------------------------------------------


def _kernel(qkv: Tensor, num_heads: int, window: int, bias: Tensor | None) -> Tensor:
    from radio_fast.kernels import window_attention

    if qkv.stride(-1) != 1:
        qkv = qkv.contiguous()
    if bias is not None and bias.stride(-1) != 1:
        bias = bias.contiguous()
    return window_attention.window_attention(qkv, num_heads, window, bias, sm_of(qkv.device))


def _native(qkv: Tensor, num_heads: int, window: int, bias: Tensor | None) -> Tensor:
    if qkv.numel() == 0:
        return qkv.new_empty((*qkv.shape[:-1], qkv.shape[-1] // 3))
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    if bias is not None and bias.stride(-1) != 1:
        bias = bias.contiguous()
    return native.library().window_attention(qkv, num_heads, window, bias, arch=native_path(qkv.device))


for _name, _implementation in (("window_attention", _kernel), ("window_attention_cuda", _native)):
    register(
        _name,
        "(Tensor qkv, int num_heads, int window, Tensor? bias) -> Tensor",
        lambda qkv, num_heads, window, bias: qkv.new_empty((*qkv.shape[:-1], qkv.shape[-1] // 3)),
        _implementation,
    )


_window_attention_cpu = register_cpu(
    "window_attention_cpu",
    "(Tensor qkv, int num_heads, int window, Tensor? bias) -> Tensor",
    lambda qkv, num_heads, window, bias: qkv.new_empty((*qkv.shape[:-1], qkv.shape[-1] // 3)),
    native_cpu.window_attention,
)


def _key(qkv: Tensor, num_heads: int, window: int, bias: Tensor | None) -> str:
    B, H, W, width = qkv.shape
    count = B * num_heads * -(-H // window) * -(-W // window)
    return f"d{width // (3 * num_heads)} window{window} count{bucket(count)}{' bias' * (bias is not None)}"


WINDOW_ATTENTION = Op("window_attention", window_attention_ref, _key)
WINDOW_ATTENTION.add("triton", torch.ops.radio_fast.window_attention, triton_runs(needs_dot=True))
WINDOW_ATTENTION.add("cuda", torch.ops.radio_fast.window_attention_cuda, why_not_native, shipped=HALF)
WINDOW_ATTENTION.add("cpu", _window_attention_cpu, why_not_native_cpu, shipped=CPU_DTYPES)
