"""Pictures to a model's `pixel_values`, as the RADIO repositories' CLIPImageProcessor makes them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from radio_fast.images import ImageError, read_image, to_tensor
from radio_fast.model import RADIOModel
from radio_fast.models.registry import Resolution

if TYPE_CHECKING:
    from PIL import Image

MAX_SIDE = 1 << 14  # pixels; a mistyped size would otherwise ask for all of the memory


class PixelValues(dict):
    """{"pixel_values": (B, 3, H, W)}: for `model(**batch)`, or by `batch.pixel_values`."""

    @property
    def pixel_values(self) -> Tensor:
        return self["pixel_values"]

    def to(self, *args: Any, **kwargs: Any) -> PixelValues:
        """On another device, or in another dtype, as `torch.Tensor.to`."""
        return PixelValues(pixel_values=self.pixel_values.to(*args, **kwargs))


class ImageProcessor:
    """RGB, resized (bicubic, antialiased), in [0, 1]; no crop and no normalisation, which is in the model.

    `processor(images)` takes one image or a list of them, each one of
    - a PIL image, a path, or a file's bytes; paths and bytes are turned upright by their EXIF orientation,
    - a uint8 numpy array (H, W, 3), (3, H, W) or (H, W),
    - a tensor (3, H, W), uint8, or float in [0, 1], or a float array likewise; also (B, 3, H, W) for B of them,

    and returns {"pixel_values": (B, 3, H, W) float32}. Tensors stay on their device.

    Pictures and uint8 arrays are resized by Pillow: the result is that of Transformers' CLIPImageProcessor with
    `size={"height": H, "width": W}`, do_center_crop=False and do_normalize=False, within float32's rounding. Tensors
    and float arrays are resized by torch, a whole batch at once, in Pillow's two passes: along the rows, then along the
    columns, cut to [0, 1] after each. uint8 is rounded to whole levels after each pass too: 99.6 % of values are then
    Pillow's, the others one level (1/255) off. Float isn't rounded, and within 1.2/255 (photographs and noise).

    Args:
        size: height and width of the result in pixels, as a pair, one number for both, or {"height": …, "width": …};
            None: each image's own, to the nearest multiples of `step`.
        step: what sides have to be multiples of: the model's `min_resolution_step`.
        do_resize: False: images must have a legal size already.

    Raises:
        ValueError: a size, or an image, that is not legal; the message names what is.
    """

    model_input_names = ("pixel_values",)

    def __init__(self, size: Any = None, *, step: int = 16, do_resize: bool = True):
        if type(step) is not int or step < 1:
            raise ValueError(f"step must be a whole number of pixels, got {step!r}")
        self.step = step
        self.size = self._legal_size(size)
        self.do_resize = do_resize

    @classmethod
    def for_model(cls, model: RADIOModel, size: Any = None, *, do_resize: bool = True) -> ImageProcessor:
        """To the model's preferred resolution (each image's nearest size, where it has none), or to `size`."""
        step = model.min_resolution_step
        preferred = model.preferred_resolution
        if size is None and preferred is not None:
            size = tuple(_nearest(side, step) for side in preferred)
        return cls(size, step=step, do_resize=do_resize)

    def __repr__(self) -> str:
        size = None if self.size is None else tuple(self.size)
        return f"ImageProcessor(size={size}, step={self.step}, do_resize={self.do_resize})"

    def __call__(
        self, images: Any, return_tensors: str = "pt", *, size: Any = None, do_resize: bool | None = None
    ) -> PixelValues:
        """`size` and `do_resize`: in place of the processor's own, for this call."""
        if return_tensors != "pt":
            raise ValueError(f"return_tensors must be 'pt', got {return_tensors!r}")
        do_resize = self.do_resize if do_resize is None else do_resize
        size = self.size if size is None else self._legal_size(size)
        parts = [self._one(image, size, do_resize) for image in _listed(images)]
        sizes = {tuple(part.shape[2:]) for part in parts}
        if len(sizes) > 1:
            each = ", ".join(f"{h} × {w}" for h, w in sorted(sizes))
            raise ValueError(f"images of one batch must come out in one size, these do in {each}: give size=(H, W)")
        devices = {part.device for part in parts}
        if len(devices) > 1:
            raise ValueError(f"images of one batch must be on one device, these are on {sorted(map(str, devices))}")
        return PixelValues(pixel_values=parts[0] if len(parts) == 1 else torch.cat(parts))

    def _legal_size(self, size: Any) -> Resolution | None:
        if size is None:
            return None
        if isinstance(size, Mapping):
            if set(size) != {"height", "width"}:
                raise ValueError(f'size must have "height" and "width", got {dict(size)}')
            size = size["height"], size["width"]
        sides = (size, size) if isinstance(size, int) else size
        whole = isinstance(sides, Sequence) and len(sides) == 2
        if not whole or not all(type(side) is int and 1 <= side <= MAX_SIDE for side in sides):
            raise ValueError(f"size must be (height, width) in whole pixels, 1…{MAX_SIDE}, got {size!r}")
        return Resolution(*self._check(*sides, "size"))

    def _check(self, h: int, w: int, what: str) -> tuple[int, int]:
        if h % self.step or w % self.step:
            near = f"{_nearest(h, self.step)} × {_nearest(w, self.step)}"
            raise ValueError(f"{what}: sides must be multiples of {self.step}, got {h} × {w}; the nearest are {near}")
        return h, w

    def _target(self, h: int, w: int, size: Resolution | None, do_resize: bool) -> tuple[int, int]:
        if not do_resize:
            return self._check(h, w, "an image with do_resize=False")
        return size or (_nearest(h, self.step), _nearest(w, self.step))

    def _one(self, image: Any, size: Resolution | None, do_resize: bool) -> Tensor:
        """(B, 3, H, W) in [0, 1]."""
        if isinstance(image, (str, os.PathLike, bytes)):
            image = read_image(image)
        if isinstance(image, np.ndarray):
            image = _of_array(image)
        if not isinstance(image, Tensor):
            h, w = image.height, image.width
            return to_tensor(_rgb(image), *self._target(h, w, size, do_resize))[None]
        x = _of_tensor(image)
        target = self._target(*x.shape[2:], size, do_resize)
        return _resize(x, target, 255) / 255 if image.dtype == torch.uint8 else _resize(x, target, 1)


