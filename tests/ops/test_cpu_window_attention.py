"""Window attention on AMX, in bfloat16 and float32: the attention kernel's windows with a bias, against float64."""

from __future__ import annotations

import pytest
import torch

from radio_fast import native_cpu, ops
from tests.conftest import qkv_like
from tests.numerics import assert_within
from tests.ops.truth import bias_like, window_truth

REASON = native_cpu.why_not_native_cpu()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

BF16 = torch.bfloat16


@pytest.fixture(params=(BF16, torch.float32), ids=("bfloat16", "float32"))
def dtype(request) -> torch.dtype:
    return request.param


def bias_of(heads: int, window: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """E-RADIO's: −16 to 0."""
    return bias_like(heads, window, dtype=BF16, device="cpu").float().sigmoid().mul(16).sub(16).to(dtype).contiguous()


def check(qkv, heads, window, bias):
    with torch.no_grad():
        actual = ops.window_attention(qkv, heads, window, bias, backend="cpu")
        same_dtype = ops.window_attention(qkv, heads, window, bias, backend="reference")
    assert actual.is_contiguous()
    assert_within(actual, window_truth(qkv, heads, window, bias), same_dtype)


@pytest.mark.parametrize(
    "window, H, W", [(1, 3, 2), (2, 4, 6), (3, 3, 6), (5, 10, 5), (7, 14, 7), (16, 16, 16), (17, 17, 17)]
)
@pytest.mark.parametrize("head_dim", (16, 72, 96))
def test_every_window(window, H, W, head_dim, threads, dtype):
    heads = 3 if window < 16 else 1
    qkv = qkv_like(2 if window < 16 else 1, H, W, 3 * heads * head_dim, dtype=dtype, device="cpu", seed=window)
    check(qkv, heads, window, bias_of(heads, window, dtype))


def test_without_a_bias(dtype):
    check(qkv_like(2, 8, 4, 3 * 2 * 32, dtype=dtype, device="cpu"), 2, 4, None)


def test_the_bias_of_each_head_query_and_key(dtype):
    """Scores are zero: the weights are the bias's softmax, and values pick out single keys."""
    heads, window, d = 2, 4, 16
    qkv = torch.zeros(1, 8, 4, 3 * heads * d, dtype=dtype)
    qkv[..., 2 * heads * d :] = torch.eye(16, dtype=dtype).view(4, 4, 16).repeat(2, 1, heads)
    bias = bias_of(heads, window, dtype)
    with torch.no_grad():
        out = ops.window_attention(qkv, heads, window, bias, backend="cpu").view(2, 16, heads, d)
    tolerance = {"rtol": 0.02, "atol": 1e-4} if dtype == BF16 else {"rtol": 1e-6, "atol": 1e-7}
    weights = bias.float().softmax(-1).expand(2, -1, -1, -1)
    torch.testing.assert_close(out.permute(0, 2, 1, 3).float(), weights, **tolerance)


def test_large_scores_and_a_large_bias(dtype):
    qkv = qkv_like(1, 17, 17, 3 * 32, dtype=dtype, device="cpu")
    qkv[..., :32] *= 20
    bias = bias_of(1, 17, dtype)
    bias[:, :, 5] = 200
    check(qkv, 1, 17, bias)


def test_masked_keys(dtype):
    """A bias of −∞: no weight, also where it is all of a block of keys, the first or the last."""
    qkv, bias = qkv_like(1, 17, 17, 3 * 32, dtype=dtype, device="cpu"), bias_of(1, 17, dtype)
    for masked in (slice(0, 160), slice(160, None), slice(7, 9)):
        holes = bias.clone()
        holes[:, :, masked] = -torch.inf
        check(qkv, 1, 17, holes)


def test_strided_arguments_and_nothing_read_beyond_them(dtype):
    wide = torch.full((2, 9, 10, 3 * 32 + 16), float("nan"), dtype=dtype)
    wide[:, :8, 1:9, 8:-8] = qkv_like(2, 8, 8, 3 * 32, dtype=dtype, device="cpu")
    room = torch.full((2, 18, 20), float("nan"), dtype=dtype)
    room[:, 1:17, 2:18] = bias_of(2, 4, dtype)
    check(wide[:, :8, 1:9, 8:-8], 2, 4, room[:, 1:17, 2:18])
    check(wide[:, :8, 1:9, 8:-8].transpose(1, 2), 2, 4, room[:, 1:17, 2:18].transpose(1, 2))


def test_nothing_outside_the_result_is_written(monkeypatch, dtype):
    made = []

    def new_empty(self, shape, **options):
        size = torch.Size(shape).numel()
        made.append(torch.full((size + 256,), float("nan"), dtype=self.dtype))
        return made[-1][128 : 128 + size].view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    native_cpu.window_attention(qkv_like(2, 14, 7, 3 * 2 * 24, dtype=dtype, device="cpu"), 2, 7, bias_of(2, 7, dtype))
    (block,) = made
    assert block[:128].isnan().all() and block[-128:].isnan().all() and not block[128:-128].isnan().any()


def test_auto_takes_it_where_windows_fit(calls):
    with torch.inference_mode():
        qkv, bias = qkv_like(1, 8, 8, 96, dtype=BF16, device="cpu"), bias_of(2, 4)
        ops.window_attention(qkv, 2, 4, bias)
        ops.window_attention(qkv.float(), 2, 4, bias.float())
        assert calls == ["rf_cpu_attention"] * 2
        ops.window_attention(qkv[:, :, :7], 2, 4, bias)
        ops.window_attention(qkv.half(), 2, 4, bias.half())
        ops.window_attention(qkv[..., :72], 2, 4, bias)
    assert len(calls) == 2
    ops.window_attention(qkv_like(1, 8, 8, 96, dtype=BF16, device="cpu").requires_grad_(), 2, 4, None).sum().backward()
    assert len(calls) == 2


def test_never_without_amx(without_amx):
    qkv = qkv_like(1, 8, 8, 96, dtype=BF16, device="cpu")
    ops.window_attention(qkv, 2, 4, bias_of(2, 4))
    with pytest.raises(ValueError, match="the cpu backend of window_attention can't run here"):
        ops.window_attention(qkv, 2, 4, None, backend="cpu")


def test_what_it_refuses():
    qkv = qkv_like(1, 8, 7, 96, dtype=BF16, device="cpu")
    with torch.no_grad():
        with pytest.raises(ValueError, match="H and W must be multiples of the window 4, got 8 × 7"):
            ops.window_attention(qkv, 2, 4, None, backend="cpu")
        with pytest.raises(ValueError, match="H and W must be multiples of the window 4, got 8 × 7"):
            native_cpu.window_attention(qkv, 2, 4, None)
        with pytest.raises(ValueError, match="head dim must be one of"):
            ops.window_attention(qkv_like(1, 8, 8, 72, dtype=BF16, device="cpu"), 1, 4, None, backend="cpu")
    assert native_cpu.window_attention(qkv_like(0, 8, 8, 96, dtype=BF16, device="cpu"), 2, 4, None).shape == (
        0,
        8,
        8,
        32,
    )


def test_the_operator_is_what_torch_expects():
    arguments = qkv_like(1, 8, 8, 96, dtype=BF16, device="cpu"), 2, 4, bias_of(2, 4)
    operator = torch.ops.radio_fast.window_attention_cpu
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
