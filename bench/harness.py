"""Time rivals against each other: warm-up, interleaved rounds, medians; by device events on a GPU, else wall time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="times kernels on a GPU; this machine has none")

ROUNDS = 25
FLUSH_BYTES = 256 << 20  # larger than any L2, so that every round finds it cold


def time_rivals(rivals: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median milliseconds of each, all in one process, one call of each per round."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    for call in rivals.values():
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(ROUNDS):
        for name, call in rivals.items():
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def time_on_cpu(rivals: dict[str, Callable[[], object]]) -> dict[str, float]:
    """As `time_rivals`, wall time; fewer rounds, as many as a minute holds."""
    started = time.perf_counter()
    for call in rivals.values():
        call()
    rounds = int(min(ROUNDS, max(5, 60 / (time.perf_counter() - started))))
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, call in rivals.items():
            started = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - started) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def synchronised() -> float:
    """Seconds, once the device has done all its work: pytest-benchmark's timer for calls that only launch it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def compare(
    benchmark,
    rivals: dict[str, Callable[[], object]],
    flop: float,
    moved: float,
    ours: str = "triton",
    timer=time_rivals,
) -> None:
    """Time the rivals; put times, achieved rates and the ratio of ours to the best other one into the record.

    `flop` and `moved` (bytes) are what the operation needs at least, for its floor.
    """
    times = benchmark.pedantic(timer, args=(rivals,), rounds=1)
    best = min((ms for name, ms in times.items() if name != ours), default=float("nan"))
    ours = times[ours]
    benchmark.extra_info.update(
        times_ms=times,
        flop=flop,
        bytes=moved,
        ours_tflops=flop / ours / 1e9,
        ours_tbps=moved / ours / 1e9,
        speedup_over_best_rival=best / ours,
    )


def compiled(function: Callable) -> Callable:
    """torch.compile of a plain function, for fixed shapes."""
    return torch.compile(function, dynamic=False)
