"""Which tiles each kernel runs with, by architecture, dtype and shape.

One function an op. Each reads a table of rows, the first that fits is taken. The compile report (`python -m
bench.compile_report`) compiles every row for its architectures and shows registers, spills and shared memory.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple


class Case(NamedTuple):
    """One compilation for the report: a kernel with a shipped configuration, on types that stand for its inputs.

    signature: parameter name → Triton type ("*fp16", "i32", "fp32", …); constexprs: parameter name → value.
    dot_macs: multiply-adds of all `dot` calls in the kernel's text, each counted once for one program; 0: no dot.
    """

    op: str
    label: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    dot_macs: int = 0


def precision_of(dtype_bytes: int) -> str:
    """How float32 operands are multiplied: never in plain TF32."""
    return "tf32x3" if dtype_bytes == 4 else "ieee"


# -- linear, ln_linear -----------------------------------------------------------------------------------------


class LinearRow(NamedTuple):
    """Tiles for M up to `max_m` rows. For SwiGLU, which has two accumulators, BLOCK_N is halved.

    SPLIT: pieces the epilogue is done in. per_sm: programs that share an SM. rate: speed of the product against the
    first row of unlimited M (est.: from the operand bytes a tile needs per multiply-add; not measured).
    """

    max_m: float
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    SPLIT: int
    per_sm: int
    rate: float


ANY = float("inf")
# fmt: off
LINEAR: dict[tuple[str, int], tuple[LinearRow, ...]] = {  # (what tl.dot becomes, bytes of the dtype)
    #                     M ≤    M    N    K  warps stages split per_sm rate
    ("mma", 2): (  # sm_80…89, 120: at most 58 KB, so that two programs share 100 KB and their epilogues overlap
        LinearRow(16,   16,  32, 128, 4, 4, 1, 2, 1.0),
        LinearRow(64,   64,  32,  64, 4, 4, 1, 2, 1.0),
        LinearRow(ANY, 128, 128,  32, 4, 4, 2, 2, 1.0),
        LinearRow(ANY,  64, 128,  32, 4, 4, 2, 2, 0.8),
        LinearRow(ANY,  64,  64,  32, 4, 4, 1, 2, 0.6),
    ),
    ("mma", 4): (
        LinearRow(16,   16,  32,  64, 4, 3, 1, 2, 1.0),
        LinearRow(64,   64,  32,  32, 4, 3, 1, 2, 1.0),
        LinearRow(ANY, 128,  64,  32, 8, 3, 2, 1, 1.0),
        LinearRow(ANY,  64,  64,  32, 4, 3, 2, 2, 0.8),
    ),
    ("wgmma", 2): (
        LinearRow(16,   16,  32, 256, 4, 5, 1, 1, 1.0),
        LinearRow(64,   64,  32, 128, 4, 6, 1, 1, 1.0),
        LinearRow(ANY, 128, 256,  64, 8, 4, 4, 1, 1.0),
        LinearRow(ANY, 128, 128,  64, 4, 3, 4, 2, 0.85),
        LinearRow(ANY,  64, 128,  64, 4, 4, 2, 2, 0.7),
        LinearRow(ANY,  64,  64,  64, 4, 5, 1, 2, 0.45),
    ),
    ("wgmma", 4): (
        LinearRow(16,   16,  32,  64, 4, 4, 1, 1, 1.0),
        LinearRow(64,   64,  32,  32, 4, 4, 1, 1, 1.0),
        LinearRow(ANY, 128, 128,  32, 8, 3, 4, 1, 1.0),
        LinearRow(ANY,  64,  64,  32, 4, 3, 2, 2, 0.6),
    ),
    ("tcgen05", 2): (
        LinearRow(16,   16,  32, 256, 4, 5, 1, 1, 1.0),
        LinearRow(64,   64,  32, 128, 4, 6, 1, 1, 1.0),
        LinearRow(ANY, 128, 256,  64, 8, 4, 4, 1, 1.0),
        LinearRow(ANY, 128, 128,  64, 4, 3, 4, 2, 0.8),
        LinearRow(ANY, 128,  64,  64, 4, 4, 2, 2, 0.5),
    ),
    ("tcgen05", 4): (
        LinearRow(16,   16,  32,  64, 4, 4, 1, 1, 1.0),
        LinearRow(64,   64,  32,  32, 4, 4, 1, 1, 1.0),
        LinearRow(ANY, 128, 128,  32, 8, 3, 4, 1, 1.0),
        LinearRow(ANY, 128,  64,  32, 4, 3, 2, 2, 0.6),
    ),
}
SM_COUNT = {80: 108, 86: 84, 87: 16, 89: 128, 90: 132, 100: 148, 103: 148, 110: 20, 120: 170, 121: 48}
# fmt: on


def linear_rows(sm: int, dtype_bytes: int, tma: bool) -> tuple[LinearRow, ...]:
    """`tma`: x and weight can be read through tensor descriptors; what can't be takes the rows of sm_80 everywhere."""
    dot = "mma" if sm < 90 or sm >= 120 or not tma else "wgmma" if sm < 100 else "tcgen05"
    return LINEAR[dot, dtype_bytes]