def _nearest(side: int, step: int) -> int:
    return max(round(side / step), 1) * step


def _listed(images: Any) -> list[Any]:
    one = isinstance(images, (str, os.PathLike, bytes, np.ndarray, Tensor)) or _is_picture(images)
    images = [images] if one else images
    if not isinstance(images, (list, tuple)) or not images:
        raise ValueError(f"images must be an image, or a list of at least one, got {_kind(images)}")
    for image in images:
        if not (isinstance(image, (str, os.PathLike, bytes, np.ndarray, Tensor)) or _is_picture(image)):
            raise ValueError(f"an image must be a PIL image, an array, a tensor, a path or bytes, got {_kind(image)}")
    return list(images)


def _kind(thing: Any) -> str:
    return "an empty list" if isinstance(thing, (list, tuple)) and not thing else type(thing).__name__


def _is_picture(image: Any) -> bool:
    # By its interface: without Pillow there are no pictures, and arrays and tensors go without it.
    return all(hasattr(image, name) for name in ("convert", "resize", "mode", "height", "width"))


def _rgb(image: Image.Image) -> Image.Image:
    try:
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # decoders raise nearly anything on damaged data
        raise ImageError(f"the picture can't be read: {str(error) or type(error).__name__}") from error


def _of_array(array: np.ndarray) -> Image.Image | Tensor:
    """A picture of uint8, a tensor of anything else."""
    if array.ndim == 2:
        array = np.repeat(array[:, :, None], 3, axis=2)
    if array.dtype != np.uint8:
        if array.ndim == 3 and array.shape[2] == 3:
            array = array.transpose(2, 0, 1)
        try:
            return torch.from_numpy(array.copy())
        except TypeError as error:
            raise ValueError(f"an array must be uint8, or float in [0, 1], got {array.dtype}") from error
    if array.ndim == 3 and array.shape[2] != 3 and array.shape[0] == 3:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ValueError(f"an array must have shape (H, W, 3), (3, H, W) or (H, W), got {array.shape}")
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(array))


def _of_tensor(image: Tensor) -> Tensor:
    """(B, 3, H, W) float32 with the values that are there."""
    x = image[None] if image.ndim == 3 else image
    if x.ndim != 4 or x.shape[1] != 3 or 0 in x.shape:
        raise ValueError(f"a tensor must have shape (3, H, W) or (B, 3, H, W), got {tuple(image.shape)}")
    if image.dtype == torch.uint8:
        return x.float()
    if not image.is_floating_point():
        raise ValueError(f"a tensor must be uint8, or float in [0, 1], got {image.dtype}")
    x = x.float()
    low, high = (value.item() for value in x.aminmax())
    if not (low >= 0 and high <= 1):  # NaN too
        raise ValueError(
            f"a float image must lie in [0, 1], this one in [{low:g}, {high:g}]: divide by 255, or give uint8"
        )
    return x


def _resize(x: Tensor, size: tuple[int, int], high: int) -> Tensor:
    """x in 0…high; with 255 the result has whole levels, halves rounded up as in Pillow."""
    for h, w in ((x.shape[2], size[1]), size):
        if (h, w) != tuple(x.shape[2:]):
            x = F.interpolate(x, size=(h, w), mode="bicubic", antialias=True, align_corners=False).clamp(0, high)
            x = (x + 0.5).floor() if high == 255 else x
    return x
