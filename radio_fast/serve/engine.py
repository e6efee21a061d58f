"""The queues and threads behind `Embedder`.

Images wait to be decoded, are decoded by worker threads, wait in the batcher, and are computed by one more thread.
`_items` has all that are not done; futures are resolved outside the lock, as their callbacks are other people's code.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, InvalidStateError
from functools import partial
from typing import Any

from torch import Tensor

from radio_fast.images import ImageError, ImageTooLarge
from radio_fast.serve.batcher import Batcher
from radio_fast.serve.compute import OnCPU, OnGPU, Outputs, out_of_memory
from radio_fast.serve.items import Batch, Hand, Item, closed, freed
from radio_fast.serve.metrics import Metrics
from radio_fast.serve.types import EmbedderClosed, Embedding, QueueFull, Timings

log = logging.getLogger("radio_fast")
clock = time.monotonic

AHEAD = 2  # batches' worth of images that are decoded before the model needs them
SHORTEST_RETRY, LONGEST_RETRY = 0.05, 30.0  # seconds
AT_EXIT = 5.0  # seconds that an interpreter waits for the batch under way
LINGER = 5.0  # seconds that close() waits for the threads once all images are done


def _forget_cancelled(engine: weakref.ref[Engine], future: Future) -> None:
    if future.cancelled() and (found := engine()) is not None:
        found.forget(future)


class Engine:
    """Runs what `Embedder` promises. `read(source, size_of)` gives an image's pixels, `grid_of(height, width)` the rows
    and columns of features that the model makes of them.
    """

    def __init__(
        self,
        runner: OnCPU | OnGPU,
        read: Callable[[Any, Callable], Tensor],
        grid_of: Callable[[int, int], tuple[int, int]],
        budget: int,
        max_queue: int,
        max_wait: float,
        workers: int,
    ):
        self.max_queue = max_queue
        self.closed = False
        self._runner, self._read, self._grid_of = runner, read, grid_of
        self._lock = threading.RLock()
        self._work = threading.Condition(self._lock)  # for a worker
        self._ready = threading.Condition(self._lock)  # for the model's thread
        self._room = threading.Condition(self._lock)  # for who wants to submit, or waits for the end
        self._items: dict[Future, Item] = {}  # all that are accepted and not done
        self.metrics = Metrics(budget, self._items.__len__)
        self._undecoded: OrderedDict[Future, Item] = OrderedDict()
        self._batcher: Batcher[Item] = Batcher(budget, max_wait)
        self._pace = 0.0  # seconds an image has taken lately
        self._cancelled = partial(_forget_cancelled, weakref.ref(self))
        self._pid = os.getpid()
        self._threads: list[threading.Thread] = []
        try:
            self._run(self._compute, "radio_fast-model")
            for i in range(workers):
                self._run(self._decode, f"radio_fast-decode-{i}")
        except BaseException:  # the system has no thread left
            self.close(drain=False)
            raise
        # A daemon inside the model while the interpreter is taken down could crash it.
        atexit.register(self._at_exit)

    def _run(self, work: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=work, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)

    @property
    def budget(self) -> int:
        return self._batcher.budget

    @property
    def forked(self) -> bool:
        """Whether this is a copy in a child process: without threads, and with locks that may be held for ever."""
        return os.getpid() != self._pid

    # -- submitting -------------------------------------------------------------------------------------------------

    def check_process(self) -> None:
        if self.forked:
            raise EmbedderClosed("the embedder is another process's: make one after the fork")

    def check_room(self) -> None:
        """Raises EmbedderClosed, QueueFull."""
        self.check_process()
        with self._lock:
            if self.closed:
                self.metrics.reject("closed")
                raise EmbedderClosed("the embedder is closed")
            waiting = len(self._items)
            if waiting >= self.max_queue:
                self.metrics.reject("queue_full")
                retry_after = min(max(waiting * self._pace, SHORTEST_RETRY), LONGEST_RETRY)
                raise QueueFull(f"{waiting} images are waiting, as many as may", retry_after)

    def submit(
        self, source: Any, size_of: Callable, features: bool, deadline: float, wait: bool = False
    ) -> Future[Embedding]:
        """Accept an image, `deadline` by `clock`; with `wait`, once there is room. Raises EmbedderClosed, QueueFull."""
        self.check_process()
        with self._lock:
            while wait and not self.closed and len(self._items) >= self.max_queue:
                self._room.wait()
            self.check_room()
            item = Item(source, size_of, features, clock(), deadline)
            item.future.add_done_callback(self._cancelled)
            self.metrics.accept()
            self._undecoded[item.future] = self._items[item.future] = item
            self._work.notify()
            return item.future

    def forget(self, future: Future) -> None:
        """The caller has cancelled it."""
        if not self.forked and self._take_out(future):
            future.set_running_or_notify_cancel()  # concurrent.futures.wait counts it as done only then
            self.metrics.cancel()

    # -- the end of an item -----------------------------------------------------------------------------------------

    def _take_out(self, future: Future) -> bool:
        """Free an item's place; whether it had one: not if another thread was faster."""
        with self._lock:
            item = self._items.pop(future, None)
            if item is None:
                return False
            self._undecoded.pop(future, None)
            if self._batcher.discard(item):
                self._work.notify_all()
            self._room.notify_all()
            if self.closed and not self._items:
                self._wake()
            return True

    def _complete(self, item: Item, result: Embedding) -> None:
        self._end(item.future.set_result, result, item.future, partial(self.metrics.complete, result.timings))

    def _fail(self, item: Item, kind: str, error: BaseException) -> None:
        """`kind`: as in `Snapshot.failed`."""
        if not isinstance(error, Exception):  # result() would end its caller's thread with a SystemExit
            cause, error = error, RuntimeError(f"the embedder was hit by {type(error).__name__}: {error}")
            error.__cause__ = cause
        self._end(item.future.set_exception, error, item.future, partial(self.metrics.fail, kind))

    def _end(self, settle: Callable, value: Embedding | BaseException, future: Future, count: Callable) -> None:
        if self._take_out(future):
            # From here on it can't be cancelled, and is counted once.
            if not future.running() and not future.set_running_or_notify_cancel():
                count = self.metrics.cancel
            count()
        try:
            settle(value)
        except InvalidStateError:  # another thread was faster, or a cancel()
            pass
        except BaseException:  # concurrent.futures logs a callback's Exception itself
            log.exception("a callback of an image's future failed")

    # -- decoding ---------------------------------------------------------------------------------------------------

    def _decode(self) -> None:
        """Whatever kills a worker costs one image and no worker. An exception that another thread injects can come
        anywhere, here in the handler too: hence two loops.
        """
        hand = Hand()
        while not hand.ended:
            try:
                while not hand.ended:
                    if hand.item is not None:
                        self._fail(hand.item, "decode", hand.error or SystemExit("the worker was killed"))
                        hand.item = hand.error = None
                    try:
                        hand.ended = not self._decode_next(hand)
                    except BaseException as error:
                        hand.error = freed(error)
            except BaseException:
                continue

    def _decode_next(self, hand: Hand) -> bool:
        """Decode an image when there is one and room for it; False at the end."""
        with self._lock:
            while not self._undecoded or self._batcher.tokens >= AHEAD * self._batcher.budget:
                if self.closed and not self._items:
                    return False
                self._work.wait()
            future = next(iter(self._undecoded))
            item = hand.item = self._undecoded[future]
            del self._undecoded[future]
        now = clock()
        if item.deadline <= now:
            self._fail(item, "deadline", item.late(now))
        else:
            try:
                pixels = self._read(item.source, item.size_of)
            except ImageError as error:
                self._fail(item, "image_too_large" if isinstance(error, ImageTooLarge) else "image", freed(error))
            except Exception as error:
                self._fail(item, "decode", freed(error))
            else:
                self._decoded(item, pixels)
        hand.item = None
        return True

    def _decoded(self, item: Item, pixels: Tensor) -> None:
        h, w = self._grid_of(*pixels.shape[1:])
        with self._lock:
            if item.future not in self._items:
                return
            item.source, item.pixels, item.tokens, item.decoded = None, pixels, h * w, clock()
            if self._batcher.add(item, item.tokens, item.decoded, item.deadline):
                self._ready.notify()

    # -- computing --------------------------------------------------------------------------------------------------

    def _compute(self) -> None:
        under_way: deque[Batch] = deque()
        try:
            while self._compute_next(under_way):
                pass
        except BaseException as error:  # a fault of this file, or an exception injected into the thread
            log.exception("the embedder's model thread failed")
            cause = freed(error)
            with self._lock:
                self.closed = True
                self._wake()
                lost = [*(item for batch in under_way for item in batch.items), *self._items.values()]
            for item in lost:
                failed = RuntimeError(f"the embedder's model thread failed: {type(cause).__name__}: {cause}")
                failed.__cause__ = cause
                self._fail(item, "internal", failed)
        finally:
            atexit.unregister(self._at_exit)

    def _compute_next(self, under_way: deque[Batch]) -> bool:
        """Start a batch, finish one, or both, so that `depth` are under way while there is enough to do; False at the
        end.
        """
        items = self._next_batch(wait=not under_way)
        if items:
            under_way.append(self._start(items))
        elif not under_way:
            return False
        if not items or len(under_way) >= self._runner.depth:
            self._finish(under_way[0])
            under_way.popleft()
        return True

    def _next_batch(self, wait: bool) -> list[Item]:
        """Images to run now, still wanted. Empty: none yet (`wait` False), or none ever."""
        while True:
            with self._lock:
                now = clock()
                chosen, expired, pause = self._batcher.take(now, flush=self.closed)
                items = [item for item in chosen if self._begin(item.future)]
                if chosen or expired:
                    self._work.notify_all()
                elif not wait or (self.closed and not self._items):
                    return []
                else:
                    self._ready.wait(None if pause is None else min(pause, threading.TIMEOUT_MAX))
            for item in expired:
                self._fail(item, "deadline", item.late(now))
            if items:
                return items

    def _begin(self, future: Future) -> bool:
        """Whether an image is still wanted; from here on it can't be cancelled."""
        if future not in self._items:
            return False
        running = future.set_running_or_notify_cancel()
        if not running and self._take_out(future):
            self.metrics.cancel()
        return running

    def _start(self, items: list[Item]) -> Batch:
        batch = Batch(items, clock())
        self.metrics.begin(len(items), batch.tokens)
        pixels, features = [item.pixels for item in items], [item.features for item in items]
        try:
            batch.finish = self._runner.start(pixels, features, self._batcher.budget)
        except BaseException as error:
            batch.error = freed(error)
        return batch

    def _finish(self, batch: Batch) -> None:
        outputs, error = None, batch.error
        if error is None:
            try:
                outputs = batch.finish()
            except BaseException as raised:
                error = freed(raised)
        batch.finish = batch.error = None
        self.metrics.end(batch.tokens)
        if error is not None:
            self._recover(batch.items, error)
            return
        now = clock()
        seconds = (now - batch.began) / len(batch.items)
        self._pace += (0.2 if self._pace else 1.0) * (seconds - self._pace)
        for item, output in zip(batch.items, outputs, strict=True):
            self._complete(item, self._embedding(item, output, batch.began, now))

    def _embedding(self, item: Item, outputs: Outputs, began: float, now: float) -> Embedding:
        height, width = item.pixels.shape[1:]
        timings = Timings(item.decoded - item.submitted, began - item.decoded, now - began, now - item.submitted)
        return Embedding(outputs, height, width, self._grid_of(height, width), timings)

    def _recover(self, items: list[Item], error: BaseException) -> None:
        """Split up a batch that failed: into halves, within the budget, if it didn't fit into memory, else into single
        images.
        """
        no_memory = out_of_memory(error)
        if len(items) == 1:
            self._fail(items[0], "out_of_memory" if no_memory else "model", error)
            return
        self.metrics.retry()
        tokens = sum(item.tokens for item in items)
        if no_memory:
            self._halve(tokens, error)
        rest = deque(items)
        while rest := self._wanted(rest):
            part = [rest.popleft()]
            room = min(tokens // 2, self._batcher.budget) - part[0].tokens  # a part that fails halves the budget again
            while no_memory and rest and rest[0].tokens <= room:
                room -= rest[0].tokens
                part.append(rest.popleft())
            self._finish(self._start(part))

    def _wanted(self, items: Iterable[Item]) -> deque[Item]:
        """Those of images under way that are neither late by now nor failed by close()."""
        now, rest = clock(), deque()
        for item in items:
            if item.deadline <= now:
                self._fail(item, "deadline", item.late(now))
            elif item.future in self._items:
                rest.append(item)
        return rest

    def _halve(self, tokens: int, error: BaseException) -> None:
        """Batches of so many tokens don't fit. Nothing new, if they were started before the budget was halved."""
        with self._lock:
            if tokens > self._batcher.budget:
                return
            budget = self._batcher.budget = max(self._batcher.budget // 2, 1)
        if self.metrics.halve(budget) == 1:
            log.warning("%d tokens don't fit into memory, batches get %d from now on: %s", tokens, budget, error)

    # -- the end ----------------------------------------------------------------------------------------------------

    def close(self, drain: bool = True, timeout: float | None = None, wait: bool = True) -> None:
        """As `Embedder.close`; without `wait` return at once."""
        if self.forked:
            return
        end = math.inf if timeout is None else clock() + timeout
        with self._lock:
            self.closed = True
            queued = [] if drain else [item for item in self._items.values() if not item.future.running()]
            self._wake()
        for item in queued:
            self._fail(item, "closed", closed())
        if not wait or threading.current_thread() in self._threads:
            return
        with self._lock:
            while self._items and (left := end - clock()) > 0:
                self._room.wait(min(left, threading.TIMEOUT_MAX))
            late = [*self._items.values()]
        for item in late:
            self._fail(item, "closed", closed())
        end = min(end, clock() + LINGER)
        for thread in self._threads:
            thread.join(max(end - clock(), 0.0))

    def _wake(self) -> None:
        for condition in (self._work, self._ready, self._room):
            condition.notify_all()

    def _at_exit(self) -> None:
        self.close(drain=False, timeout=AT_EXIT)
