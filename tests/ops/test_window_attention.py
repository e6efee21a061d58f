"""The window attention kernel against float64, within twice plain torch's error."""

from __future__ import annotations

import math
import random
import re

import pytest
import torch
from torch import Tensor

from radio_fast import ops
from radio_fast.arch import ARCHS
from radio_fast.kernels import window_attention as kernels
from radio_fast.ops.window_attention import window_attention_ref
from tests.conftest import qkv_like
from tests.numerics import assert_relative, assert_within
from tests.ops.truth import MAPS, bias_like, window_truth

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check(qkv: Tensor, heads: int, window: int, bias: Tensor | None = None) -> None:
    truth = window_truth(qkv, heads, window, bias)
    wide_bias = None if bias is None else bias.double()
    # Were the plain form wrong, its error would excuse the kernel's.
    assert_relative(ops.window_attention(qkv.double(), heads, window, wide_bias, backend="reference"), truth, 1e-12)
    actual = ops.window_attention(qkv, heads, window, bias, backend="triton")
    same_dtype = ops.window_attention(qkv, heads, window, bias, backend="reference")
    assert actual.is_contiguous()
    assert_within(actual, truth, same_dtype)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize(("window", "H", "W"), MAPS)
def test_every_window(window, H, W, dtype, device, guarded):
    qkv = qkv_like(2 if window < 9 else 1, H, W, 3 * 16, dtype=dtype, device=device, seed=window)
    check(qkv, 1, window, ops.padded_bias(bias_like(1, window, dtype=dtype, device=device, seed=window)))


@pytest.mark.parametrize(("window", "H", "W"), ((1, 2, 2), (3, 5, 4), (7, 4, 9), (8, 8, 8), (14, 14, 8)))
def test_float32(window, H, W, device, guarded):
    qkv = qkv_like(1, H, W, 3 * 2 * 16, dtype=torch.float32, device=device, seed=window)
    check(qkv, 2, window, bias_like(2, window, dtype=torch.float32, device=device, seed=window))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", (16, 32, 64, 72, 80, 96, 128))
def test_head_dims(head_dim, dtype, device, guarded):
    qkv = qkv_like(1, 7, 10, 3 * 2 * head_dim, dtype=dtype, device=device, seed=head_dim)
    check(qkv, 2, 7, bias_like(2, 7, dtype=dtype, device=device))
    if dtype != torch.float32:  # its keys go through blocks of 16
        check(qkv_like(1, 9, 9, 3 * head_dim, dtype=dtype, device=device, seed=head_dim), 1, 9)


@pytest.mark.parametrize("sm", (80, 89, 90, 100, 120))
def test_configurations(sm, device, guarded, monkeypatch):
    """Each architecture's tiles, on one, two and many blocks of keys."""
    monkeypatch.setenv("RADIO_FAST_ARCH", str(sm))
    for dtype, head_dim, window in ((torch.float16, 96, 14), (torch.float32, 96, 6), (torch.float32, 32, 9)):
        qkv = qkv_like(1, window, window, 3 * head_dim, dtype=dtype, device=device, seed=sm)
        check(qkv, 1, window, ops.padded_bias(bias_like(1, window, dtype=dtype, device=device, seed=sm)))


@pytest.mark.parametrize("batch", (1, 2, 3))
def test_batches(batch, device, guarded):
    """Images, windows and heads all differ, on a map that is not square."""
    qkv = qkv_like(batch, 9, 14, 3 * 3 * 16, dtype=torch.float16, device=device, seed=batch)
    check(qkv, 3, 5, bias_like(3, 5, dtype=torch.float16, device=device))


def strided(qkv: Tensor, how: str) -> Tensor:
    """The same values in another layout, NaN between them."""
    B, H, W, width = qkv.shape
    if how == "channels first":
        return qkv.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    if how == "columns first":
        return qkv.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "batch inside":
        return qkv.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    if how == "wider":
        view = qkv.new_full((B, H + 5, W + 3, width + 32), math.nan)[:, 2 : H + 2, 1 : W + 1, 16 : width + 16]
    elif how == "every other":
        view = qkv.new_full((2 * B, 3 * H, 2 * W, width), math.nan)[1::2, ::3, 1::2]
    else:
        assert how == "odd"  # nothing divisible by 16
        view = qkv.new_full((B, H, W, width + 3), math.nan)[..., 1 : width + 1]
    return view.copy_(qkv)


