"""Image to block input: normalise, cut into patches, project, add positions, put the prefix in front.

For images of one size, or for the patches of images of several sizes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from radio_fast.ops._dispatch import (
    CPU_DTYPES,
    Op,
    bucket,
    cpu_limit,
    limit_of,
    register,
    sm_of,
    triton_runs,
    why_not_native_cpu,
)
from radio_fast.ops.linear import linear

CPU_VALUES = 1 << 20  # of images that are normalised at once: what is made of them on the way stays small
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
    rows: Tensor | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    patches = F.linear(_patches(image, weight.dtype, patch_size, mean, std), weight, bias)
    patches = patches + (pos if rows is None else pos.index_select(0, rows[0]).unsqueeze(1))
    return _with_prefix(patches, prefix, rows, starts)


def _patches(image: Tensor, dtype: torch.dtype, patch_size: int, mean: Tensor | None, std: Tensor | None) -> Tensor:
    """(B, T, 3·p·p) in `dtype`, normalised."""
    if image.dtype == torch.uint8:
        image = image.float() / 255
    if mean is not None:
        image = image.float().sub(mean).div_(std)
    return patchify(image.to(dtype), patch_size)


def _with_prefix(patches: Tensor, prefix: Tensor, rows: Tensor | None, starts: Tensor | None) -> Tensor:
    if rows is not None:
        patches = patches.squeeze(1)
        images, P = starts.shape[0] - 1, prefix.shape[0]
        first = starts[:-1, None] + torch.arange(P, device=starts.device)
        out = patches.new_empty((patches.shape[0] + images * P, patches.shape[1]))
        out = out.index_copy(0, rows[1].long(), patches)
        return out.index_copy(0, first.flatten(), prefix.to(patches.dtype).repeat(images, 1))
    prefix = prefix.to(patches.dtype).expand(patches.shape[0], -1, -1)
    return torch.cat([prefix, patches], dim=1)


def _limit(image, weight, bias, pos, prefix, patch_size, mean, std, rows, starts) -> str | None:
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
    if (rows is None) != (starts is None):
        return "rows and starts go together"
    if rows is not None:
        if T != 1:
            return f"packed patches must have shape (T, 3, {p}, {p}), got {tuple(image.shape)}"
        T = pos.shape[0]
        for name, tensor, shape in (("rows", rows, (2, image.shape[0])), ("starts", starts, starts.shape[:1])):
            if tensor.dtype != torch.int32 or tensor.shape != shape or tensor.device != image.device:
                got = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
                return f"{name} must be int32 of shape {tuple(shape)} on {image.device}, got {got}"
        if not starts.shape[0]:
            return "starts must be of shape (images + 1,), got (0,)"
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
    rows: Tensor | None = None,
    starts: Tensor | None = None,
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
        rows: (2, T) int32 beside patches of several images, `image` (T, 3, p, p): each one's row in pos, which is then
            of any length, and in the result. Their values are not checked.
        starts: (images + 1,) int32 beside rows, where in the result each image begins: with its prefix.

    Returns:
        (B, P + T, D); beside rows (T + images·P, D). The normalisation is computed in float32 and rounded once, to the
        model's dtype.
    """
    args = (image, weight, bias, pos, prefix, patch_size, mean, std, rows, starts)
    limit = cpu = _limit(*args)
    if limit is None and image.device.type == "cpu":
        cpu = cpu_limit(CPU_DTYPES, weight, image, bias, pos, prefix, mean, std, rows, starts)
    return PATCH_EMBED(backend, args, {"triton": limit, "cpu": cpu})


# -- operator --------------------------------------------------------------------------------------------------


def _kernel(image, weight, bias, pos, prefix, patch_size, mean, std, rows=None, starts=None) -> Tensor:
    from radio_fast.kernels import patch_embed

    sm = sm_of(image.device)
    return patch_embed.patch_embed(image, weight, bias, pos, prefix, patch_size, mean, std, rows, starts, sm)


def _fake(image, weight, bias, pos, prefix, patch_size, mean, std, rows=None, starts=None) -> Tensor:
    if rows is not None:
        return weight.new_empty((image.shape[0] + (starts.shape[0] - 1) * prefix.shape[0], weight.shape[0]))
    return weight.new_empty((image.shape[0], prefix.shape[0] + pos.shape[0], weight.shape[0]))


register(
    "patch_embed",
    "(Tensor image, Tensor weight, Tensor? bias, Tensor pos, Tensor prefix, int patch_size, Tensor? mean, Tensor? std,"
    " Tensor? rows=None, Tensor? starts=None) -> Tensor",
    _fake,
    _kernel,
)


def _cpu(image, weight, bias, pos, prefix, patch_size, mean, std, rows, starts) -> Tensor:
    """The plain form with positions added to the product's float32 sums, and a few images normalised at a time."""
    some = max(1, CPU_VALUES // max(1, image[0].numel())) if image.shape[0] else 1
    if image.shape[0] <= some:
        patches = _patches(image, weight.dtype, patch_size, mean, std)
    else:
        patches = weight.new_empty((image.shape[0], image[0].numel() // weight.shape[1], weight.shape[1]))
        for part, few in zip(patches.split(some), image.split(some), strict=True):
            part.copy_(_patches(few, weight.dtype, patch_size, mean, std))
    pos = pos.expand(image.shape[0], -1, -1) if rows is None else pos.index_select(0, rows[0]).unsqueeze(1)
    return _with_prefix(linear(patches, weight, bias, None, pos, backend="cpu"), prefix, rows, starts)


def _key(image, weight, bias, pos, prefix, patch_size, mean, std, rows, starts) -> str | None:
    if rows is not None:
        return None  # only the kernel does it in one
    rows = bucket(image.shape[0] * pos.shape[0])
    return f"to {str(weight.dtype).removeprefix('torch.')} p{patch_size} d{weight.shape[0]} rows{rows}"


PATCH_EMBED = Op("patch_embed", patch_embed_ref, _key)
PATCH_EMBED.add("triton", torch.ops.radio_fast.patch_embed, triton_runs(needs_dot=True))
PATCH_EMBED.add("cpu", _cpu, why_not_native_cpu, shipped=IMAGE_DTYPES)
