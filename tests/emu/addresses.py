"""Run the sanitized emulation on arrays that end where their data do: a bad access ends the process.

`python addresses.py LIBRARY`, with the sanitizer's runtime preloaded. numpy and ctypes alone: torch would take minutes.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys

import numpy as np

library = ctypes.CDLL(sys.argv[1])
library.rf_last_error.restype = ctypes.c_char_p
pointer, size = ctypes.c_void_p, ctypes.c_int64
library.rf_window_attention.argtypes = [pointer] * 3 + [ctypes.c_int] + [size] * 11 + [ctypes.c_int, pointer]
library.rf_attention.argtypes = [pointer] * 3 + [ctypes.c_int] + [size] * 7 + [ctypes.c_int, pointer]
FLOAT16, FLOAT32 = 0, 2


def attention(qkv, heads, bias=None):
    """float64, of one window or image: (S, 3·heads·d) → (S, heads·d)."""
    S, d = qkv.shape[0], qkv.shape[1] // (3 * heads)
    q, k, v = np.moveaxis(qkv.astype(np.float64).reshape(S, 3, heads, d), 1, 0)
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(d) + (0 if bias is None else bias)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v).reshape(S, heads * d)


def exact(shape, dtype):
    """An array on the heap, with nothing behind it."""
    array = np.random.standard_normal(shape).astype(dtype)
    assert array.base is None or array.flags.owndata
    return array


def main() -> None:
    np.random.seed(3)
    count = 0
    for (sm, kind), dim, (H, W, k) in itertools.product(
        ((70, FLOAT16), (75, FLOAT16), (80, FLOAT16), (80, FLOAT32)),
        (16, 72),
        ((5, 9, 7), (9, 8, 8), (4, 4, 1), (9, 6, 9)),
    ):
        dtype, heads = (np.float16, np.float32)[kind == FLOAT32], 2
        os.environ["RF_EMU_ARCH"] = "90"
        qkv, bias = exact((1, H, W, 3 * heads * dim), dtype), exact((heads, k * k, k * k), dtype)
        out = np.full((1, H, W, heads * dim), np.nan, dtype)
        stride = [s // qkv.itemsize for s in qkv.strides[:3]]
        pitch = k * k + k % 2  # even, so that the kernels read pairs; the last row still ends with its last key
        room = exact((heads * k * k - 1) * pitch + k * k, dtype)
        steps = [bias.itemsize * step for step in (pitch * k * k, pitch, 1)]
        np.lib.stride_tricks.as_strided(room, bias.shape, steps)[:] = bias
        status = library.rf_window_attention(
            *(qkv.ctypes.data, room.ctypes.data, out.ctypes.data, kind, 1, H, W, heads, dim, k, *stride),
            *(pitch * k * k, pitch, sm, None),
        )
        assert status == 0, library.rf_last_error().decode()
        mirror = [[*range(n), *range(n - 2, -1, -1)][: -(-n // k) * k] for n in (H, W)]
        for y, x in itertools.product(range(0, H, k), range(0, W, k)):
            rows, columns = mirror[0][y : y + k], mirror[1][x : x + k]
            window = qkv[0][np.ix_(rows, columns)].reshape(k * k, -1)
            truth = attention(window, heads, bias).reshape(k, k, -1)[: H - y, : W - x]
            assert np.abs(out[0, y : y + k, x : x + k] - truth).max() < (2e-5 if kind == FLOAT32 else 8e-3)
        count += 1
    for (sm, kind), dim, N in itertools.product(
        ((70, FLOAT16), (75, FLOAT16), (80, FLOAT16), (80, FLOAT32)), (32, 96), (1, 67)
    ):
        dtype, heads = (np.float16, np.float32)[kind == FLOAT32], 2
        qkv, out = exact((N, 3 * heads * dim), dtype), np.full((N, heads * dim), np.nan, dtype)
        starts = np.array([0, N], np.int32)
        status = library.rf_attention(
            *(
                qkv.ctypes.data,
                starts.ctypes.data,
                out.ctypes.data,
                kind,
                1,
                N,
                N,
                heads,
                dim,
                0,
                qkv.shape[1],
                sm,
                None,
            )
        )
        assert status == 0, library.rf_last_error().decode()
        assert np.abs(out - attention(qkv, heads)).max() < (2e-5 if kind == FLOAT32 else 8e-3)
        for wrong in (
            [0, 10**8],
            [-(10**8), N],
            [N, 0],
            [5 * N, 9 * N],
        ):  # values of the caller's: nothing may be touched
            starts[:] = wrong
            assert not library.rf_attention(
                *(qkv.ctypes.data, starts.ctypes.data, out.ctypes.data, kind, 1, N, N, heads, dim, 0, qkv.shape[1], sm),
                None,
            )
        count += 1
    sys.stdout.write(f"{count} cases without a bad access\n")


if __name__ == "__main__":
    main()
