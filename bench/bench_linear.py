"""linear with its epilogues, and ln_linear, against torch eager (cuBLAS) and torch.compile."""

from __future__ import annotations

import pytest
import torch

from bench.harness import compare, compiled, needs_gpu
from bench.shapes import shapes
from radio_fast import ops

pytestmark = needs_gpu
SHAPES = shapes(("ViT-B", "ViT-L", "ViT-H"))
LAYERS = ("qkv", "proj", "fc1", "fc2")


def tensors(shape, layer):
    D, hidden = shape.embed_dim, shape.mlp_hidden
    K, M = {"qkv": (D, 3 * D), "proj": (D, D), "fc1": (D, hidden), "fc2": (hidden, D)}[layer]
    new = {"device": "cuda", "dtype": torch.bfloat16}
    x, weight, bias = torch.randn(shape.rows, K, **new), torch.randn(M, K, **new) * K**-0.5, torch.randn(M, **new)
    residual = torch.randn(shape.rows, M, **new) if layer in ("proj", "fc2") else None
    return x, weight, bias, "gelu" if layer == "fc1" else None, residual


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.id)
def test_linear(benchmark, shape, layer):
    x, weight, bias, activation, residual = tensors(shape, layer)

    def call(backend):
        return ops.linear(x, weight, bias, activation, residual, backend=backend)

    run = {name: lambda name=name: call(name) for name in ("triton", "reference")}
    run["compile"] = compiled(lambda: call("reference"))
    rows, out = x.shape[0], weight.shape[0]
    moved = 2 * (x.numel() + weight.numel() + rows * out * (1 if residual is None else 2))
    compare(benchmark, run, flop=2 * x.numel() * out, moved=moved)


@pytest.mark.parametrize("layer", ("qkv", "fc1"))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.id)
def test_ln_linear(benchmark, shape, layer):
    x, weight, bias, activation, _ = tensors(shape, layer)
    w, b = torch.randn(2, x.shape[1], device="cuda", dtype=torch.bfloat16)

    def call(backend):
        mean, rstd = ops.norm_stats(x, 1e-6, backend=backend)
        return ops.ln_linear(x, mean, rstd, w, b, 1.0, weight, bias, activation, backend=backend)

    def unfused(backend):
        h = ops.layer_norm(x, w, b, 1e-6, backend="triton")
        return ops.linear(h, weight, bias, activation, backend=backend)

    run = {
        "triton": lambda: call("triton"),
        "reference": lambda: call("reference"),
        "triton norm + cuBLAS": lambda: unfused("reference"),
        "triton norm + triton linear": lambda: unfused("triton"),
    }
    moved = 2 * (x.numel() + weight.numel() + x.shape[0] * weight.shape[0])
    compare(benchmark, run, flop=2 * x.numel() * weight.shape[0], moved=moved)
