"""The attention kernels against float64, within twice plain torch's error."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

from radio_fast import ops
from radio_fast.arch import ARCHS
from radio_fast.kernels import attention as kernels
from radio_fast.kernels.configs import attention_config
from radio_fast.ops.attention import attention_ref
from tests.conftest import outlier_input, qkv_like
from tests.numerics import assert_within
from tests.ops.truth import attention_truth

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check(qkv: Tensor, heads: int, lengths: list[int] | None = None, window=None, **kwargs) -> None:
    cu_seqlens = None
    if lengths is not None:
        ends = torch.tensor([0, *lengths]).cumsum(0)
        cu_seqlens = ends.to(qkv.device, torch.int32)
    actual = ops.attention(qkv, heads, cu_seqlens, window=window, backend="triton", **kwargs)
    same_dtype = ops.attention(qkv, heads, cu_seqlens, window=window, backend="reference")
    assert actual.is_contiguous()
    assert_within(actual, attention_truth(qkv, heads, lengths, window), same_dtype)


LENGTHS = (1, 7, 113, 203, 257)  # odd ones, over every way to cut a short row of keys
LONG = 323  # streams its keys on all architectures: two blocks of 128 and 67 more


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", (*LENGTHS, LONG))
def test_lengths(N, dtype, device, guarded):
    if N == LONG and dtype == torch.float32:
        N = 100  # float32 always streams its keys, in blocks of 16: slow in the interpreter
    check(qkv_like(1, N, 3 * 80, dtype=dtype, device=device, seed=N), 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", (16, 32, 64, 72, 80, 96, 128))
def test_head_dims(head_dim, dtype, device, guarded):
    check(qkv_like(2, 40, 3 * 3 * head_dim, dtype=dtype, device=device, seed=head_dim), 3)
    if dtype != torch.float32:
        check(qkv_like(1, LONG, 3 * head_dim, dtype=dtype, device=device, seed=head_dim), 1)


@pytest.mark.parametrize("sm", (80, 89, 90, 100, 120))
def test_configurations(sm, device, guarded, monkeypatch):
    """Each architecture's tiles, on lengths of 16k + 10 tokens as RADIO's are."""
    monkeypatch.setenv("RADIO_FAST_ARCH", str(sm))
    check(qkv_like(1, 202, 3 * 72, dtype=torch.float16, device=device, seed=sm), 1)
    check(qkv_like(1, 298, 3 * 64, dtype=torch.float16, device=device, seed=sm), 1)
    check(qkv_like(2, 42, 3 * 96, dtype=torch.float32, device=device, seed=sm), 1)


@pytest.mark.parametrize("N", (74, 138, 206, 250, 266))
def test_one_program_for_all_queries(N, device, guarded, monkeypatch):
    """Large batches: the short kernel goes over a head's tiles of queries in a loop. Every cut of the keys."""
    monkeypatch.setattr(kernels, "FILL", 1)
    check(qkv_like(1, N, 3 * 2 * 64, dtype=torch.bfloat16, device=device, seed=N), 2)


@pytest.mark.parametrize("N", (113, 203, 266, LONG))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_scores_far_apart(N, dtype, device, guarded):
    """Scores in the hundreds, the largest of the last keys, each in its own block: no exp2 may overflow."""
    qkv = outlier_input(1, N, 3 * 64, dtype=dtype, seed=5, device=device)
    qkv[:, -8:, 64:128] *= 8
    check(qkv, 1)


def strided(qkv: Tensor, how: str) -> Tensor:
    """The same values in another layout, NaN between them."""
    B, N, width = qkv.shape
    if how == "tokens first":
        return qkv.transpose(0, 1).contiguous().transpose(0, 1)
    if how == "wider":
        room = qkv.new_full((B, N + 5, width + 48), math.nan)
        view = room[:, 2 : N + 2, 16 : width + 16]
    elif how == "every other":
        view = qkv.new_full((2 * B, 2 * N, width), math.nan)[::2, 1::2]
    elif how == "odd":  # nothing divisible by 16
        view = qkv.new_full((B, N, width + 3), math.nan)[..., 1 : width + 1]
    else:
        assert how == "last axis"
        view = qkv.new_full((B, N, 2 * width), math.nan)[..., ::2]
    return view.copy_(qkv)


@pytest.mark.parametrize("how", ("tokens first", "wider", "every other", "odd", "last axis"))
@pytest.mark.parametrize("N", (30, 300))
def test_strides(how, N, device, guarded):
    qkv = strided(qkv_like(2, N, 3 * 72, dtype=torch.float16, device=device), how)
    assert not qkv.is_contiguous()
    check(qkv, 1)


