"""Measure ahead what first uses would: every op of a model, at the sizes and batches it will see."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from radio_fast.model import RADIOModel
from radio_fast.ops import _dispatch, _tuning
from radio_fast.ops._dispatch import OPS


class Step(NamedTuple):
    """A shape that has been run: height and width in pixels, and why it could not be, if so."""

    batch: int
    height: int
    width: int
    failed: str | None


class Choice(NamedTuple):
    """What a bucket's measurement came to. times: microseconds by implementation, the one that runs first."""

    op: str
    bucket: str
    times: dict[str, float]
    dropped: dict[str, str]

    @property
    def winner(self) -> str:
        return next(iter(self.times), "reference")

    @property
    def gain(self) -> float | None:
        """The best other time over that of the one that runs; None if there is no other."""
        best, *others = self.times.values() or [0.0]
        return min(others) / best if others else None


def check_tunable(device: torch.device) -> None:
    """Raise a ValueError if there is nothing to choose from on a device, or RADIO_FAST_TUNE=0."""
    if not _dispatch.accelerated(device):
        raise ValueError(f"nothing to tune on {device}: plain PyTorch runs there. Kernels need an NVIDIA GPU")
    if not _tuning.enabled():
        raise ValueError("RADIO_FAST_TUNE=0 is set: nothing would be measured")


def tune(model: RADIOModel, sizes: Iterable[tuple[int, int]], batches: Iterable[int]) -> Iterator[Step]:
    """Run the model on every size (height, width) and batch, largest last; each measurement is written at once.

    Raises:
        ValueError: there is nothing to choose from on the model's device, or RADIO_FAST_TUNE=0.
    """
    device = model.model.device
    check_tunable(device)
    shapes = sorted({(n, *size) for size in sizes for n in batches}, key=lambda shape: shape[0] * shape[1] * shape[2])
    for batch, height, width in shapes:
        try:
            with torch.inference_mode():
                model(torch.rand(batch, 3, height, width, device=device))
        except torch.OutOfMemoryError:
            yield Step(batch, height, width, "out of memory")
        else:
            yield Step(batch, height, width, None)


def choices(device: torch.device) -> list[Choice]:
    """What has been measured on a device so far, by this process or another."""
    found = []
    for op, buckets in sorted(_tuning.store(device).refreshed().items()):
        if op in OPS:
            for bucket, record in sorted(buckets.items()):
                found.append(Choice(op, bucket, record.times, record.dropped))
    return found
