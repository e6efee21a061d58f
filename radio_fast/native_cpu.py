"""The CPU kernels: csrc/cpu's shared library through ctypes (csrc/include/radio_fast_cpu.h), on tensors.

They need a CPU with AMX. The library is looked for beside this file, or where RADIO_FAST_CPU_LIBRARY says, and loaded
when it is first wanted. A tensor whose storage has been emptied is a RuntimeError.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import struct
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from radio_fast import native

ABI_VERSION = 5
LIBRARY = "libradio_fast_cpu.so"
REASON = "libradio_fast_cpu.txt"  # the build leaves it in the library's place: why there is none
DTYPES = {torch.bfloat16: 1, torch.float32: 2}
ACTIVATIONS = {None: 0, "gelu": 1, "swiglu": 2}
ERRORS = {1: ValueError, 2: NotImplementedError, 3: MemoryError}  # by rf_cpu_status

_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
ENTRIES = {
    "rf_cpu_abi_version": (_I, []),
    "rf_cpu_last_error": (ctypes.c_char_p, []),
    "rf_cpu_features": (ctypes.c_char_p, []),
    "rf_cpu_linear": (_I, [*[_P] * 5, *[_L] * 7, *[_I] * 4]),
    "rf_cpu_linear_int8": (_I, [*[_P] * 6, *[_L] * 6, _I, _I]),
    "rf_cpu_layer_norm": (_I, [*[_P] * 6, _I, _I, *[_L] * 4, _F, _F, _I]),
    "rf_cpu_attention": (_I, [*[_P] * 4, _I, *[_L] * 9, _I]),
    "rf_cpu_blocks": (_I, [ctypes.c_char_p, _L]),
}
_BLOCK = struct.Struct("=6q" + "2q2d" * 3 + "3q" * 4 + "11q")  # rf_cpu_block_arguments; a pointer is a q, null is 0
# What oneDNN understands too: whoever takes AMX from it, to compare or to be safe, takes it from these kernels.
MASK, WITH_AMX = "ONEDNN_MAX_CPU_ISA", ("", "ALL", "DEFAULT")

# Every op asks what they say: the dictionary inside is read in 0.1 µs, os.environ in 1.5.
_environment = getattr(os.environ, "_data", os.environ)
_keys = tuple(
    os.environ.encodekey(name) if _environment is not os.environ else name for name in (MASK, "RADIO_FAST_CPU_LIBRARY")
)

_lock = threading.Lock()
_found: dict[str, ctypes.CDLL | str] = {}  # by what RADIO_FAST_CPU_LIBRARY says: the library, or why there is none
_reasons: dict[tuple, str | None] = {}  # by what both variables say


def _load(path: Path, named: bool) -> ctypes.CDLL | str:
    if not path.is_file():
        if named:
            return f"RADIO_FAST_CPU_LIBRARY names no file: {path}"
        note = path.with_name(REASON)
        why = note.read_text(encoding="utf-8").strip() if note.is_file() else f"there is no {path}; {native.REBUILD}"
        return f"the CPU kernels were not built: {why}"
    try:
        if not native._whole(path):
            return f"the CPU kernels are damaged: {path} is cut off; {native.REBUILD}"
        library = ctypes.CDLL(str(path))
        for name, (restype, argtypes) in ENTRIES.items():
            entry = getattr(library, name)
            entry.restype, entry.argtypes = restype, argtypes
    except OSError as error:
        return f"the CPU kernels are damaged: {error}; {native.REBUILD}"
    except AttributeError as error:
        return f"the CPU kernels are stale or another library: {error}; {native.REBUILD}"
    version = library.rf_cpu_abi_version()
    if version != ABI_VERSION:
        return f"the CPU kernels are stale: {path} has interface {version}, not {ABI_VERSION}; {native.REBUILD}"
    return library


def _library() -> ctypes.CDLL | str:
    named = os.fsdecode(_environment.get(_keys[1]) or "")
    found = _found.get(named)
    if found is None:
        with _lock:
            found = _found.get(named)
            if found is None:
                found = _load(Path(named or Path(__file__).with_name(LIBRARY)).absolute(), bool(named))
                _found[named] = found
    return found


def _why_not() -> str | None:
    mask = os.environ.get(MASK, "").upper()
    if mask not in WITH_AMX and "AMX" not in mask:
        return f"{MASK}={mask} takes AMX away"
    library = _library()
    if isinstance(library, str):
        return library
    return None if "amx" in library.rf_cpu_features().decode().split() else "this CPU, or the system, has no AMX"


def why_not_native_cpu() -> str | None:
    """None if the kernels run here, else the reason in one line."""
    said = (_environment.get(_keys[0]), _environment.get(_keys[1]))
    if said not in _reasons:
        _reasons[said] = _why_not()
    return _reasons[said]


def _call(entry: str, *arguments) -> None:
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(library)
    status = getattr(library, entry)(*arguments)
    if status:
        text = library.rf_cpu_last_error().decode(errors="replace")
        raise ERRORS.get(status, RuntimeError)(text or f"{entry} failed with status {status}")


def _address(tensor: Tensor | None) -> int:
    if tensor is None:
        return 0
    address = tensor.data_ptr()
    # Sharded training empties storages: what is left of an address is the offset, far below those of memory.
    if address < 1 << 40 and address == tensor.storage_offset() * tensor.element_size() and tensor.numel():
        raise RuntimeError(f"the memory of a tensor of shape {tuple(tensor.shape)} has been given back")
    return address


def rows_of(x: Tensor) -> Tensor:
    """x as (rows, D), D adjacent and rows a whole number of values apart: a view where it can be one."""
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _operands(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As the linear kernels take them."""
    if bias is not None and (bias.dtype != torch.float32 or not bias.is_contiguous()):
        bias = bias.float().contiguous()
    return rows_of(x), bias, None if residual is None else rows_of(residual)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None) -> Tensor:
    """residual + act(x·weightᵀ + bias).

    Args:
        x: (..., K), bfloat16 or float32. weight: (N, K), in x's dtype, read where it lies; beside bfloat16 float32 too,
            rounded as it is read. bias: (N) or None; float32 is not copied. activation: None; "gelu", the exact one;
            "swiglu", silu(a)·b of the halves (a, b) of the product, N even. residual: (..., N) or None, as it is for
            "swiglu".

    Returns:
        (..., N), of "swiglu" (..., N/2), in x's dtype. bfloat16: sums are float32 and rounded once. float32: sums of
        six products of three bfloat16 parts, all 24 bits of a value; infinities, and what bfloat16 rounds to one, give
        NaN, values below 2⁻¹¹⁰ lose bits.

    Raises:
        ValueError: K is 0. NotImplementedError: the CPU has no AMX. MemoryError.
    """
    N, K = weight.shape
    N = N // 2 if activation == "swiglu" else N
    shape = (*x.shape[:-1], N)
    out = x.new_empty(shape)
    if not out.numel():
        return out
    x, bias, residual = _operands(x, bias, residual)
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    _call(
        "rf_cpu_linear",
        *(_address(x), _address(weight), _address(bias)),
        *(_address(residual), out.data_ptr(), x.shape[0], N, K, x.stride(0)),
        *(weight.stride(0), 0 if residual is None else residual.stride(0), N),
        *(DTYPES[x.dtype], DTYPES[weight.dtype], ACTIVATIONS[activation], torch.get_num_threads()),
    )
    return out


