"""patch_embed and pos_embed against torch eager, torch.compile and a cuDNN convolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench.harness import compare, compiled, needs_gpu
from bench.shapes import shapes
from radio_fast import ops
from radio_fast.layers.conditioner import CLIP_MEAN, CLIP_STD

pytestmark = needs_gpu


@pytest.mark.parametrize("image_dtype", (torch.uint8, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", shapes(("ViT-B", "ViT-H")), ids=lambda s: s.id)
def test_patch_embed(benchmark, shape, image_dtype):
    D, p, T = shape.embed_dim, shape.patch_size, (shape.pixels // shape.patch_size) ** 2
    new = {"device": "cuda", "dtype": torch.bfloat16}
    image = torch.randint(0, 256, (shape.batch, 3, shape.pixels, shape.pixels), device="cuda", dtype=torch.uint8)
    if image_dtype != torch.uint8:
        image = (image / 255).to(image_dtype)
    weight, pos = torch.randn(D, 3 * p * p, **new), torch.randn(T, D, **new)
    prefix = torch.randn(shape.tokens - T, D, **new)
    mean, std = (torch.tensor(values, device="cuda").view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))

    def call(backend):
        return ops.patch_embed(image, weight, None, pos, prefix, p, mean, std, backend=backend)

    kernel = weight.view(D, 3, p, p)

    def convolution():
        x = ((image.float() / 255 if image.dtype == torch.uint8 else image.float()) - mean) / std
        patches = F.conv2d(x.bfloat16(), kernel, stride=p).flatten(2).transpose(1, 2) + pos
        return torch.cat([prefix.expand(shape.batch, -1, -1), patches], dim=1)

    run = {name: lambda name=name: call(name) for name in ("triton", "reference")}
    run |= {"cudnn": convolution, "compile": compiled(lambda: call("reference"))}
    moved = image.nbytes + weight.nbytes + pos.nbytes + 2 * shape.rows * D
    compare(benchmark, run, flop=2 * shape.batch * T * D * 3 * p * p, moved=moved)


@pytest.mark.parametrize("sizes", ([(32, 32)], [(14, 14), (27, 40), (32, 32), (64, 48)] * 8), ids=("one", "32 sizes"))
def test_pos_embed(benchmark, sizes):
    table = torch.randn(128 * 128, 1280, device="cuda", dtype=torch.bfloat16)
    run = {name: lambda name=name: ops.pos_embed_varlen(table, sizes, backend=name) for name in ("triton", "reference")}
    run["compile"] = compiled(lambda: ops.pos_embed_varlen(table, sizes, backend="reference"))
    written = sum(h * w for h, w in sizes) * 1280
    compare(benchmark, run, flop=8 * written, moved=2 * written * 5)
