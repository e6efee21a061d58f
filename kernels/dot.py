"""The matrix product inside kernels: one spelling for the GPU, ahead-of-time compilation and the interpreter."""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

INTERPRET = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a·b, (M, K) × (K, N), accumulated in float32.

    PRECISION matters for float32 operands alone: "tf32x3" (three tensor-core products, error near float32's) or "ieee".
    """
    if INTERPRET:
        # The interpreter multiplies bfloat16 as the integers it keeps them in; in float32 the products are exact.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)