def linear_int8(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None
) -> Tensor:
    """residual + act(s · (q·weightᵀ) · scale + bias), x ≈ s · q with one s a row: see `ops.linear_int8`.

    Args:
        x: (..., K), bfloat16, K up to 131072. weight: of `ops.pack_int8`, contiguous. scale: (N), float32. bias,
            activation, residual: as for `linear`.

    Returns:
        (..., N), bfloat16; the sums of products are exact.

    Raises:
        ValueError: K. NotImplementedError: the CPU has no AMX. MemoryError.
    """
    N, K = scale.shape[0], x.shape[-1]
    out = x.new_empty((*x.shape[:-1], N))
    if not out.numel():
        return out
    x, bias, residual = _operands(x, bias, residual)
    weight, scale = weight.contiguous(), scale.contiguous()
    _call(
        "rf_cpu_linear_int8",
        *(_address(x), _address(weight), _address(scale), _address(bias)),
        *(_address(residual), out.data_ptr(), x.shape[0], N, K, x.stride(0)),
        *(0 if residual is None else residual.stride(0), N, ACTIVATIONS[activation], torch.get_num_threads()),
    )
    return out


def layer_norm(
    x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, scale: float
) -> tuple[Tensor, Tensor]:
    """(s, scale · LayerNorm(s)) with s = x + y, rounded to x's dtype; s is x where y is None.

    Args:
        x, y: (..., D), bfloat16 or float32. weight, bias: (D), in x's dtype.

    Returns:
        Both (..., D); the arithmetic is float32.
    """
    out = x.new_empty(x.shape)
    s = x if y is None else x.new_empty(x.shape)
    if not out.numel():
        return s, out
    rows, others = rows_of(x), None if y is None else rows_of(y)
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    # Below that the threads take longer to start than to work.
    threads = torch.get_num_threads() if out.numel() > 1 << 15 else 1
    _call(
        "rf_cpu_layer_norm",
        *(_address(rows), _address(others), _address(weight)),
        *(_address(bias), None if y is None else s.data_ptr(), out.data_ptr()),
        *(DTYPES[x.dtype], DTYPES[weight.dtype], *rows.shape, rows.stride(0)),
        *(0 if others is None else others.stride(0), eps, scale, threads),
    )
    return s, out


