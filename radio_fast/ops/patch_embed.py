"""Image to block input: normalise, cut into patches, project, add positions, put the prefix in front."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) → (B, T, C·p·p), T = H/p · W/p row by row, features ordered (channel, row, column)."""
    B, C, H, W = x.shape
    p = patch_size
    x = x.reshape(B, C, H // p, p, W // p, p)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(B, (H // p) * (W // p), C * p * p)


def patch_embed(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos: Tensor,
    prefix: Tensor,
    patch_size: int,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    """out[:, :P] = prefix;  out[:, P:] = patches((image − mean) / std) · weightᵀ + bias + pos.

    Args:
        image: (B, 3, H, W), any float dtype, in [0, 1] (already normalised when `mean` is None); H, W multiples of p.
        weight, bias: (D, 3·p·p) and (D) or None, in the model's dtype.
        pos: (T, D), positions of this image size.
        prefix: (P, D), cls tokens and registers; they get no position.
        mean, std: (3, 1, 1) float32, or both None.

    Returns:
        (B, P + T, D). The normalisation is computed in float32 and rounded once, to the model's dtype.
    """
    if mean is not None:
        image = (image.float() - mean) / std
    patches = F.linear(patchify(image.to(weight.dtype), patch_size), weight, bias) + pos
    prefix = prefix.to(patches.dtype).expand(patches.shape[0], -1, -1)
    return torch.cat([prefix, patches], dim=1)
