"""The CUDA extension: csrc's shared library through ctypes.

One C library without torch (csrc/include/radio_fast.h) serves every version of it. It is looked for beside this file,
or where RADIO_FAST_LIBRARY says, and loaded when it is first wanted.
"""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path

import torch
from torch import Tensor

ABI_VERSION = 1
LIBRARY = "libradio_fast_cuda.so"
REASON = "libradio_fast_cuda.txt"  # the build leaves it in the library's place: why there is none
REBUILD = "install radio_fast again from its source (`pip install .`, or `pip install -e .`)"
HEAD_DIMS = (16, 32, 64, 72, 80, 96)
MAX_WINDOW = 32
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}

_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
ENTRIES = {
    "rf_last_error": (ctypes.c_char_p, []),
    "rf_architectures": (ctypes.c_char_p, []),
    "rf_window_attention": (_I, [_P, _P, _P, _I, *[_L] * 11, _I, _P]),
    "rf_attention": (_I, [_P, _P, _P, _I, *[_L] * 7, _I, _P]),
}
ERRORS = {1: ValueError, 2: NotImplementedError, 3: RuntimeError}  # by rf_status


class LibraryError(RuntimeError):
    """The CUDA extension can't be used; the message says why and what to do."""


def _whole(path: Path) -> bool:
    """Whether an ELF file reaches to its section headers, its last part.

    Of one that was cut off dlopen maps pages that are not there, and the process dies.
    """
    with path.open("rb") as file:
        head = file.read(64)
        size = os.fstat(file.fileno()).st_size
    if head[:5] != b"\x7fELF\x02":
        return True  # dlopen says what it is
    if len(head) < 64:
        return False
    offset, entry, count = (int.from_bytes(head[a:b], "little") for a, b in ((40, 48), (58, 60), (60, 62)))
    return size >= offset + entry * count


def _dlopen(path: Path) -> ctypes.CDLL:
    if not path.is_file():
        reason = path.with_name(REASON)
        if os.environ.get("RADIO_FAST_LIBRARY"):
            raise LibraryError(f"RADIO_FAST_LIBRARY names no file: {path}")
        why = reason.read_text(encoding="utf-8").strip() if reason.is_file() else f"there is no {path}; {REBUILD}"
        raise LibraryError(f"the CUDA extension was not built: {why}")
    try:
        if not _whole(path):
            raise LibraryError(f"the CUDA extension is damaged: {path} is cut off; {REBUILD}")
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise LibraryError(f"the CUDA extension is damaged: {error}; {REBUILD}") from None


