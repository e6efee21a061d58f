"""One CUDA graph: captured, kept with what it reads, replayed into memory that is the caller's."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CudaCapture:
    """One `torch.cuda.CUDAGraph` and the order of its uses. Tests on the CPU put a stand-in here.

    Each graph has a memory pool of its own (torch's default), so different graphs may be replayed at the same time; a
    shared pool would be smaller, and its graphs would have to wait for each other. It is captured on a stream of its
    own too: cuBLAS has one workspace per thread and stream, which graphs captured on one stream would share, and which
    torch takes from all of them when one is destroyed (pytorch #193402).
    """

    device_type = "cuda"
    _spare: ClassVar[dict[torch.device, list[tuple[torch.cuda.Stream, torch.cuda.Event]]]] = {}

    @staticmethod
    def limit(device: torch.device) -> int:
        """Bytes that all graphs of a model may take where nothing else is said."""
        return torch.cuda.get_device_properties(device).total_memory // 8

    @staticmethod
    def busy(device: torch.device) -> bool:
        """Whether the caller is capturing a graph of their own."""
        with torch.cuda.device(device):
            return torch.cuda.is_current_stream_capturing()

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes = 0
        self.graph = torch.cuda.CUDAGraph()
        spare = self._spare.setdefault(device, [])
        # The event is that of the last graph of this stream: its workspace may still be in use.
        self.stream, self.done = spare.pop() if spare else (self._new_stream(), torch.cuda.Event())
        self.last: torch.cuda.Stream | None = None

    def _new_stream(self) -> torch.cuda.Stream:
        """A stream that nobody else has.

        Those of torch.cuda.Stream come from a ring of 32 per device: one might be in use by another thread, whose
        work would then be captured instead of done.
        """
        handle = ctypes.c_void_p()
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        with torch.cuda.device(self.device):
            status = driver.cuStreamCreate(ctypes.byref(handle), 1)  # 1: does not wait for the default stream
        if status:
            raise RuntimeError(f"cuStreamCreate failed with status {status}")
        return torch.cuda.ExternalStream(handle.value, device=self.device)

    def capture(self, run: Callable[[], Any]) -> Any:
        """What `run` returns: tensors that each `replay` writes.

        Without torch.cuda.graph, which empties the allocator's cache, and leaves its stream current after a failure.
        """
        with torch.cuda.stream(self.stream):
            self.graph.capture_begin(capture_error_mode="thread_local")
            try:
                outputs = run()
            except BaseException:
                with suppress(RuntimeError):  # it says less than what has gone wrong
                    self.graph.capture_end()
                raise
            self.graph.capture_end()
        self.bytes = sum(segment["total_size"] for segment in torch.cuda.memory_snapshot(self.graph.pool()))
        return outputs

    @contextmanager
    def turn(self, image: Tensor) -> Iterator[None]:
        """What is enqueued inside runs after all earlier uses of the graph and of its input, on whichever stream."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            if stream != self.last:
                stream.wait_event(self.done)
                image.record_stream(stream)
                self.last = stream
            try:
                yield
            finally:
                self.done.record(stream)

    def replay(self) -> None:
        self.graph.replay()

    def close(self) -> None:
        """Free the graph and its memory, after its last use."""
        if self.stream is not None:
            self.done.synchronize()
            self.graph.reset()
            self._spare[self.device].append((self.stream, self.done))
            self.stream = None

    def __del__(self):
        with suppress(Exception):  # half made, or torch is gone already
            self.close()


def map_tensors(change: Callable[[Tensor], Any], value: Any) -> Any:
    """`change` of each tensor in tensors, named tuples, tuples, lists and dicts, which keep their structure."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: map_tensors(change, item) for name, item in value.items()}
    items = [map_tensors(change, item) for item in value]
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def copied(tensor: Tensor) -> Tensor:
    """The same values, sizes and strides in memory of its own."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def same_bits(ours: Any, theirs: Any) -> bool:
    """Whether all tensors are equal, NaNs too."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    pairs: tuple[list[Tensor], list[Tensor]] = [], []
    for found, value in zip(pairs, (ours, theirs), strict=True):
        map_tensors(found.append, value)
    return len(pairs[0]) == len(pairs[1]) and all(
        a.dtype == b.dtype and torch.equal(a.view(bits[a.itemsize]), b.view(bits[b.itemsize]))
        for a, b in zip(*pairs, strict=True)
    )


class _Read(TorchDispatchMode):
    """Collects the tensors that operators read and did not make, but for those in the storages `known`."""

    transparent = True

    def __init__(self, known: set[int]):
        super().__init__()
        self.known = known
        self.found: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        outputs = func(*args, **(kwargs or {}))
        self.known |= {t.untyped_storage().data_ptr() for t in tree_leaves(outputs) if isinstance(t, Tensor)}
        return outputs


class Graph:
    """A captured call: copy the image in, replay, copy the outputs out."""

    def __init__(self, capture: CudaCapture, x: Tensor):
        self.lock = threading.Lock()
        self.capture = capture
        self.x = torch.empty_like(x).copy_(x)
        self.replays = 0
        self.bytes = 0

    def record(self, run: Callable[[Tensor], Any], weights: list[Tensor]) -> None:
        run(self.x)  # compiles what the layout and alignment of this copy ask for
        with _Read({t.untyped_storage().data_ptr() for t in weights}) as read:
            self.outputs = self.capture.capture(lambda: run(self.x))
        self.kept = [*read.found.values()]  # positions and the like, which their caches may let go
        self.bytes = self.capture.bytes + self.x.nbytes

    def __call__(self, x: Tensor) -> Any:
        """The outputs, in memory of their own; None if the graph was closed meanwhile."""
        with self.lock:
            if self.x is None:
                return None
            self.replays += 1
            with self.capture.turn(self.x):
                self.x.copy_(x)
                self.capture.replay()
                return map_tensors(copied, self.outputs)

    def close(self) -> None:
        with self.lock:
            self.x = self.outputs = self.kept = None
            self.capture.close()
