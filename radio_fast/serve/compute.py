"""A batch's way through the model: to its device, through it, and back."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from radio_fast.graphs.cache import MAX_ROWS
from radio_fast.model import RADIOModel, RadioOutput

Outputs = dict[str, RadioOutput]
Finish = Callable[[], list[Outputs]]

_NO_MEMORY = re.compile(r"out of memory|not enough memory|can't allocate memory|ALLOC_FAILED")


def out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch might do."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None)


def grid(model: RADIOModel, height: int, width: int) -> tuple[int, int]:
    """The rows and columns of features that the model makes of an image; its tokens are their product."""
    return model.model.grid(torch.empty(1, 3, height, width, device="meta"))


def padded(model: RADIOModel, images: int, tokens: int) -> int:
    """How many images of one size, of `tokens` tokens each, to run in the place of `images`.

    CUDA graphs are made for exact shapes. So that not every number of images needs one of its own, they are filled up
    to a power of two or three halves of one: 12 shapes up to 64 images, of the 16 that a model keeps.
    """
    graphs = model.graphs
    if graphs is None or not graphs.enabled or model.model.device.type != graphs.capture.device_type:
        return images
    power = 1 << (images - 1).bit_length()
    count = power * 3 // 4 if images <= power * 3 // 4 else power
    return count if count * tokens <= MAX_ROWS else images


def batch_sizes(model: RADIOModel, most: int, tokens: int) -> list[int]:
    """The numbers of images that batches of at most `most` run as."""
    return sorted({padded(model, images, tokens) for images in range(1, most + 1)})


def forward(model: RADIOModel, images: Sequence[Tensor]) -> dict[str, tuple[Tensor, Sequence[Tensor]]]:
    """{"backbone": (summaries (B, S·D), features B × (T_i, D)), adaptor's name: …} of images (3, h_i, w_i) on the
    model's device, all uint8 or all float.
    """
    first = images[0]
    if all(image.shape == first.shape for image in images):
        x = torch.stack(images)
        if x.dtype == torch.uint8:
            x = x.float() / 255
        count = padded(model, len(images), math.prod(grid(model, *first.shape[1:])))
        if count > len(images):
            x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, count - len(images)))
        result = model(x)
        outputs = result if isinstance(result, dict) else {"backbone": result}
        return {
            name: (summary[: len(images)], features[: len(images)]) for name, (summary, features) in outputs.items()
        }
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
        groups.setdefault(tuple(image.shape), []).append(i)
    parts = [forward(model, [images[i] for i in group]) for group in groups.values()]
    order = [i for group in groups.values() for i in group]
    back = sorted(range(len(order)), key=order.__getitem__)
    merged = {}
    for name in parts[0]:
        summaries = torch.cat([part[name][0] for part in parts])
        features = [one for part in parts for one in part[name][1]]
        merged[name] = (summaries[back], [features[i] for i in back])
    return merged


def same_dtype(pixels: Sequence[Tensor]) -> list[Tensor]:
    if len({image.dtype for image in pixels}) == 1:
        return list(pixels)
    return [image if image.is_floating_point() else image.float() / 255 for image in pixels]


def split(outputs: dict[str, tuple[Tensor, Sequence[Tensor]]], images: int, wanted: Sequence[bool]) -> list[Outputs]:
    """Each image's own outputs, in memory of their own: a batch lives no longer than it has to."""
    for name, (summaries, features) in outputs.items():
        if len(summaries) != images or len(features) != images:
            raise RuntimeError(f"{len(summaries)} summaries and {len(features)} features of {name} for {images} images")
    return [
        {
            name: RadioOutput(summaries[i].clone(), features[i].clone() if wanted[i] else None)
            for name, (summaries, features) in outputs.items()
        }
        for i in range(images)
    ]


class OnCPU:
    """Runs batches where the images are."""

    depth = 1  # batches that are worth having under way at a time

    def __init__(self, model: RADIOModel):
        self.model = model

    def start(self, pixels: Sequence[Tensor], wanted: Sequence[bool]) -> Finish:
        """Compute images (3, h_i, w_i); what is returned waits for their outputs, on the CPU, features where wanted."""
        with torch.inference_mode():
            outputs = forward(self.model, same_dtype(pixels))
        return lambda: split(outputs, len(pixels), wanted)


class OnGPU:
    """Copies a batch to the GPU while the one before it is computed.

    Images travel as uint8 in one pinned buffer, results in another; torch keeps such buffers, and hands them out again
    once the GPU is done with them.
    """

    depth = 2

    def __init__(self, model: RADIOModel):
        self.model = model
        self.device = model.model.device
        self.uploads, self.computing = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)
        self.computing.wait_stream(torch.cuda.current_stream(self.device))  # whoever made the weights

    def start(self, pixels: Sequence[Tensor], wanted: Sequence[bool]) -> Finish:
        """As `OnCPU.start`, but returns before the GPU has done the work."""
        pixels = same_dtype(pixels)
        flat = torch.empty(sum(image.numel() for image in pixels), dtype=pixels[0].dtype, pin_memory=True)
        places = flat.split([image.numel() for image in pixels])
        for place, image in zip(places, pixels, strict=True):
            place.view(image.shape).copy_(image)
        with torch.inference_mode():
            with torch.cuda.stream(self.uploads):
                there = flat.to(self.device, non_blocking=True)
            self.computing.wait_stream(self.uploads)
            with torch.cuda.stream(self.computing):
                there.record_stream(self.computing)
                parts = there.split([image.numel() for image in pixels])
                images = [part.view(image.shape) for part, image in zip(parts, pixels, strict=True)]
                outputs = {
                    name: (
                        _to_host(summaries),
                        [_to_host(one) if keep else one for one, keep in zip(features, wanted, strict=True)],
                    )
                    for name, (summaries, features) in forward(self.model, images).items()
                }
                done = torch.cuda.Event()
                done.record()

        def finish() -> list[Outputs]:
            done.synchronize()
            return split(outputs, len(pixels), wanted)

        return finish


def _to_host(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
