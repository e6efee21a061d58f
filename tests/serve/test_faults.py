"""What goes wrong: every image that was accepted gets its own result or its own error, and none waits for ever."""

from __future__ import annotations

import ctypes
import gc
import itertools
import logging
import os
import random
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import CancelledError, wait
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from radio_fast import Embedder
from radio_fast.images import ImageError
from radio_fast.serve import compute, engine
from radio_fast.serve.items import Item
from radio_fast.serve.types import DeadlineExceeded, EmbedderClosed, QueueFull
from tests.serve.models import SIDE, TIMEOUT, Gate, Reader, encoded, numbered, threads, tiny

ROOT = Path(__file__).resolve().parents[2]


def reader(before=lambda numbers: None, **options) -> Embedder:
    return Embedder(Reader(before), **{"resolution": SIDE, "max_tokens": 64, "workers": 2} | options)


def number_of(embedding) -> int:
    return int(embedding.summary)


def together(embedder: Embedder, gate: Gate, numbers) -> list:
    """Futures of images that share a batch: they fill it, in an embedder that waits for that."""
    assert embedder.max_tokens == 4 * len(numbers)
    first = embedder.submit(numbered(0), deadline=TIMEOUT)  # sooner than the wait's end: it goes alone
    assert gate.reached.wait(TIMEOUT)
    futures = [embedder.submit(numbered(n)) for n in numbers]
    gate.open.set()
    assert number_of(first.result(TIMEOUT)) == 0
    return futures


def await_decoded(embedder: Embedder, images: int) -> None:
    """Until so many wait for the model."""
    end = time.monotonic() + TIMEOUT
    while len(embedder._engine._batcher) < images:
        assert time.monotonic() < end
        time.sleep(0.001)


def kill(thread: threading.Thread, error: type[BaseException]) -> None:
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(error)) == 1


# -- the model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("odd image"), SystemExit(2), KeyboardInterrupt()])
def test_one_bad_image_fails_alone(error):
    gate = Gate()

    def before(numbers):
        gate(numbers)
        if 3 in numbers:
            raise error

    with reader(before, max_tokens=24, max_wait_ms=60_000) as embedder:
        futures = together(embedder, gate, range(1, 7))
        for number, future in enumerate(futures, 1):
            if number != 3:
                assert number_of(future.result(TIMEOUT)) == number
            elif isinstance(error, RuntimeError):
                assert future.exception(TIMEOUT) is error
            else:
                raised = future.exception(TIMEOUT)
                assert type(raised) is RuntimeError and raised.__cause__ is error, "it would end its caller's thread"
        snapshot = embedder.metrics.snapshot()
        assert snapshot.failed == {"model": 1} and snapshot.retried == 1 and snapshot.tokens_in_flight == 0
        assert number_of(embedder.submit(numbered(9), deadline=TIMEOUT).result(TIMEOUT)) == 9
    assert [3] in embedder.model.batches


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:113] . DefaultCPUAllocator: not enough memory: you tried"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "linux", "cublas", "python"],
)
def test_out_of_memory_halves_the_budget_and_tells_once(error, caplog):
    gate = Gate()

    def before(numbers):
        gate(numbers)
        if len(numbers) > 3:
            raise error

    with reader(before, max_wait_ms=60_000) as embedder, caplog.at_level(logging.WARNING, "radio_fast"):
        futures = together(embedder, gate, range(1, 17))
        assert [number_of(f.result(TIMEOUT)) for f in futures] == list(range(1, 17))
        # 64 tokens → 32 → 16 → 8, of 4 each.
        assert embedder.max_tokens == 8 and embedder.metrics.snapshot().token_budget == 8
        more = [embedder.submit(numbered(n)) for n in range(20, 40)]
        assert [number_of(f.result(TIMEOUT)) for f in more] == list(range(20, 40))
        snapshot = embedder.metrics.snapshot()
    assert len(caplog.records) == 1 and "64 tokens don't fit into memory, batches get 32" in caplog.text
    assert snapshot.out_of_memory >= 3 and snapshot.failed == {}
    ran = [numbers for numbers in embedder.model.batches if numbers[0] >= 20]
    assert all(len(numbers) <= 2 for numbers in ran)


