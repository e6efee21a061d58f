"""layer_norm and add_layer_norm against torch eager and torch.compile."""

from __future__ import annotations

import pytest
import torch

from bench.harness import compare, compiled, needs_gpu
from bench.shapes import shapes
from radio_fast import ops

pytestmark = needs_gpu
SHAPES = shapes()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.id)
def test_layer_norm(benchmark, shape):
    x = torch.randn(shape.rows, shape.embed_dim, device="cuda", dtype=torch.bfloat16)
    w, b = torch.randn(2, shape.embed_dim, device="cuda", dtype=torch.bfloat16)
    run = {name: lambda name=name: ops.layer_norm(x, w, b, 1e-6, backend=name) for name in ("triton", "reference")}
    run["compile"] = compiled(lambda: ops.layer_norm(x, w, b, 1e-6, backend="reference"))
    compare(benchmark, run, flop=8 * x.numel(), moved=2 * x.nbytes)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.id)
def test_add_layer_norm(benchmark, shape):
    x, y = torch.randn(2, shape.rows, shape.embed_dim, device="cuda", dtype=torch.bfloat16)
    w, b = torch.randn(2, shape.embed_dim, device="cuda", dtype=torch.bfloat16)
    run = {
        name: lambda name=name: ops.add_layer_norm(x, y, None, w, b, 1e-6, backend=name)
        for name in ("triton", "reference")
    }
    run["compile"] = compiled(lambda: ops.add_layer_norm(x, y, None, w, b, 1e-6, backend="reference"))
    compare(benchmark, run, flop=10 * x.numel(), moved=4 * x.nbytes)
