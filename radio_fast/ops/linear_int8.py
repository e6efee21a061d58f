"""Linear layers in int8: weights scaled per output channel beforehand, each row of x as it comes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from radio_fast import native_cpu
from radio_fast.ops._dispatch import Op, cpu_limit, register_cpu, why_not_native_cpu

LARGEST = 127
TINY = 2.0**-100  # rows without larger values count as zeros
MAX_K = 1 << 17  # 32 bits hold that many products


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """(q, scale) with x ≈ q · scale: scale = max|x| / 127 of each row, q = round(x · (127 / max|x|)), ties to even.

    Args:
        x: (..., K), floating-point.

    Returns:
        q: (..., K), whole numbers in −127…127, float32. scale: (..., 1), float32. Rows without values of 2⁻¹⁰⁰ and more
        count as zeros; the scale of one with NaN or infinity is NaN, its q are zeros.
    """
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True)
    none, finite = largest < TINY, largest.isfinite()
    some = finite & ~none
    q = torch.where(some, torch.round(x * (torch.full_like(largest, LARGEST) / largest)), 0.0)
    return q, torch.where(some, largest / LARGEST, torch.where(none, 0.0, torch.nan))


def packed_shape(N: int, K: int) -> tuple[int, ...]:
    """Of `pack_int8`'s result."""
    return -(-N // 32), -(-K // 64), 2, 16, 64


def pack_int8(weight: Tensor) -> Tensor:
    """A weight (N, K), int8, in the order in which the kernel reads it.

    Returns:
        (⌈N / 32⌉, ⌈K / 64⌉, 2, 16, 64): row 32·p + 16·h + f, column 64·s + 4·r + j at [p, s, h, r, 4·f + j]; what is
        beyond N and K is zero.
    """
    N, K = weight.shape
    padded = F.pad(weight, (0, -K % 64, 0, -N % 32))
    tiles = padded.unflatten(1, (-1, 16, 4)).unflatten(0, (-1, 2, 16))
    return tiles.permute(0, 3, 1, 4, 2, 5).flatten(4).contiguous()


def unpack_int8(packed: Tensor, N: int, K: int) -> Tensor:
    """`pack_int8`'s weight, (N, K)."""
    tiles = packed.unflatten(4, (16, 4)).permute(0, 2, 4, 1, 3, 5)
    return tiles.flatten(3).flatten(0, 2)[:N, :K]


def linear_int8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    activation: str | None = None,
    residual: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """residual + act(s · (q·weightᵀ) · scale + bias), where x ≈ s · q row by row (`quantise`).

    Args:
        x: (..., K), bfloat16 (the kernel), float16 or float32, any strides. weight: int8, `pack_int8` of (N, K), K
            up to 131072. scale: (N), float32. bias: (N), in float32 or x's dtype, or None.
        activation: None or "gelu", the exact one. residual: (..., N), in x's dtype, or None.

    Returns:
        (..., N) in x's dtype. The kernel's sums of products are exact, the reference's float32; what follows is float32
        and rounded once. Rows of x with NaN or infinity give NaN.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit; a gradient would be needed.
    """
    _check(x, weight, scale, bias, activation, residual)
    limit = cpu_limit((torch.bfloat16,), x, weight, scale, bias, residual) if x.device.type == "cpu" else None
    return LINEAR_INT8(backend, (x, weight, scale, bias, activation, residual), {"cpu": limit})


def _check(x, weight, scale, bias, activation, residual) -> None:
    if activation not in (None, "gelu"):
        raise ValueError(f"activation must be None or 'gelu', got {activation!r}")
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"x must be bfloat16, float16 or float32, got {x.dtype}")
    if weight.dtype != torch.int8 or scale.dtype != torch.float32:
        raise ValueError(f"weight must be int8 and scale float32, got {weight.dtype} and {scale.dtype}")
    K = x.shape[-1] if x.ndim else 0
    if not 1 <= K <= MAX_K:
        raise ValueError(f"x must be (..., K) with K in 1…{MAX_K}, got {tuple(x.shape)}")
    if scale.ndim != 1:
        raise ValueError(f"scale must be (N), got {tuple(scale.shape)}")
    N = scale.shape[0]
    packed = packed_shape(N, K)
    if weight.shape != packed:
        raise ValueError(f"weight must be pack_int8 of ({N}, {K}), of shape {packed}, got {tuple(weight.shape)}")
    if bias is not None and (bias.shape != (N,) or bias.dtype not in (torch.float32, x.dtype)):
        raise ValueError(f"bias must be ({N}), float32 or {x.dtype}, got {tuple(bias.shape)} of {bias.dtype}")
    out = (*x.shape[:-1], N)
    if residual is not None and (residual.shape != out or residual.dtype != x.dtype):
        raise ValueError(f"residual must be {out}, {x.dtype}, got {tuple(residual.shape)} of {residual.dtype}")
    tensors = [t for t in (x, weight, scale, bias, residual) if t is not None]
    if any(t.device != x.device for t in tensors):
        raise ValueError(f"all tensors must be on x's device, {x.device}")
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise ValueError("linear_int8 has no gradient: call it under torch.no_grad(), or load the model in bfloat16")


def linear_int8_ref(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    # Not torch._int_mm: without VNNI oneDNN lets sums of two products overflow 16 bits.
    with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
        q, row_scale = quantise(x)
        y = F.linear(q, unpack_int8(weight, scale.shape[0], x.shape[-1]).float()) * row_scale * scale
        y = y if bias is None else y + bias.float()
        y = F.gelu(y) if activation == "gelu" else y
        return (y if residual is None else residual.float() + y).to(x.dtype)


_linear_int8_cpu = register_cpu(
    "linear_int8_cpu",
    "(Tensor x, Tensor weight, Tensor scale, Tensor? bias, str? activation, Tensor? residual) -> Tensor",
    lambda x, weight, scale, bias, activation, residual: x.new_empty((*x.shape[:-1], scale.shape[0])),
    native_cpu.linear_int8,
)


LINEAR_INT8 = Op("linear_int8", linear_int8_ref, lambda *args: None, batched=(0, 5))
LINEAR_INT8.add("cpu", _linear_int8_cpu, why_not_native_cpu, shipped=(torch.bfloat16,))
