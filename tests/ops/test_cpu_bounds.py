"""The CPU kernels touch no memory beside their arguments and results: these lie at pages that may not be touched.

NaNs around an argument show what is used of them, not what is only read; a process that reads beyond a mapping ends.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from radio_fast import native_cpu, ops
from radio_fast.native_cpu import BlockParameters, Layer, Norm

BF16 = torch.bfloat16
ROOT = Path(__file__).resolve().parents[2]
PAGE = 1 << 16
READ_WRITE, PRIVATE_ANONYMOUS = 3, 0x22
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mmap.restype = ctypes.c_void_p
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Fence:
    """Makes tensors that end where a forbidden page begins, or begin where one ends; none is freed."""

    def __init__(self, at_end: bool):
        self.at_end = at_end

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, apart: int = 0) -> torch.Tensor:
        """`apart`: values between its last axis's rows, of which none follow the last one."""
        strides = [1]
        for i, side in enumerate(reversed(shape[1:])):
            strides.insert(0, strides[0] * side + (apart if i == 0 else 0))
        values = 1 + sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True))
        size = values * dtype.itemsize
        room = -(-size // PAGE) * PAGE
        base = libc.mmap(None, room + 2 * PAGE, READ_WRITE, PRIVATE_ANONYMOUS, -1, 0)
        for page in (base, base + PAGE + room):
            if libc.mprotect(page, PAGE, 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        first = base + PAGE + (room - size if self.at_end else 0)
        ctypes.memset(first, 0xFF, size)  # NaN
        return torch.frombuffer((ctypes.c_char * size).from_address(first), dtype=dtype).as_strided(shape, strides)

    def random(self, *shape: int, dtype: torch.dtype = BF16, apart: int = 0) -> torch.Tensor:
        return self.empty(shape, dtype, apart).copy_(torch.randn(shape) / shape[-1] ** 0.5)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)

    def new_empty(self, like: torch.Tensor, shape) -> torch.Tensor:
        return self.empty((shape,) if isinstance(shape, int) else tuple(shape), like.dtype)


def linear(make: Fence):
    for x_dtype, dtype in ((BF16, BF16), (BF16, torch.float32), (torch.float32, torch.float32)):
        sizes = (1, 1, 1, 0), (17, 33, 50, 3), (33, 64, 96, 0), (16, 47, 801, 7), (206, 70, 1024, 0), (401, 33, 45, 3)
        for M, N, K, apart in sizes:
            bias = make.random(2 * N, dtype=torch.float32)
            weight = make.random(2 * N, K, dtype=dtype, apart=apart)
            x, residual = (make.random(M, width, dtype=x_dtype, apart=apart) for width in (K, 2 * N))
            yield native_cpu.linear(x, weight, bias, "gelu", residual)
            yield native_cpu.linear(x, weight, bias, "swiglu", None)
            yield native_cpu.linear(x, weight[:N], None, None, residual[:, :N])


def linear_int8(make: Fence):
    for M, N, K, apart in ((1, 1, 1, 0), (17, 33, 50, 3), (33, 64, 128, 0), (206, 70, 1601, 0), (790, 70, 65, 5)):
        weight = make.keep(ops.pack_int8(torch.randint(-127, 128, (N, K), dtype=torch.int8)))
        scale, bias = make.random(N, dtype=torch.float32), make.random(N, dtype=torch.float32)
        x, residual = make.random(M, K, apart=apart), make.random(M, N, apart=apart)
        yield native_cpu.linear_int8(x, weight, scale, bias, "gelu", residual)


def layer_norm(make: Fence):
    for dtype in (BF16, torch.float32):
        for rows, D, apart in ((1, 1, 0), (17, 33, 5), (3, 64, 0)):
            x, y = make.random(rows, D, dtype=dtype, apart=apart), make.random(rows, D, dtype=dtype)
            weight, bias = make.random(D, dtype=dtype), make.random(D, dtype=dtype)
            yield from native_cpu.layer_norm(x, y, weight, bias, 1e-6, 1.0)
            yield native_cpu.layer_norm(x, None, weight, None, 1e-6, 1.0)[1]


def attention(make: Fence):
    for dtype in (BF16, torch.float32):
        for N, d, apart in ((1, 8, 0), (33, 24, 3), (300, 72, 0)):
            yield native_cpu.attention(make.random(2, N, 3 * 2 * d, dtype=dtype, apart=apart), 2)
        starts = make.keep(torch.tensor([0, 0, 1, 34, 34], dtype=torch.int32))
        yield native_cpu.attention(make.random(34, 3 * 2 * 40, dtype=dtype, apart=3), 2, starts)
        for k, H, W in ((1, 2, 1), (3, 3, 6), (7, 14, 7), (17, 17, 17)):
            bias = make.random(2, k**2, k**2, dtype=dtype)
            yield native_cpu.window_attention(make.random(1, H, W, 3 * 2 * 40, dtype=dtype), 2, k, bias)


def blocks(make: Fence):
    D, heads, hidden = 72, 3, 77
    for dtype in (BF16, torch.float32):
        norm = Norm(make.random(D, dtype=dtype), make.random(D, dtype=dtype), 1e-6, 1.0)
        shapes = (3 * D, D), (D, D), (2 * hidden, D), (D, hidden)
        layers = [Layer(make.random(*s, dtype=dtype), make.random(s[0], dtype=torch.float32)) for s in shapes]
        block = BlockParameters(norm, norm, *layers, heads, hidden, "swiglu")
        for starts in (None, make.keep(torch.tensor([0, 1, 1, 33], dtype=torch.int32))):
            yield from native_cpu.blocks(make.random(1, 33, D, dtype=dtype), None, [block, block], norm, None, starts)
        x, normed = make.random(2, 6, D, dtype=dtype), make.random(2, 6, D, dtype=dtype)
        yield native_cpu.blocks(x, normed, [block], None, (2, 3, 1))[0]


def main() -> None:
    for at_end in (True, False):
        make = Fence(at_end)
        torch.Tensor.new_empty = lambda like, shape, make=make: make.new_empty(like, shape)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for kernel in (linear, linear_int8, layer_norm, attention, blocks):
                for i, result in enumerate(kernel(make)):
                    if not result.isfinite().all():
                        raise SystemExit(f"result {i} of {kernel.__name__} is not finite")


@pytest.mark.skipif(native_cpu.why_not_native_cpu() is not None, reason=str(native_cpu.why_not_native_cpu()))
def test_nothing_beyond_a_mapping_is_touched():
    """In a process of its own: it would be killed, and says where."""
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.ops.test_cpu_bounds"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


if __name__ == "__main__":
    main()
