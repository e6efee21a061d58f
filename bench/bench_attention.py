"""attention against torch's SDPA backends, torch.compile, and flash-attn and xFormers where they are installed."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from bench.harness import compare, compiled, needs_gpu
from bench.rivals import sdpa_rivals
from bench.shapes import shapes
from radio_fast import native, ops

pytestmark = needs_gpu


def package_rivals(qkv) -> dict:
    """flash-attn and xFormers on the same packed input, read in place."""
    out = {}
    q, k, v = qkv.unbind(2)
    if importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_qkvpacked_func

        out["flash-attn"] = lambda: flash_attn_qkvpacked_func(qkv)
    if importlib.util.find_spec("xformers"):
        from xformers.ops import memory_efficient_attention

        out["xformers"] = lambda: memory_efficient_attention(q, k, v)
    return out


@pytest.mark.parametrize("shape", shapes(), ids=lambda s: s.id)
def test_attention(benchmark, shape):
    H, d = shape.num_heads, shape.head_dim
    packed = torch.randn(shape.batch, shape.tokens, 3, H, d, device="cuda", dtype=torch.bfloat16)
    qkv = packed.flatten(2)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    run = {
        "triton": lambda: ops.attention(qkv, H, backend="triton"),
        "reference": lambda: ops.attention(qkv, H, backend="reference"),
        "compile": compiled(lambda: ops.attention(qkv, H, backend="reference")),
    }
    if native.why_not_native() is None:
        run["cuda"] = lambda: ops.attention(qkv, H, backend="cuda")
    run |= sdpa_rivals(q, k, v) | package_rivals(packed)
    flop = 4 * shape.batch * H * shape.tokens**2 * d
    compare(benchmark, run, flop=flop, moved=qkv.nbytes * 4 / 3)


@pytest.mark.parametrize("shape", shapes(("ViT-L", "ViT-H"), (8,)), ids=lambda s: s.id)
def test_packed(benchmark, shape):
    """Images of three sizes in one call."""
    H, d = shape.num_heads, shape.head_dim
    lengths = torch.tensor([shape.tokens, shape.tokens // 2, shape.tokens * 3 // 4] * 3)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int().cuda()
    qkv = torch.randn(int(lengths.sum()), 3 * H * d, device="cuda", dtype=torch.bfloat16)
    longest = int(lengths.max())
    run = {
        "triton": lambda: ops.attention(qkv, H, cu_seqlens, longest, backend="triton"),
        "reference": lambda: ops.attention(qkv, H, cu_seqlens, longest, backend="reference"),
    }
    flop = 4 * int((lengths.double() ** 2).sum()) * H * d
    compare(benchmark, run, flop=flop, moved=qkv.nbytes * 4 / 3)


@pytest.mark.skipif(native.why_not_native() is not None, reason="the CUDA extension is not built")
@pytest.mark.parametrize("path", [70, 75])
@pytest.mark.parametrize("shape", shapes(("ViT-B", "ViT-H")), ids=lambda s: s.id)
def test_older_paths(benchmark, monkeypatch, shape, path):
    """What sm_70 and sm_75 run, forced on this GPU, in float16, against torch's memory-efficient SDPA.

    From sm_80 on, sm_70's product instruction has no tensor cores: its times say nothing of a V100.
    """
    monkeypatch.setenv("RADIO_FAST_ARCH", str(path))
    H, d = shape.num_heads, shape.head_dim
    packed = torch.randn(shape.batch, shape.tokens, 3, H, d, device="cuda", dtype=torch.float16)
    qkv = packed.flatten(2)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    rivals = {name: call for name, call in sdpa_rivals(q, k, v).items() if name == "sdpa efficient"}
    flop = 4 * shape.batch * H * shape.tokens**2 * d
    ours = {"cuda": lambda: ops.attention(qkv, H, backend="cuda")}
    compare(benchmark, ours | rivals, flop=flop, moved=qkv.nbytes * 4 / 3, ours="cuda")