def attention(
    qkv: Tensor, num_heads: int, cu_seqlens: Tensor | None = None, window: tuple[int, int, int] | None = None
) -> Tensor:
    """softmax(q·kᵀ / √d)·v in each head; see `ops.attention`.

    Args:
        qkv: (B, N, 3·H·d), bfloat16 or float32, or (tokens, 3·H·d) of packed images; d a multiple of 8, up to 256.
        cu_seqlens: (images + 1,) int32; wrong values give a wrong result, and touch no other memory.
        window: (h, w, k) or None.

    Returns:
        (B, N, H·d), or (tokens, H·d), contiguous.

    Raises:
        ValueError: the head dim. NotImplementedError: the CPU has no AMX. MemoryError.
    """
    width = qkv.shape[-1]
    shape = (*qkv.shape[:-1], width // 3)
    # What no packed image has is left alone: zeros, not what was in memory.
    out = qkv.new_empty(shape) if cu_seqlens is None else qkv.new_zeros(shape)
    if not out.numel():
        return out
    if qkv.stride(-1) != 1:
        qkv = qkv.contiguous()
    if cu_seqlens is None:
        images, N, stride_b, starts = qkv.shape[0], qkv.shape[1], qkv.stride(0), None
    else:
        cu_seqlens = cu_seqlens.contiguous()
        images, N, stride_b, starts = cu_seqlens.shape[0] - 1, 0, 0, _address(cu_seqlens)
    _, across, side = window or (0, 0, 0)
    _call(
        "rf_cpu_attention",
        *(_address(qkv), starts, None, out.data_ptr(), DTYPES[qkv.dtype], images, N, qkv.shape[:-1].numel(), num_heads),
        *(width // (3 * num_heads), stride_b, qkv.stride(-2), across, side, torch.get_num_threads()),
    )
    return out


def window_attention(qkv: Tensor, num_heads: int, window: int, bias: Tensor | None) -> Tensor:
    """softmax(q·kᵀ / √d + bias)·v in each head, inside windows; see `ops.window_attention`.

    Args:
        qkv: (B, H, W, 3·heads·d), bfloat16 or float32, H and W multiples of the window; d a multiple of 8, up to 256.
        bias: (heads, window², window²), in qkv's dtype, or None.

    Returns:
        (B, H, W, heads·d), contiguous.

    Raises:
        ValueError: the head dim, or windows that do not tile the map. NotImplementedError: the CPU has no AMX.
        MemoryError.
    """
    B, H, W, width = qkv.shape
    if H % window or W % window:
        raise ValueError(f"H and W must be multiples of the window {window}, got {H} × {W}")
    out = qkv.new_empty((B, H, W, width // 3))
    if not out.numel():
        return out
    qkv, bias = qkv.contiguous(), None if bias is None else bias.contiguous()
    _call(
        "rf_cpu_attention",
        *(_address(qkv), None, _address(bias), out.data_ptr(), DTYPES[qkv.dtype], B, H * W, B * H * W),
        *(num_heads, width // (3 * num_heads), H * W * width, width, W, window, torch.get_num_threads()),
    )
    return out


class Norm(NamedTuple):
    """A LayerNorm's parameters, (D) each."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    scale: float


class Layer(NamedTuple):
    """A linear layer's, (out, in) and (out); of an int8 one as for `linear_int8`."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None = None


class BlockParameters(NamedTuple):
    """A transformer block's; contiguous. The weights but int8 ones, and the norms' biases, are all bfloat16, or all
    float32, which beside bfloat16 is rounded as it is read; the layers' biases are float32. hidden: fc2's in.
    activation: of fc1.
    """

    norm1: Norm
    norm2: Norm
    qkv: Layer
    proj: Layer
    fc1: Layer
    fc2: Layer
    num_heads: int
    hidden: int
    activation: str | None


def _pack_norm(norm: Norm | None) -> tuple:
    return (0, 0, 0.0, 0.0) if norm is None else (_address(norm.weight), _address(norm.bias), norm.eps, norm.scale)


def blocks(
    x: Tensor,
    normed: Tensor | None,
    chain: Sequence[BlockParameters],
    after: Norm | None = None,
    window: tuple[int, int, int] | None = None,
    cu_seqlens: Tensor | None = None,
    calls: Sequence[int] = (),
) -> tuple[Tensor, Tensor | None]:
    """Transformer blocks one after another: (the last one's output, `after` of that, or None). Every value is what
    `linear`, `attention` and `layer_norm` give.

    Args:
        x: (B, N, D), bfloat16, or float32 beside weights in float32. normed: the first block's norm1 of it, or None.
        chain: the blocks, one or more. after: the norm after them, in their dtype.
        window: as for `attention`. cu_seqlens: (images + 1,) int32, from 0 to N, beside x (1, N, D) of packed images.
        calls: how many blocks go into each call; all into one.

    Raises:
        ValueError: the head dim, or what cu_seqlens hold. NotImplementedError: the CPU has no AMX. MemoryError.
    """
    out = x.new_empty(x.shape)
    out_normed = None if after is None else x.new_empty(x.shape)
    if not out.numel():
        return out, out_normed
    images, N, D = x.shape
    hidden = max(block.hidden for block in chain)
    workspace = x.new_empty(images * N * (max(3 * D, hidden) + (2 * D if x.dtype == torch.float32 else D)))
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()
        images = cu_seqlens.shape[0] - 1
    _, width, side = window or (0, 0, 0)
    x, normed = x.contiguous(), None if normed is None else normed.contiguous()
    norms = [*(_pack_norm(block.norm1) for block in chain[1:]), _pack_norm(after)]
    passed_on = workspace.data_ptr()  # norm1 of the next block: it starts there with what is free by then
    inputs = (_address(x), _address(normed)), (out.data_ptr(), passed_on)
    threads, packed = torch.get_num_threads(), []
    for i, (block, following) in enumerate(zip(chain, norms, strict=True)):
        wanted = passed_on if i + 1 < len(chain) else _address(out_normed)
        addresses = *inputs[i > 0], out.data_ptr(), wanted, workspace.data_ptr(), _address(cu_seqlens)
        layers = itertools.chain.from_iterable(map(_address, layer) for layer in block[2:6])
        sizes = images, N, D, block.num_heads, block.hidden, width, side
        kinds = ACTIVATIONS[block.activation], DTYPES[x.dtype], DTYPES[block.norm1.weight.dtype], threads
        both = *_pack_norm(block.norm1), *_pack_norm(block.norm2)
        packed.append(_BLOCK.pack(*addresses, *both, *following, *layers, *sizes, *kinds))
    left = iter(packed)
    for count in calls or (len(packed),):
        _call("rf_cpu_blocks", b"".join(itertools.islice(left, count)), count)
    return out, out_normed
