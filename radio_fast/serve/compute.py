"""A batch's way through the model: to its device, through it, and back."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from radio_fast.graphs.cache import MAX_ROWS
from radio_fast.graphs.capture import map_tensors
from radio_fast.model import RADIOModel, RadioOutput

Outputs = dict[str, RadioOutput]  # one image's
# B images': summaries (B, S·D), features B × (T_i, D), or None of those that nobody wants
Several = Mapping[str, tuple[Tensor, Sequence[Tensor | None]]]
Finish = Callable[[], list[Outputs]]

_NO_MEMORY = re.compile(r"out of memory|not enough memory|can't allocate memory|ALLOC_FAILED")


def out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch might do."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None)


def grid(model: RADIOModel, height: int, width: int) -> tuple[int, int]:
    """The rows and columns of features that the model makes of an image; its tokens are their product."""
    return model.model.grid(torch.empty(1, 3, height, width, device="meta"))


def padded(model: RADIOModel, images: int, tokens: int, budget: int) -> int:
    """How many images of one size, of `tokens` tokens each, to run in the place of `images`.

    CUDA graphs are made for exact shapes. So that not every number of images needs one of its own, they are filled up
    to a power of two or three halves of one, as far as the budget goes: 12 shapes up to 64 images, where a model keeps
    16 graphs.
    """
    graphs = model.graphs
    if graphs is None or not graphs.enabled or model.model.device.type != graphs.capture.device_type:
        return images
    power = 1 << (images - 1).bit_length()
    count = power * 3 // 4 if images <= power * 3 // 4 else power
    return count if count * tokens <= min(budget, MAX_ROWS) else images


def batch_sizes(model: RADIOModel, tokens: int, budget: int) -> list[int]:
    """The numbers of images, of `tokens` tokens each, that batches run as."""
    most = max(min(budget, MAX_ROWS) // tokens, 1)
    return sorted({padded(model, images, tokens, budget) for images in range(1, most + 1)})


def forward(model: RADIOModel, images: Sequence[Tensor], budget: int) -> Several:
    """The outputs of images (3, h_i, w_i) on the model's device, all uint8 or all float."""
    if any(image.shape != images[0].shape for image in images):
        result = model.forward_packed(list(images))
    else:
        x = torch.stack(list(images))
        if x.dtype == torch.uint8:
            x = x.float() / 255
        blank = padded(model, len(x), math.prod(model.model.grid(x)), budget) - len(x)
        result = model(F.pad(x, (0, 0, 0, 0, 0, 0, 0, blank)) if blank else x)
        if blank:
            result = map_tensors(lambda t: t[: len(images)], result)
    return result if isinstance(result, dict) else {"backbone": result}


def same_dtype(pixels: Sequence[Tensor]) -> list[Tensor]:
    if len({image.dtype for image in pixels}) == 1:
        return list(pixels)
    return [image if image.is_floating_point() else image.float() / 255 for image in pixels]


def split(outputs: Several, images: int, wanted: Sequence[bool]) -> list[Outputs]:
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

    def start(self, pixels: Sequence[Tensor], wanted: Sequence[bool], budget: int) -> Finish:
        """Compute images (3, h_i, w_i); what is returned waits for their outputs, on the CPU, features where wanted."""
        with torch.inference_mode():
            outputs = forward(self.model, same_dtype(pixels), budget)
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
        self.default = torch.cuda.default_stream(self.device)

    def start(self, pixels: Sequence[Tensor], wanted: Sequence[bool], budget: int) -> Finish:
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
            self.computing.wait_stream(self.default)  # whoever has changed the weights in place since
            with torch.cuda.stream(self.computing):
                there.record_stream(self.computing)
                parts = there.split([image.numel() for image in pixels])
                images = [part.view(image.shape) for part, image in zip(parts, pixels, strict=True)]
                outputs = {
                    name: (
                        _to_host(summaries),
                        [_to_host(one) if keep else None for one, keep in zip(features, wanted, strict=True)],
                    )
                    for name, (summaries, features) in forward(self.model, images, budget).items()
                }
                done = torch.cuda.Event()
                done.record()

        def finish() -> list[Outputs]:
            done.synchronize()
            return split(outputs, len(pixels), wanted)

        return finish


def _to_host(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
