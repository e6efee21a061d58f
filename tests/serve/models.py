"""Tiny models for the tests of serving: one that is real, one that says which image it saw."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable

import numpy as np
import torch

import radio_fast
from radio_fast.model import RADIOModel, RadioOutput
from radio_fast.models.packing import PackedOutput
from tests.conftest import golden_source

TIMEOUT = 30  # seconds after which a test that hangs fails
SIDE = 32  # pixels of an image that carries a number: four tokens


def tiny(case: str = "vit_h16", **options) -> RADIOModel:
    return radio_fast.load(golden_source(case), **options)


def numbered(number: int, side: int = SIDE) -> np.ndarray:
    """An image whose pixels are its number."""
    image = np.zeros((side, side, 3), np.uint8)
    image[:] = [number >> 16 & 255, number >> 8 & 255, number & 255]
    return image


def encoded(image: np.ndarray, kind: str = "PNG") -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


class Reader(RADIOModel):
    """Its summary is the number that each image carries, its features that number in every token.

    `before(numbers)` is called with each batch's; what it raises the model raises.
    """

    def __init__(self, before: Callable[[list[int]], None] = lambda numbers: None):
        real = tiny()
        super().__init__(real.model, real.input_conditioner)
        self.before = before
        self.batches: list[list[int]] = []

    def _numbers(self, images: list[torch.Tensor]) -> list[int]:
        numbers = []
        for image in images:
            image = image if image.dtype == torch.uint8 else (image * 255).round()
            pixel = image[:, 0, 0].long()
            # All of the image, not a part of another one's.
            number = int(pixel @ torch.tensor([1 << 16, 1 << 8, 1])) if (image == image[:, :1, :1]).all() else -1
            numbers.append(number)
        self.batches.append(numbers)
        self.before(numbers)
        return numbers

    def forward(self, x, feature_fmt="NLC"):
        numbers = torch.tensor(self._numbers(list(x)), dtype=torch.float64)
        h, w = self.model.grid(x)
        return RadioOutput(numbers[:, None], numbers[:, None, None].expand(-1, h * w, 1))

    def forward_packed(self, images, image_grid_hw=None, feature_fmt="NLC"):
        numbers = torch.tensor(self._numbers(images), dtype=torch.float64)
        grids = [self.model.grid(image[None]) for image in images]
        return PackedOutput(
            numbers[:, None],
            tuple(number.expand(h * w, 1) for number, (h, w) in zip(numbers, grids, strict=True)),
        )


class Gate:
    """Holds the model up: `reached` once a batch has come, until `open` is set."""

    def __init__(self):
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self, numbers: list[int]) -> None:
        self.reached.set()
        assert self.open.wait(TIMEOUT)


def threads() -> set[threading.Thread]:
    """Those of embedders."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("radio_fast-")}
