"""The shapes that RADIO models really have."""

from __future__ import annotations

import os
from typing import NamedTuple


class Shape(NamedTuple):
    """One model at one image size and batch."""

    model: str
    embed_dim: int
    num_heads: int
    mlp_hidden: int
    patch_size: int
    pixels: int
    tokens: int  # prefix and patches
    batch: int

    @property
    def id(self) -> str:
        return f"{self.model}-{self.pixels}px-b{self.batch}"

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def rows(self) -> int:
        return self.batch * self.tokens


# model: D, heads, hidden, patch, prefix tokens
MODELS = {
    "ViT-B": (768, 12, 3072, 16, 8),
    "ViT-L": (1024, 16, 4096, 16, 8),
    "SO400M": (1152, 16, 4304, 16, 10),
    "ViT-H": (1280, 16, 5120, 16, 10),
    "ViT-g": (1536, 24, 6144, 16, 8),
}
# RADIO_FAST_BENCH=full takes them all; without it a run of all files fits into ten minutes.
FULL = os.environ.get("RADIO_FAST_BENCH") == "full"
SIZES = (224, 432, 512, 1024) if FULL else (224, 512)
BATCHES = (1, 32) if FULL else (32,)


def shapes(models: tuple[str, ...] = tuple(MODELS), batches: tuple[int, ...] = BATCHES) -> list[Shape]:
    """Every model × size × batch, but for batches that would not fit beside their activations (1024 px × 32)."""
    out = []
    for model in models:
        D, heads, hidden, p, prefix = MODELS[model]
        for pixels in SIZES:
            for batch in batches:
                if pixels < 1024 or batch == 1:
                    tokens = (pixels // p) ** 2 + prefix
                    out.append(Shape(model, D, heads, hidden, p, pixels, tokens, batch))
    return out
