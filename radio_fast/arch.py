"""GPU architectures: compute capability → name, what Triton makes of `tl.dot`, on-chip memory.

Read by path from setup.py: imports nothing of this package and not torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Arch:
    """One compute capability.

    `dot` is what `tl.dot` becomes: "fma" (no tensor cores), "mma" (mma.sync), "wgmma" or "tcgen05". `shared_memory` is
    the most a block may ask for, in bytes (CUDA C++ programming guide, compute capabilities).
    """

    sm: int
    gpus: str
    dot: str
    shared_memory: int
    bf16: bool = True
    fp8: bool = False

    @property
    def tensor_core_dot(self) -> bool:
        return self.dot != "fma"


# fmt: off
ARCHS: dict[int, Arch] = {
    arch.sm: arch
    for arch in (
        Arch(70, "V100", "fma", 96 << 10, bf16=False),
        Arch(72, "Jetson Xavier", "fma", 96 << 10, bf16=False),
        Arch(75, "T4, RTX 20", "fma", 64 << 10, bf16=False),
        Arch(80, "A100", "mma", 163 << 10),
        Arch(86, "A10, RTX 30", "mma", 99 << 10),
        Arch(87, "Jetson Orin", "mma", 163 << 10),
        Arch(88, "Jetson Orin", "mma", 99 << 10),
        Arch(89, "L4, L40, RTX 40", "mma", 99 << 10, fp8=True),
        Arch(90, "H100, H200", "wgmma", 227 << 10, fp8=True),
        Arch(100, "B200", "tcgen05", 227 << 10, fp8=True),
        Arch(103, "B300", "tcgen05", 227 << 10, fp8=True),
        Arch(110, "Jetson Thor", "tcgen05", 227 << 10, fp8=True),
        Arch(120, "RTX 50", "mma", 99 << 10, fp8=True),
        Arch(121, "DGX Spark", "mma", 99 << 10, fp8=True),
    )
}
# fmt: on


def arch_of(major: int, minor: int) -> Arch:
    """The row for a compute capability; for one newer than the table the newest row of its generation or before.

    RADIO_FAST_ARCH=80 (any sm in the table) makes a newer GPU take an older one's path.

    Raises:
        ValueError: RADIO_FAST_ARCH is no sm in the table or newer than the GPU; or the GPU is older than all of them.
    """
    sm = 10 * major + minor
    forced = os.environ.get("RADIO_FAST_ARCH")
    if forced:
        if not forced.isdecimal() or int(forced) not in ARCHS:
            raise ValueError(f"RADIO_FAST_ARCH must be one of {', '.join(map(str, ARCHS))}, got {forced!r}")
        if int(forced) > sm:
            raise ValueError(f"RADIO_FAST_ARCH={forced} asks for a newer GPU than this sm_{sm}")
        sm = int(forced)
    known = [number for number in ARCHS if number <= sm]
    if not known:
        raise ValueError(f"sm_{sm} is older than all supported GPUs (sm_{min(ARCHS)} and newer)")
    return ARCHS[max(known)]