def test_an_image_that_never_fits_fails_alone():
    def before(numbers):
        gate(numbers)
        if 2 in numbers:
            raise torch.OutOfMemoryError("out of memory")

    gate = Gate()
    with reader(before, max_tokens=16, max_wait_ms=60_000) as embedder:
        futures = together(embedder, gate, range(1, 5))
        assert [number_of(futures[i].result(TIMEOUT)) for i in (0, 2, 3)] == [1, 3, 4]
        assert isinstance(futures[1].exception(TIMEOUT), torch.OutOfMemoryError)
        assert embedder.metrics.snapshot().failed == {"out_of_memory": 1}
        assert embedder.max_tokens >= 4, "a single image says nothing of the budget"


def test_outputs_for_fewer_images_than_were_given(monkeypatch):
    with reader() as embedder:
        forward = embedder.model.forward
        embedder.model.forward = lambda x: type(forward(x))(*(t[1:] for t in forward(x)))
        with pytest.raises(RuntimeError, match="0 summaries and 0 features of backbone for 1 images"):
            embedder.submit(numbered(1)).result(TIMEOUT)


def test_the_model_thread_hit_by_a_fault(monkeypatch, caplog):
    """A fault of ours, not of the model: nothing is left waiting, and it is said."""
    gate = Gate()
    embedder = reader(gate, max_tokens=4, workers=1)
    futures = [embedder.submit(numbered(n)) for n in range(20)]
    assert gate.reached.wait(TIMEOUT)
    monkeypatch.setattr(embedder._engine._batcher, "take", lambda now, flush: 1 / 0)
    gate.open.set()
    for future in futures[1:]:
        with pytest.raises(RuntimeError, match="model thread failed: ZeroDivisionError"):
            future.result(TIMEOUT)
    assert number_of(futures[0].result(TIMEOUT)) == 0
    assert embedder.closed and "model thread failed" in caplog.text
    with pytest.raises(EmbedderClosed):
        embedder.submit(numbered(1))
    embedder.close(timeout=TIMEOUT)
    assert embedder.metrics.snapshot().failed == {"internal": 19}


def test_the_model_thread_killed_while_it_waits(caplog):
    embedder = reader()
    assert number_of(embedder.submit(numbered(1)).result(TIMEOUT)) == 1
    kill(embedder._engine._threads[0], SystemExit)
    try:
        future = embedder.submit(numbered(2))
    except EmbedderClosed:
        return
    assert number_of(future.result(TIMEOUT)) == 2 if future.exception(TIMEOUT) is None else True
    embedder.close(timeout=TIMEOUT)


# -- decoding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [SystemExit, MemoryError, KeyboardInterrupt, GeneratorExit, ValueError])
def test_a_decoder_that_dies_costs_one_image(error, monkeypatch):
    with reader(workers=2) as embedder:
        read = embedder._engine._read

        def dying(source, size_of):
            if isinstance(source, bytes) and source == b"kill":
                raise error("dead")
            return read(source, size_of)

        embedder._engine._read = dying
        images = [b"kill" if n % 3 == 0 else numbered(n) for n in range(30)]
        futures = [embedder.submit(image) for image in images]
        for n, future in enumerate(futures):
            if n % 3:
                assert number_of(future.result(TIMEOUT)) == n
            else:
                found = future.exception(TIMEOUT)
                assert isinstance(found, Exception) and isinstance(found.__cause__ or found, error)
        assert embedder.metrics.snapshot().failed == {"decode": 10}
        assert all(thread.is_alive() for thread in embedder._engine._threads)


def test_a_worker_killed_from_outside():
    """While it decodes, and while it waits."""
    with reader(workers=1) as embedder:
        worker, reached, go_on = embedder._engine._threads[1], threading.Event(), threading.Event()
        read = embedder._engine._read

        def slow(source, size_of):
            reached.set()
            while not go_on.wait(0.001):
                pass
            return read(source, size_of)

        embedder._engine._read = slow
        future = embedder.submit(numbered(1))
        assert reached.wait(TIMEOUT)
        kill(worker, SystemExit)
        assert isinstance(future.exception(TIMEOUT), RuntimeError)
        go_on.set()
        kill(worker, SystemExit)
        for number in range(2, 6):
            future = embedder.submit(numbered(number))
            error = future.exception(TIMEOUT)
            assert "SystemExit" in str(error) if error else number_of(future.result()) == number
        assert error is None and worker.is_alive()


