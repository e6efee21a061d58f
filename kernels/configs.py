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
    """Tiles for M up to `max_m` rows.

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

    def block_n(self, activation: str | None) -> int:
        """SwiGLU has two accumulators: half the columns, but where the tile is small anyway."""
        return self.BLOCK_N // 2 if activation == "swiglu" and self.max_m == ANY else self.BLOCK_N


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
        LinearRow(ANY, 128,  64,  32, 8, 3, 2, 1, 1.0),
        LinearRow(ANY,  64,  64,  32, 4, 3, 2, 2, 0.8),
    ),
    ("wgmma", 2): (
        LinearRow(16,   16,  32, 128, 4, 8, 1, 1, 1.0),
        LinearRow(64,   64,  32, 128, 4, 6, 1, 1, 1.0),
        LinearRow(ANY, 128, 256,  64, 8, 4, 4, 1, 1.0),
        LinearRow(ANY, 128, 128,  64, 8, 3, 4, 2, 0.85),
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
        LinearRow(16,   16,  32, 128, 4, 8, 1, 1, 1.0),
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


def linear_rows(sm: int, dtype_bytes: int, tma: bool, norm: bool = False) -> tuple[LinearRow, ...]:
    """`tma`: x and weight can be read through tensor descriptors; what can't be takes the rows of sm_80 everywhere."""
    if tma and 90 <= sm < 120:
        return LINEAR["wgmma" if sm < 100 else "tcgen05", dtype_bytes]
    rows = LINEAR["mma", dtype_bytes]
    # The registers that ln_linear normalises in are too many for the largest tile (255 and spills) but on sm_80…89.
    return tuple(row for row in rows if row.BLOCK_M * row.BLOCK_N < 128 * 128) if norm and sm >= 90 else rows