class Library:
    """The entries of a built library, on tensors.

    Raises:
        LibraryError: it is missing, damaged, or of another version than this Python code.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        library = _dlopen(self.path)
        try:
            library.rf_abi_version.restype = ctypes.c_int
            version = library.rf_abi_version()
            if version != ABI_VERSION:
                raise LibraryError(
                    f"the CUDA extension is stale: {self.path} has interface {version}, this radio_fast needs "
                    f"{ABI_VERSION}; {REBUILD}"
                )
            for name, (restype, argtypes) in ENTRIES.items():
                entry = getattr(library, name)
                entry.restype, entry.argtypes = restype, argtypes
        except AttributeError as error:
            raise LibraryError(f"the CUDA extension is stale or another library: {error}; {REBUILD}") from None
        self._window_attention, self._attention = library.rf_window_attention, library.rf_attention
        self._last_error = library.rf_last_error
        self.architectures: str = library.rf_architectures().decode()
        self.emulated = self.architectures == "emulation"  # the tests' build: its kernels run on CPU tensors
        self._tried: dict[int, str | None] = {}

    def why_not_on(self, sm: int) -> str | None:
        """None if the library has code that a GPU of this architecture runs: of its major, no later minor."""
        if any(int(built) // 10 == sm // 10 and int(built) <= sm for built in self.architectures.split()):
            return None
        return f"the CUDA extension was built for {self.architectures.replace(' ', ', ')}, not for sm_{sm}; {REBUILD}"

    def why_not_run(self, device: torch.device) -> str | None:
        """None if the smallest attention is launched on a GPU without an error; tried once.

        Code of CUDA 13, for one, needs a driver as new, which only loading it tells.
        """
        index = torch.cuda.current_device() if device.index is None else device.index
        if index not in self._tried:
            if torch.cuda.is_current_stream_capturing():
                return None
            try:
                with torch.no_grad():
                    self.attention(torch.zeros(1, 1, 3 * 16, dtype=torch.float16, device=f"cuda:{index}"), 1)
                self._tried[index] = None
            except (ValueError, RuntimeError) as error:
                self._tried[index] = f"the CUDA extension does not run on cuda:{index}: {error}"
        return self._tried[index]

    def _check(self, status: int) -> None:
        if status:
            text = self._last_error().decode(errors="replace")
            raise ERRORS.get(status, RuntimeError)(text or f"the CUDA extension failed with status {status}")

    def _place(self, qkv: Tensor, name: str, other: Tensor | None) -> int:
        """qkv's dtype, for the library. Pointers don't say where and what they are: a wrong one would be a crash."""
        device = qkv.device
        if qkv.is_cuda == self.emulated or device.type not in ("cuda", "cpu"):
            place = "the CPU: this library is the emulation" if self.emulated else "a CUDA device"
            raise ValueError(f"qkv is on {device}, must be on {place}")
        dtype = DTYPES.get(qkv.dtype)
        if dtype is None:
            raise ValueError(f"qkv must be float16, bfloat16 or float32, got {qkv.dtype}")
        if qkv.stride(-1) != 1:
            raise ValueError(f"qkv's last axis must be adjacent, its strides are {qkv.stride()}")
        if other is not None:
            if other.device != device:
                raise ValueError(f"{name} is on {other.device}, expected {device} like qkv")
            if other.stride(-1) != 1 and other.shape[-1] > 1:
                raise ValueError(f"{name}'s last axis must be adjacent, its strides are {other.stride()}")
        return dtype

    def _stream(self, qkv: Tensor) -> int:
        return 0 if self.emulated else torch.cuda.current_stream(qkv.device).cuda_stream

    def window_attention(
        self, qkv: Tensor, num_heads: int, window: int, bias: Tensor | None = None, *, arch: int = 0
    ) -> Tensor:
        """softmax(q·kᵀ / √d + bias)·v in each head and each k × k window; see `ops.window_attention`.

        Args:
            qkv: (B, H, W, 3·heads·d), float16, bfloat16 or float32, the last axis adjacent.
            bias: (heads, k², k²) in qkv's dtype, rows adjacent.
            arch: the path to take (70, 75, 80), 0 for the GPU's own.

        Returns:
            (B, H, W, heads·d), contiguous.

        Raises:
            ValueError: shapes, strides, dtypes or devices are off.
            NotImplementedError: the library has no kernel for this GPU, dtype or head dim.
            RuntimeError: the CUDA driver is missing or refused; the message has its text.
        """
        if qkv.ndim != 4 or num_heads < 1 or qkv.shape[-1] % (3 * num_heads):
            raise ValueError(f"qkv must have shape (B, H, W, 3·{num_heads}·d), got {tuple(qkv.shape)}")
        if bias is not None:
            if bias.shape != (num_heads, window**2, window**2):
                raise ValueError(f"bias must have shape {(num_heads, window**2, window**2)}, got {tuple(bias.shape)}")
            if bias.dtype != qkv.dtype:
                raise ValueError(f"bias is {bias.dtype}, expected {qkv.dtype} like qkv")
        dtype = self._place(qkv, "bias", bias)
        if not self.emulated and qkv.device.index != torch.cuda.current_device():
            with torch.cuda.device_of(qkv):
                return self.window_attention(qkv, num_heads, window, bias, arch=arch)
        B, H, W, width = qkv.shape
        out = qkv.new_empty((B, H, W, width // 3))
        if not out.numel():
            return out
        stride_b, stride_h, stride_w, _ = qkv.stride()
        pointer, stride_head, stride_row = (None, 0, 0) if bias is None else (bias.data_ptr(), *bias.stride()[:2])
        status = self._window_attention(
            *(qkv.data_ptr(), pointer, out.data_ptr(), dtype, B, H, W, num_heads, width // (3 * num_heads)),
            *(window, stride_b, stride_h, stride_w, stride_head, stride_row, arch, self._stream(qkv)),
        )
        self._check(status)
        return out

    def attention(
        self, qkv: Tensor, num_heads: int, cu_seqlens: Tensor | None = None, max_seqlen: int = 0, *, arch: int = 0
    ) -> Tensor:
        """softmax(q·kᵀ / √d)·v in each head of each image; see `ops.attention`.

        Args:
            qkv: (B, N, 3·heads·d), or (tokens, 3·heads·d) of packed images; the last axis adjacent.
            cu_seqlens: (images + 1,) int32, where each packed image begins; wrong values give a wrong result, and touch
                no other memory.
            max_seqlen: the longest packed image's tokens.
            arch: the path to take (70, 75, 80), 0 for the GPU's own.

        Returns:
            (B, N, heads·d), or (tokens, heads·d), contiguous.

        Raises:
            ValueError, NotImplementedError, RuntimeError: as `window_attention`.
        """
        packed = cu_seqlens is not None
        if qkv.ndim != 3 - packed or num_heads < 1 or qkv.shape[-1] % (3 * num_heads):
            shape = "(tokens, 3·heads·d)" if packed else "(B, N, 3·heads·d)"
            raise ValueError(f"qkv must have shape {shape} with {num_heads} heads, got {tuple(qkv.shape)}")
        if packed and (cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.shape[0] < 2):
            got = f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
            raise ValueError(f"cu_seqlens must be int32 of shape (images + 1,), got {got}")
        cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
        dtype = self._place(qkv, "cu_seqlens", cu_seqlens)
        if not self.emulated and qkv.device.index != torch.cuda.current_device():
            with torch.cuda.device_of(qkv):
                return self.attention(qkv, num_heads, cu_seqlens, max_seqlen, arch=arch)
        width = qkv.shape[-1]
        head_dim = width // (3 * num_heads)
        out = qkv.new_empty((*qkv.shape[:-1], width // 3))
        if not out.numel():
            return out
        if packed:
            images, N, stride_b, starts = cu_seqlens.shape[0] - 1, max_seqlen, 0, cu_seqlens.data_ptr()
        else:
            images, N, stride_b, starts = qkv.shape[0], qkv.shape[1], qkv.stride(0), None
        status = self._attention(
            *(qkv.data_ptr(), starts, out.data_ptr(), dtype, images, N, qkv.shape[:-1].numel(), num_heads, head_dim),
            *(stride_b, qkv.stride(-2), arch, self._stream(qkv)),
        )
        self._check(status)
        return out


_lock = threading.Lock()
_found: dict[str, Library | LibraryError] = {}  # by what RADIO_FAST_LIBRARY says: every op asks, paths take 7 µs


def library() -> Library:
    """The library, loaded at the first call.

    Raises:
        LibraryError: there is none that can be used; every call says the same, with the reason.
    """
    named = os.environ.get("RADIO_FAST_LIBRARY", "")
    found = _found.get(named)
    if found is None:
        with _lock:
            found = _found.get(named)
            if found is None:
                try:
                    found = Library(Path(named or Path(__file__).with_name(LIBRARY)).absolute())
                except LibraryError as error:
                    found = error
                _found[named] = found
    if isinstance(found, LibraryError):
        raise LibraryError(str(found))
    return found


def why_not_native() -> str | None:
    """None if the library can be used, else the reason in one line. Says nothing of GPUs and the driver."""
    try:
        library()
    except LibraryError as error:
        return " ".join(str(error).split())
    return None
