"""Which images run together, and when: any order, sizes, deadlines; no threads, no clock."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radio_fast.serve.batcher import Batcher

FAST = settings(max_examples=150, deadline=None, derandomize=True, database=None)
WAIT = 5.0
BUDGET = 10


def batcher(*tokens: int, at: float = 0.0, deadline: float = math.inf) -> Batcher:
    found = Batcher(BUDGET, WAIT)
    for key, count in enumerate(tokens):
        found.add(key, count, at, deadline)
    return found


def test_waits_for_more_until_the_oldest_has_waited():
    waiting = batcher(2, 2)
    assert waiting.take(0.0) == ([], [], 5.0)
    waiting.add("late", 2, 4.0)
    assert waiting.take(4.5) == ([], [], 0.5)
    assert waiting.take(5.0) == ([0, 1, "late"], [], None)
    assert len(waiting) == waiting.tokens == 0
    assert waiting.take(6.0) == ([], [], None)


def test_a_full_batch_goes_at_once():
    assert batcher(4, 6).take(0.0).batch == [0, 1]
    assert batcher(4, 5, 2).take(0.0).batch == [0, 1], "a third would not fit"
    assert batcher(4, 5).take(0.0).batch == []


def test_an_image_above_the_budget_goes_alone():
    waiting = batcher(25, 1)
    assert waiting.take(0.0).batch == [0]
    assert waiting.take(5.0).batch == [1]
    waiting = batcher(1, 25)
    assert [waiting.take(0.0).batch, waiting.take(0.0).batch] == [[0], [1]]


def test_no_image_overtakes_another():
    waiting = batcher(6, 6, 1)
    assert waiting.take(0.0).batch == [0], "image 2 would fit beside image 0"
    assert waiting.take(5.0).batch == [1, 2]


def test_flush_waits_for_nothing():
    assert batcher(1).take(0.0, flush=True).batch == [0]
    assert batcher().take(0.0, flush=True) == ([], [], None)


def test_a_deadline_before_the_end_of_the_wait():
    """Who can't wait is run at once: at the deadline it would be too late."""
    assert batcher(1, deadline=WAIT).take(0.0).batch == [0]
    assert batcher(1, deadline=WAIT + 0.1).take(0.0) == ([], [], WAIT)


def test_expired_images_are_told_and_not_run():
    waiting = batcher(1, 1, deadline=2.0)
    waiting.add("lasting", 1, 0.0)
    assert waiting.take(2.0) == ([], [0, 1], None)
    assert waiting.take(2.0) == ([], [], 3.0)
    assert waiting.tokens == 1


def test_discarded_images_are_gone():
    waiting = batcher(4, 5)
    assert waiting.discard(0) and not waiting.discard(0) and not waiting.discard("unknown")
    assert waiting.tokens == 5
    assert waiting.take(WAIT).batch == [1]


def test_a_smaller_budget_counts_from_then_on():
    waiting = batcher(3, 3, 3)
    waiting.budget = 6
    assert waiting.take(0.0).batch == [0, 1]


@pytest.mark.parametrize(("tokens", "deadline", "tells"), [(1, math.inf, False), (9, math.inf, True), (1, 3.0, True)])
def test_add_tells_when_to_look_again(tokens, deadline, tells):
    waiting = batcher()
    assert waiting.add("first", 1, 0.0)
    assert waiting.add("second", tokens, 0.0, deadline) is tells


images = st.tuples(st.integers(1, 15), st.floats(0, 3), st.one_of(st.just(math.inf), st.floats(0.1, 20)), st.booleans())


@FAST
@given(st.lists(images, max_size=40), st.integers(1, 12), st.floats(0, 4), st.lists(st.floats(0, 3), max_size=60))
def test_any_order_sizes_and_deadlines(arrivals, budget, max_wait, pauses):
    """Images come, some are cancelled; `take` is called where `wait` and `add` say so, and at other times too."""
    queue: Batcher[int] = Batcher(budget, max_wait)
    now, tokens, deadlines, came, done = 0.0, {}, {}, {}, []
    cancelled: set[int] = set()

    def look(flush: bool = False) -> float | None:
        """Take all there is to take, and check it; how long to wait then."""
        while True:
            batch, expired, wait = queue.take(now, flush)
            for key in expired:
                assert deadlines[key] <= now
            for key in batch:
                assert deadlines[key] > now, "computed after its deadline"
            assert not cancelled & {*batch, *expired}
            done.append((batch, expired))
            size = sum(tokens[key] for key in batch)
            assert size <= budget or len(batch) == 1
            left = [key for key in tokens if key not in cancelled and all(key not in b + e for b, e in done)]
            assert len(queue) == len(left) and queue.tokens == sum(tokens[key] for key in left)
            if not batch and not expired:
                break
            assert wait is None
            # Nothing that came earlier and still could run was left behind.
            assert not batch or all(key > max(batch) or deadlines[key] <= now for key in left)
        if left:
            assert not flush
            oldest = min(came[key] for key in left)
            assert wait is not None and 0 < wait <= oldest + max_wait - now + 1e-9, "longer than the oldest may wait"
            assert all(deadlines[key] > now + wait for key in left), "an image would expire while nothing runs"
            assert queue.tokens < budget
        else:
            assert wait is None
        return wait

    until = math.inf
    for number, (count, pause, lasts, cancel) in enumerate(arrivals):
        while until <= now + pause:
            pause -= max(until - now, 0.0)
            now = max(until, now)
            wait = look()
            until = math.inf if wait is None else now + wait
        now += pause
        tokens[number], came[number], deadlines[number] = count, now, now + lasts
        if queue.add(number, count, now, now + lasts):
            wait = look()
            until = math.inf if wait is None else now + wait
        if cancel and queue.discard(number):
            cancelled.add(number)
        if number < len(pauses) and pauses[number] < 1:
            wait = look()  # at no particular time
            until = math.inf if wait is None else now + wait
    look(flush=True)
    out = [key for batch, expired in done for key in batch + expired]
    assert sorted([*out, *cancelled]) == sorted(tokens), "each image leaves exactly once"
    ran = [key for batch, _ in done for key in batch]
    assert ran == sorted(ran), "first come, first served"