# -- callers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("mine"), SystemExit(1)])
def test_a_callback_that_raises(error, caplog):
    def bad(future):
        raise error

    with reader(max_tokens=4) as embedder:
        futures = [embedder.submit(numbered(n) if n % 2 else b"no image") for n in range(20)]
        gate = Gate()
        embedder.model.before = gate
        held = embedder.submit(numbered(99))
        held.add_done_callback(bad)
        gate.open.set()
        assert number_of(held.result(TIMEOUT)) == 99
        for n, future in enumerate(futures):
            assert isinstance(future.exception(TIMEOUT), ImageError) if n % 2 == 0 else number_of(future.result()) == n
        assert number_of(embedder.submit(numbered(7)).result(TIMEOUT)) == 7
    assert "callback" in caplog.text


def test_a_callback_that_submits_more():
    done = threading.Event()
    with reader(max_queue=1, max_wait_ms=0) as embedder:

        def again(future):
            number = number_of(future.result())
            if number == 20:
                done.set()
            else:
                embedder.submit(numbered(number + 1)).add_done_callback(again)

        embedder.submit(numbered(0)).add_done_callback(again)
        assert done.wait(TIMEOUT)


def test_no_error_keeps_a_batch_alive():
    """The frames of a traceback hold the images and all that the model has made of them."""
    seen = []

    def before(numbers):
        large = torch.empty(1000)
        seen.append(weakref.ref(large))
        raise ValueError("no")

    with reader(before) as embedder:
        gc.disable()
        try:
            errors = [embedder.submit(numbered(n)).exception(TIMEOUT) for n in range(8)]
            # The last one may be in the thread's hands still.
            assert all(found() is None for found in seen[:-1]), "a traceback keeps tensors"
        finally:
            gc.enable()
    assert all("in before" in error.__notes__[0] and len(error.__notes__) == 1 for error in errors)


@pytest.mark.parametrize("image", [numbered(1), b"no image"], ids=["result", "error"])
def test_nothing_is_left_for_the_garbage_collector(image):
    """A cycle would keep images until it is found."""
    with reader(max_wait_ms=0) as embedder:
        embedder.submit(image).exception(TIMEOUT)
        gc.collect()
        gc.disable()
        try:
            for _ in range(20):
                found = weakref.ref(future := embedder.submit(image))
                future.exception(TIMEOUT)
                del future
                # The thread that has resolved it may still be about to let go.
                for _ in range(1000):
                    if found() is None:
                        break
                    embedder.submit(image).exception(TIMEOUT)
                assert found() is None
        finally:
            gc.enable()


def test_nothing_of_past_images_is_kept():
    def items() -> int:
        gc.collect()
        return sum(type(found) is Item for found in gc.get_objects())

    before = items()
    with reader(max_wait_ms=0, max_tokens=256) as embedder:
        kinds = itertools.cycle([numbered(5), b"no image", encoded(numbered(6))])
        found = list(embedder.embed_many(itertools.islice(kinds, 600), return_exceptions=True))
        inner = embedder._engine
        # The threads may have the last ones in hand.
        assert items() - before <= 3 + 64
        assert not inner._items and not inner._undecoded and not len(inner._batcher)
    assert len(found) == 600 and items() == before


