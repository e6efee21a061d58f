"""Image files to the tensors a model takes. Needs Pillow (`pip install radio_fast[cli]`)."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


class ImageError(ValueError):
    """A file that is no readable image; the message names it."""


def read_image(source: str | os.PathLike | bytes) -> Image.Image:
    """An RGB picture, turned upright by its EXIF orientation.

    Raises:
        ImageError: missing, no image, truncated, or larger than Pillow's limit against decompression bombs.
    """
    from PIL import Image, ImageOps

    name = "image" if isinstance(source, bytes) else str(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else Path(source)) as image:
                image.load()
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I"):  # 16 bits of grey; convert("RGB") would clip them at 255
                    image = Image.fromarray((np.asarray(image, np.float64) / 257).round().clip(0, 255).astype(np.uint8))
                return image.convert("RGB")
    except Exception as error:  # decoders raise nearly anything on damaged data
        raise ImageError(f"{name}: {str(error) or type(error).__name__}") from error


def to_tensor(image: Image.Image, height: int, width: int) -> Tensor:
    """(3, height, width) float32 in [0, 1], resized (bicubic, antialiased) if the picture has another size."""
    from PIL import Image

    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def find_images(paths: list[Path]) -> list[Path]:
    """The files named, and of each folder named the images in it and below, sorted."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        else:
            found.append(path)
    return found
