"""What `Embedder.submit` takes, and the pixels that the model sees of it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from radio_fast.images import ImageError, check_size, read_image, to_pixels, upright

LEGAL = (
    "a path, the bytes of an image file, a PIL image, a numpy array (H, W, 3) of uint8, or a torch tensor (3, H, W) of "
    "uint8 or float in [0, 1]"
)

# Pillow reads a file when its pixels or tags are first asked for, and is not safe in threads at that.
_reading = threading.Lock()


def hold(image: Any, max_pixels: int) -> Any:
    """`image` as `read_pixels` takes it, and as it is now: arrays, tensors and PIL images are copied.

    Raises:
        ValueError: nothing that is legal.
        ImageError: a PIL image whose file can't be read; more than `max_pixels` in memory already.
        ImportError: Pillow is needed and missing.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(f"an array must be (H, W, 3) of uint8, got {image.shape} of {image.dtype}")
        check_size("array", image.shape[1], image.shape[0], max_pixels)
        return torch.from_numpy(np.array(image, order="C")).permute(2, 0, 1)
    if isinstance(image, Tensor):
        if image.layout != torch.strided or image.is_nested or image.is_meta:
            raise ValueError("a tensor must be dense, with its pixels in memory")
        if image.ndim != 3 or image.shape[0] != 3 or not image.numel():
            raise ValueError(f"a tensor must be (3, H, W), got {tuple(image.shape)}")
        if image.dtype != torch.uint8 and not image.is_floating_point():
            raise ValueError(f"a tensor must be uint8, or float in [0, 1], got {image.dtype}")
        check_size("tensor", image.shape[2], image.shape[1], max_pixels)
        dtype = torch.uint8 if image.dtype == torch.uint8 else torch.float32
        return image.detach().to("cpu", dtype, copy=True)
    # Without importing it; and another thread may be at it, before the class is there.
    picture = getattr(sys.modules.get("PIL.Image"), "Image", None)
    if picture is not None and isinstance(image, picture):
        check_size("image", *image.size, max_pixels)
        try:
            with _reading:
                image.load()
                image.getexif()
            return upright(image)
        except Exception as error:
            raise ImageError(f"image: {str(error) or type(error).__name__}") from error
    if isinstance(image, (bytearray, memoryview)):
        image = bytes(image)
    if not isinstance(image, (bytes, str, os.PathLike)):
        raise ValueError(f"an image must be {LEGAL}, got {type(image).__name__}")
    try:
        import PIL.Image  # noqa: F401 (told to who submits, not to who awaits)
    except ImportError as error:
        raise ImportError(f"image files need Pillow: pip install 'radio_fast[cli]' ({error})") from error
    return image


def read_pixels(source: Any, size_of: Callable[[int, int], tuple[int, int]], max_pixels: int) -> Tensor:
    """(3, h, w), (h, w) = size_of(height, width of the picture): uint8, or float32 in [0, 1] for a float tensor.

    Its memory is in that order too: here, among many threads, turning what Pillow gives costs less than in the one that
    feeds the model.

    What has another size is resized, bicubic and antialiased: by Pillow, as the command line does; a float tensor by
    torch, cut to [0, 1].

    Raises:
        ImageError: as `read_image`; a float tensor with values outside [0, 1], or NaN; `source` itself, if it is one.
    """
    if isinstance(source, ImageError):
        raise source
    return _read(source, size_of, max_pixels).contiguous()


def _read(source: Any, size_of: Callable[[int, int], tuple[int, int]], max_pixels: int) -> Tensor:
    if not isinstance(source, Tensor):
        encoded = isinstance(source, (bytes, str, os.PathLike))
        picture = read_image(source, max_pixels) if encoded else source
        return to_pixels(picture, *size_of(picture.height, picture.width))
    size = size_of(*source.shape[1:])
    if source.is_floating_point():
        low, high = source.aminmax()
        if not (low >= 0 and high <= 1):  # NaN too
            raise ImageError(f"tensor: floats must lie in [0, 1], got {low.item():.3g} to {high.item():.3g}")
        if size == source.shape[1:]:
            return source
        return F.interpolate(source[None], size, mode="bicubic", antialias=True)[0].clamp(0, 1)
    if size == source.shape[1:]:
        return source
    from PIL import Image

    return to_pixels(Image.fromarray(source.permute(1, 2, 0).numpy()), *size)