# -- all of it at once -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1])
def test_ten_thousand_images_and_every_fault(seed, caplog):
    """From five threads: cancelled, late, corrupt, in a model that fails every tenth batch, with workers that die."""
    caplog.set_level(logging.CRITICAL)
    count, per_thread = itertools.count(), 2000
    chance = random.Random(seed)
    poisoned = {n for n in range(10_000) if chance.random() < 0.002}

    def before(numbers):
        if next(count) % 10 == 9:
            raise RuntimeError("every tenth batch")
        if poisoned & {*numbers}:
            raise ValueError("poisoned")

    outcomes: dict[int, tuple] = {}
    embedder = reader(before, max_queue=300, max_tokens=128, max_wait_ms=0.5, workers=3)
    read = embedder._engine._read

    def dying(source, size_of):
        if source == b"kill":
            raise SystemExit
        return read(source, size_of)

    embedder._engine._read = dying
    stop, kills = threading.Event(), []

    def killer() -> None:
        while not stop.wait(0.02):
            kills.append(1)
            kill(chance.choice(embedder._engine._threads[1:]), SystemExit)

    def submitting(thread: int) -> None:
        mine = random.Random(f"{seed} {thread}")
        for number in range(thread * per_thread, (thread + 1) * per_thread):
            kind = mine.choices(["array", "file", "corrupt", "kill", "late", "cancel"], [70, 10, 5, 2, 5, 8])[0]
            image = {"corrupt": b"\x89PNG no", "kill": b"kill"}.get(kind, numbered(number))
            if kind == "file":
                image = encoded(image)
            while True:
                try:
                    future = embedder.submit(
                        image if isinstance(image, bytes) else torch.from_numpy(image).permute(2, 0, 1),
                        deadline=1e-6 if kind == "late" else None,
                        resolution=mine.choice([None, 48]),
                    )
                    break
                except QueueFull as error:
                    assert 0.05 <= error.retry_after <= 30
                    stop.wait(0.001)
            outcomes[number] = kind, future, future.cancel() if kind == "cancel" else False

    with embedder:
        killing = threading.Thread(target=killer)
        killing.start()
        others = [threading.Thread(target=submitting, args=(i,)) for i in range(5)]
        for thread in others:
            thread.start()
        for thread in others:
            thread.join(4 * TIMEOUT)
            assert not thread.is_alive()
        stop.set()
        killing.join(TIMEOUT)
        assert not wait([future for _, future, _ in outcomes.values()], TIMEOUT).not_done
        ended: dict[str, int] = {}
        for number, (kind, future, cancelled) in outcomes.items():
            try:
                found = number_of(future.result(TIMEOUT))
            except CancelledError:
                assert cancelled
                ended["cancelled"] = ended.get("cancelled", 0) + 1
                continue
            except Exception as error:
                name = type(error).__name__
                ended[name] = ended.get(name, 0) + 1
                assert not cancelled
                killed = "SystemExit" in str(error)
                if kind == "corrupt":
                    assert isinstance(error, ImageError) or killed
                elif kind == "kill":
                    assert killed
                elif kind == "late":
                    assert isinstance(error, DeadlineExceeded) or killed
                else:
                    assert killed or str(error) in ("every tenth batch", "poisoned")
                    assert str(error) != "poisoned" or number in poisoned, "failed with a neighbour"
                continue
            assert found == number, "another's result"
            assert kind not in ("corrupt", "kill", "late") and not cancelled and number not in poisoned
            ended["done"] = ended.get("done", 0) + 1
    snapshot = embedder.metrics.snapshot()
    assert len(outcomes) == snapshot.accepted == 10_000 and snapshot.queue_depth == snapshot.tokens_in_flight == 0
    # A worker may be killed between an image's end and its being counted.
    counted = snapshot.completed + snapshot.cancelled + sum(snapshot.failed.values())
    assert 10_000 - len(kills) <= counted <= 10_000
    assert snapshot.completed == ended["done"] > 7000 and snapshot.cancelled == ended["cancelled"] > 100
    assert {"ImageError", "DeadlineExceeded", "RuntimeError", "ValueError"} <= set(ended)
    numbers = list(itertools.chain(*embedder.model.batches))
    assert not {n for n, (kind, _, cancelled) in outcomes.items() if cancelled or kind == "late"} & {*numbers}
    assert max(map(len, embedder.model.batches)) <= 32


# -- copies to and from a GPU, on a stand-in ---------------------------------------------------------------------------


class FakeGPU:
    """Copies that need not be waited for are done when an event is; `log` has what was asked, in order."""

    def __init__(self, monkeypatch):
        self.log: list[tuple] = []
        self.copies: list[tuple] = []
        self.pinned: list[torch.Tensor] = []
        gpu, empty, copy, to = self, torch.empty, torch.Tensor.copy_, torch.Tensor.to

        class Stream:
            def __init__(self, device=None):
                pass

            def wait_stream(self, other):
                gpu.log.append(("wait", self, other))

        class Event:
            def record(self):
                gpu.log.append(("record", gpu.current))

            def synchronize(self):
                gpu.log.append(("synchronize",))
                with torch.inference_mode():
                    for to, what in gpu.copies:
                        copy(to, what)
                gpu.copies.clear()

        @contextmanager
        def stream(chosen):
            before, gpu.current = gpu.current, chosen
            yield
            gpu.current = before

        def pinning(*size, pin_memory=False, **options):
            found = empty(*size, **options)
            if pin_memory:
                gpu.pinned.append(found.zero_())
            return found

        def copying(to, what, non_blocking=False):
            if not non_blocking:
                return copy(to, what)
            assert any(to is one for one in gpu.pinned), "a copy to other memory is waited for"
            gpu.copies.append((to, what))
            return to

        def moving(tensor, *args, **options):
            if any(tensor is one for one in gpu.pinned):
                assert options == {"non_blocking": True}
                gpu.log.append(("upload", gpu.current))
            return to(tensor, *args, **options)

        self.default = self.current = Stream()
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: self.default)
        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(
            torch.Tensor, "record_stream", lambda tensor, stream: self.log.append(("kept for", stream, tensor.numel()))
        )
        monkeypatch.setattr(torch, "empty", pinning)
        monkeypatch.setattr(torch.Tensor, "copy_", copying)
        monkeypatch.setattr(torch.Tensor, "to", moving)


