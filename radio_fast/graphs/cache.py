"""The CUDA graphs of a model's calls: when one is made, used, dropped."""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from radio_fast.graphs.capture import CudaCapture, Graph, same_bits
from radio_fast.graphs.state import Baked, torch_settings
from radio_fast.models.eradio import ERADIO
from radio_fast.ops._state import overrides, torch_is_plain

log = logging.getLogger("radio_fast")

MAX_GRAPHS = 16
# Batch × patches. An estimate, to be measured: a ViT-B's 84 launches take Python about 2 ms, and an H200 about 4 ms for
# this many rows; other ViTs and GPUs take longer.
MAX_ROWS = 16384
PAYS_AFTER = 64  # replays that make up for a capture: three calls as they are, and one more to record and to check
MAX_COUNTED = 1024  # shapes whose calls are counted

# torch captures one graph at a time in a process. Who finds it taken runs as it is: other threads, and the calls that
# a capture makes.
_capturing = threading.Lock()


def resolve_graphs(cuda_graphs: bool | None) -> GraphCache | None:
    """The cache that `load(cuda_graphs=…)` asks for, None for no graphs.

    Raises:
        ValueError: neither True, False nor None; RADIO_FAST_GRAPHS or RADIO_FAST_GRAPH_MEMORY is no such number.
    """
    if cuda_graphs is not None and not isinstance(cuda_graphs, bool):
        raise ValueError(f"cuda_graphs must be True, False or None, got {cuda_graphs!r}")
    switch = os.environ.get("RADIO_FAST_GRAPHS") or "1"
    if switch not in ("0", "1"):
        raise ValueError(f"RADIO_FAST_GRAPHS must be 0 (off) or 1 (on), got {switch!r}")
    if cuda_graphs is False or (cuda_graphs is None and switch == "0"):
        return None
    memory = os.environ.get("RADIO_FAST_GRAPH_MEMORY") or None
    if memory is not None and not (memory.isascii() and memory.isdigit()):
        raise ValueError(f"RADIO_FAST_GRAPH_MEMORY must be a whole number of MiB, got {memory!r}")
    return GraphCache(max_bytes=None if memory is None else int(memory) << 20)


