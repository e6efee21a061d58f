"""Every released version, one row each: where its weights are, what it is, how it may be used."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import NamedTuple


class Resolution(NamedTuple):
    """An image size in pixels."""

    height: int
    width: int


@dataclass(frozen=True)
class Arch:
    """A backbone architecture under the (timm-style) name that checkpoints use."""

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int
    mlp_hidden: int
    image_size: int | None = 224  # the size timm built it for; the position rule looks at it
    mlp_norm: bool = False
    swiglu: bool = False
    dino_student: bool = False  # DINOv2 layout: final norm always, bias in the patch projection
    dynamic_tanh: bool = False


# fmt: off
ARCHS: dict[str, Arch] = {
    #                                     D  depth heads p  hidden
    "vit_tiny_patch14_224":          Arch(192, 12, 3, 14, 768),
    "vit_small_patch14_224":         Arch(384, 12, 6, 14, 1536),
    "vit_base_patch14_224":          Arch(768, 12, 12, 14, 3072),
    "vit_base_patch16_224":          Arch(768, 12, 12, 16, 3072),
    "vit_base_patch16_v2_224":       Arch(768, 12, 12, 16, 3072, image_size=592),
    "vit_large_patch16_224":         Arch(1024, 24, 16, 16, 4096),
    "vit_large_patch16_v2_224":      Arch(1024, 24, 16, 16, 4096, image_size=592),
    "vit_large_dyt_patch16_224":     Arch(1024, 24, 16, 16, 4096, dynamic_tanh=True),
    "vit_huge_patch14_224":          Arch(1280, 32, 16, 14, 5120),
    "vit_huge_patch16_224":          Arch(1280, 32, 16, 16, 5120),
    "vit_huge_patch16_224_mlpnorm":  Arch(1280, 32, 16, 16, 5120, mlp_norm=True),
    "vit_so400m_patch16_224":        Arch(1152, 27, 16, 16, 4304),
    "vit_so400m_v2_patch16_224":     Arch(1152, 27, 16, 16, 4320, image_size=592),
    "vit_giant_patch16_224":         Arch(1536, 40, 24, 16, 6144),
    "vit_bigG_patch14_224":          Arch(1664, 48, 16, 14, 8192),
    "dino_v2_g_student":             Arch(1536, 40, 24, 14, 4096, image_size=None, swiglu=True,
                                          dino_student=True),
}

NSCL = "NSCL (non-commercial)"
OPEN = "NVIDIA Open Model"


@dataclass(frozen=True)
class ViTDet:
    """Which blocks stay global in ViTDet mode: `num_global` of them, or one after every `num_windowed`."""

    num_global: int | None = 4
    num_windowed: int | None = None


@dataclass(frozen=True)
class Version:
    """One released checkpoint.

    `prefix` (cls tokens, registers, summary indices) and the position table's side (max_resolution / patch size) are
    read from the file when there is one; these columns only shape `load(..., random_init=True)`.
    """

    name: str
    repo: str
    file: str
    arch: str
    max_resolution: int
    preferred: int
    vitdet: ViTDet | None  # None: ViTDet mode is refused
    license: str
    prefix: tuple[int, int, tuple[int, ...]]
    adaptors: tuple[str, ...]  # as published; the file has the last word
    dtype: str = "float32"
    aliases: tuple[str, ...] = ()

    @property
    def preferred_resolution(self) -> Resolution:
        return Resolution(self.preferred, self.preferred)

    @property
    def is_eradio(self) -> bool:
        return self.arch.startswith("eradio")


_G4, _G8, _W5 = ViTDet(4), ViTDet(8), ViTDet(None, 5)
_V2, _V25 = ("clip", "dino_v2", "sam"), ("clip", "siglip", "dino_v2", "sam")
_C3, _C4 = ("clip", "siglip2-g", "dino_v2", "sam"), ("siglip2-g", "dino_v3", "sam3")
_P1, _V2_PREFIX, _P4, _P10 = (1, 4, (0,)), (3, 5, (0, 1)), (4, 4, (0, 1, 2)), (3, 7, (0, 1))

_B, _L, _H, _G = (f"vit_{size}_patch16_224" for size in ("base", "large", "huge", "giant"))
_H14, _SO = "vit_huge_patch14_224", "vit_so400m_patch16_224"

_ROWS = (
    Version("radio_v1", "RADIO", "radio_v1.pth.tar", _H14, 1050, 378, _G4, NSCL, (1, 0, (0,)), _V2),
    Version("radio_v2", "RADIO", "radio_v2.pth.tar", _H, 2048, 432, _W5, NSCL, _V2_PREFIX, _V2),
    Version("radio_v2.1", "RADIO", "radio_v2.1_bf16.pth.tar", _H, 2048, 432, _W5, NSCL, _V2_PREFIX, _V2, "bfloat16"),
    Version("radio_v2.5-b", "RADIO", "radio-v2.5-b_half.pth.tar", _B, 2048, 768, _G4, NSCL, _P4, _V25),
    Version("radio_v2.5-l", "RADIO", "radio-v2.5-l_half.pth.tar", _L, 2048, 768, _G4, NSCL, _P4, _V25),
    Version("radio_v2.5-h", "RADIO", "radio_v2.5-h.pth.tar", _H, 2048, 768, _G4, NSCL, _P4, _V25),
    Version("radio_v2.5-h-norm", "RADIO", "radio_v2.5-h-norm.pth.tar", _H, 2048, 768, _G4, NSCL, _P4, _V25),
    Version("radio_v2.5-g", "RADIO", "radio_v2.5-g.pth.tar", "dino_v2_g_student", 1792, 896, _G8, NSCL, _P1, _V25),
    Version("e-radio_v2", "RADIO", "eradio_v2.pth.tar", "eradio_large_fullres_ws16", 2048, 512, None, NSCL,
            (0, 0, ()), (), aliases=("eradio_v1",)),
    Version("c-radio_v2-g", "C-RADIOv2-g", "c-radio_v2-g_half.pth.tar", _G, 2048, 768, _G8, OPEN, _P4, ()),
    Version("c-radio_v2-vlm-h", "C-RADIOv2-VLM-H", "c-radio_v2-vlm-h.pth.tar", _H, 2048, 768, _G8, OPEN, _P4, ()),
    Version("c-radio_v3-b", "C-RADIOv3-B", "c-radio_v3-b_half.pth.tar", _B, 2048, 512, None, OPEN, _P4, _C3),
    Version("c-radio_v3-l", "C-RADIOv3-L", "c-radio-v3_l_half.pth.tar", _L, 2048, 512, None, OPEN, _P4, _C3),
    Version("c-radio_v3-h", "C-RADIOv3-H", "c-radio_v3-h_half.pth.tar", _H, 2048, 512, None, OPEN, _P4, _C3),
    Version("c-radio_v3-g", "C-RADIOv3-g", "c-radio_v3-g_half.pth.tar", _G, 2048, 512, None, OPEN, _P4, _C3),
    Version("c-radio_v4-so400m", "C-RADIOv4-SO400M", "c-radio_v4-so400m_half.pth.tar", _SO, 2048, 512, _G4, OPEN,
            _P10, _C4),
    Version("c-radio_v4-h", "C-RADIOv4-H", "c-radio_v4-h_half.pth.tar", _H, 2048, 512, _G4, OPEN, _P10, _C4),
)
# fmt: on

DEFAULT_VERSION = "c-radio_v4-h"
VERSIONS: dict[str, Version] = {row.name: row for row in _ROWS}
_BY_NAME = VERSIONS | {alias: row for row in _ROWS for alias in row.aliases}


def versions() -> tuple[str, ...]:
    """The version names that `radio_fast.load` knows, oldest family first."""
    return tuple(VERSIONS)


def find_version(name: str | None) -> Version | None:
    """The row for a version name or alias (`""` or None: the default); None when there is no such version."""
    return _BY_NAME.get(name or DEFAULT_VERSION)


def unknown_version(name: str) -> ValueError:
    """The error for a name that is neither a version nor a file: it names the close ones, or all."""
    close = difflib.get_close_matches(name.lower(), _BY_NAME, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"known versions: {', '.join(VERSIONS)}."
    return ValueError(
        f"unknown version {name!r}: {hint} A checkpoint file or a Hugging Face folder can be given by its path, a "
        f"Hugging Face repository as ORGANISATION/NAME."
    )