@cache
def linear_config(
    sm: int, dtype_bytes: int, M: int, N: int, activation: str | None, tma: bool, norm: bool
) -> dict[str, Any]:
    """For few rows the tile that fits them; else the one that is through first: waves of tiles × their area / rate.

    N: columns of the output. Returns BLOCK_*, SPLIT, num_warps, num_stages; per_sm; tma: whether to use descriptors.
    """
    rows = linear_rows(sm, dtype_bytes, tma, norm)
    columns = 2 * N if activation == "swiglu" else N

    def time_of(row: LinearRow) -> float:
        tiles = -(-M // row.BLOCK_M) * -(-columns // row.BLOCK_N)
        return -(-tiles // SM_COUNT.get(sm, 128)) * row.BLOCK_M * row.BLOCK_N / row.rate

    few = next((row for row in rows if M <= row.max_m < ANY), None)
    row = few or min((row for row in rows if row.max_m == ANY), key=time_of)
    config = row._asdict()
    del config["max_m"], config["rate"]
    return config | {"BLOCK_N": row.block_n(activation), "tma": tma and 90 <= sm < 120}


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

SM_8X, SM_9X, SM_10X, SM_12X = range(80, 90), range(90, 100), range(100, 120), range(120, 130)
LARGE_8X, SMALL_8X = (80, 87), (86, 88, 89)  # 164 and 100 KB of shared memory a multiprocessor
ATTENTION_KEYS = (  # up to how many keys the short kernel keeps on chip, in which blocks; 197 … 208 at 224 pixels
    (64, (64, 0, 0)),
    (80, (64, 16, 0)),
    (128, (128, 0, 0)),
    (144, (128, 16, 0)),
    (192, (128, 64, 0)),
    (208, (128, 64, 16)),
    (256, (128, 64, 64)),
    (272, (128, 128, 16)),
)
ATTENTION_SHORT = (  # sms, KB a multiprocessor, head dim and keys up to, ONLINE: where one softmax a row spills
    (LARGE_8X, 164, 64, 208, False),
    (LARGE_8X, 164, 80, 208, True),
    (LARGE_8X, 164, 64, 272, True),
    (SM_9X, 228, 96, 208, False),
    (SM_9X, 228, 80, 256, True),
    (SM_9X, 228, 64, 272, True),
    (SMALL_8X, 100, 64, 208, False),
    (SMALL_8X, 100, 80, 208, True),
    (SM_12X, 100, 64, 208, False),
    (SM_12X, 100, 80, 208, True),
)
ATTENTION_STREAM = (  # sms, bytes, head dim and N up to: BLOCK_M, BLOCK_N, warps, stages
    (LARGE_8X, 2, 64, 1 << 31, (64, 64, 4, 3)),
    (LARGE_8X, 2, 72, 1 << 31, (64, 64, 4, 2)),  # 3 stages spill
    (LARGE_8X, 2, 128, 1 << 31, (64, 64, 4, 3)),
    (SMALL_8X, 2, 128, 1 << 31, (64, 64, 4, 2)),  # with 3 stages one program fits a multiprocessor instead of three
    (SM_9X, 2, 96, 320, (64, 128, 4, 2)),  # 266 queries fill 5 tiles of 64 or 3 of 128
    (SM_9X, 2, 128, 1 << 31, (128, 128, 8, 2)),
    (SM_10X, 2, 128, 1 << 31, (128, 128, 8, 2)),
    (SM_12X, 2, 128, 1 << 31, (64, 64, 4, 2)),
    # float32 keeps q twice in registers, rounded to TF32 and the rest: larger blocks spill
    (SM_9X, 4, 64, 1 << 31, (64, 32, 4, 2)),
    (SM_9X, 4, 128, 1 << 31, (64, 16, 4, 2)),
    (SM_10X, 4, 96, 1 << 31, (64, 16, 8, 2)),
    (SM_10X, 4, 128, 1 << 31, (16, 32, 4, 2)),
    ((*SM_8X, *SM_12X), 4, 32, 1 << 31, (64, 32, 4, 2)),
    ((*SM_8X, *SM_12X), 4, 80, 1 << 31, (64, 16, 4, 2)),
    ((*SM_8X, *SM_12X), 4, 128, 1 << 31, (16, 32, 4, 2)),
)


def attention_config(sm: int, dtype_bytes: int, head_dim: int, N: int, packed: bool = False) -> dict[str, int]:
    """The short kernel's (it has N1, N2, N3) where two programs fit a multiprocessor, else the streaming kernel's.

    Two, so that one multiplies while the other loads its keys and values. Packed images stream theirs: the short kernel
    would work on the longest one's number of keys for each, and a mask on every block spills.
    """
    blocks = next((blocks for up_to, blocks in ATTENTION_KEYS if up_to >= N), None)
    if blocks and dtype_bytes == 2 and not packed:
        kilobytes = (2 * sum(blocks) + 64) * -(-head_dim // 16) * 16 * dtype_bytes / 1024 + 1  # 1: the driver's own
        for sms, shared, up_to_dim, up_to_keys, online in ATTENTION_SHORT:
            if sm in sms and head_dim <= up_to_dim and up_to_keys >= N and 2 * kilobytes <= shared:
                keys = dict(zip(("N1", "N2", "N3"), blocks, strict=True))
                return {"BLOCK_M": 64, **keys, "ONLINE": online, "num_warps": 4, "num_stages": 1}
    for sms, size, up_to_dim, up_to_n, tiles in ATTENTION_STREAM:
        if sm in sms and dtype_bytes == size and head_dim <= up_to_dim and up_to_n >= N:
            return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), tiles, strict=True))
    raise ValueError(f"attention has no kernel for sm_{sm} and head dim {head_dim}")


# -- patch_embed -----------------------------------------------------------------------------------------------

# fmt: off
PATCH_EMBED = (
    # bytes a value, patches up to, BLOCK_M, BLOCK_N, warps, stages; first that fits
    (2, 1024, 64, 64, 4, 4),  # one 512² image: 16 × 20 programs in ViT-H, where 128 × 128 would leave GPUs half empty
    (2, None, 128, 128, 8, 3),
    (4, None, 64, 64, 4, 3),
)
# fmt: on


