"""The feature normalizers of `radio_v2.5-h-norm`: whitening rotations on patch tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FeatureNormalizer(nn.Module):
    """(x − mean) · txᵀ on features (B, T, D)."""

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("tx", torch.eye(dim))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) @ self.tx.T


class IntermediateFeatureNormalizer(nn.Module):
    """y = (x − means[i]) · rotationᵀ and a factor alphas[i] for the patch tokens after block i.

    `rotation` is (D, D), or (L, D, D) with one per block.
    """

    def __init__(self, depth: int, dim: int, rotation_per_block: bool):
        super().__init__()
        self.register_buffer("alphas", torch.ones(depth))
        self.register_buffer("means", torch.zeros(depth, dim))
        shape = (depth, dim, dim) if rotation_per_block else (dim, dim)
        self.register_buffer("rotation", torch.zeros(shape))

    def normalize(self, x: Tensor, index: int, rotation_index: int) -> Tensor:
        """y for patch tokens (B, T, D) after block `index`, turned by the rotation of block `rotation_index`."""
        rotation = self.rotation[rotation_index] if self.rotation.ndim == 3 else self.rotation
        return (x - self.means[index]) @ rotation.T