def test_batches_by_way_of_a_gpu(monkeypatch):
    model = tiny()
    on_cpu = compute.OnCPU(model)
    images = [torch.randint(256, (3, *size), dtype=torch.uint8) for size in ((32, 48), (32, 48), (16, 64))]
    images[1] = images[1].permute(0, 2, 1).contiguous().permute(0, 2, 1)
    batches = images, images[:2], [images[0], images[2].float() / 255]
    wanted = [[i != 1 for i in range(len(batch))] for batch in batches]
    truths = [on_cpu.start(batch, keep, 1000)() for batch, keep in zip(batches, wanted, strict=True)]
    gpu = FakeGPU(monkeypatch)
    on_gpu = compute.OnGPU(model)
    uploads, computing = on_gpu.uploads, on_gpu.computing
    assert uploads is not computing and gpu.log == [("wait", computing, gpu.default)]
    for batch, keep, truth in zip(batches, wanted, truths, strict=True):
        gpu.log.clear()
        gpu.pinned.clear()
        finish = on_gpu.start(batch, keep, 1000)
        assert len(gpu.pinned) == 2 + sum(keep) and len(gpu.copies) == 1 + sum(keep), "what nobody wants stays there"
        assert gpu.log == [
            ("upload", uploads), ("wait", computing, uploads), ("wait", computing, gpu.default),
            ("kept for", computing, sum(image.numel() for image in batch)), ("record", computing),
        ]  # fmt: skip
        found = finish()
        assert gpu.log[5:] == [("synchronize",)] and gpu.current is gpu.default
        for ours, theirs, kept in zip(found, truth, keep, strict=True):
            assert torch.equal(ours["backbone"].summary, theirs["backbone"].summary)
            assert not ours["backbone"].summary.is_inference()
            assert torch.equal(ours["backbone"].features, theirs["backbone"].features) if kept else (
                ours["backbone"].features is None)  # fmt: skip


def test_features_that_nobody_wants_are_not_kept(monkeypatch):
    FakeGPU(monkeypatch)
    real, seen = compute.forward, []

    def forward(*args):
        outputs = real(*args)
        seen.extend(weakref.ref(one) for one in outputs["backbone"].features)
        return outputs

    monkeypatch.setattr(compute, "forward", forward)
    images = [torch.zeros(3, *size, dtype=torch.uint8) for size in ((32, 48), (16, 64))]
    finish = compute.OnGPU(tiny()).start(images, [False, True], 1000)
    gc.collect()
    assert seen[0]() is None
    assert [one["backbone"].features is None for one in finish()] == [True, False]


def test_two_batches_are_under_way_at_a_time():
    """The second is started before the first one is waited for; each keeps its own outputs."""
    events: list[tuple[str, list[int]]] = []
    embedder = reader(max_tokens=8, workers=1, max_wait_ms=60_000)
    inner, runner = embedder._engine, embedder._engine._runner
    go = threading.Event()

    class Later:
        depth = 2

        def start(self, pixels, wanted, budget):
            assert go.wait(TIMEOUT)
            finish = runner.start(pixels, wanted, budget)
            numbers = embedder.model.batches[-1]
            events.append(("start", numbers))
            return lambda: (events.append(("finish", numbers)), finish())[1]

    inner._runner = Later()
    futures = [embedder.submit(numbered(n)) for n in range(6)]
    idle = threading.Event()
    real = inner._work.wait

    def wait_for_work() -> None:
        if not inner._undecoded and inner._batcher.tokens == 16:  # [0, 1] are in the model's hands, the others ready
            idle.set()
        real()

    inner._work.wait = wait_for_work
    with inner._lock:
        inner._work.notify_all()
    assert idle.wait(TIMEOUT)
    go.set()
    assert [number_of(f.result(TIMEOUT)) for f in futures] == list(range(6))
    embedder.close()
    assert events == [
        ("start", [0, 1]), ("start", [2, 3]), ("finish", [0, 1]), ("start", [4, 5]), ("finish", [2, 3]),
        ("finish", [4, 5]),
    ]  # fmt: skip


