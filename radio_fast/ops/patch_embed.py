"""Image to block input: normalise, cut into patches, project, add positions, put the prefix in front."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from radio_fast.ops._dispatch import Op, bucket, limit_of, register, sm_of, triton_runs

IMAGE_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) → (B, T, C·p·p), T = H/p · W/p row by row, features ordered (channel, row, column)."""
    B, C, H, W = x.shape
    p = patch_size
    x = x.reshape(B, C, H // p, p, W // p, p)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(B, (H // p) * (W // p), C * p * p)


def patch_embed_ref(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos: Tensor,
    prefix: Tensor,
    patch_size: int,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    if image.dtype == torch.uint8:
        image = image.float() / 255
    if mean is not None:
        image = (image.float() - mean) / std
    patches = F.linear(patchify(image.to(weight.dtype), patch_size), weight, bias) + pos
    prefix = prefix.to(patches.dtype).expand(patches.shape[0], -1, -1)
    return torch.cat([prefix, patches], dim=1)


def _limit(image, weight, bias, pos, prefix, patch_size, mean, std) -> str | None:
    p = patch_size
    if image.ndim != 4 or image.shape[1] != 3 or image.shape[2] % p or image.shape[3] % p:
        return f"image must have shape (B, 3, H, W), H and W multiples of {p}, got {tuple(image.shape)}"
    if image.dtype not in IMAGE_DTYPES:
        return f"image must be uint8, float16, bfloat16 or float32, got {image.dtype}"
    if image.device != weight.device:
        return f"image is on {image.device}, the weights on {weight.device}"
    if weight.ndim != 2 or weight.shape[1] != 3 * p * p:
        return f"weight must have shape (D, {3 * p * p}), got {tuple(weight.shape)}"
    D, T = weight.shape[0], image.shape[2] * image.shape[3] // p**2
    if pos.shape != (T, D) or prefix.ndim != 2 or prefix.shape[1] != D:
        return f"pos and prefix must have shapes ({T}, {D}) and (P, {D}), got {tuple(pos.shape)}, {tuple(prefix.shape)}"
    if bias is not None and bias.shape != (D,):
        return f"bias must have shape ({D},), got {tuple(bias.shape)}"
    for name, tensor in (("mean", mean), ("std", std)):
        if tensor is not None and (tensor.numel() != 3 or tensor.dtype != torch.float32):
            return f"{name} must hold 3 float32 values, got {tensor.dtype} {tuple(tensor.shape)}"
    if (mean is None) != (std is None):
        return "mean and std go together"
    return limit_of(weight, bias=bias, pos=pos, prefix=prefix)


def patch_embed(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos: Tensor,
    prefix: Tensor,
    patch_size: int,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """out[:, :P] = prefix;  out[:, P:] = patches((image − mean) / std) · weightᵀ + bias + pos.

    Args:
        image: (B, 3, H, W) with any strides (NCHW or NHWC memory), float in [0, 1] or uint8 (divided by 255); already
            normalised when `mean` is None. H, W multiples of p.
        weight, bias: (D, 3·p·p) and (D) or None, in the model's dtype.
        pos: (T, D), positions of this image size.
        prefix: (P, D), cls tokens and registers; they get no position.
        mean, std: (3, 1, 1) float32, or both None.

    Returns:
        (B, P + T, D). The normalisation is computed in float32 and rounded once, to the model's dtype.
    """
    args = (image, weight, bias, pos, prefix, patch_size, mean, std)
    return PATCH_EMBED(backend, args, {"triton": _limit(*args)})


# -- operator --------------------------------------------------------------------------------------------------


def _kernel(image, weight, bias, pos, prefix, patch_size, mean, std) -> Tensor:
    from radio_fast.kernels import patch_embed

    return patch_embed.patch_embed(image, weight, bias, pos, prefix, patch_size, mean, std, sm_of(image.device))


def _fake(image, weight, bias, pos, prefix, patch_size, mean, std) -> Tensor:
    return weight.new_empty((image.shape[0], prefix.shape[0] + pos.shape[0], weight.shape[0]))


register(
    "patch_embed",
    "(Tensor image, Tensor weight, Tensor? bias, Tensor pos, Tensor prefix, int patch_size, Tensor? mean, Tensor? std)"
    " -> Tensor",
    _fake,
    _kernel,
)


def _key(image, weight, bias, pos, prefix, patch_size, mean, std) -> str:
    rows = bucket(image.shape[0] * pos.shape[0])
    return f"to {str(weight.dtype).removeprefix('torch.')} p{patch_size} d{weight.shape[0]} rows{rows}"


PATCH_EMBED = Op("patch_embed", patch_embed_ref, _key)
PATCH_EMBED.add("triton", torch.ops.radio_fast.patch_embed, triton_runs(needs_dot=True))