def test_expanded_batch(device, guarded):
    check(qkv_like(1, 50, 3 * 2 * 32, dtype=torch.float16, device=device).expand(3, -1, -1), 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", ([70, 0, 1, 33], [0, 0, 16], [5, 0], [7, 206, 130], [300, 0, 129, 17]), ids=str)
def test_packed_images(lengths, dtype, device, guarded):
    if dtype == torch.float32:  # streams its keys at any length
        lengths = [min(length, 60) for length in lengths]
    check(qkv_like(sum(lengths), 3 * 2 * 80, dtype=dtype, device=device, seed=7), 2, lengths)


def test_packed_with_room(device, guarded):
    """max_seqlen may be more than the longest, to replay one CUDA graph; the tokens may lie apart."""
    qkv = strided(qkv_like(1, 120, 3 * 2 * 72, dtype=torch.float16, device=device), "wider")[0]
    check(qkv, 2, [100, 20], max_seqlen=100)
    check(qkv, 2, [100, 20], max_seqlen=250)
    check(qkv, 2, [100, 20], max_seqlen=400)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", ((8, 8, 8), (8, 12, 4), (21, 14, 7), (2, 3, 1)), ids=str)
def test_windows(window, dtype, device, guarded):
    h, w, k = window
    check(qkv_like(2, h * w, 3 * 2 * 32, dtype=dtype, device=device, seed=k), 2, window=window)


@pytest.mark.parametrize("window", ((28, 14, 14), (18, 36, 18)), ids=str)
def test_large_windows(window, device, guarded):
    h, w, k = window
    check(qkv_like(1, h * w, 3 * 32, dtype=torch.float16, device=device, seed=k), 1, window=window)


@pytest.mark.parametrize("window", ((10, 15, 5), (17, 17, 17)), ids=str)
def test_windows_of_strided_tokens(window, device, guarded):
    h, w, _ = window
    qkv = qkv_like(2, h * w, 3 * 72, dtype=torch.float16, device=device)
    check(strided(qkv, "wider"), 1, window=window)
    check(strided(qkv, "tokens first"), 1, window=window)


@pytest.mark.parametrize("N", (1, 80, 203, LONG))
@pytest.mark.parametrize("kind", ("dense", "packed", "window"))
def test_reads_nothing_past_the_end(kind, N, device, guarded, loads, monkeypatch):
    if device != "cpu":
        pytest.skip("watches the interpreter's loads")
    window = None
    if kind == "window":
        side = math.isqrt(N)
        N, window = side * 2 * side, (side, 2 * side, side)
    monkeypatch.setattr(kernels, "FILL", 2)
    width = 3 * 72
    room = torch.full((1, N + 200, width + 200), math.nan, dtype=torch.float16)
    qkv = room[:, :N, :width].copy_(qkv_like(1, N, width, dtype=torch.float16, device=device))
    if kind == "packed":
        check(qkv[0], 1, [N], max_seqlen=N + 100)
    else:
        check(qkv, 1, window=window)
    assert loads and not any(loads)


@pytest.mark.parametrize("max_seqlen", (200, 500))
def test_programs_past_the_end_return_early(max_seqlen, device, guarded, loads):
    if device != "cpu":
        pytest.skip("watches the interpreter's loads")
    check(qkv_like(20, 3 * 64, dtype=torch.float16, device=device), 1, [20, 0], max_seqlen=max_seqlen)
    assert 0 < len(loads) <= 7, "one tile of q, k and v of at most three blocks"


@pytest.mark.parametrize("shape", ((0, 5, 96), (2, 0, 96)))
def test_nothing_to_do(shape, device):
    qkv = torch.zeros(shape, device=device)
    assert ops.attention(qkv, 2, backend="triton").shape == (*shape[:2], 32)


def test_no_packed_tokens(device):
    cu_seqlens = torch.zeros(3, dtype=torch.int32, device=device)
    assert ops.attention(torch.zeros(0, 96, device=device), 2, cu_seqlens, backend="triton").shape == (0, 32)


@pytest.mark.parametrize("kind", ("dense", "long", "packed", "window", "strided"))
def test_operator(kind, device):
    qkv = qkv_like(1, 300 if kind == "long" else 24, 96, dtype=torch.float16, device=device)
    args = [qkv, 2, None, 0, []]
    if kind == "packed":
        args = [qkv[0], 2, torch.tensor([0, 10, 24], dtype=torch.int32, device=device), 14, []]
    elif kind == "window":
        args[4] = [4, 6, 2]
    elif kind == "strided":
        args[0] = strided(qkv, "wider")
    torch.library.opcheck(torch.ops.radio_fast.attention.default, tuple(args))


def test_reference_backend(device):
    qkv = qkv_like(2, 24, 96, dtype=torch.float32, device=device)
    cu_seqlens = torch.tensor([0, 10, 24], dtype=torch.int32, device=device)
    for arguments in ((qkv, 2), (qkv[0], 2, cu_seqlens), (qkv, 2, None, None, (4, 6, 2))):
        x, heads, *rest = arguments
        expected = attention_ref(*arguments)
        options = {"cu_seqlens": rest[0] if rest else None, "window": rest[2] if len(rest) > 2 else None}
        assert torch.equal(ops.attention(x, heads, **options, backend="reference"), expected)


QKV = torch.zeros(2, 24, 96)
ENDS = torch.tensor([0, 10, 24], dtype=torch.int32)
BAD = {  # (what to call the op with, what its message says)
    "dtype": ((QKV.double(), 2), "dtype must be float16, bfloat16 or float32, got torch.float64"),
    "width": ((QKV, 5), "qkv must have shape (B, N, 3·H·d) with H = 5 heads, got (2, 24, 96)"),
    "rank": ((QKV[0], 2), "qkv must have shape (B, N, 3·H·d) with H = 2 heads, got (24, 96)"),
    "no heads": ((QKV, 0), "with H = 0 heads"),
    "packed rank": ((QKV, 2, ENDS), "qkv must have shape (tokens, 3·H·d) beside cu_seqlens"),
    "head dim": ((QKV, 4), "head dim must be one of 16, 32, 64, 72, 80, 96, 128, got 8"),
    "long ends": ((QKV[0], 2, ENDS.long()), "cu_seqlens must be int32 of shape (images + 1,), got torch.int64"),
    "one end": ((QKV[0], 2, ENDS[:1]), "cu_seqlens must be int32 of shape (images + 1,), got torch.int32 (1,)"),
    "device": ((QKV[0], 2, ENDS.to("meta")), "cu_seqlens is on meta, expected cpu"),
    "both": ((QKV[0], 2, ENDS, None, (4, 6, 2)), "cu_seqlens and window can't be combined"),
    "grid": ((QKV, 2, None, None, (4, 5, 1)), "window (h, w, k) needs h·w = 24 tokens and k dividing both sides"),
    "side": ((QKV, 2, None, None, (4, 6, 4)), "needs h·w = 24 tokens and k dividing both sides, got (4, 6, 4)"),
    "no side": ((QKV, 2, None, None, (4, 6, 0)), "window must be (h, w, k), positive numbers, got (4, 6, 0)"),
}


@pytest.mark.parametrize("change", BAD)
def test_refuses(change):
    arguments, message = BAD[change]
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.attention(*arguments, backend="triton")


def test_refuses_old_gpus(device, monkeypatch):
    if device != "cpu":
        pytest.skip("a newer GPU")
    monkeypatch.setenv("RADIO_FAST_ARCH", "75")
    with pytest.raises(ValueError, match="no kernel for sm_75"):
        ops.attention(torch.zeros(1, 8, 96), 2, backend="triton")


def test_refuses_autograd(device):
    with pytest.raises(ValueError, match="no backward"):
        ops.attention(torch.zeros(1, 8, 96, device=device, requires_grad=True), 2, backend="triton")


@pytest.mark.parametrize("sm", [sm for sm, arch in ARCHS.items() if arch.tensor_core_dot])
@pytest.mark.parametrize("size", (2, 4))
def test_every_length_has_a_configuration(sm, size):
    for head_dim in kernels.HEAD_SPLIT:
        for N in (*range(1, 400), 739, 1034, 4106, 1 << 20):
            config = attention_config(sm, size, head_dim, N)
            if "N1" in config:
                blocks = [config[name] for name in ("N1", "N2", "N3") if config[name]]
                assert sum(blocks[:-1]) < N <= sum(blocks), "all keys, and all but the last block whole"
            else:
                assert 2 * kernels._tail(N, config["BLOCK_N"], False) >= N % config["BLOCK_N"]
            if N == 206 and head_dim in (64, 72, 80) and sm in (80, 90):
                assert ("N1" in config) == (size == 2)


def test_compile_cases():
    for sm in (80, 86, 89, 90, 100, 120):
        cases = kernels.compile_cases(sm)
        assert {case.signature["qkv"] for case in cases} == {"*fp16", "*bf16", "*fp32"}
        for case in cases:
            assert sorted([*case.signature, *case.constexprs]) == sorted(case.fn.arg_names)
            assert case.dot_macs > 0
