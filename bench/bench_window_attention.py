"""window_attention and blend at E-RADIO's shapes, against plain torch, torch.compile and FlexAttention with a bias."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from bench.harness import compare, compiled, needs_gpu
from radio_fast import native, ops

pytestmark = needs_gpu

# image side, window, then of an attention level: side of the map that the windows cover, heads, head dim
SHAPES = [
    (pixels, window, pixels // stride, heads)
    for pixels, window in ((224, 7), (512, 16))
    for stride, heads in ((32, 8), (16, 8), (32, 16))  # level 2 at half its resolution and at its own, level 3
]
HEAD_DIM = 96


def flex(qkv: Tensor, heads: int, window: int, bias: Tensor):
    """FlexAttention on windows cut out beforehand: its own time alone, without the partition and its reverse."""
    B, H, W, _ = qkv.shape
    windows = qkv.view(B, H // window, window, W // window, window, 3, heads, HEAD_DIM).permute(5, 0, 1, 3, 6, 2, 4, 7)
    q, k, v = windows.reshape(3, -1, heads, window**2, HEAD_DIM)

    def add_bias(score, _, head, query, key):
        return score + bias[head, query, key]

    call = torch.compile(flex_attention, dynamic=False)
    return lambda: call(q, k, v, score_mod=add_bias)


@pytest.mark.parametrize("batch", (1, 8, 64))
@pytest.mark.parametrize(("pixels", "window", "side", "heads"), SHAPES, ids=lambda value: str(value))
def test_window_attention(benchmark, pixels, window, side, heads, batch):
    qkv = torch.randn(batch, side, side, 3 * heads * HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(heads, window**2, window**2, device="cuda", dtype=torch.bfloat16)
    padded = ops.padded_bias(bias)
    run = {
        "triton": lambda: ops.window_attention(qkv, heads, window, padded, backend="triton"),
        "reference": lambda: ops.window_attention(qkv, heads, window, bias, backend="reference"),
        "compile": compiled(lambda: ops.window_attention(qkv, heads, window, bias, backend="reference")),
        "flex, windows given": flex(qkv, heads, window, bias),
    }
    if native.why_not_native() is None:
        run["cuda"] = lambda: ops.window_attention(qkv, heads, window, padded, backend="cuda")
    flop = 4 * batch * side**2 * window**2 * heads * HEAD_DIM
    compare(benchmark, run, flop=flop, moved=qkv.nbytes * 4 / 3 + bias.nbytes)


@pytest.mark.parametrize("batch", (1, 64))
@pytest.mark.parametrize(("side", "C"), [(14, 768), (7, 1536), (32, 768), (16, 1536)])
@pytest.mark.parametrize("shuffled", [False, True], ids=["", "shuffled"])
def test_blend(benchmark, side, C, shuffled, batch):
    if shuffled and side % 2:
        pytest.skip("only maps of even sides come from half their resolution")
    skip = torch.randn(batch, side, side, C, device="cuda", dtype=torch.bfloat16)
    x = torch.randn_like(skip)
    x = x.view(batch, side // 2, side // 2, 4 * C) if shuffled else x
    run = {
        "triton": lambda: ops.blend(x, skip, backend="triton"),
        "reference": lambda: ops.blend(x, skip, backend="reference"),
        "compile": compiled(lambda: ops.blend(x, skip, backend="reference")),
    }
    compare(benchmark, run, flop=3 * skip.numel(), moved=3 * skip.nbytes)
