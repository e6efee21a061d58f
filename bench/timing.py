"""Times of rivals against each other: warm-up, interleaved rounds, medians and spread. On a GPU by device events."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch

Calls = dict[str, Callable[[], object]]
MIN_ROUNDS, MAX_ROUNDS = 3, 40
BLOCK_MS = 20.0  # calls of one contender in a row, so that the host's launches run ahead as they do in real use


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def block_ms(call: Callable[[], object], count: int) -> float:
    """Milliseconds per call of `count` calls in a row: between two device events, on the CPU by the clock."""
    if not torch.cuda.is_available():
        started = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - started) * 1e3 / count
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / count


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles in ms, and how many values they are of."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"ms": median, "q1": low, "q3": high, "rounds": len(values)}


def throughput(calls: Calls, seconds: float) -> dict[str, dict[str, float]]:
    """{contender: spread of ms per call}, calls in a row, contenders in turn; about `seconds` in all."""
    counts = {}
    for name, call in calls.items():
        block_ms(call, 1)
        counts[name] = max(1, math.ceil(BLOCK_MS / max(block_ms(call, 1), 1e-3)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    started = time.monotonic()
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.monotonic() - started > seconds:
            break
        for name, call in calls.items():
            times[name].append(block_ms(call, counts[name]))
    return {name: spread(values) for name, values in times.items()}


def latency(calls: Calls, seconds: float, most: int = 400) -> dict[str, dict[str, float]]:
    """{contender: median, 99th percentile in ms and the number of calls}; each call waited for before the next.

    By the host's clock, from the call to its result being there: what someone with one image waits.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    started = time.monotonic()
    while len(next(iter(times.values()))) < most:
        if len(next(iter(times.values()))) >= 20 and time.monotonic() - started > seconds:
            break
        for name, call in calls.items():
            call()
            synchronize()
            for _ in range(10):
                before = time.perf_counter()
                call()
                synchronize()
                times[name].append((time.perf_counter() - before) * 1e3)
    return {
        name: {
            "ms": statistics.median(values),
            "p99": statistics.quantiles(values, n=100, method="inclusive")[98],
            "calls": len(values),
        }
        for name, values in times.items()
    }


def ceilings(small: bool = False) -> dict[str, float]:
    """This machine's own matrix-product rate (bf16, random data) and copy bandwidth, medians.

    `matmul_tflops`: 8192³; `copy_tbps`: bytes read and bytes written, of a copy far larger than any cache.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    side, room = (256, 1 << 20) if small else (8192, 2 << 30)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randint(0, 127, (room,), device=device, dtype=torch.int8)
    target = torch.empty_like(source)
    times = throughput({"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}, 0.1 if small else 2.0)
    return {
        "matmul_side": side,
        "matmul_tflops": 2 * side**3 / times["matmul"]["ms"] / 1e9,
        "copy_bytes": room,
        "copy_tbps": 2 * room / times["copy"]["ms"] / 1e9,
    }
