"""An embedder's life behind HTTP: loading, ready, draining; and requests' images on their way through it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager

from fastapi import Request
from starlette.types import Scope

from radio_fast.serve.embedder import Embedder
from radio_fast.serve.errors import ApiError, api_error, client_gone
from radio_fast.serve.types import DeadlineExceeded, EmbedderClosed, Embedding, QueueFull

logger = logging.getLogger("radio_fast")

# Features are large (84 MB of 16384 patches of ViT-H), so fewer images with them are worked on together.
DENSE_IMAGES = 16  # of one request
DENSE_IMAGES_TOGETHER = 64
HELD = "radio_fast.held"  # in a request's scope: what it gives back when its answer has left


class Service:
    """What the routes share.

    `source`: the embedder, or a function that makes it; it is called in a thread of its own, so that the server can
    tell of its health meanwhile. `failure`: what that raised. `requests`: how many are there whose answer has not left.
    """

    def __init__(self, source: Embedder | Callable[[], Embedder], model_name: str, deadline: float):
        self._source = source
        self._embedder: Embedder | None = None
        self.model_name = model_name
        self.deadline = deadline
        self.draining = False
        self.failure: Exception | None = None
        self.requests = 0
        self._dense = 0
        self._stopped = False
        self._limits: set[asyncio.Timeout] = set()
        self._waiting: set[asyncio.Future[list[Embedding]]] = set()

    def start(self) -> None:
        # A daemon: a process told to stop while it loads must not wait for a download.
        threading.Thread(target=self._load, name="radio-fast-load", daemon=True).start()

    def _load(self) -> None:
        try:
            embedder = self._source() if callable(self._source) else self._source
            embedder.warm_up()
        except Exception as error:
            self.failure = error
            logger.error("the model could not be loaded: %s", error)
        else:
            self._embedder = embedder

    async def stop(self) -> None:
        """Fail what is still waiting, arriving or leaving. An embedder that was handed in stays its owner's."""
        self.draining = self._stopped = True
        for limit in self._limits:
            if not limit.expired():
                limit.reschedule(0)
        for results in self._waiting:
            results.cancel()
        if self._embedder is not None and self._embedder is not self._source:
            await asyncio.to_thread(self._embedder.close, drain=False, timeout=5)

    @property
    def loaded(self) -> Embedder | None:
        return self._embedder

    @property
    def why_not_ready(self) -> str | None:
        if self.draining or (self._embedder is not None and self._embedder.closed):
            return "the server is shutting down"
        if self.failure is not None:
            return "the model could not be loaded"
        return "the model is being loaded" if self._embedder is None else None

    @property
    def embedder(self) -> Embedder:
        """Raises ApiError (503) until it is loaded and warm."""
        if self._embedder is None:
            raise ApiError(503, "not_ready", self.why_not_ready or "not ready", retry_after=1)
        return self._embedder

    def check_room(self) -> None:
        """Raises ApiError: 429 while no image would be taken, 503 until one would be."""
        try:
            self.embedder.check_room()
        except (QueueFull, EmbedderClosed) as error:
            raise _answer(error, 0) from error

    @property
    def outputs(self) -> tuple[str, ...]:
        """Their names; raises as `embedder`."""
        return "backbone", *self.embedder.model.adaptors

    def width_of(self, output: str) -> int:
        """Of its summary."""
        model = self.embedder.model
        return model.summary_dim if output == "backbone" else model.adaptors[output].summary_dim

    def name_of(self, output: str) -> str:
        """What clients call an output of `outputs` as a model."""
        return self.model_name if output == "backbone" else f"{self.model_name}:{output}"

    @contextmanager
    def request(self, scope: Scope) -> Iterator[None]:
        """Around one until its answer has left; a server that drains waits for all of them."""
        self.requests += 1
        try:
            with ExitStack() as scope[HELD]:
                yield
        finally:
            self.requests -= 1

    @asynccontextmanager
    async def within(self, seconds: float) -> AsyncIterator[None]:
        """For a client's part of a request, which must not last. TimeoutError, by `stop` too."""
        async with asyncio.timeout(0 if self._stopped else seconds) as limit:
            self._limits.add(limit)
            try:
                yield
            finally:
                self._limits.discard(limit)

    @contextmanager
    def _dense_images(self, count: int) -> Iterator[None]:
        if count > DENSE_IMAGES:
            raise ApiError(413, "too_many_images", f"features are of at most {DENSE_IMAGES} images a request")
        if self._dense + count > DENSE_IMAGES_TOGETHER:
            raise ApiError(429, "queue_full", "the server is full, try again later", retry_after=1)
        self._dense += count
        try:
            yield
        finally:
            self._dense -= count

    async def embed(
        self,
        request: Request,
        images: Sequence[bytes],
        *,
        deadline: float | None = None,
        features: bool = False,
        resolution: tuple[int, int] | None = None,
    ) -> list[Embedding]:
        """All of the images. ApiError: the first that fails, or the client has gone; the rest is then taken back."""
        embedder, seconds = self.embedder, deadline or self.deadline
        if len(images) > embedder.max_queue:
            raise ApiError(413, "too_many_images", f"this server holds {embedder.max_queue} images at a time")
        request.scope[HELD].enter_context(self._dense_images(len(images) if features else 0))
        futures: list[asyncio.Future[Embedding]] = []
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            for i, image in enumerate(images):
                futures.append(self._submit(embedder, i, image, seconds, features, resolution))
            results = asyncio.ensure_future(_results(futures))
            self._waiting.add(results)
            results.add_done_callback(self._waiting.discard)
            await asyncio.wait({results, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if results.cancelled():
                raise _answer(EmbedderClosed(), 0)
            if results.done():
                return results.result()
            results.cancel()
            if gone.done():
                raise client_gone()
            raise _answer(DeadlineExceeded(), 0)
        finally:
            gone.cancel()
            for future in futures:
                future.cancel()

    def _submit(self, embedder, index, image, deadline, features, resolution) -> asyncio.Future[Embedding]:
        try:
            future = embedder.submit(image, deadline=deadline, features=features, resolution=resolution)
        except Exception as error:
            if isinstance(error, ValueError) and api_error(error, index) is None:
                raise ApiError(400, "invalid_value", str(error)) from error
            raise _answer(error, index) from error
        return asyncio.wrap_future(future)


async def _results(futures: Sequence[asyncio.Future[Embedding]]) -> list[Embedding]:
    return await asyncio.gather(*(_result(i, future) for i, future in enumerate(futures)))


async def _result(index: int, future: asyncio.Future[Embedding]) -> Embedding:
    try:
        return await future
    except Exception as error:
        raise _answer(error, index) from error


def _answer(error: Exception, index: int) -> ApiError:
    answer = api_error(error, index)
    if answer is None:  # its text is for the log, not for strangers
        logger.error("the model failed on an image", exc_info=error)
        answer = ApiError(500, "model_failed", "the model failed; the server's log says why")
    return answer


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
