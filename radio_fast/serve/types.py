"""What an embedder gives and what it refuses with."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from radio_fast.model import RadioOutput


@dataclass(frozen=True, slots=True)
class Timings:
    """Where an image's time went, in seconds: until it was decoded, until its batch began, in the model, and all of it
    from being submitted to the result.
    """

    decode: float
    wait: float
    compute: float
    total: float


@dataclass(frozen=True, slots=True)
class Embedding:
    """One image's result, on the CPU.

    `outputs`: {"backbone": RadioOutput(summary (S·D,), features (T, D) or None), adaptor's name: …}; features row by
    row, where they were asked for. `height`, `width`: pixels that the model saw; `grid`: rows and columns of features.
    """

    outputs: dict[str, RadioOutput]
    height: int
    width: int
    grid: tuple[int, int]
    timings: Timings = field(compare=False)

    @property
    def summary(self) -> Tensor:
        return self.outputs["backbone"].summary

    @property
    def features(self) -> Tensor | None:
        return self.outputs["backbone"].features


class QueueFull(RuntimeError):
    """The embedder holds as many images as it may. `retry_after`: seconds until there may be room, by its own pace."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple:
        """For another process, as Ray has; by default it would be made of the message alone."""
        return type(self), (*self.args, self.retry_after)


class DeadlineExceeded(TimeoutError):
    """The image's deadline passed before it was computed."""


class EmbedderClosed(RuntimeError):
    """The embedder takes no more images."""
