"""Image files to the tensors a model takes. Needs Pillow (`pip install radio_fast[cli]`)."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
# Pillow reads many more, one of them (EPS) by starting another program.
FORMATS = frozenset({"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"})


class ImageError(ValueError):
    """A file that is no readable image; the message names it."""


class ImageTooLarge(ImageError):
    """A picture of more pixels than are allowed, refused by its header."""


def check_size(name: str, width: int, height: int, max_pixels: int) -> None:
    """Raises ImageTooLarge for more than `max_pixels`."""
    if width * height > max_pixels:
        raise ImageTooLarge(
            f"{name}: {width} × {height} pixels could be a decompression bomb; {max_pixels} pixels are allowed"
        )


def _open_regular(path: str, flags: int) -> int:
    """An `opener` for `open` that takes regular files alone: opening a pipe, or reading it, may take for ever."""
    fd = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # Windows has neither the flag nor such files
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise ImageError(f"{path}: no regular file")


def read_image(source: str | os.PathLike | bytes, max_pixels: int | None = None) -> Image.Image:
    """An RGB picture, turned upright by its EXIF orientation; the first one of an animation. Safe in threads.

    Raises:
        ImageTooLarge: more than `max_pixels` (None: Pillow's own limit), or than twice Pillow's.
        ImageError: missing, no regular file, no image of the kinds in `FORMATS`, or truncated.
    """
    from PIL import Image, UnidentifiedImageError

    name = "image" if isinstance(source, bytes) else str(source)
    if max_pixels is None:
        max_pixels = Image.MAX_IMAGE_PIXELS
    Image.init()
    try:
        with (
            io.BytesIO(source) if isinstance(source, bytes) else open(Path(source), "rb", opener=_open_regular) as file,
            Image.open(file, formats=sorted(FORMATS & Image.OPEN.keys())) as image,
        ):
            if max_pixels is not None:
                check_size(name, *image.size, max_pixels)
            return upright(image)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLarge(f"{name}: {error}") from error
    except UnidentifiedImageError as error:  # its own text has a memory address in place of a name
        raise ImageError(f"{name}: no image of a known kind") from error
    except Exception as error:  # decoders raise nearly anything on damaged data
        raise ImageError(f"{name}: {str(error) or type(error).__name__}") from error


def upright(image: Image.Image) -> Image.Image:
    """`image` in RGB, turned by its EXIF orientation. Raises what Pillow's decoders do."""
    from PIL import Image, ImageOps

    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey; convert("RGB") would clip them at 255
        image = Image.fromarray((np.asarray(image, np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def to_pixels(image: Image.Image, height: int, width: int) -> Tensor:
    """(3, height, width) uint8, resized (bicubic, antialiased) if the picture has another size."""
    from PIL import Image

    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_tensor(image: Image.Image, height: int, width: int) -> Tensor:
    """`to_pixels` as float32 in [0, 1]."""
    return to_pixels(image, height, width).float() / 255


def find_images(paths: list[Path]) -> list[Path]:
    """The files named, and of each folder named the images in it and below, sorted."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        else:
            found.append(path)
    return found
