"""The CPU kernels: csrc/cpu's shared library through ctypes (csrc/include/radio_fast_cpu.h), on tensors.

They need a CPU with AMX. The library is looked for beside this file, or where RADIO_FAST_CPU_LIBRARY says, and loaded
when it is first wanted.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from radio_fast import native

ABI_VERSION = 3
LIBRARY = "libradio_fast_cpu.so"
REASON = "libradio_fast_cpu.txt"  # the build leaves it in the library's place: why there is none
DTYPES = {torch.bfloat16: 1, torch.float32: 2}
ACTIVATIONS = {None: 0, "gelu": 1}
ERRORS = {1: ValueError, 2: NotImplementedError, 3: MemoryError}  # by rf_cpu_status

_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
ENTRIES = {
    "rf_cpu_abi_version": (_I, []),
    "rf_cpu_last_error": (ctypes.c_char_p, []),
    "rf_cpu_features": (ctypes.c_char_p, []),
    "rf_cpu_linear": (_I, [*[_P] * 5, *[_L] * 7, _I, _I, _I]),
    "rf_cpu_linear_int8": (_I, [*[_P] * 6, *[_L] * 6, _I, _I]),
    "rf_cpu_layer_norm": (_I, [*[_P] * 6, _I, _I, *[_L] * 4, _F, _F, _I]),
    "rf_cpu_attention": (_I, [*[_P] * 3, *[_L] * 9, _I]),
    "rf_cpu_block": (_I, [ctypes.c_char_p]),
}
_BLOCK = struct.Struct("=5q" + "2q2d" * 3 + "3q" * 4 + "9q")  # rf_cpu_block_arguments; a pointer is a q, null is 0
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


def rows_of(x: Tensor) -> Tensor:
    """x as (rows, D), D adjacent and rows a whole number of values apart: a view where it can be one."""
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None) -> Tensor:
    """residual + act(x·weightᵀ + bias).

    Args:
        x: (..., K), bfloat16, K a multiple of 32. weight: (N, K), read where it lies; float32 is rounded as it is read.
            bias: (N) or None; float32 is not copied. activation: None or "gelu", the exact one. residual: (..., N) or
            None.

    Returns:
        (..., N), bfloat16; sums are float32 and rounded once.

    Raises:
        ValueError: K is no multiple of 32. NotImplementedError: the CPU has no AMX. MemoryError.
    """
    N, K = weight.shape
    shape = (*x.shape[:-1], N)
    out = x.new_empty(shape)
    if not out.numel():
        return out
    x = rows_of(x)
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    if bias is not None and (bias.dtype != torch.float32 or not bias.is_contiguous()):
        bias = bias.float().contiguous()
    if residual is not None:
        residual = rows_of(residual)
    _call(
        "rf_cpu_linear",
        *(x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr()),
        *(None if residual is None else residual.data_ptr(), out.data_ptr(), x.shape[0], N, K, x.stride(0)),
        *(weight.stride(0), 0 if residual is None else residual.stride(0), N),
        *(DTYPES[weight.dtype], ACTIVATIONS[activation], torch.get_num_threads()),
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
    x = rows_of(x)
    weight, scale = weight.contiguous(), scale.contiguous()
    if bias is not None and (bias.dtype != torch.float32 or not bias.is_contiguous()):
        bias = bias.float().contiguous()
    if residual is not None:
        residual = rows_of(residual)
    _call(
        "rf_cpu_linear_int8",
        *(x.data_ptr(), weight.data_ptr(), scale.data_ptr(), None if bias is None else bias.data_ptr()),
        *(None if residual is None else residual.data_ptr(), out.data_ptr(), x.shape[0], N, K, x.stride(0)),
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
        *(rows.data_ptr(), None if others is None else others.data_ptr(), weight.data_ptr()),
        *(None if bias is None else bias.data_ptr(), None if y is None else s.data_ptr(), out.data_ptr()),
        *(DTYPES[x.dtype], DTYPES[weight.dtype], *rows.shape, rows.stride(0)),
        *(0 if others is None else others.stride(0), eps, scale, threads),
    )
    return s, out


def attention(
    qkv: Tensor, num_heads: int, cu_seqlens: Tensor | None = None, window: tuple[int, int, int] | None = None
) -> Tensor:
    """softmax(q·kᵀ / √d)·v in each head; see `ops.attention`.

    Args:
        qkv: (B, N, 3·H·d), bfloat16, or (tokens, 3·H·d) of packed images; d a multiple of 8, up to 256.
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
        images, N, stride_b, starts = cu_seqlens.shape[0] - 1, 0, 0, cu_seqlens.data_ptr()
    _, across, side = window or (0, 0, 0)
    _call(
        "rf_cpu_attention",
        *(qkv.data_ptr(), starts, out.data_ptr(), images, N, qkv.shape[:-1].numel(), num_heads),
        *(width // (3 * num_heads), stride_b, qkv.stride(-2), across, side, torch.get_num_threads()),
    )
    return out


def block(
    x: Tensor,
    normed: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scales: Sequence[tuple[float, float]],
    num_heads: int,
    window: tuple[int, int, int] | None = None,
    int8_scales: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor | None]:
    """A transformer block: (its output, the norm after it of that, or None). Every value is what `linear`, `attention`
    and `layer_norm` give.

    Args:
        x: (B, N, D), bfloat16, D and the hidden values multiples of 32. normed: the first norm of x, or None.
        weights, biases: the block's two norms', those of the norm after it if it is wanted, those of qkv, proj, fc1 and
            fc2; contiguous. The weights, and the norms' biases, are all bfloat16, or all float32, which is rounded as
            it is read; the others are float32.
        scales: eps and scale of each norm. window: as for `attention`. int8_scales: none; or of qkv, proj, fc1 and fc2,
            whose weights then are int8, as for `linear_int8`.

    Raises:
        ValueError, NotImplementedError, MemoryError: as there.
    """
    wants_after = len(scales) == 3
    out, after = x.new_empty(x.shape), x.new_empty(x.shape) if wants_after else None
    if not out.numel():
        return out, after
    images, N, D = x.shape
    hidden = (int8_scales[2] if int8_scales else weights[-2]).shape[0]
    workspace = x.new_empty(images * N * (max(3 * D, hidden) + 2 * D))
    _, width, side = window or (0, 0, 0)
    x, normed = x.contiguous(), None if normed is None else normed.contiguous()
    addresses = [0 if t is None else t.data_ptr() for t in (x, normed, out, after, workspace)]
    pairs = [
        (weight.data_ptr(), 0 if bias is None else bias.data_ptr())
        for weight, bias in zip(weights, biases, strict=True)
    ]
    norms = [(*pair, *scale) for pair, scale in zip(pairs, scales, strict=False)]
    if not wants_after:
        norms.append((0, 0, 0.0, 0.0))
    layers = [
        (*pair, scale) for pair, scale in zip(pairs[-4:], [t.data_ptr() for t in int8_scales] or [0] * 4, strict=True)
    ]
    sizes = images, N, D, num_heads, hidden, width, side, DTYPES[weights[0].dtype], torch.get_num_threads()
    _call("rf_cpu_block", _BLOCK.pack(*addresses, *chain(*norms, *layers), *sizes))
    return out, after
