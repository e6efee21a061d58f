"""`Embedder`: images from many callers, computed in batches."""

from __future__ import annotations

import asyncio
import math
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from numbers import Real
from typing import Any

import torch

from radio_fast.export import legal_size
from radio_fast.graphs.cache import MAX_ROWS
from radio_fast.images import ImageError, ImageTooLarge
from radio_fast.model import RADIOModel
from radio_fast.serve import engine
from radio_fast.serve.compute import OnCPU, OnGPU, batch_sizes, forward, grid
from radio_fast.serve.decode import hold, read_pixels
from radio_fast.serve.metrics import Metrics
from radio_fast.serve.types import EmbedderClosed, Embedding

MAX_PIXELS = 89_478_485  # Pillow's own limit: a quarter of a GiB as RGB
MAX_SIDE = 16384  # of a resolution, in pixels
IMAGES_ON_CPU = 4  # a CPU gains little from larger batches

ResolutionLike = tuple[int, int] | int | str | None


def check_whole(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def check_number(name: str, value: float, legal: str, positive: bool = False) -> float:
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # of a whole number
        number = math.inf
    if not 0 <= number < math.inf or (positive and not number):
        raise ValueError(f"{name} must be {legal}, got {str(value)[:50]}")
    return number


def legal_resolution(model: RADIOModel, resolution: ResolutionLike) -> tuple[int, int]:
    """(height, width) in pixels; the model's preferred one for None.

    Raises:
        ValueError: no such size, or one the model does not take; the message names the nearest it takes.
    """
    if resolution is None:
        return legal_size(model, None)
    size = tuple(resolution) if isinstance(resolution, (tuple, list)) else (resolution, resolution)
    if len(size) != 2 or not all(type(side) is int and 0 < side <= MAX_SIDE for side in size):
        raise ValueError(
            f"resolution must be a number of pixels up to {MAX_SIDE}, (height, width) or 'native', got {resolution!r}"
        )
    only = model.model.only_size
    near = (only, only) if only else tuple(model.get_nearest_supported_resolution(*size))
    if near != size:
        raise ValueError(
            f"resolution: sides must be multiples of {model.min_resolution_step} pixels, got {size[0]} × {size[1]}; "
            f"the nearest supported size is {near[0]} × {near[1]}"
        )
    return size


class Embedder:
    """Embeds images for many callers at a time; safe in threads.

    Worker threads decode and resize, one thread runs the model on batches that a token budget bounds: images go in the
    order in which they were decoded, of whatever sizes.

    Args:
        model: from `radio_fast.load`; it stays the caller's, and may be called besides.
        max_tokens: features a batch may have (an image has H/p · W/p); an image of more goes alone. None: 16384 on a
            GPU, as many as a CUDA graph is made for; on a CPU four images of the model's preferred size.
        max_queue: how many images may be accepted and not done, those in the model included. With the images themselves
            this bounds memory: no more than two batches, and an image for each worker, are decoded ahead of the model.
        max_wait_ms: how long a decoded image may wait for others to share its batch.
        resolution: what images are resized to, in pixels: (height, width), a side, "native" for each image's nearest
            legal size, None for the model's preferred one.
        max_pixels: larger images are refused by their header; with "native" also those whose nearest legal size is
            larger, as every side has to be one step at least. It then bounds the work for an image too.
        workers: threads that decode; as many as there are CPUs, 8 at most, if None.

    Raises:
        ValueError: an argument is off; the message names the legal values.
    """

    def __init__(
        self,
        model: RADIOModel,
        *,
        max_tokens: int | None = None,
        max_queue: int = 1024,
        max_wait_ms: float = 5.0,
        resolution: ResolutionLike = None,
        max_pixels: int = MAX_PIXELS,
        workers: int | None = None,
    ):
        if not isinstance(model, RADIOModel):
            raise ValueError(f"model must be a RADIOModel, as radio_fast.load makes, got {type(model).__name__}")
        device = model.model.device.type
        if device not in ("cpu", "cuda"):
            raise ValueError(f"model must be on a CPU or a CUDA GPU, got one on {device!r}")
        self.model = model
        self._resolution = resolution
        size_of = self._size_of(resolution)
        # The size that images will have, as far as that is known.
        self._usual = legal_size(model, None) if resolution == "native" else size_of(0, 0)
        tokens = self._tokens(*self._usual)
        on_gpu = device == "cuda"
        if max_tokens is None:
            max_tokens = MAX_ROWS if on_gpu else IMAGES_ON_CPU * tokens
        if workers is None:
            workers = min(8, os.cpu_count() or 1)
        for name, value in {
            "max_tokens": max_tokens, "max_queue": max_queue, "max_pixels": max_pixels, "workers": workers,
        }.items():  # fmt: skip
            check_whole(name, value)
        max_wait_ms = check_number("max_wait_ms", max_wait_ms, "a number of milliseconds from 0 on")
        self._max_pixels = max_pixels
        # What embed_many has under way: two batches for the model, and two images for each worker.
        self._window = min(max_queue, 2 * workers + 2 * -(-max_tokens // tokens))
        self._engine = engine.Engine(
            (OnGPU if on_gpu else OnCPU)(model),
            partial(read_pixels, max_pixels=max_pixels),
            partial(grid, model),
            max_tokens,
            max_queue,
            max_wait_ms / 1000,
            workers,
        )
        self._finalizer = weakref.finalize(self, self._engine.close, drain=True, wait=False)
        self._finalizer.atexit = False

    def _tokens(self, height: int, width: int) -> int:
        return math.prod(grid(self.model, height, width))

    def _size_of(self, resolution: ResolutionLike) -> Callable[[int, int], tuple[int, int]]:
        """(height, width) of a picture → of what the model sees."""
        if resolution != "native":
            size = legal_resolution(self.model, resolution)
            return lambda height, width: size
        if self.model.model.only_size:
            raise ValueError(f"resolution: this model takes only {self.model.model.only_size} pixels, not 'native'")
        nearest = self.model.get_nearest_supported_resolution

        def size_of(height: int, width: int) -> tuple[int, int]:
            h, w = nearest(height, width)
            if h * w > self._max_pixels:
                raise ImageTooLarge(f"image: {h} × {w} pixels, its nearest legal size; {self._max_pixels} are allowed")
            return h, w

        return size_of

    @property
    def max_tokens(self) -> int:
        """What a batch may have now: less than at first once memory has run out."""
        return self._engine.budget

    @property
    def max_queue(self) -> int:
        return self._engine.max_queue

    @property
    def closed(self) -> bool:
        return self._engine.closed or self._engine.forked

    @property
    def metrics(self) -> Metrics:
        return self._engine.metrics

    def check_room(self) -> None:
        """For those whose images cost something to have: `submit` would raise the same.

        Raises:
            QueueFull, EmbedderClosed.
        """
        self._engine.check_room()

    def submit(
        self, image: Any, *, deadline: float | None = None, features: bool = False, resolution: ResolutionLike = None
    ) -> Future[Embedding]:
        """Queue an image; at once, whatever the model is doing.

        Args:
            image: a path; the bytes of an image file; a PIL image, which is decoded and copied here if it is not yet;
                numpy (H, W, 3) uint8; torch (3, H, W), uint8 or float in [0, 1], on any device. Arrays and tensors are
                copied: they are the caller's again.
            deadline: seconds from now. An image that is not in the model by then fails, and one whose batch has failed
                is not computed again after it.
            features: give the features too, not the summaries alone.
            resolution: for this image, in place of the embedder's.

        Returns:
            A future of an `Embedding`, whose tensors have the model's dtype and are on the CPU. `cancel()` works until
            the image is in the model. Callbacks run in the embedder's threads and hold them up: they must be short and
            must not wait for other images. The future fails with ImageError (ImageTooLarge), DeadlineExceeded,
            EmbedderClosed, or what the model raised for this image alone.

        Raises:
            QueueFull: `max_queue` images are accepted and not done.
            EmbedderClosed: after `close`.
            ValueError: no image, deadline or resolution that is legal.
        """
        self._engine.check_room()
        return self._submit(image, deadline, features, resolution)

    def _submit(
        self, image: Any, deadline: float | None, features: bool, resolution: ResolutionLike, wait: bool = False
    ) -> Future[Embedding]:
        end = engine.clock()
        try:
            end += (
                math.inf
                if deadline is None
                else check_number("deadline", deadline, "a number of seconds above 0, or None", positive=True)
            )
            size_of = self._size_of(self._resolution if resolution is None else resolution)
            source = hold(image, self._max_pixels)
        except ImageError as error:
            source = error
        except ValueError:
            self.metrics.reject("invalid")
            raise
        return self._engine.submit(source, size_of, bool(features), end, wait)

    async def embed(
        self, image: Any, *, deadline: float | None = None, features: bool = False, resolution: ResolutionLike = None
    ) -> Embedding:
        """`submit`, awaited. A task that is cancelled cancels the image."""
        return await asyncio.wrap_future(
            self.submit(image, deadline=deadline, features=features, resolution=resolution)
        )

    def embed_many(
        self,
        images: Iterable[Any],
        *,
        features: bool = False,
        resolution: ResolutionLike = None,
        return_exceptions: bool = False,
    ) -> Iterator[Embedding | Exception]:
        """The embeddings of images, in their order; `images` may have no end.

        It reads ahead, in the thread that asks for results, by as many images as keep the model busy, and waits where
        `submit` would raise QueueFull. The first image that fails ends it with its error, and an error of `images`
        itself comes after the results before it; what is under way is then cancelled, as it is when the iterator is
        closed.

        Args:
            return_exceptions: give an image's error in the place of its embedding, and go on.

        Raises:
            ValueError: at once: `images` or the resolution are not legal.
        """
        self._size_of(resolution)
        try:
            if isinstance(images, (str, bytes, bytearray, memoryview)):
                raise TypeError
            images = iter(images)
        except TypeError:
            raise ValueError(
                f"images must be several, got {type(images).__name__}: put a single one into a list"
            ) from None
        return self._embed_many(images, features, resolution, return_exceptions)

    def _embed_many(
        self, images: Iterator[Any], features: bool, resolution: ResolutionLike, return_exceptions: bool
    ) -> Iterator[Embedding | Exception]:
        waiting: deque[Future[Embedding]] = deque()
        failure: Exception | None = None

        def result() -> Embedding | Exception:
            error = waiting[0].exception()  # waits; what a KeyboardInterrupt leaves here is cancelled
            future = waiting.popleft()
            return error if error is not None and return_exceptions else future.result()

        try:
            while True:
                try:
                    image = next(images)
                except StopIteration:
                    break
                except Exception as error:
                    failure = error
                    break
                try:
                    waiting.append(self._submit(image, None, features, resolution, wait=True))
                except EmbedderClosed as error:
                    failure = error
                    break
                except Exception as error:
                    waiting.append(Future())
                    waiting[-1].set_exception(error)
                while waiting and (len(waiting) >= self._window or waiting[0].done()):
                    yield result()
            while waiting:
                yield result()
            if failure is not None:
                raise failure
        finally:
            for future in waiting:
                future.cancel()

    def warm_up(self) -> None:
        """Run the model on blank images: once, or on a GPU in every number that batches of the usual size will have,
        so that kernels are chosen and CUDA graphs captured before the first image comes.
        """
        device, tokens, budget = self.model.model.device, self._tokens(*self._usual), self.max_tokens
        blank = torch.zeros(3, *self._usual, dtype=torch.uint8, device=device)
        with torch.inference_mode():
            for size in batch_sizes(self.model, tokens, budget) if device.type == "cuda" else [1]:
                for _ in range(2):  # a shape's second call is captured
                    forward(self.model, [blank] * size, budget)

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more images, and return when all are done; as often as one likes. The threads are gone then, but for
        one that a decoder or a batch holds up: it is waited for 5 s more, and ends by itself.

        Args:
            drain: finish the images that are accepted; otherwise those that are not in the model fail with
                EmbedderClosed.
            timeout: seconds after which those that are left fail with EmbedderClosed too. A batch in the model can't
                be stopped.

        Raises:
            ValueError: `timeout` is no number of seconds from 0 on.
        """
        if timeout is not None:
            timeout = check_number("timeout", timeout, "a number of seconds from 0 on, or None")
        self._engine.close(drain, timeout)

    def __enter__(self) -> Embedder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(drain=kind is None)

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.metrics.snapshot().queue_depth} of {self.max_queue} images waiting"
        return f"Embedder({state}, batches of {self.max_tokens} tokens)"
