"""An image on its way through an embedder, alone and in a batch, and the error that it may end with."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from torch import Tensor

from radio_fast.images import ImageError
from radio_fast.serve.compute import Finish
from radio_fast.serve.types import DeadlineExceeded, EmbedderClosed, Embedding


class Item:
    """An image on its way."""

    __slots__ = ("deadline", "decoded", "features", "future", "pixels", "size_of", "source", "submitted", "tokens")

    def __init__(self, source: Any, size_of: Callable, features: bool, now: float, deadline: float):
        self.future: Future[Embedding] = Future()
        self.source, self.size_of, self.features = source, size_of, features
        self.submitted = self.decoded = now
        self.deadline = deadline
        self.pixels: Tensor | None = None
        self.tokens = 0

    def late(self, now: float) -> DeadlineExceeded:
        return DeadlineExceeded(f"the deadline passed {now - self.deadline:.3f} s before the image was computed")


def closed() -> EmbedderClosed:
    return EmbedderClosed("the embedder was closed before this image was computed")


class Hand:
    """What a worker holds, and what has hit it."""

    item: Item | None = None
    error: BaseException | None = None
    ended = False


class Batch:
    """Images given to the model, and what it takes to get their outputs."""

    def __init__(self, items: list[Item], began: float):
        self.items, self.began = items, began
        self.tokens = sum(item.tokens for item in items)
        self.finish: Finish | None = None
        self.error: BaseException | None = None


def freed(error: BaseException) -> BaseException:
    """`error` with its traceback as a note. The frames would keep what their variables hold as long as the caller keeps
    the error: a batch, all the activations, and by way of a future the error itself.
    """
    if not isinstance(error, ImageError) and not hasattr(error, "__notes__"):
        error.add_note("".join(traceback.format_exception(error)).rstrip())
    parts: list[BaseException | None] = [error]
    seen: set[int] = set()
    while parts:
        part = parts.pop()
        if part is not None and id(part) not in seen:
            seen.add(id(part))
            part.__traceback__ = None
            parts += [part.__cause__, part.__context__]
    return error
