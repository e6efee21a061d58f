"""What an embedder counts."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from radio_fast.serve.types import Timings

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
TOKENS = tuple(2**i for i in range(6, 18))
IMAGES = tuple(2**i for i in range(11))


@dataclass(frozen=True, slots=True)
class Histogram:
    """`counts[i]`: values of at most `bounds[i]` and above `bounds[i - 1]`; the last one: values above all bounds."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float

    @property
    def count(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An embedder's numbers at one moment; all but the gauges only grow.

    While nothing is on its way from one count to the next, accepted = completed + cancelled + Σ failed + queue_depth.
    """

    accepted: int  # images that submit() took
    completed: int  # images with a result
    cancelled: int  # by their callers, before they were computed
    failed: dict[
        str, int
    ]  # images, by kind: image, image_too_large, decode, deadline, closed, out_of_memory, model, internal
    rejected: dict[str, int]  # calls of submit() that raised, by kind: queue_full, closed, invalid
    retried: int  # batches that failed and were split up
    out_of_memory: int  # batches that did not fit and halved the budget
    queue_depth: int  # gauge: images accepted and not done, of at most max_queue
    tokens_in_flight: int  # gauge: tokens that the model is computing
    token_budget: int  # gauge: what a batch may have now
    decode_seconds: Histogram  # per image with a result, as in `Timings`
    wait_seconds: Histogram
    compute_seconds: Histogram
    total_seconds: Histogram
    batch_tokens: Histogram  # per batch given to the model, the parts of failed ones too
    batch_images: Histogram


class _Tally:
    def __init__(self, bounds: tuple[float, ...]):
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def snapshot(self) -> Histogram:
        return Histogram(self.bounds, tuple(self.counts), self.sum)


class Metrics:
    """Counters and histograms of one embedder; safe in threads."""

    def __init__(self, token_budget: int, queue_depth: Callable[[], int]):
        self._lock = threading.RLock()
        self._counts: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()
        self._in_flight = 0
        self._budget = token_budget
        self._queue_depth = queue_depth
        self._seconds = {name: _Tally(SECONDS) for name in ("decode", "wait", "compute", "total")}
        self._tokens, self._images = _Tally(TOKENS), _Tally(IMAGES)

    def snapshot(self) -> Snapshot:
        with self._lock:
            counts = self._counts
            return Snapshot(
                accepted=counts["accepted"],
                completed=counts["completed"],
                cancelled=counts["cancelled"],
                failed=dict(self._failed),
                rejected=dict(self._rejected),
                retried=counts["retried"],
                out_of_memory=counts["out_of_memory"],
                queue_depth=self._queue_depth(),
                tokens_in_flight=self._in_flight,
                token_budget=self._budget,
                **{f"{name}_seconds": tally.snapshot() for name, tally in self._seconds.items()},
                batch_tokens=self._tokens.snapshot(),
                batch_images=self._images.snapshot(),
            )

    def accept(self) -> None:
        self._count("accepted")

    def cancel(self) -> None:
        self._count("cancelled")

    def retry(self) -> None:
        self._count("retried")

    def reject(self, kind: str) -> None:
        with self._lock:
            self._rejected[kind] += 1

    def fail(self, kind: str) -> None:
        with self._lock:
            self._failed[kind] += 1

    def complete(self, timings: Timings) -> None:
        with self._lock:
            self._counts["completed"] += 1
            for name, tally in self._seconds.items():
                tally.add(getattr(timings, name))

    def begin(self, images: int, tokens: int) -> None:
        """A batch goes to the model."""
        with self._lock:
            self._in_flight += tokens
            self._tokens.add(tokens)
            self._images.add(images)

    def end(self, tokens: int) -> None:
        with self._lock:
            self._in_flight -= tokens

    def halve(self, token_budget: int) -> int:
        """A batch did not fit into memory; how often that has been so."""
        with self._lock:
            self._counts["out_of_memory"] += 1
            self._budget = token_budget
            return self._counts["out_of_memory"]

    def _count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1
