"""Images of several sizes in one call: what they may be, and their patches one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import _register_namedtuple

from radio_fast.layers.block import call_rowwise
from radio_fast.layers.packing import Packing
from radio_fast.models.adaptors import to_nchw
from radio_fast.models.normalizers import FeatureNormalizer


class PackedOutput(NamedTuple):
    """summary (B, S·D) and each image's features, (T, D) for "NLC" or (D, h, w) for "NCHW"."""

    summary: Tensor
    features: tuple[Tensor, ...]


_register_namedtuple(PackedOutput, serialized_type_name="radio_fast.PackedOutput")


def check_images(images: Sequence[Tensor], device: torch.device) -> None:
    """Raises ValueError unless they are RGB images on the model's device."""
    if not isinstance(images, (list, tuple)):
        raise ValueError(
            f"images must be a list of (3, H, W) tensors, got {type(images).__name__}: images of one size go to "
            f"model(x), patches need image_grid_hw"
        )
    if not images:
        raise ValueError("images must be a list of one image or more, got none")
    for i, image in enumerate(images):
        if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != 3:
            got = f"shape {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(f"images[{i}] must be a tensor of shape (3, H, W), got {got}")
        _check_pixels(image, f"images[{i}]", device)


def check_patches(patches: Tensor, p: int, device: torch.device) -> None:
    """Raises ValueError unless they are RGB patches on the model's device."""
    if not isinstance(patches, Tensor) or patches.ndim != 2 or patches.shape[1] != 3 * p * p:
        got = f"shape {tuple(patches.shape)}" if isinstance(patches, Tensor) else type(patches).__name__
        raise ValueError(f"beside image_grid_hw, images must be patches of shape (T, {3 * p * p}), got {got}")
    _check_pixels(patches, "images", device)


def _check_pixels(x: Tensor, name: str, device: torch.device) -> None:
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise ValueError(f"{name} must be uint8 or float in [0, 1], got {x.dtype}")
    if x.layout != torch.strided:
        raise ValueError(f"{name} must be dense, got {x.layout}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device} and the model on {device}: move one of them with .to(...)")


def read_grids(grids: Tensor | Sequence[Sequence[int]], num_patches: int) -> tuple[tuple[int, int], ...]:
    """The (rows, columns) of patches of each image, as Python's numbers.

    Raises:
        ValueError: no pairs of positive whole numbers, or not `num_patches` patches together.
    """
    if isinstance(grids, Tensor):
        grids = grids.tolist()
    try:
        pairs = tuple((index(h), index(w)) for h, w in grids)
    except (TypeError, ValueError):
        raise ValueError(
            "image_grid_hw must be (B, 2), whole numbers: each image's rows and columns of patches"
        ) from None
    if not pairs or min(min(pair) for pair in pairs) < 1:
        raise ValueError("image_grid_hw must have one image or more, of one row and column of patches or more")
    total = sum(h * w for h, w in pairs)
    if total != num_patches:
        raise ValueError(f"image_grid_hw has {total} patches (rows × columns, all images), images has {num_patches}")
    return pairs


def to_float(x: Tensor) -> Tensor:
    """uint8 pixels as float32 in [0, 1]; others as they are."""
    return x.float() / 255 if x.dtype == torch.uint8 else x


def cut(images: Sequence[Tensor], p: int) -> Tensor:
    """Images (3, h·p, w·p) → their patches (ΣT, 3, p, p), row by row, in the images' dtype; float32 if those differ."""
    dtypes = {image.dtype for image in images}
    if len(dtypes) > 1:
        images = [to_float(image) for image in images]
    grids = [(image.shape[1] // p, image.shape[2] // p) for image in images]
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    patches = images[0].new_empty((sum(h * w for h, w in grids), 3, p, p), dtype=dtype)
    first = 0
    for image, (h, w) in zip(images, grids, strict=True):
        part = patches[first : first + h * w]  # of split's parts none could be written to under autograd
        part.view(h, w, 3, p, p).copy_(image.unflatten(2, (w, p)).unflatten(1, (h, p)).permute(1, 3, 0, 2, 4))
        first += h * w
    return patches


def glue(patches: Tensor, grids: Sequence[tuple[int, int]], p: int) -> list[Tensor]:
    """The inverse of `cut`: patches (ΣT, 3·p·p) of images of h × w patches → the images."""
    parts = zip(patches.split([h * w for h, w in grids]), grids, strict=True)
    return [part.reshape(h, w, 3, p, p).permute(2, 0, 3, 1, 4).reshape(3, h * p, w * p) for part, (h, w) in parts]


def packed_outputs(
    model: nn.Module, tokens: Tensor, packing: Packing, fmt: str
) -> PackedOutput | dict[str, PackedOutput]:
    """What a `RADIOModel` with a ViT makes of the tokens (Σ(P + T), D) of images of several sizes."""
    prefix = tokens.index_select(0, packing.prefix_rows).unflatten(0, (len(packing.grids), -1))
    summary = torch.cat([prefix[:, i] for i in model.model.summary_tokens], dim=1)
    features = tokens.index_select(0, packing.patch_rows).unsqueeze(0)
    if model.feature_normalizer is not None:
        features = call_rowwise(model.feature_normalizer, features, packing.patches, FeatureNormalizer)
    parts = features.split(packing.patches.lengths, dim=1)
    if fmt == "NCHW":
        parts = [to_nchw(part, h, w) for part, (h, w) in zip(parts, packing.grids, strict=True)]
    backbone = PackedOutput(summary, tuple(part[0] for part in parts))
    if not model.adaptors:
        return backbone
    outputs = {"backbone": backbone}
    for name, adaptor in model.adaptors.items():
        outputs[name] = PackedOutput(*adaptor(prefix, features, None, None, fmt, packing))
    return outputs


def in_groups(images: Sequence[Tensor], run: Callable[[Tensor], Any]) -> PackedOutput | dict[str, PackedOutput]:
    """`run`, which takes a batch of one size and gives (summary, features) or a dict of them, on images of several."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
        groups.setdefault(tuple(image.shape), []).append(i)
    found: dict[str | None, dict[int, tuple[Tensor, Tensor]]] = {}
    for numbers in groups.values():
        outputs = run(torch.stack([to_float(images[i]) for i in numbers]))
        for name, batch in outputs.items() if isinstance(outputs, dict) else [(None, outputs)]:
            found.setdefault(name, {}).update(zip(numbers, zip(*batch, strict=True), strict=True))
    packed = {}
    for name, by_number in found.items():
        summaries, features = zip(*(by_number[i] for i in range(len(images))), strict=True)
        packed[name] = PackedOutput(torch.stack(summaries), features)
    return packed.get(None, packed)
