"""`Embedder`: each image's own result, whatever it is given as and however it is asked for."""

from __future__ import annotations

import asyncio
import gc
import itertools
import subprocess
import sys
import threading
import weakref
from concurrent.futures import CancelledError, wait
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import radio_fast
from radio_fast import Embedder
from radio_fast.graphs import GraphCache
from radio_fast.images import ImageError, ImageTooLarge, read_image, to_tensor
from radio_fast.serve import compute, decode, engine
from radio_fast.serve import embedder as embedder_module
from radio_fast.serve.types import DeadlineExceeded, EmbedderClosed, QueueFull
from tests.numerics import assert_relative
from tests.serve.models import SIDE, TIMEOUT, Gate, Reader, encoded, numbered, threads, tiny

ROOT = Path(__file__).resolve().parents[2]


def reader(before=lambda numbers: None, **options) -> Embedder:
    return Embedder(Reader(before), **{"resolution": SIDE, "max_tokens": 64, "workers": 2} | options)


def number_of(embedding) -> int:
    return int(embedding.summary)


# -- the results -------------------------------------------------------------------------------------------------------


def photo(tmp_path, height=50, width=70) -> Path:
    path = tmp_path / "photo.jpg"
    Image.fromarray(np.random.default_rng(3).integers(0, 256, (height, width, 3), np.uint8)).save(path)
    return path


@pytest.mark.parametrize("case", ["vit_h16", "vit_h14_v1", "vit_b16_vitdet", "eradio_small"])
@pytest.mark.parametrize("resolution", ["native", None])
def test_equal_to_the_model_called_as_the_command_line_does(case, resolution, tmp_path):
    model = tiny(case, **({"vitdet_window_size": 2} if "vitdet" in case else {}))
    image = read_image(photo(tmp_path))
    if resolution is None:
        size = (64, 96)
        model.set_resolutions(None, size)
        size = tuple(model.get_nearest_supported_resolution(*size))
    else:
        size = tuple(model.get_nearest_supported_resolution(image.height, image.width))
    truth = model(to_tensor(image, *size).unsqueeze(0))
    with Embedder(model, resolution=resolution) as embedder:
        found = embedder.submit(tmp_path / "photo.jpg", features=True).result(TIMEOUT)
        bare = embedder.submit(tmp_path / "photo.jpg").result(TIMEOUT)
    assert_relative(found.summary, truth.summary[0])
    assert_relative(found.features, truth.features[0])
    assert (found.height, found.width) == size
    assert found.features.shape[0] == found.grid[0] * found.grid[1]
    assert found.grid == model.model.grid(torch.empty(1, 3, *size))
    assert bare.features is None and torch.equal(bare.summary, found.summary)