@cache
def linear_config(sm: int, dtype_bytes: int, M: int, N: int, activation: str | None, tma: bool) -> dict[str, Any]:
    """For few rows the tile that fits them; else the one that is through first: waves of tiles × their area / rate.

    N: columns of the output. Returns BLOCK_*, SPLIT, num_warps, num_stages; per_sm; tma: whether to use descriptors.
    """
    rows = linear_rows(sm, dtype_bytes, tma)
    row = rows[0]
    columns = 2 * N if activation == "swiglu" else N
    if M > rows[0].max_m:

        def time_of(row: LinearRow) -> float:
            tiles = -(-M // row.BLOCK_M) * -(-columns // row.BLOCK_N)
            return -(-tiles // SM_COUNT.get(sm, 128)) * row.BLOCK_M * row.BLOCK_N / row.rate

        row = rows[1] if rows[1].max_m >= M else min((row for row in rows if row.max_m == ANY), key=time_of)
    config = row._asdict()
    del config["max_m"], config["rate"]
    config["BLOCK_N"] //= 2 if activation == "swiglu" else 1
    return config | {"tma": tma and 90 <= sm < 120}


# -- layer_norm ------------------------------------------------------------------------------------------------

LAYER_NORM = (  # D up to, warps: 16 values a thread (two 16-byte loads in fp16), 32 for the widest
    (512, 1),
    (1024, 2),
    (2048, 4),
    (4096, 8),
    (16384, 16),
)


def layer_norm_config(sm: int, dtype_bytes: int, D: int) -> dict[str, int]:
    """Memory-bound on every architecture: what counts is loads in flight, so one table serves all.

    Narrow rows share a warp, and a warp's rows need no shared memory.
    """
    for up_to, num_warps in LAYER_NORM:
        if up_to >= D:
            block_d = max(16, 1 << (D - 1).bit_length())
            return {"BLOCK_M": max(1, min(16, 512 // block_d)), "BLOCK_D": block_d, "num_warps": num_warps}
    raise ValueError(f"layer_norm takes at most {LAYER_NORM[-1][0]} channels, got {D}")


# -- pos_embed -------------------------------------------------------------------------------------------------


def pos_embed_config(sm: int, dtype_bytes: int, D: int) -> dict[str, int]:
    """Memory-bound, and once per image size: 16 values a thread. RADIO's widths are multiples of 128."""
    block_d = min(256, max(16, 1 << (D - 1).bit_length()))
    return {"BLOCK_M": min(64, 2048 // block_d), "BLOCK_D": block_d, "num_warps": 4}


# -- attention -------------------------------------------------------------------------------------------------


def attention_config(sm: int, dtype_bytes: int, head_dim: int, N: int) -> dict[str, int]:
    if N <= 272 and dtype_bytes == 2:
        pieces = {208: (128, 64, 16), 256: (128, 128, 0), 272: (128, 128, 16)}
        N1, N2, N3 = next(p for up, p in pieces.items() if N <= up)
        return {"BLOCK_M": 64, "N1": N1, "N2": N2, "N3": N3, "ONLINE": N > 208, "num_warps": 4, "num_stages": 1}
    return {"BLOCK_M": 64, "BLOCK_N": 32 if dtype_bytes == 4 else 64, "num_warps": 4, "num_stages": 2}