class GraphCache:
    """CUDA graphs of a model's calls, `model.graphs`: one for each exact shape, dtype, method and torch setting.

    The first call of a shape runs as it is, the second one is captured, and its first replay held against it bit by
    bit; later ones are replayed. What can't be captured, gives other bits or takes too much memory is told once in the
    log and runs as it is from then on. A caller's outputs are copies that nothing overwrites. Threads and streams
    may share a model: a graph's uses wait for each other, and a call that meets a capture under way runs as it is
    instead of waiting. While a shape is captured (milliseconds), CUDA allows no other thread to wait for the whole
    device, nor torch to draw random numbers on it: a program that does so calls each shape twice before, or does
    without graphs.

    Not for: the CPU, backend "reference", gradients, more than `MAX_ROWS` patches, torch.compile and tracing, tensor
    subclasses and modes, hooks in submodules, a stream that is capturing already. Changed weights or modules are
    noticed in every call, and drop the graphs. `enabled` switches the use of graphs off and on.

    Args:
        max_graphs: how many are kept; the least recently used one goes first.
        max_bytes: what they may take together; an eighth of the GPU's memory if None.

    Raises:
        ValueError: a limit that is no whole number, or below 1 (`max_graphs`), or negative (`max_bytes`).
    """

    def __init__(
        self,
        max_graphs: int = MAX_GRAPHS,
        max_bytes: int | None = None,
        capture: type[CudaCapture] = CudaCapture,
        enabled: bool = True,
    ):
        if type(max_graphs) is not int or max_graphs < 1:
            raise ValueError(f"max_graphs must be a whole number of at least 1, got {max_graphs!r}")
        if max_bytes is not None and (type(max_bytes) is not int or max_bytes < 0):
            raise ValueError(f"max_bytes must be None or a whole number of bytes, got {max_bytes!r}")
        self.max_graphs = max_graphs
        self.max_bytes = max_bytes
        self.capture = capture
        self.enabled = enabled
        self._lock = threading.Lock()
        self._graphs: OrderedDict[tuple, Graph] = OrderedDict()
        self._calls: OrderedDict[tuple, int] = OrderedDict()
        self._refused: set[tuple] = set()
        self._baked: Baked | None = None
        # Calls before a shape is captured. Doubles when graphs go that were hardly used: many shapes taking turns, or
        # weights that change all the time, would otherwise be captured again and again.
        self._patience = 1

    def __reduce__(self):
        return GraphCache, (self.max_graphs, self.max_bytes, self.capture, self.enabled)

    def __len__(self) -> int:
        return len(self._graphs)

    def __repr__(self) -> str:
        most = "an eighth of the GPU's" if self.max_bytes is None else f"{self.max_bytes / 2**20:.0f} MiB"
        off = "" if self.enabled else ", off"
        return f"GraphCache({len(self)} of {self.max_graphs} graphs, {self.memory / 2**20:.1f} MiB of {most}{off})"

    @property
    def memory(self) -> int:
        """Bytes that the graphs hold: their pools and their copies of the image."""
        with self._lock:
            return sum(graph.bytes for graph in self._graphs.values())

    def clear(self) -> None:
        """Free all graphs and forget what could not be captured."""
        self.drop()
        self._refused.clear()
        self._patience = 1

    def drop(self) -> None:
        """Free all graphs: their model has changed."""
        with self._lock:
            graphs, self._graphs, self._baked = [*self._graphs.values()], OrderedDict(), None
            self._calls.clear()
        self._retire(graphs)

    def _retire(self, graphs: list[Graph]) -> None:
        if graphs and all(graph.replays < PAYS_AFTER for graph in graphs):
            self._patience = min(2 * self._patience, 1 << 20)
        for graph in graphs:
            graph.close()

    def run(self, model: nn.Module, method: Callable, x: Tensor, args: tuple) -> Any:
        """What `method(model, x, *args)` gives; None where the caller has to run it.

        `x` has been checked, `args` are hashable, and equal ones mean the same.
        """
        if not self.enabled or x.device.type != self.capture.device_type or not self._fits(model, x):
            return None
        vit = None if isinstance(model.model, ERADIO) else model.model
        windows = (vit.window_size, vit.windowed) if vit else model.model.attention_window
        settings = (*torch_settings(x), *overrides().items())
        key = (method, args, x.shape, x.stride(), x.dtype, x.device, windows, settings)
        with self._lock:
            graph, baked = self._graphs.get(key), self._baked
            if graph is not None:
                self._graphs.move_to_end(key)
            elif key in self._refused or self._early(key):
                return None
        if graph is None:
            return self._capture(key, model, method, x, args)
        if not baked.holds(model):
            self.drop()
            with self._lock:
                self._early(key)
            return None
        return None if baked.runs_python() or baked.differentiable() else graph(x)

    def _fits(self, model: nn.Module, x: Tensor) -> bool:
        """Whether a replay of this call would be right, and faster."""
        h, w = model.model.grid(x)
        return (
            0 < x.shape[0] * h * w <= MAX_ROWS
            and type(x) is Tensor
            and model.backend != "reference"
            and not (x.requires_grad and torch.is_grad_enabled())
            and torch_is_plain()
            and not self.capture.busy(x.device)
        )

    def _early(self, key: tuple) -> bool:
        """Count this call; whether its shape is not to be captured yet."""
        calls = self._calls.pop(key, 0)
        early = calls < self._patience
        self._calls[key] = calls + early
        if len(self._calls) > MAX_COUNTED:
            self._calls.popitem(last=False)
        return early

    def _capture(self, key: tuple, model: nn.Module, method: Callable, x: Tensor, args: tuple) -> Any:
        """Run the call as it is, then capture it; what `run` returns."""
        if not _capturing.acquire(blocking=False):
            return None
        why = None
        try:
            with self._lock:
                if key in self._graphs:  # another thread was here first
                    return None
                baked = self._baked
            try:
                if baked is not None and not baked.holds(model):
                    self.drop()
                    baked = None
                if baked is None:
                    self._baked = baked = Baked(model, x.device)
            except TypeError as error:
                why = str(error)
            else:
                if baked.runs_python() or baked.differentiable():
                    return None
            outputs = method(model, x, *args)
            why = why or self._take(key, baked, lambda image: method(model, image, *args), x, outputs)
            if why is not None:
                self._refused.add(key)
                shape = "×".join(map(str, x.shape))
                log.warning("no CUDA graph for %s of %s %s: %s", method.__name__, shape, x.dtype, why)
            return outputs
        finally:
            _capturing.release()

    def _take(self, key: tuple, baked: Baked, run: Callable, x: Tensor, outputs: Any) -> str | None:
        """Capture `run`, which gave `outputs` for x, and keep the graph; else why not."""
        kind, graph = x.device.type, None
        # An autocast cache would keep casts that live in the graph's memory.
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        cast = torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)
        try:
            with torch.inference_mode(False), torch.no_grad(), cast:
                limit = self.capture.limit(x.device) if self.max_bytes is None else self.max_bytes
                graph = Graph(self.capture(x.device), x)
                graph.record(run, baked.tensors)
                if not same_bits(graph(x), outputs):
                    why = "its replay differs from the call"
                elif graph.bytes > limit:
                    why = f"it takes {graph.bytes / 2**20:.0f} MiB, more than the {limit / 2**20:.0f} allowed"
                else:
                    self._keep(key, graph, baked, limit)
                    return None
        except Exception as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0]
        with suppress(Exception):
            if graph is not None:
                graph.close()
        return why

    def _keep(self, key: tuple, graph: Graph, baked: Baked, limit: int) -> None:
        evicted = []
        with self._lock:
            room = limit - graph.bytes
            while self._graphs and (
                len(self._graphs) >= self.max_graphs or sum(g.bytes for g in self._graphs.values()) > room
            ):
                evicted.append(self._graphs.popitem(last=False)[1])
            self._graphs[key], self._baked = graph, baked
            self._calls.pop(key, None)
        self._retire(evicted)