def test_sizes_mixed_in_one_batch():
    model = tiny()
    images = [np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8) for i, size in enumerate(
        [(32, 48), (16, 16), (32, 48), (64, 32), (16, 16)])]  # fmt: skip
    gate = Gate()
    model.register_forward_pre_hook(lambda *_: gate([]))
    with Embedder(model, resolution="native", max_tokens=1000, workers=1) as embedder:
        first = embedder.submit(images[0])
        assert gate.reached.wait(TIMEOUT)
        futures = [embedder.submit(image, features=i != 1) for i, image in enumerate(images)]
        floats = embedder.submit(torch.from_numpy(images[0]).permute(2, 0, 1) / 255, features=True)
        gate.open.set()
        found = [future.result(TIMEOUT) for future in [*futures, floats]]
        assert first.result(TIMEOUT)
        assert embedder.metrics.snapshot().batch_images.sum == 7
    for image, embedding in zip([*images, images[0]], found, strict=True):
        x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
        truth = model(x)
        assert_relative(embedding.summary, truth.summary[0])
        assert embedding.grid == (image.shape[0] // 16, image.shape[1] // 16)
        if image is not images[1]:
            assert_relative(embedding.features, truth.features[0])
    assert found[1].features is None


@pytest.mark.parametrize("case", ["hf_vit_h16_adaptors", "vit_b16_attn_head"])
def test_adaptors(case):
    from radio_fast.checkpoint import read_checkpoint, state_of_checkpoint
    from tests.conftest import golden_source

    source = golden_source(case)
    names = None if source.is_dir() else list(state_of_checkpoint(read_checkpoint(source)).heads)
    model = tiny(case, adaptor_names=names)
    assert model.adaptors
    for size in (32, "native"):
        with Embedder(model, resolution=size) as embedder:
            futures = [embedder.submit(numbered(7, side), features=True) for side in (32, 64)]
            for side, future in zip((32, 64), futures, strict=True):
                found = future.result(TIMEOUT)
                picture = Image.fromarray(numbered(7, side))
                truth = model(to_tensor(picture, *((side,) * 2 if size == "native" else (32, 32)))[None])
                assert list(found.outputs) == list(truth)
                for name, (summary, features) in truth.items():
                    assert_relative(found.outputs[name].summary, summary[0])
                    assert_relative(found.outputs[name].features, features[0])


def test_half_precision_stays():
    with Embedder(tiny(dtype="bfloat16"), resolution=32) as embedder:
        found = embedder.submit(numbered(3), features=True).result(TIMEOUT)
    assert found.summary.dtype == found.features.dtype == torch.bfloat16


def test_results_are_the_callers_own():
    """Neither views of a batch, which would keep it alive, nor tensors that autograd refuses."""
    gate = Gate()
    with reader(gate, max_tokens=1000) as embedder:
        embedder.submit(numbered(0))
        assert gate.reached.wait(TIMEOUT)
        futures = [embedder.submit(numbered(n), features=True) for n in range(8)]
        gate.open.set()
        for future in futures:
            found = future.result(TIMEOUT)
            for tensor in (found.summary, found.features):
                assert tensor.untyped_storage().nbytes() == tensor.nbytes
                assert not tensor.is_inference() and tensor.device.type == "cpu"
        assert max(map(len, embedder.model.batches)) == 8


def test_resolution_of_one_image():
    with reader() as embedder:
        for resolution, size in ((64, (64, 64)), ((32, 64), (32, 64)), (None, (32, 32)), ("native", (48, 48))):
            found = embedder.submit(numbered(5, 50), resolution=resolution, features=True).result(TIMEOUT)
            assert (found.height, found.width) == size and found.features.shape == (size[0] * size[1] // 256, 1)
            assert number_of(found) == 5


def test_timings_and_metrics(monkeypatch):
    gate = Gate()
    with reader(gate, max_wait_ms=0) as embedder:
        future = embedder.submit(numbered(1))
        assert gate.reached.wait(TIMEOUT)
        during = embedder.metrics.snapshot()
        gate.open.set()
        t = future.result(TIMEOUT).timings
        with pytest.raises(ImageError):
            embedder.submit(b"no image").result(TIMEOUT)
        with pytest.raises(ValueError):
            embedder.submit(3)
        after = embedder.metrics.snapshot()
    assert (during.accepted, during.queue_depth, during.tokens_in_flight, during.completed) == (1, 1, 4, 0)
    assert (after.accepted, after.queue_depth, after.tokens_in_flight, after.completed) == (2, 0, 0, 1)
    assert after.failed == {"image": 1} and after.rejected == {"invalid": 1} and after.cancelled == 0
    assert after.batch_tokens.count == after.batch_images.count == 1 and after.batch_tokens.sum == 4
    assert after.total_seconds.count == 1 and after.total_seconds.sum == t.total
    assert min(t.decode, t.wait, t.compute) >= 0 and t.decode + t.wait + t.compute == pytest.approx(t.total)
    assert after.token_budget == 64
    with pytest.raises(EmbedderClosed):
        embedder.submit(numbered(1))
    assert embedder.metrics.snapshot().rejected == {"invalid": 1, "closed": 1}


def test_histograms():
    metrics = engine.Metrics(1, int)
    for tokens in (64, 65, 10**9):
        metrics.begin(1, tokens)
    found = metrics.snapshot().batch_tokens
    assert found.counts[:2] == (1, 1) and found.counts[-1] == 1 and len(found.counts) == len(found.bounds) + 1


# -- limits ------------------------------------------------------------------------------------------------------------


def test_queue_full_at_once_and_room_again():
    gate = Gate()
    with reader(gate, max_queue=3, max_wait_ms=0) as embedder:
        futures = [embedder.submit(numbered(n)) for n in range(3)]
        assert gate.reached.wait(TIMEOUT)
        with pytest.raises(QueueFull, match="3 images are waiting") as raised:
            embedder.submit(numbered(9))
        assert raised.value.retry_after == 0.05, "no image has been timed yet"
        with pytest.raises(QueueFull, match="3 images are waiting"):
            embedder.check_room()
        assert embedder.metrics.snapshot().rejected == {"queue_full": 2}
        embedder._engine._pace = 2.0
        with pytest.raises(QueueFull) as raised:
            embedder.submit(object())
        assert raised.value.retry_after == 6.0, "refused before it is looked at"
        embedder._engine._pace = 1e9
        with pytest.raises(QueueFull) as raised:
            embedder.submit(numbered(9))
        assert raised.value.retry_after == 30.0
        gate.open.set()
        assert [number_of(f.result(TIMEOUT)) for f in futures] == [0, 1, 2]
        # One after the other, in a queue of one.
        for number in range(50):
            assert number_of(embedder.submit(numbered(number)).result(TIMEOUT)) == number


def test_a_queue_of_one():
    with reader(max_queue=1, max_wait_ms=0) as embedder:
        for number in range(100):
            assert number_of(embedder.submit(numbered(number)).result(TIMEOUT)) == number
        assert [number_of(e) for e in embedder.embed_many(numbered(n) for n in range(20))] == list(range(20))


def test_a_cancelled_image_frees_its_place():
    gate = Gate()
    with reader(gate, max_queue=2, max_wait_ms=0) as embedder:
        first = embedder.submit(numbered(0))
        assert gate.reached.wait(TIMEOUT)
        second = embedder.submit(numbered(1))
        assert not first.cancel(), "it is in the model"
        assert second.cancel()
        third = embedder.submit(numbered(2))
        gate.open.set()
        assert number_of(first.result(TIMEOUT)) == 0 and number_of(third.result(TIMEOUT)) == 2
        with pytest.raises(CancelledError):
            second.result(TIMEOUT)
        assert not wait([first, second, third], TIMEOUT).not_done, "not told of the cancellation"
        snapshot = embedder.metrics.snapshot()
    assert [0] in embedder.model.batches and [2] in embedder.model.batches
    assert 1 not in itertools.chain(*embedder.model.batches)
    assert (snapshot.accepted, snapshot.completed, snapshot.cancelled) == (3, 2, 1)


def test_batches_keep_the_budget():
    gate = Gate()
    with reader(gate, max_tokens=10) as embedder:
        futures = [embedder.submit(numbered(n)) for n in range(21)]
        large = embedder.submit(numbered(99, 64), resolution=64)
        gate.open.set()
        assert [number_of(f.result(TIMEOUT)) for f in [*futures, large]] == [*range(21), 99]
        batches = embedder.model.batches
    assert all(len(batch) <= 2 for batch in batches) and [99] in batches
    assert embedder.max_tokens == 10


def test_no_more_is_decoded_than_the_model_needs_soon():
    """A queue of large images is kept as they came."""
    gate, idle = Gate(), threading.Event()
    with reader(gate, max_tokens=8, workers=1) as embedder:
        inner = embedder._engine
        real = inner._work.wait

        def wait_for_work() -> None:
            if inner._undecoded:
                idle.set()
            real()

        def await_idle() -> None:
            """Not as it may have been before: the worker looks again, and waits only where there is no room."""
            idle.clear()
            with inner._lock:
                inner._work.notify_all()
            assert idle.wait(TIMEOUT)

        inner._work.wait = wait_for_work
        futures = [embedder.submit(numbered(n)) for n in range(40)]
        assert gate.reached.wait(TIMEOUT)
        await_idle()
        with inner._lock:
            assert inner._batcher.tokens == 16 and len(inner._undecoded) >= 34
            decoded = {item.future for item in inner._batcher._queue}
        for future in decoded:
            assert future.cancel()
        await_idle()
        with inner._lock:
            assert inner._batcher.tokens == 16
        gate.open.set()
        assert [n for n, f in enumerate(futures) if f not in decoded and number_of(f.result(TIMEOUT)) != n] == []


def test_large_images_are_refused():
    with reader(max_pixels=1000) as embedder:
        with pytest.raises(ImageTooLarge, match="1000 pixels are allowed"):
            embedder.submit(encoded(numbered(1))).result(TIMEOUT)
        with pytest.raises(ImageTooLarge):
            embedder.submit(numbered(1)).result(TIMEOUT)
        assert embedder.metrics.snapshot().failed == {"image_too_large": 2}


def test_native_sizes_are_bounded_too():
    """A side has 16 pixels at least: a line of one pixel would be made 16 times as much work."""
    with reader(resolution="native", max_pixels=4000) as embedder:
        for image in (encoded(np.zeros((1, 4000, 3), np.uint8)), torch.zeros(3, 4000, 1)):
            with pytest.raises(ImageTooLarge, match=r"16 × 4000|4000 × 16"):
                embedder.submit(image).result(TIMEOUT)
        assert embedder.submit(numbered(1, 48)).result(TIMEOUT).height == 48
        assert embedder.submit(numbered(1, 48), resolution=128).result(TIMEOUT).height == 128, "as one has asked for"
        assert embedder.metrics.snapshot().failed == {"image_too_large": 2}


# -- deadlines ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

        def __call__(self) -> float:
            return self.now

    found = Clock()
    monkeypatch.setattr(engine, "clock", found)
    return found


def test_deadlines_while_the_model_is_busy(clock):
    """One image is decoded by then, the others are not."""
    gate = Gate()
    with reader(gate, max_tokens=4, workers=1, max_wait_ms=0) as embedder:
        first = embedder.submit(numbered(0), deadline=1)
        assert gate.reached.wait(TIMEOUT)
        late = [embedder.submit(numbered(n), deadline=1) for n in range(1, 9)]
        patient = embedder.submit(numbered(9), deadline=3)
        clock.now += 2
        gate.open.set()
        assert number_of(first.result(TIMEOUT)) == 0, "it was in the model by then"
        for future in late:
            with pytest.raises(DeadlineExceeded, match=r"passed 1.000 s before"):
                future.result(TIMEOUT)
        assert number_of(patient.result(TIMEOUT)) == 9
        assert embedder.metrics.snapshot().failed == {"deadline": 8}
    assert sorted(itertools.chain(*embedder.model.batches)) == [0, 9]


def test_an_image_that_cant_wait_goes_at_once(clock):
    """Before its deadline, not at the end of the minute that others may be waited for; the clock stands still."""
    with reader(max_wait_ms=60_000) as embedder:
        assert number_of(embedder.submit(numbered(4), deadline=59).result(TIMEOUT)) == 4


def test_a_deadline_counts_from_the_start_of_submit(clock, monkeypatch):
    def hold(image, max_pixels):
        clock.now += 5
        return decode.hold(image, max_pixels)

    monkeypatch.setattr(embedder_module, "hold", hold)
    with reader(max_wait_ms=0) as embedder:
        with pytest.raises(DeadlineExceeded, match=r"passed 2\.000 s before"):
            embedder.submit(numbered(1), deadline=3).result(TIMEOUT)
        assert number_of(embedder.submit(numbered(1), deadline=6).result(TIMEOUT)) == 1


@pytest.mark.parametrize("number", [1e14, np.float32(1), 3])
def test_numbers_of_seconds(number):
    """Longer than a thread may wait, too."""
    embedder = reader(max_wait_ms=number, max_tokens=8)
    futures = [embedder.submit(numbered(n), deadline=number) for n in range(2)]
    assert [number_of(f.result(TIMEOUT)) for f in futures] == [0, 1]
    for timeout in (True, -1, float("nan"), "1", 10**400):
        with pytest.raises(ValueError, match="timeout must be a number of seconds from 0 on, or None"):
            embedder.close(timeout=timeout)
    assert not embedder.closed
    embedder.close(timeout=1e12 * number)


def test_a_model_thread_that_waits_long():
    """One image in a batch of two, until it is closed."""
    embedder = reader(max_wait_ms=1e14, workers=1)
    future = embedder.submit(numbered(1))
    for _ in range(2):  # decoded, and then looked at
        with suppress(TimeoutError):
            future.result(0.02)
    embedder.close()
    assert number_of(future.result(0)) == 1


@pytest.mark.parametrize("deadline", [0, -1, float("nan"), float("inf"), "1", 0.0, True, 10**400, 1j])
def test_no_legal_deadline(deadline):
    with reader() as embedder, pytest.raises(ValueError, match="deadline must be a number of seconds above 0"):
        embedder.submit(numbered(1), deadline=deadline)


# -- the ways to ask ---------------------------------------------------------------------------------------------------


def test_embed_awaits():
    async def run() -> None:
        found = await asyncio.gather(*(embedder.embed(numbered(n), features=True) for n in range(30)))
        assert [number_of(e) for e in found] == list(range(30)) and found[3].features.shape == (4, 1)
        with pytest.raises(ImageError):
            await embedder.embed(b"no image")

    with reader() as embedder:
        asyncio.run(asyncio.wait_for(run(), TIMEOUT))


def test_a_cancelled_task_cancels_its_image():
    gate = Gate()

    async def run() -> None:
        loop = asyncio.get_running_loop()
        first = asyncio.create_task(embedder.embed(numbered(0)))
        await loop.run_in_executor(None, gate.reached.wait, TIMEOUT)
        second = asyncio.create_task(embedder.embed(numbered(1)))
        await asyncio.sleep(0)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        gate.open.set()
        assert number_of(await first) == 0

    with reader(gate, max_wait_ms=0) as embedder:
        asyncio.run(asyncio.wait_for(run(), TIMEOUT))
        assert embedder.metrics.snapshot().cancelled == 1
    assert embedder.model.batches == [[0]]


@pytest.mark.parametrize("max_queue", [1, 7, 1024])
def test_embed_many_in_order(max_queue):
    with reader(max_queue=max_queue, max_wait_ms=0) as embedder:
        found = embedder.embed_many((numbered(n) for n in range(300)), features=True)
        assert [number_of(e) for e in found] == list(range(300))
        assert list(embedder.embed_many([])) == []


def test_embed_many_of_an_endless_source():
    taken = itertools.count()
    with reader() as embedder:
        found = embedder.embed_many(numbered(n) for n in taken)
        assert [number_of(next(found)) for _ in range(100)] == list(range(100))
        assert next(taken) <= 100 + embedder._window + 1, "read far ahead"
        found.close()
    snapshot = embedder.metrics.snapshot()
    assert snapshot.queue_depth == 0 and snapshot.accepted <= 100 + embedder._window + 1


def test_embed_many_left_early_cancels_what_is_under_way():
    gate, ahead = Gate(), threading.Event()

    def source():
        for n in itertools.count():
            if n == 3:
                ahead.set()
            yield numbered(n)

    with reader(
        lambda numbers: ahead.wait(TIMEOUT) if 0 in numbers else gate(numbers), max_tokens=4, workers=1
    ) as embedder:
        found = embedder.embed_many(source())
        assert number_of(next(found)) == 0
        assert gate.reached.wait(TIMEOUT)
        found.close()
        snapshot = embedder.metrics.snapshot()
        assert snapshot.cancelled == 2 and snapshot.queue_depth == 1
        gate.open.set()
    assert embedder.model.batches == [[0], [1]]


def test_embed_many_and_an_image_that_cannot_be_held(monkeypatch):
    def hold(image, max_pixels):
        if isinstance(image, str):
            raise NotImplementedError
        return decode.hold(image, max_pixels)

    monkeypatch.setattr(embedder_module, "hold", hold)
    with reader() as embedder:
        images = [numbered(0), torch.zeros(3, 32, 32, device="meta"), "odd", numbered(3)]
        found = list(embedder.embed_many(images, return_exceptions=True))
    assert [type(e) for e in found[1:3]] == [ValueError, NotImplementedError]
    assert [number_of(found[i]) for i in (0, 3)] == [0, 3]


def test_embed_many_with_errors():
    images = [numbered(0), b"no image", numbered(2), None, numbered(4)]
    with reader() as embedder:
        found = list(embedder.embed_many(images, return_exceptions=True))
        assert [number_of(found[i]) for i in (0, 2, 4)] == [0, 2, 4]
        assert isinstance(found[1], ImageError) and type(found[3]) is ValueError
        iterator = embedder.embed_many(images)
        assert number_of(next(iterator)) == 0
        with pytest.raises(ImageError):
            next(iterator)
        with pytest.raises(StopIteration):
            next(iterator)
        for one in (3, None, "photo.jpg", b"bytes", bytearray(b"bytes"), Path("photo.jpg")):
            with pytest.raises(ValueError, match=r"images must be several, .* into a list"):
                embedder.embed_many(one)
        with pytest.raises(ValueError, match="resolution"):
            embedder.embed_many([], resolution=33)


def test_embed_many_of_a_source_that_fails():
    def source():
        yield from (numbered(n) for n in range(5))
        raise KeyError("lost")

    with reader() as embedder:
        iterator = embedder.embed_many(source(), return_exceptions=True)
        assert [number_of(next(iterator)) for _ in range(5)] == list(range(5))
        with pytest.raises(KeyError, match="lost"):
            next(iterator)


def test_embed_many_and_close():
    def source():
        for n in itertools.count():
            if n == 50:
                embedder.close()
            yield numbered(n)

    embedder = reader()
    iterator = embedder.embed_many(source())
    assert [number_of(e) for e in itertools.islice(iterator, 50)] == list(range(50))
    with pytest.raises(EmbedderClosed):
        next(iterator)


def test_embed_many_interrupted():
    """Ctrl-C while it waits for a result."""
    gate = Gate()
    with reader(gate, max_wait_ms=0, workers=1, max_tokens=4, max_queue=4) as embedder:
        iterator = embedder.embed_many(numbered(n) for n in itertools.count())
        real, calls = engine.Future.exception, []

        def interrupted(future, timeout=None):
            calls.append(future)
            assert gate.reached.wait(TIMEOUT)
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine.Future, "exception", interrupted)
            with pytest.raises(KeyboardInterrupt):
                next(iterator)
        assert calls and real is engine.Future.exception
        assert embedder.metrics.snapshot().cancelled == 3, "all but the one in the model"
        gate.open.set()


def test_embed_many_waits_where_submit_would_refuse():
    gate = Gate()
    with reader(gate, max_queue=2, max_wait_ms=0) as embedder:
        others = [embedder.submit(numbered(n)) for n in (70, 71)]
        found: list[int] = []
        thread = threading.Thread(
            target=lambda: found.extend(number_of(e) for e in embedder.embed_many(numbered(n) for n in range(9)))
        )
        thread.start()
        assert gate.reached.wait(TIMEOUT)
        gate.open.set()
        thread.join(TIMEOUT)
        assert found == list(range(9)) and [number_of(f.result(TIMEOUT)) for f in others] == [70, 71]
        assert embedder.metrics.snapshot().rejected == {}


# -- the end -----------------------------------------------------------------------------------------------------------


def test_close_drains():
    before = threads()
    embedder = reader(max_wait_ms=60_000)
    assert len(threads() - before) == 3
    futures = [embedder.submit(numbered(n)) for n in range(100)]
    embedder.close()
    assert all(future.done() for future in futures) and embedder.closed
    assert [number_of(f.result(0)) for f in futures] == list(range(100))
    assert threads() == before
    embedder.close()
    with pytest.raises(EmbedderClosed):
        embedder.submit(numbered(1))
    with pytest.raises(EmbedderClosed):
        next(embedder.embed_many([numbered(1)]))
    assert "closed" in repr(embedder)


def test_close_without_draining():
    gate = Gate()
    embedder = reader(gate, max_tokens=4, workers=1)
    futures = [embedder.submit(numbered(n)) for n in range(30)]
    assert gate.reached.wait(TIMEOUT)
    closing = threading.Thread(target=embedder.close, kwargs={"drain": False})
    closing.start()
    for future in futures[1:]:
        with pytest.raises(EmbedderClosed):
            future.result(TIMEOUT)
    gate.open.set()
    closing.join(TIMEOUT)
    assert number_of(futures[0].result(TIMEOUT)) == 0, "it was in the model"
    assert embedder.metrics.snapshot().failed == {"closed": 29}


def test_close_with_a_timeout_leaves_no_future_open():
    gate = Gate()
    embedder = reader(gate, max_tokens=4)
    futures = [embedder.submit(numbered(n)) for n in range(30)]
    assert gate.reached.wait(TIMEOUT)
    embedder.close(timeout=0.01)
    assert all(isinstance(future.exception(0), EmbedderClosed) for future in futures)
    gate.open.set()
    embedder.close(timeout=TIMEOUT)
    snapshot = embedder.metrics.snapshot()
    assert snapshot.failed == {"closed": 30} and snapshot.queue_depth == snapshot.completed == 0


def test_close_from_many_threads_and_from_a_callback():
    embedder = reader()
    called = threading.Event()
    first = embedder.submit(numbered(0))
    first.add_done_callback(lambda future: (embedder.close(), called.set()))
    futures = [first]
    with suppress(EmbedderClosed):
        futures += [embedder.submit(numbered(n)) for n in range(1, 20)]
    closing = [threading.Thread(target=embedder.close) for _ in range(4)]
    for thread in closing:
        thread.start()
    for thread in closing:
        thread.join(TIMEOUT)
        assert not thread.is_alive()
    assert called.wait(TIMEOUT)
    assert [number_of(f.result(0)) for f in futures] == list(range(len(futures)))


def test_with_and_an_error_does_not_drain():
    gate = Gate()
    with pytest.raises(KeyError), reader(gate, max_tokens=4, workers=1) as embedder:
        futures = [embedder.submit(numbered(n)) for n in range(9)]
        assert gate.reached.wait(TIMEOUT)
        gate.open.set()
        raise KeyError
    done, open_ = wait(futures, 0)
    assert not open_ and any(isinstance(future.exception(), EmbedderClosed) for future in done)


def test_an_embedder_that_nobody_has_ends_by_itself():
    before = threads()
    embedder = reader()
    future = embedder.submit(numbered(8))
    model = weakref.ref(embedder.model)
    found = weakref.ref(embedder)
    del embedder
    gc.collect()
    assert found() is None
    assert number_of(future.result(TIMEOUT)) == 8
    for thread in threads() - before:
        thread.join(TIMEOUT)
    gc.collect()
    assert model() is None, "a future kept the model"


@pytest.mark.parametrize("ending", ["", "sys.exit(3)"])
def test_an_interpreter_ends_with_an_embedder_open(ending):
    code = f"""
import sys, threading, torch
torch.set_num_threads(1)
from tests.serve.models import Reader, numbered, Gate
import radio_fast
gate = Gate()
embedder = radio_fast.Embedder(Reader(gate), resolution=32, max_tokens=4, workers=2)
futures = [embedder.submit(numbered(n)) for n in range(50)]
assert gate.reached.wait(30)
threading.Timer(0.05, gate.open.set).start()
print("end", flush=True)
{ending}
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "end\n" and done.returncode == {"": 0, "sys.exit(3)": 3}[ending], done.stderr
    assert "Fatal" not in done.stderr and "Exception ignored" not in done.stderr


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_tokens": 0}, "max_tokens must be a whole number of at least 1"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"max_queue": 0}, "max_queue"),
        ({"max_queue": True}, "max_queue"),
        ({"workers": -1}, "workers"),
        ({"max_pixels": None}, "max_pixels"),
        ({"max_wait_ms": -1}, "max_wait_ms"),
        ({"max_wait_ms": float("nan")}, "max_wait_ms"),
        ({"max_wait_ms": "5"}, "max_wait_ms"),
        ({"max_wait_ms": True}, "max_wait_ms"),
        ({"max_wait_ms": 10**400}, "max_wait_ms"),
        ({"resolution": 33}, "multiples of 16 pixels, got 33 × 33; the nearest supported size is 32 × 32"),
        ({"resolution": (32, 33)}, "nearest supported size is 32 × 32"),
        ({"resolution": "large"}, "resolution must be"),
        ({"resolution": (32, 32, 3)}, "resolution must be"),
        ({"resolution": 3.5}, "resolution must be"),
        ({"resolution": True}, "resolution must be"),
        ({"resolution": 1 << 20}, "up to 16384"),
        ({"resolution": 0}, "resolution must be"),
    ],
)
def test_no_legal_arguments(options, said):
    model = tiny()
    with pytest.raises(ValueError, match=said):
        Embedder(model, **options)
    with pytest.raises(ValueError, match=r"a RADIOModel, as radio_fast\.load makes, got Linear"):
        Embedder(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="on a CPU or a CUDA GPU, got one on 'meta'"):
        Embedder(tiny().to("meta"))
    if "resolution" in options:
        with Embedder(model, resolution=32) as embedder, pytest.raises(ValueError, match=said):
            embedder.submit(numbered(1), **options)


def test_a_model_of_one_size():
    model = tiny()
    model.model.only_size = 64
    with pytest.raises(ValueError, match="takes only 64 pixels"):
        Embedder(model, resolution="native")
    with pytest.raises(ValueError, match="nearest supported size is 64 × 64"):
        Embedder(model, resolution=32)
    with Embedder(model) as embedder:
        assert embedder.submit(numbered(1)).result(TIMEOUT).height == 64


def test_defaults():
    model = tiny()
    model.set_resolutions(None, (64, 96))
    with Embedder(model) as embedder:
        assert embedder.max_tokens == 4 * 24 and embedder.max_queue == 1024 and embedder.model is model
        embedder.warm_up()
        assert embedder.metrics.snapshot().batch_images.count == 0
    assert radio_fast.Embedder is Embedder


# -- CUDA graphs -------------------------------------------------------------------------------------------------------


def test_few_shapes_for_cuda_graphs():
    """Numbers of images are rounded up where graphs are made, within the budget and the graphs' own limit."""
    model = tiny()
    assert model.graphs is not None and compute.padded(model, 5, 4, 1000) == 5, "a CPU has none"
    model.graphs = GraphCache(capture=type("OnCPU", (model.graphs.capture,), {"device_type": "cpu"}))
    assert [compute.padded(model, n, 1, 1000) for n in range(1, 14)] == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16]
    assert compute.padded(model, 5, 10, 50) == 5
    assert compute.padded(model, 5, 4000, 10**6) == 5, "no graph of that size is made"
    assert compute.batch_sizes(model, 256, 16384) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    assert compute.batch_sizes(model, 256, 100) == [1]
    model.graphs.enabled = False
    assert compute.padded(model, 5, 4, 1000) == 5
    model.graphs = None
    assert compute.padded(model, 5, 4, 1000) == 5


def test_padded_batches_give_the_same(monkeypatch):
    model = Reader()
    monkeypatch.setattr(compute, "padded", lambda model, images, tokens, budget: images + 3)
    images = [torch.from_numpy(numbered(n)).permute(2, 0, 1) for n in range(1, 6)]
    found = compute.forward(model, images, 1000)["backbone"]
    assert found.summary.flatten().tolist() == [1, 2, 3, 4, 5] and found.features.shape == (5, 4, 1)
    assert model.batches == [[1, 2, 3, 4, 5, 0, 0, 0]]
