from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def rounded_like_a_gpu(nearest_bfloat16):
    """Every kernel test runs with bfloat16 rounded to nearest."""


@pytest.fixture
def loads(monkeypatch):
    """For every load of floating-point values in the interpreter, whether there was a NaN, even one masked later."""
    builder = pytest.importorskip("triton.runtime.interpreter").InterpreterBuilder
    load = builder.create_masked_load
    found = []

    def watched(self, ptrs, mask, *args):
        loaded = load(self, ptrs, mask, *args)
        if loaded.data.dtype.kind == "f":
            found.append(bool(((loaded.data != loaded.data) & mask.data).any()))
        return loaded

    monkeypatch.setattr(builder, "create_masked_load", watched)
    return found
