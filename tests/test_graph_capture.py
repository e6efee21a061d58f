"""`CudaCapture` on a torch.cuda that writes down what it is asked for; and threads that share graphs."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from radio_fast.graphs import capture as module
from radio_fast.graphs.capture import CudaCapture, map_tensors, same_bits
from radio_fast.graphs.state import pointer_check
from radio_fast.model import RadioOutput
from tests.tape import assert_same, eager, image, load, replays, warm

pytestmark = pytest.mark.usefixtures("without_amx")  # the stand-in for graphs records PyTorch's operators

DEVICE = torch.device("cuda", 0)


class FakeStream:
    def __init__(self, handle, device=None):
        self.handle = handle

    def __eq__(self, other):
        return isinstance(other, FakeStream) and self.handle == other.handle

    def wait_event(self, event):
        event.log.append(f"{self.handle} waits for {event.name}")


class FakeCuda:
    """torch.cuda, as far as `CudaCapture` goes."""

    def __init__(self):
        self.log, self.stack, self.made = [], [FakeStream("default")], 0
        self.ExternalStream = FakeStream
        self.current_stream = lambda: self.stack[-1]
        self.is_current_stream_capturing = lambda: False
        self.memory_snapshot = lambda pool: [{"total_size": 100}, {"total_size": 20}]
        self.get_device_properties = lambda device: SimpleNamespace(total_memory=800)
        outer = self

        class Event:
            def __init__(self):
                self.log, self.name = outer.log, "event"

            def record(self, stream):
                self.log.append(f"recorded on {stream.handle}")

            def synchronize(self):
                self.log.append("synchronized")

        class CUDAGraph:
            def capture_begin(self, capture_error_mode):
                outer.log.append(f"begin {capture_error_mode} on {outer.current_stream().handle}")

            def capture_end(self):
                outer.log.append("end")

            def replay(self):
                outer.log.append(f"replay on {outer.current_stream().handle}")

            def reset(self):
                outer.log.append("reset")

            def pool(self):
                return (0, 1)

        self.Event, self.CUDAGraph = Event, CUDAGraph

    @contextmanager
    def device(self, device):
        assert device == DEVICE
        yield

    @contextmanager
    def stream(self, stream):
        self.stack.append(stream)
        try:
            yield
        finally:
            self.stack.pop()

    def cuStreamCreate(self, pointer, flags):
        assert flags == 1
        self.made += 1
        pointer._obj.value = self.made
        return 0


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(module.torch, "cuda", fake)
    monkeypatch.setattr(module.ctypes, "CDLL", lambda name: fake)
    monkeypatch.setattr(CudaCapture, "_spare", {})
    return fake


class Image:
    def __init__(self, cuda):
        self.cuda = cuda

    def record_stream(self, stream):
        self.cuda.log.append(f"the image is used on {stream.handle}")


def test_capture(cuda):
    graph = CudaCapture(DEVICE)
    assert graph.capture(lambda: cuda.log.append(f"run on {cuda.current_stream().handle}") or 7) == 7
    assert cuda.log == ["begin thread_local on 1", "run on 1", "end"]
    assert graph.bytes == 120 and cuda.current_stream().handle == "default"
    assert CudaCapture.limit(DEVICE) == 100 and not CudaCapture.busy(DEVICE)


def test_a_failure_ends_the_capture_and_the_stream_is_the_callers_again(cuda, monkeypatch):
    graph = CudaCapture(DEVICE)

    def end(self):
        raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(cuda.CUDAGraph, "capture_end", end)
    with pytest.raises(ValueError, match="the reason"):
        graph.capture(lambda: (_ for _ in ()).throw(ValueError("the reason")))
    assert cuda.current_stream().handle == "default"


def test_uses_on_several_streams_wait_for_each_other(cuda):
    graph, image = CudaCapture(DEVICE), Image(cuda)
    a, b = FakeStream("A"), FakeStream("B")
    for stream in (a, a, b):
        with cuda.stream(stream), graph.turn(image):
            graph.replay()
    assert cuda.log == [
        "A waits for event", "the image is used on A", "replay on A", "recorded on A",
        "replay on A", "recorded on A",
        "B waits for event", "the image is used on B", "replay on B", "recorded on B",
    ]  # fmt: skip


def test_streams_are_used_again_after_the_last_work(cuda):
    first, second = CudaCapture(DEVICE), CudaCapture(DEVICE)
    assert {first.stream.handle, second.stream.handle} == {1, 2}
    first.close()
    first.close()
    assert cuda.log == ["synchronized", "reset"]
    third = CudaCapture(DEVICE)
    assert third.stream.handle == 1 and third.done is first.done and cuda.made == 2
    del second
    assert CudaCapture(DEVICE).stream.handle == 2


def test_no_stream(cuda, monkeypatch):
    monkeypatch.setattr(cuda, "cuStreamCreate", lambda pointer, flags: 3, raising=False)
    with pytest.raises(RuntimeError, match="cuStreamCreate failed with status 3"):
        CudaCapture(DEVICE)


def test_structures_and_bits():
    one, nan = torch.ones(2), torch.full((2,), torch.nan)
    value = {"a": RadioOutput(one, nan), "b": ([one], nan)}
    twice = map_tensors(lambda t: 2 * t, value)
    assert type(twice["a"]) is RadioOutput and type(twice["b"]) is tuple and type(twice["b"][0]) is list
    assert same_bits(value, map_tensors(torch.clone, value)) and not same_bits(value, twice)
    assert not same_bits([one], [one, one]) and not same_bits(one, one.double())
    assert not same_bits(torch.zeros(1), -torch.zeros(1))
    assert same_bits(nan.bfloat16()[::2], nan.bfloat16()[:1])


def test_pointer_check_in_cpp_is_used_only_if_it_is_right(monkeypatch):
    calls = []

    def right(tensors, pointers, indices):
        calls.append(indices)
        return all(tensors[i].data_ptr() == pointers[i] for i in indices)

    def broken(tensors, pointers, indices):
        raise TypeError

    for compare in (right, lambda *args: True, lambda *args: False, broken, None):
        monkeypatch.setattr(torch._C, "_tensors_data_ptrs_at_indices_equal", compare, raising=False)
        tensors = [torch.zeros(2), torch.zeros(2)]
        check = pointer_check(tensors, [t.data_ptr() for t in tensors])
        assert check()
        tensors[0].data = torch.zeros(2)
        assert not check()
    assert len(calls) == 4


# -- threads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_graphs", [16, 2])
def test_threads(max_graphs):
    model = load(max_graphs=max_graphs)
    inputs = [image(seed, 1, 1 + seed % 3, 1 + seed % 2) for seed in range(48)]
    expected = [eager(model, x) for x in inputs]
    outputs: list = [None] * len(inputs)
    barrier = threading.Barrier(4)

    def work(part: int) -> None:
        barrier.wait()
        for i in [*range(part, len(inputs), 4)] * 3:
            outputs[i] = model(inputs[i])

    threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in zip(outputs, expected, strict=True):
        assert_same(ours, theirs)
    assert replays(model) > 0


def test_a_graph_is_used_by_one_thread_at_a_time():
    """Two threads in the same graph: copy in, replay and copy out of one are not torn apart."""
    model = load()
    warm(model, image())
    log, barrier = model.graphs.capture.log, threading.Barrier(2)
    del log[:]

    def work() -> None:
        barrier.wait()
        for _ in range(40):
            model(image())

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert log == ["turn", "replay", "done"] * 80


def test_a_graph_that_goes_while_its_turn_comes():
    model = load()
    warm(model, image())
    (graph,) = model.graphs._graphs.values()
    graph.close()
    assert graph(image()) is None
    assert_same(model(image()), eager(model, image()))