@pytest.mark.parametrize("wide", (False, True), ids=("narrow", "wide"))
@pytest.mark.parametrize("how", ("channels first", "columns first", "batch inside", "wider", "every other", "odd"))
def test_strides(how, wide, device, guarded, monkeypatch):
    if wide:  # as if the offsets inside a window didn't fit 32 bits
        monkeypatch.setattr(kernels, "NARROW", 1)
    qkv = strided(qkv_like(2, 8, 10, 3 * 2 * 16, dtype=torch.float16, device=device), how)
    assert not qkv.is_contiguous()
    check(qkv, 2, 7, bias_like(2, 7, dtype=torch.float16, device=device))


def test_expanded_batch(device, guarded):
    qkv = qkv_like(1, 5, 6, 3 * 2 * 16, dtype=torch.float16, device=device)
    check(qkv.expand(3, -1, -1, -1), 2, 4, bias_like(1, 4, dtype=torch.float16, device=device).expand(2, -1, -1))


def relaid(bias: Tensor, how: str) -> Tensor:
    """The same bias in other memory, NaN or infinity wherever no entry of it is."""
    heads, S, _ = bias.shape
    if how == "padded":
        return ops.padded_bias(bias)
    if how == "transposed":
        return bias.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "padded by NaN":
        view = bias.new_full((heads, S, S + 64), math.nan)[..., :S]
    elif how == "odd":
        view = bias.new_full((heads, S, S + 3), math.inf)[..., 1 : S + 1]
    elif how == "rows apart":
        view = bias.new_full((2 * heads, 2 * S, S), math.nan)[1::2, ::2]
    elif how == "every other":
        view = bias.new_full((heads, S, 2 * S), math.nan)[..., ::2]
    else:
        assert how == "contiguous"
        return bias
    return view.copy_(bias)


BIASES = ("contiguous", "padded", "padded by NaN", "odd", "rows apart", "every other", "transposed")


@pytest.mark.parametrize("how", BIASES)
@pytest.mark.parametrize("window", (7, 9, 14))
def test_biases(window, how, device, guarded):
    heads = 2 if window == 7 else 1
    qkv = qkv_like(1, window, window, 3 * heads * 16, dtype=torch.float16, device=device)
    check(qkv, heads, window, relaid(bias_like(heads, window, dtype=torch.float16, device=device), how))