def test_a_batch_that_fails_when_it_is_waited_for():
    with reader() as embedder:
        runner = embedder._engine._runner

        class Late:
            depth = 2

            def start(self, pixels, wanted, budget):
                finish = runner.start(pixels, wanted, budget)
                numbers = embedder.model.batches[-1]

                def wait():
                    if 3 in numbers:
                        raise RuntimeError("an error of the device")
                    return finish()

                return wait

        embedder._engine._runner = Late()
        futures = [embedder.submit(numbered(n)) for n in range(12)]
        for n, future in enumerate(futures):
            if n == 3:
                assert "an error of the device" in str(future.exception(TIMEOUT))
            else:
                assert number_of(future.result(TIMEOUT)) == n


def test_a_batch_started_before_memory_ran_out_for_another():
    """Its size says nothing new: the budget neither falls twice nor rises again."""
    embedder = reader(max_tokens=16, max_wait_ms=60_000)
    runner, second = embedder._engine._runner, threading.Event()

    class Late:
        depth = 2

        def start(self, pixels, wanted, budget):
            finish = runner.start(pixels, wanted, budget)
            if embedder.model.batches[-1] != [0, 1, 2, 3]:
                second.set()

            def end():
                assert second.wait(TIMEOUT)
                if len(pixels) > 1:
                    raise torch.OutOfMemoryError
                return finish()

            return end

    embedder._engine._runner = Late()
    with embedder._engine._lock:  # both are there before the model's thread looks
        futures = [embedder.submit(numbered(n)) for n in range(8)]
        for item in [*embedder._engine._undecoded.values()]:
            embedder._engine._undecoded.popitem(last=False)
            embedder._engine._decoded(item, embedder._engine._read(item.source, item.size_of))
    assert [number_of(f.result(TIMEOUT)) for f in futures] == list(range(8))
    assert embedder.model.batches[:2] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    snapshot = embedder.metrics.snapshot()
    assert snapshot.out_of_memory == 2 and embedder.max_tokens == snapshot.token_budget == 4
    embedder.close()


# -- what holds things up, and what can't be had -----------------------------------------------------------------------


def test_close_does_not_wait_for_a_worker_that_is_stuck(monkeypatch):
    monkeypatch.setattr(engine, "LINGER", 0.01)
    embedder, reached, go_on = reader(workers=1), threading.Event(), threading.Event()

    def stuck(source, size_of):
        reached.set()
        go_on.wait()

    embedder._engine._read = stuck
    future = embedder.submit(numbered(1))
    assert reached.wait(TIMEOUT)
    closed = threading.Event()
    threading.Thread(target=lambda: (embedder.close(drain=False), closed.set()), daemon=True).start()
    try:
        assert closed.wait(TIMEOUT) and embedder._engine._threads[1].is_alive()
        assert isinstance(future.exception(0), EmbedderClosed)
    finally:
        go_on.set()


def test_memory_that_runs_out_once_halves_the_budget_once():
    """However small the batch: two images of four tokens say little of 4096."""
    failures = [torch.OutOfMemoryError("for a moment")]

    def before(numbers):
        if len(numbers) > 1 and failures:
            raise failures.pop()

    gate = Gate()
    with reader(
        lambda numbers: (gate(numbers), before(numbers)), max_tokens=4096, workers=1, max_wait_ms=0
    ) as embedder:
        first = embedder.submit(numbered(0))
        assert gate.reached.wait(TIMEOUT)
        futures = [embedder.submit(numbered(n)) for n in (1, 2)]
        await_decoded(embedder, 2)
        gate.open.set()
        assert [number_of(f.result(TIMEOUT)) for f in [first, *futures]] == [0, 1, 2]
        assert embedder.max_tokens == embedder.metrics.snapshot().token_budget == 2048
    assert embedder.model.batches == [[0], [1, 2], [1], [2]], "the parts are half of what failed"


