"""Whole models, a benchmark for each contender: for `pytest-benchmark compare`, before and after a change.

`./dev bench bench/bench_model.py --benchmark-autosave`; CONTRIBUTING.md says how two such runs are compared. Without a
GPU it is ViT-B on one image of 224 pixels. RADIO_FAST_BENCH=full: every case, and torch.compile where there is
one (minutes each); RADIO_FAST_BENCH=tiny: the tests' small models. For ratios take `bench/engine.py`, which times the
contenders in turn.
"""

from __future__ import annotations

import os

import pytest
import torch

from bench.harness import synchronised
from bench.rivals import Rivals, check
from bench.shapes import FULL
from bench.workload import MODELS, Case, grid

CUDA = torch.cuda.is_available()
TINY = os.environ.get("RADIO_FAST_BENCH") == "tiny"


def cases() -> list[Case]:
    if TINY:
        return [Case(model, 32, 2) for model in MODELS]
    if FULL:
        return grid()
    if CUDA:
        return [case for case in grid() if case.pixels in (224, 512) and case.batch in (1, 64)]
    return [Case("ViT-B", 224, 1)]


@pytest.fixture(scope="module")
def rivals():
    """A function: model name → its contenders; those of one model at a time are kept."""
    kept: dict[str, Rivals] = {}

    def get(model: str) -> Rivals:
        if model not in kept:
            kept.clear()
            kept[model] = Rivals(model, "cuda" if CUDA else "cpu", TINY)
        return kept[model]

    return get


@pytest.mark.benchmark(timer=synchronised)
@pytest.mark.parametrize("contender", ["radio_fast", "eager", "official"] + ["compiled"] * (FULL and CUDA))
@pytest.mark.parametrize(("model", "pixels", "batch"), cases())
def test_forward(benchmark, rivals, model, pixels, batch, contender):
    case = Case(model, pixels, batch)
    contenders = rivals(model)
    with torch.inference_mode():
        call = contenders.calls(case, compiled=contender == "compiled")[contender]
        check(call(), contenders.truth(case))  # what is fast and wrong is not to be timed; and it warms up
        benchmark.group = case.id
        benchmark(call)
    median = benchmark.stats.stats.median
    benchmark.extra_info |= {"images_per_s": batch / median, "tflops": contenders.flop(case) / median / 1e12}