def patch_embed_config(
    sm: int, dtype_bytes: int, image_bytes: int, patch_size: int, M: int, stride_iw: int
) -> dict[str, int]:
    """Tiles, and how many pixel rows (each BLOCK_P wide) a step takes: 64 pixels, or 32 where those fit p rows better.

    p = 16: 4 rows, K = 768 in 12 steps. p = 14: 2 rows, K = 672 in 21 steps; 4 rows would make it 768. Channels last
    takes the small tile: its pixels come one by one, and 8192 of them a step spilled on sm_120. A float32 step is 16
    pixels: with 32, mma.sync's three products need more than 255 registers. A float32 image for a 16-bit model gives
    up a stage: it waits in shared memory as float32, 112 KB of it where a block has 99.
    """
    fits = M if stride_iw == 1 else 0
    rows = (row for row in PATCH_EMBED if row[0] == dtype_bytes and (row[1] is None or row[1] >= fits))
    _, _, block_m, block_n, num_warps, num_stages = next(rows)
    num_stages -= image_bytes > dtype_bytes
    block_p = 1 << (patch_size - 1).bit_length()
    block_rows = max(1, (64 if dtype_bytes == 2 else 16) // block_p)
    if patch_size % block_rows and block_rows * block_p > 32:
        block_rows //= 2
    tiles = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_P": block_p, "BLOCK_ROWS": block_rows}
    return tiles | {"num_warps": num_warps, "num_stages": num_stages}


# -- window_attention ------------------------------------------------------------------------------------------

WINDOW_ATTENTION = (  # sms, bytes, head dim up to: BLOCK_M, BLOCK_N, warps, stages
    # At head dim 96 two programs share 100 KB, three Hopper's 228. With 128 queries one 512² image, 64 programs in its
    # last level, would leave more of a GPU idle; what they save, K and V read again, is in L2.
    ((*SM_8X, *SM_9X, *SM_10X, *SM_12X), 2, 128, (64, 64, 4, 2)),
    # float32 keeps q twice in registers, rounded to TF32 and the rest, beside the bias: larger blocks spill
    (SM_9X, 4, 80, (64, 16, 4, 2)),
    (SM_10X, 4, 96, (64, 16, 8, 2)),
    ((*SM_8X, *SM_12X), 4, 32, (64, 32, 4, 2)),
    (LARGE_8X, 4, 64, (64, 16, 4, 2)),
    (LARGE_8X, 4, 80, (32, 16, 4, 2)),
    ((*SMALL_8X, *SM_12X), 4, 80, (64, 16, 4, 2)),
    ((*SM_8X, *SM_12X), 4, 96, (16, 32, 2, 2)),
    ((*SM_8X, *SM_9X, *SM_10X, *SM_12X), 4, 128, (16, 32, 4, 2)),
)


def window_attention_config(sm: int, dtype_bytes: int, head_dim: int, window: int) -> dict[str, int]:
    """Tiles of at most 64 queries and keys: 49 and 64 are one block. A window of up to 5 × 5 takes a tile that fits it.

    Such a tile has a warp for each 16 queries: tensor cores take no fewer, and with more the warps repeat each other.
    """
    fits = max(16, 1 << (window**2 - 1).bit_length())
    for sms, size, up_to_dim, (block_m, block_n, num_warps, num_stages) in WINDOW_ATTENTION:
        if sm in sms and dtype_bytes == size and head_dim <= up_to_dim:
            if fits < block_m:
                block_m, num_warps = fits, fits // 16
            tiles = {"BLOCK_M": block_m, "BLOCK_N": min(block_n, fits)}
            return tiles | {"num_warps": num_warps, "num_stages": num_stages}
    raise ValueError(f"window_attention has no kernel for sm_{sm} and head dim {head_dim}")


# -- blend -----------------------------------------------------------------------------------------------------


def blend_config(sm: int, dtype_bytes: int, C: int) -> dict[str, int]:
    """Memory-bound: 16 values a thread. 256 channels at most, so that any width leaves few threads idle."""
    block_d = min(256, max(16, 1 << (C - 1).bit_length()))
    return {"BLOCK_M": min(64, 2048 // block_d), "BLOCK_D": block_d, "num_warps": 4}
