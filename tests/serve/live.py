"""A real server on a free port of this machine, in a thread; and an embedder that does what a test says."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from radio_fast.model import RadioOutput
from radio_fast.serve.listen import Server, listen
from radio_fast.serve.metrics import Metrics
from radio_fast.serve.server import create_app
from radio_fast.serve.types import Embedding, Timings


def picture(seed: int = 0, height: int = 40, width: int = 56, kind: str = "PNG", **options) -> bytes:
    """The file of a smooth random picture."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(file, kind, **options)
    return file.getvalue()


class Running:
    """`url`, `port`; `signal()` is what SIGTERM does; `ended`: the server's thread is over."""

    def __init__(self, embedder, drain_seconds: float, **options):
        self.app = create_app(embedder, **({"model_name": "tiny"} | options))
        self.server = Server(self.app, drain_seconds=drain_seconds)
        self.socket = listen("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))

    def signal(self) -> None:
        self.server.handle_exit(15, None)

    def ended(self, timeout: float = 30) -> bool:
        self.thread.join(timeout)
        return not self.thread.is_alive()


@contextmanager
def serving(embedder, drain_seconds: float = 0, wait: bool = True, **options) -> Iterator[Running]:
    """Ready, unless told not to wait for that."""
    running = Running(embedder, drain_seconds, **options)
    running.thread.start()
    try:
        if wait:
            until(lambda: running.app.state.service.why_not_ready is None)
        yield running
    finally:
        running.signal()
        running.signal()
        assert running.ended()


def until(condition, seconds: float = 30) -> None:
    """Wait for something that another thread does."""
    event = threading.Event()
    for _ in range(int(seconds / 0.005)):
        if condition():
            return
        event.wait(0.005)
    raise AssertionError("it did not happen")


def result(value: float = 1.0, grid: tuple[int, int] = (2, 3), width: int = 4) -> Embedding:
    rows = grid[0] * grid[1]
    output = RadioOutput(torch.full((width,), value), torch.full((rows, width), value))
    return Embedding({"backbone": output}, 16 * grid[0], 16 * grid[1], grid, Timings(0.001, 0.002, 0.003, 0.006))


class Scripted:
    """`submit` notes each image and hands out a Future that the test sets; or what `script` returns or raises."""

    max_queue = 4
    max_tokens = 1024
    closed = False
    refusal: Exception | None = None  # of `check_room`
    model = SimpleNamespace(adaptors={}, patch_size=16, summary_dim=4)

    def __init__(self, script=None):
        self.script = script
        self.futures: list[Future] = []
        self.options: list[dict] = []
        self.metrics = Metrics(1024, int)

    def warm_up(self) -> None:
        pass

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        self.closed = True

    def check_room(self) -> None:
        if self.refusal is not None:
            raise self.refusal

    def submit(self, image, **options) -> Future:
        future: Future = Future()
        outcome = self.script(len(self.futures)) if self.script else None
        if isinstance(outcome, Embedding):
            future.set_result(outcome)
        elif isinstance(outcome, Exception):
            future.set_exception(outcome)
        self.futures.append(future)
        self.options.append(options)
        return future