@pytest.mark.parametrize("no_memory", [False, True])
def test_retries_heed_deadlines_and_close(no_memory, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(engine, "clock", lambda: now[0])
    gate, again, go_on = Gate(), threading.Event(), threading.Event()

    def before(numbers):
        gate(numbers)
        if len(numbers) > 1:
            now[0] += 10 * (len(numbers) == 6)
            raise torch.OutOfMemoryError if no_memory else RuntimeError
        if numbers == [2]:
            again.set()
            assert go_on.wait(TIMEOUT)

    embedder = reader(before, max_tokens=24, max_wait_ms=60_000, workers=1)
    first = embedder.submit(numbered(0), deadline=TIMEOUT)
    assert gate.reached.wait(TIMEOUT)
    futures = [embedder.submit(numbered(n), deadline=5 if n == 1 else None) for n in range(1, 7)]
    await_decoded(embedder, 6)
    gate.open.set()
    assert number_of(first.result(TIMEOUT)) == 0
    with pytest.raises(DeadlineExceeded):
        futures[0].result(TIMEOUT)
    assert again.wait(TIMEOUT)
    monkeypatch.setattr(engine, "clock", time.monotonic)
    monkeypatch.setattr(engine, "LINGER", 0.01)
    embedder.close(timeout=0)
    for future in futures[1:]:
        assert isinstance(future.exception(0), EmbedderClosed)
    go_on.set()
    embedder._engine._threads[0].join(TIMEOUT)
    assert not {1, 3, 4, 5, 6} & {numbers[0] for numbers in embedder.model.batches if len(numbers) == 1}
    assert embedder.metrics.snapshot().failed == {"deadline": 1, "closed": 5}


def test_a_cancel_at_the_last_moment_is_counted_once(monkeypatch):
    """Between an image's being taken out and its error."""
    with reader(workers=1) as embedder:
        inner = embedder._engine
        take_out, cancelled = inner._take_out, []

        def cancel_then(future):
            taken = take_out(future)
            if not cancelled:
                cancelled.append(True)
                cancelled[:] = [future.cancel()]
            return taken

        inner._take_out = cancel_then
        future = embedder.submit(b"no image")
        assert not wait([future], TIMEOUT).not_done and future.cancelled() and cancelled == [True]
        snapshot = embedder.metrics.snapshot()
    assert (snapshot.accepted, snapshot.cancelled, snapshot.failed) == (1, 1, {})


@pytest.mark.parametrize("which", [0, 2])
def test_threads_that_cannot_be_started(which, monkeypatch):
    before, started, start = threads(), [], threading.Thread.start

    def limited(thread):
        if len(started) == which:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    hooks = []
    monkeypatch.setattr(engine.atexit, "register", hooks.append)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        reader(workers=3)
    assert len(started) == which and threads() == before and not hooks


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_has_a_closed_embedder():
    """Whose lock a thread that is not there may hold."""
    code = """
import os, threading, torch
torch.set_num_threads(1)
from tests.serve.models import Reader, numbered, Gate
import radio_fast
gate = Gate()
embedder = radio_fast.Embedder(Reader(gate), resolution=32, max_tokens=4, workers=1)
futures = [embedder.submit(numbered(n)) for n in range(3)]
assert gate.reached.wait(30)
locked, go_on = threading.Event(), threading.Event()
def hold():
    with embedder._engine._lock:
        locked.set()
        go_on.wait(30)
threading.Thread(target=hold).start()
assert locked.wait(30)
if os.fork() == 0:
    for ask in (lambda: embedder.submit(numbered(1)), lambda: next(embedder.embed_many([numbered(1)]))):
        try:
            ask()
        except radio_fast.serve.types.EmbedderClosed as error:
            print(error, flush=True)
    futures[2].cancel()
    embedder.close()
    print(embedder.closed, flush=True)
    os._exit(0)
os.wait()
go_on.set()
gate.open.set()
embedder.close()
print([int(future.result().summary) for future in futures], embedder.closed)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    told = "the embedder is another process's: make one after the fork\n"
    assert done.stdout == 2 * told + "True\n[0, 1, 2] True\n", done.stderr