def test_whole_blocks_are_read_only_where_they_exist():
    padded = ops.padded_bias(torch.zeros(3, 49, 49))
    fit = kernels._whole_blocks_fit
    assert fit(padded, 64) and fit(padded[1:], 64) and fit(padded[:2, :10], 64)
    assert not fit(padded, 65)
    assert fit(torch.zeros(2, 64, 64), 64) and not fit(torch.zeros(2, 49, 49), 64)
    assert fit(torch.zeros(2, 49, 49)[:1], 64), "the next head's rows are there"
    assert not fit(torch.zeros(2, 49, 49)[1:], 64)
    assert fit(torch.zeros(49 * 49 + 15, dtype=torch.float16)[: 49 * 49].view(1, 49, 49), 64)
    assert not fit(torch.zeros(49 * 49 + 14, dtype=torch.float16)[: 49 * 49].view(1, 49, 49), 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", (7, 9, 14))
@pytest.mark.parametrize("where", ("first", "last", "anywhere"))
def test_scores_far_apart(where, window, dtype, device, guarded):
    """Scores in the hundreds, the largest in one block of keys or another: no exp2 may overflow."""
    qkv = qkv_like(1, window, window, 3 * 16, dtype=dtype, device=device, seed=5)
    bias = bias_like(1, window, dtype=dtype, device=device, scale=300 if where == "anywhere" else 2)
    if where != "anywhere":
        bias[..., slice(3) if where == "first" else slice(-3, None)] += 400
    check(qkv, 1, window, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", (3, 9))
def test_every_key_shut_out(window, dtype, device, guarded):
    """Queries whose bias is −∞ throughout get 0, as torch gives them; the others what they always get."""
    qkv = qkv_like(1, window, window, 3 * 32, dtype=dtype, device=device)
    bias = bias_like(1, window, dtype=dtype, device=device)
    expected = ops.window_attention(qkv, 1, window, bias, backend="triton").flatten(1, 2)
    bias[:, ::2] = -math.inf
    actual = ops.window_attention(qkv, 1, window, bias, backend="triton").flatten(1, 2)
    assert torch.equal(actual[:, 1::2], expected[:, 1::2])
    assert (actual[:, ::2] == 0).all()


@pytest.mark.parametrize("window", (7, 14))
def test_keys_shut_out(window, device, guarded):
    """A bias of −∞, for whole blocks of keys too."""
    qkv = qkv_like(1, window, window, 3 * 16, dtype=torch.float16, device=device)
    bias = bias_like(1, window, dtype=torch.float16, device=device)
    half = window**2 // 2
    bias[:, ::2, :half] = -math.inf
    bias[:, 1::2, half:] = -math.inf
    check(qkv, 1, window, bias)


def test_infinite_values_stay_in_their_window(device, guarded):
    qkv = qkv_like(1, 6, 12, 3 * 16, dtype=torch.float16, device=device)
    qkv[:, :, :6, 32:] = math.inf
    out = ops.window_attention(qkv, 1, 6, backend="triton")
    assert out[:, :, :6].isinf().all(), "weights of 0 past the window's end times infinity would be NaN"
    assert out[:, :, 6:].isfinite().all()


@pytest.mark.parametrize(("window", "H", "W"), ((1, 1, 1), (7, 7, 7), (9, 13, 5), (14, 14, 14)))
@pytest.mark.parametrize("how", ("contiguous", "padded"))
def test_reads_nothing_past_the_end(how, window, H, W, device, guarded, loads):
    if device != "cpu":
        pytest.skip("watches the interpreter's loads")
    width = 3 * 72
    room = torch.full((1, H + 40, W + 40, width + 200), math.nan, dtype=torch.float16)
    qkv = room[:, 20 : H + 20, 20 : W + 20, 100 : width + 100]
    qkv.copy_(qkv_like(1, H, W, width, dtype=torch.float16, device=device))
    check(qkv, 1, window, relaid(bias_like(1, window, dtype=torch.float16, device=device), how))
    assert loads and not any(loads)


def test_queries_below_the_map_are_skipped(device, guarded, loads):
    if device != "cpu":
        pytest.skip("counts the interpreter's loads")
    qkv = qkv_like(1, 20, 16, 3 * 16, dtype=torch.float16, device=device)
    check(qkv, 1, 16)
    # Of its 4 tiles of queries the lower window has only the first on the map; each tile needs q and 4 blocks of k, v.
    assert len(loads) == (4 + 1) * (1 + 4 * 2)


@pytest.mark.parametrize("seed", range(16))
def test_any_map(seed, device, guarded):
    """Maps as E-RADIO's levels have them for images of 32 to 640 pixels, sides differing."""
    draw = random.Random(seed)
    while True:
        window, head_dim, batch, heads = draw.randint(1, 16), draw.choice((16, 96)), draw.randint(1, 3), 2
        H, W = draw.randint(1, 20) * draw.choice((1, 2)), draw.randint(1, 20) * draw.choice((1, 2))
        programs = -(-H // window) * -(-W // window) * -(-(window**2) // 64) * batch * heads
        if window <= 2 * min(H, W) - 1 and programs <= 80:
            break
    dtype = draw.choice((torch.float16, torch.bfloat16))
    qkv = qkv_like(batch, H, W, 3 * heads * head_dim, dtype=dtype, device=device, seed=seed)
    bias = bias_like(heads, window, dtype=dtype, device=device, seed=seed)
    bias = draw.choice((None, bias, ops.padded_bias(bias)))
    wide_bias = None if bias is None else bias.double()
    truth = ops.window_attention(qkv.double(), heads, window, wide_bias, backend="reference")
    same_dtype = ops.window_attention(qkv, heads, window, bias, backend="reference")
    assert_within(ops.window_attention(qkv, heads, window, bias, backend="triton"), truth, same_dtype)


@pytest.mark.parametrize("shape", ((0, 5, 6, 96), (2, 0, 6, 96), (2, 5, 0, 96)))
def test_nothing_to_do(shape, device):
    qkv = torch.zeros(shape, device=device)
    assert ops.window_attention(qkv, 2, 1, backend="triton").shape == (*shape[:3], 32)


@pytest.mark.parametrize("kind", ("plain", "bias", "padded", "strided"))
def test_operator(kind, device):
    qkv = qkv_like(1, 5, 6, 3 * 2 * 16, dtype=torch.float16, device=device)
    bias = None if kind == "plain" else bias_like(2, 3, dtype=torch.float16, device=device)
    if kind == "padded":
        bias = ops.padded_bias(bias)
    elif kind == "strided":
        qkv = strided(qkv, "wider")
    torch.library.opcheck(torch.ops.radio_fast.window_attention.default, (qkv, 2, 3, bias))


def test_reference_backend(device):
    qkv = qkv_like(2, 5, 6, 3 * 2 * 16, dtype=torch.float32, device=device)
    bias = bias_like(2, 3, dtype=torch.float32, device=device)
    for b in (None, bias):
        expected = window_attention_ref(qkv, 2, 3, b)
        assert torch.equal(ops.window_attention(qkv, 2, 3, b, backend="reference"), expected)
        assert expected.is_contiguous()


def test_padded_bias(device):
    bias = bias_like(2, 7, dtype=torch.float16, device=device)
    padded = ops.padded_bias(bias)
    assert torch.equal(padded, bias) and padded.stride() == (49 * 64, 64, 1)
    assert padded.untyped_storage().nbytes() == 2 * 49 * 64 * 2


QKV = torch.zeros(2, 4, 6, 96)
BIAS = torch.zeros(2, 9, 9)
BAD = {  # (what to call the op with, what its message says)
    "no window": ((QKV, 2, 0), "window must be a number of positions in 1…32, got 0"),
    "negative": ((QKV, 2, -1), "window must be a number of positions in 1…32, got -1"),
    "bool": ((QKV, 2, True), "window must be a number of positions in 1…32, got True"),
    "float": ((QKV, 2, 3.0), "window must be a number of positions in 1…32, got 3.0"),
    "too large": ((torch.zeros(1, 40, 40, 48), 1, 33), "window must be a number of positions in 1…32, got 33"),
    "past H": ((QKV, 2, 8), "window 8 is too large for a map with H = 4: reflection pads it by at most 3 positions"),
    "past W": ((torch.zeros(1, 8, 2, 48), 1, 4), "window 4 is too large for a map with W = 2"),
    "rank": ((QKV[0], 2, 3), "qkv must have shape (B, H, W, 3·2·d), got (4, 6, 96)"),
    "width": ((QKV, 5, 3), "qkv must have shape (B, H, W, 3·5·d), got (2, 4, 6, 96)"),
    "no heads": ((QKV, 0, 3), "num_heads must be a positive number, got 0"),
    "heads as a float": ((QKV, 2.0, 3), "num_heads must be a positive number, got 2.0"),
    "bias heads": ((QKV, 2, 3, BIAS[:1]), "bias must have shape (2, 9, 9), got (1, 9, 9)"),
    "bias keys": ((QKV, 2, 2, BIAS), "bias must have shape (2, 4, 4), got (2, 9, 9)"),
    "bias dtype": ((QKV, 2, 3, BIAS.half()), "bias is torch.float16 on cpu, expected torch.float32 on cpu"),
    "mask": ((QKV, 2, 3, BIAS.bool()), "bias is torch.bool on cpu, expected torch.float32 on cpu"),
    "bias device": ((QKV, 2, 3, BIAS.to("meta")), "bias is torch.float32 on meta, expected torch.float32 on cpu"),
    "dtype": ((QKV.double(), 2, 3), "dtype must be float16, bfloat16 or float32, got torch.float64"),
    "head dim": ((torch.zeros(1, 4, 6, 144), 1, 3), "head dim must be one of 16, 32, 64, 72, 80, 96, 128, got 48"),
}


@pytest.mark.parametrize("change", BAD)
def test_refuses(change):
    arguments, message = BAD[change]
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.window_attention(*arguments, backend="triton")
    if change not in ("dtype", "head dim"):  # which plain torch takes
        with pytest.raises(ValueError, match=re.escape(message)):
            ops.window_attention(*arguments, backend="reference")


def test_refuses_old_gpus(device, monkeypatch):
    if device != "cpu":
        pytest.skip("a newer GPU")
    monkeypatch.setenv("RADIO_FAST_ARCH", "75")
    with pytest.raises(ValueError, match="no kernel for sm_75"):
        ops.window_attention(QKV, 2, 3, backend="triton")


def test_refuses_autograd(device):
    with pytest.raises(ValueError, match="no backward"):
        ops.window_attention(QKV.to(device).requires_grad_(), 2, 3, backend="triton")


@pytest.mark.parametrize("sm", [sm for sm, arch in ARCHS.items() if arch.tensor_core_dot])
@pytest.mark.parametrize("size", (2, 4))
def test_every_window_has_a_configuration(sm, size):
    for head_dim in kernels.HEAD_SPLIT:
        for window in range(1, 33):
            config, _ = kernels._choose(sm, size, head_dim, window)
            keys = kernels._padded_keys(config)
            assert window**2 <= keys <= ops.padded_bias(torch.empty(1, 1, window**2)).stride(1)


def test_compile_cases():
    for sm in (80, 86, 89, 90, 100, 120):
        cases = kernels.compile_cases(sm)
        assert {case.signature["qkv"] for case in cases} == {"*fp16", "*bf16", "*fp32"}
        for case in cases:
            assert sorted([*case.signature, *case.constexprs]) == sorted(case.fn.arg_names)
            assert case.dot_macs > 0
