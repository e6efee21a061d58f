"""Which images run together, and when. No threads and no clock here: the caller says what time it is."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Generic, NamedTuple, TypeVar

Key = TypeVar("Key")


class Decision(NamedTuple, Generic[Key]):
    """`batch` to run now, in the order of arrival; `expired`, whose deadlines have passed. Where both are empty: look
    again after `wait` seconds, or (None) when something is added.
    """

    batch: list[Key]
    expired: list[Key]
    wait: float | None


class _Waiting(NamedTuple):
    tokens: int
    arrival: float
    deadline: float


class Batcher(Generic[Key]):
    """A queue of images that leaves in batches of at most `budget` tokens; an image of more goes alone.

    First come, first served: a batch is the longest run from the front of the queue that the budget allows, so that no
    image waits for ever behind smaller ones. It goes when no more would fit, when its oldest image has waited
    `max_wait` seconds, and at once when waiting that long would cost one of its images its deadline.
    """

    def __init__(self, budget: int, max_wait: float):
        self.budget = budget
        self.max_wait = max_wait
        self.tokens = 0
        self._queue: OrderedDict[Key, _Waiting] = OrderedDict()

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, key: Key, tokens: int, now: float, deadline: float = math.inf) -> bool:
        """Put an image at the end; whether `take` may now say something else than before."""
        self._queue[key] = _Waiting(tokens, now, deadline)
        self.tokens += tokens
        return len(self._queue) == 1 or self.tokens >= self.budget or deadline < math.inf

    def discard(self, key: Key) -> bool:
        """Forget an image; whether it was here."""
        waiting = self._queue.pop(key, None)
        if waiting is not None:
            self.tokens -= waiting.tokens
        return waiting is not None

    def take(self, now: float, flush: bool = False) -> Decision[Key]:
        """Take out what is to run now; with `flush` without waiting for more."""
        batch, expired, tokens, due, full = [], [], 0, math.inf, False
        for key, waiting in self._queue.items():
            if waiting.deadline <= now:
                expired.append(key)
                continue
            if batch and tokens + waiting.tokens > self.budget:
                full = True
                break
            batch.append(key)
            tokens += waiting.tokens
            due = min(due, waiting.arrival + self.max_wait)
            if waiting.deadline <= due:
                due = now
        if batch and not (flush or full or tokens >= self.budget or due <= now):
            batch = []
        for key in (*batch, *expired):
            self.discard(key)
        return Decision(batch, expired, None if batch or expired or due == math.inf else due - now)
