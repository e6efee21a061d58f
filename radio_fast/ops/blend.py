"""The mean of two feature maps, one of them perhaps still at half the size with four positions in its channels."""

from __future__ import annotations

import torch
from torch import Tensor

from radio_fast.ops._dispatch import Op, bucket, limit_of, register, sm_of, triton_runs


def pixel_shuffle(x: Tensor) -> Tensor:
    """(B, h, w, 2·2·C), channels ordered (row, column, C) → (B, 2h, 2w, C)."""
    B, h, w, width = x.shape
    return x.reshape(B, h, w, 2, 2, width // 4).transpose(2, 3).reshape(B, 2 * h, 2 * w, width // 4)


def blend_ref(x: Tensor, skip: Tensor) -> Tensor:
    x = x if x.shape == skip.shape else pixel_shuffle(x)
    return torch.lerp(x, skip.to(x.dtype), 0.5).contiguous()  # their dtypes differ under autocast


def blend(x: Tensor, skip: Tensor, *, backend: str = "auto") -> Tensor:
    """0.5·x + 0.5·skip.

    Args:
        x: (B, H, W, C), or (B, H/2, W/2, 4·C): its channels are then 2 × 2 positions, ordered (row, column, C), as a
            transposed convolution of kernel and stride 2, done as a linear layer, leaves them.
        skip: (B, H, W, C). Both any strides.

    Returns:
        (B, H, W, C), contiguous, in x's dtype; the kernel's arithmetic is float32.

    Raises:
        ValueError: the shapes are neither, or the backend asked for can't run.
    """
    B, H, W, C = skip.shape if skip.ndim == 4 else 4 * (-1,)
    halved = H % 2 == 0 and W % 2 == 0 and x.shape == (B, H // 2, W // 2, 4 * C)
    if x.ndim != 4 or (x.shape != skip.shape and not halved):
        raise ValueError(
            f"x and skip must have shapes (B, H, W, C) both, or (B, H/2, W/2, 4·C) and (B, H, W, C), "
            f"got {tuple(x.shape)} and {tuple(skip.shape)}"
        )
    return BLEND(backend, (x, skip), {"triton": limit_of(x, skip=skip)})


# -- operator --------------------------------------------------------------------------------------------------


def _kernel(x: Tensor, skip: Tensor) -> Tensor:
    from radio_fast.kernels import blend

    return blend.blend(x, skip, sm_of(x.device))


register("blend", "(Tensor x, Tensor skip) -> Tensor", lambda x, skip: skip.new_empty(skip.shape), _kernel)


def _key(x: Tensor, skip: Tensor) -> str:
    return f"c{skip.shape[-1]} rows{bucket(skip.shape[:-1].numel())}{' shuffled' * (x.shape != skip.shape)}"


BLEND = Op("blend", blend_ref, _key, batched=(0, 1))
BLEND.add("triton", torch.ops.radio_fast.blend, triton_runs(needs_dot=False))
