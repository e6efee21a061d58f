"""The normalisation kernels against float64, within twice plain torch's error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from radio_fast import ops
from radio_fast.ops import norm
from tests.conftest import outlier_input
from tests.numerics import assert_within

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
EPS = 1e-6
CHANNELS = {"weight": 1.0, "bias": 0.5, "layer_scale": 0.2}
ROWS = 8  # the bound compares maxima: over fewer rows it is luck, whose last bit falls well


def channels(name: str, D: int, dtype: torch.dtype, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(D + len(name))
    return (CHANNELS[name] * torch.randn(D, generator=generator) + (name == "weight")).to(device, dtype)


def norm_truth(x: Tensor, weight: Tensor, bias: Tensor, scale: float = 1.0) -> Tensor:
    x = x.double()
    centred = x - x.mean(-1, keepdim=True)
    return scale * (centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double() + bias.double())


def stats_truth(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.double()
    return x.mean(-1), 1 / ((x - x.mean(-1, keepdim=True)).square().mean(-1) + EPS).sqrt()


def stats_in_float32(x: Tensor) -> tuple[Tensor, Tensor]:
    """What plain torch makes of them in float32; its var_mean sums in float64 on a CPU, out of any kernel's reach."""
    mean = x.float().mean(-1)
    return mean, ((x.float() - mean[..., None]).square().mean(-1) + EPS).rsqrt()


def check_stats(stats: tuple[Tensor, Tensor], x: Tensor) -> None:
    for actual, truth, same_dtype in zip(stats, stats_truth(x), stats_in_float32(x), strict=True):
        assert_within(actual, truth, same_dtype)


def strided(x: Tensor, kind: str) -> Tensor:
    """The same values in other memory."""
    if kind == "contiguous":
        return x
    if kind == "rows":  # a slice of a wider tensor, as of packed qkv
        wide = torch.full((*x.shape[:-1], 3 * x.shape[-1] + 5), float("nan"), dtype=x.dtype, device=x.device)
        wide[..., 3 : 3 + x.shape[-1]] = x
        return wide[..., 3 : 3 + x.shape[-1]]
    if kind == "transposed":  # channels first
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if kind == "every second":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype, device=x.device)
        wide[..., ::2] = x
        return wide[..., ::2]
    # A slice of tokens: no one row stride reaches all rows of a batch.
    long = torch.full((*x.shape[:-2], x.shape[-2] + 3, x.shape[-1]), float("nan"), dtype=x.dtype, device=x.device)
    long[..., 2:-1, :] = x
    return long[..., 2:-1, :]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [1, 16, 113, 257, 768, 1024, 1280, 1664, 4097])
def test_layer_norm(D, dtype, device, poison):
    x = outlier_input(2, ROWS // 2, D, dtype=dtype, seed=D, device=device)
    weight, bias = (channels(name, D, dtype, device) for name in ("weight", "bias"))
    out = ops.layer_norm(x, weight, bias, EPS, backend="triton")
    reference = ops.layer_norm(x, weight, bias, EPS, backend="reference")
    assert torch.equal(reference, norm.layer_norm_ref(x, weight, bias, EPS))
    assert_within(out, norm_truth(x, weight, bias), reference)
    mean, rstd = ops.norm_stats(x, EPS, backend="triton")
    assert mean.shape == rstd.shape == (2, ROWS // 2) and mean.dtype == rstd.dtype == torch.float32
    check_stats((mean, rstd), x)


@pytest.mark.parametrize("D", [2, 7, 203, 512, 513, 1152, 1536, 8193, 16384])
def test_any_width(D, device, guarded):
    x = outlier_input(3, D, dtype=torch.float16, seed=D, device=device)
    weight, bias = (channels(name, D, torch.float16, device) for name in ("weight", "bias"))
    out = ops.layer_norm(x, weight, bias, EPS, 0.5, backend="triton")
    assert_within(out, norm_truth(x, weight, bias, 0.5), norm.layer_norm_ref(x, weight, bias, EPS, 0.5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer_scale", [False, True], ids=["plain", "layer_scale"])
@pytest.mark.parametrize("shape", [(1, 7, 768), (2, 257, 16), (113, 32), (203, 24)], ids=str)
def test_add(shape, layer_scale, dtype, device, guarded):
    D = shape[-1]
    x = outlier_input(*shape, dtype=dtype, seed=1, device=device)
    y = outlier_input(*shape, dtype=dtype, seed=2, device=device)
    ls, weight, bias = (channels(name, D, dtype, device) for name in ("layer_scale", "weight", "bias"))
    ls = ls if layer_scale else None
    s, out = ops.add_layer_norm(x, y, ls, weight, bias, EPS, 0.5, backend="triton")
    s_truth = x.double() + (y.double() * ls.double() if layer_scale else y.double())
    s_reference, out_reference = ops.add_layer_norm(x, y, ls, weight, bias, EPS, 0.5, backend="reference")
    assert torch.equal(s_reference, norm.add_ref(x, y, ls))
    assert torch.equal(out_reference, norm.layer_norm_ref(s_reference, weight, bias, EPS, 0.5))
    assert_within(s, s_truth, s_reference)
    # The norm is of s as stored, so that is what its truth starts from.
    assert_within(out, norm_truth(s, weight, bias, 0.5), norm.layer_norm_ref(s, weight, bias, EPS, 0.5))

    s2, *stats = ops.add_norm_stats(x, y, ls, EPS, backend="triton")
    assert torch.equal(s2, s)
    check_stats(tuple(stats), s)
    reference = ops.add_norm_stats(x, y, ls, EPS, backend="reference")
    assert all(map(torch.equal, reference, (s_reference, *norm.norm_stats_ref(s_reference, EPS))))


@pytest.mark.parametrize("y_kind", ["contiguous", "rows", "transposed"])
@pytest.mark.parametrize("x_kind", ["rows", "transposed", "every second", "tokens"])
def test_strides(x_kind, y_kind, device, poison):
    x = outlier_input(2, 5, 113, dtype=torch.float16, seed=3, device=device)
    y = outlier_input(2, 5, 113, dtype=torch.float16, seed=4, device=device)
    ls, weight, bias = (channels(name, 113, torch.float16, device) for name in ("layer_scale", "weight", "bias"))
    expected = ops.add_layer_norm(x, y, ls, weight, bias, EPS, backend="triton")
    actual = ops.add_layer_norm(strided(x, x_kind), strided(y, y_kind), ls[:], weight, bias, EPS, backend="triton")
    assert all(map(torch.equal, actual, expected)) and all(t.is_contiguous() for t in actual)
    expected = ops.layer_norm(x, weight, bias, EPS, backend="triton")
    wide = torch.stack([weight, bias], dim=1)
    assert torch.equal(ops.layer_norm(strided(x, x_kind), wide[:, 0], wide[:, 1], EPS, backend="triton"), expected)
    stats = ops.norm_stats(strided(x, x_kind), EPS, backend="triton")
    assert all(map(torch.equal, stats, ops.norm_stats(x, EPS, backend="triton")))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_do_not_cancel(dtype, device, poison):
    """A row far from zero: E[x²] − E[x]² would lose three digits of seven."""
    x = (torch.randn(ROWS, 768, generator=torch.Generator().manual_seed(5)) + 40).to(device, dtype)
    weight, bias = (channels(name, 768, dtype, device) for name in ("weight", "bias"))
    check_stats(ops.norm_stats(x, EPS, backend="triton"), x)
    out = ops.layer_norm(x, weight, bias, EPS, backend="triton")
    assert_within(out, norm_truth(x, weight, bias), norm.layer_norm_ref(x, weight, bias, EPS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_alone(dtype, device, guarded):
    """A row's values depend on no other row, nor on how many there are."""
    x = outlier_input(1, 5, 203, dtype=dtype, seed=7, device=device)
    y = outlier_input(1, 5, 203, dtype=dtype, seed=8, device=device)
    ls, weight, bias = (channels(name, 203, dtype, device) for name in ("layer_scale", "weight", "bias"))
    together = ops.add_layer_norm(x, y, ls, weight, bias, EPS, backend="triton")
    alone = ops.add_layer_norm(x[:, 3:4], y[:, 3:4], ls, weight, bias, EPS, backend="triton")
    assert all(torch.equal(a, t[:, 3:4]) for a, t in zip(alone, together, strict=True))
    assert torch.equal(ops.layer_norm(together[0][0, 3], weight, bias, EPS, backend="triton"), alone[1][0, 0])


def test_constant_rows_and_eps(device, poison):
    """eps alone keeps a row without variance finite."""
    x = torch.full((2, 768), 3.0, device=device)
    mean, rstd = ops.norm_stats(x, 1e-4, backend="triton")
    assert mean.eq(3).all()
    torch.testing.assert_close(rstd, torch.full_like(rstd, 100.0), rtol=1e-6, atol=0)


def test_no_rows(device):
    x = torch.empty(0, 5, 64, device=device)
    w = torch.ones(64, device=device)
    assert ops.layer_norm(x, w, w, EPS, backend="triton").shape == (0, 5, 64)
    assert [t.shape for t in ops.add_norm_stats(x, x, w, EPS, backend="triton")] == [(0, 5, 64), (0, 5), (0, 5)]


def test_operators(device):
    x = outlier_input(2, 3, 16, dtype=torch.float16, seed=6, device=device)
    y = strided(x, "transposed")
    ls, weight, bias = (channels(name, 16, torch.float16, device) for name in ("layer_scale", "weight", "bias"))
    namespace = torch.ops.radio_fast
    torch.library.opcheck(namespace.layer_norm.default, (y, weight, bias, EPS, 1.0))
    torch.library.opcheck(namespace.norm_stats.default, (y, EPS))
    torch.library.opcheck(namespace.add_layer_norm.default, (x, y, ls, weight, bias, EPS, 0.5))
    torch.library.opcheck(namespace.add_norm_stats.default, (x, y, None, EPS))


def test_limits(device):
    x, w = torch.randn(2, 64, device=device), torch.ones(64, device=device)

    def refuses(text: str, op, *args) -> None:
        with pytest.raises(ValueError, match=f"the triton backend of .* can't run here: .*{text}"):
            op(*args, backend="triton")

    refuses("dtype must be float16, bfloat16 or float32, got torch.float64", ops.norm_stats, x.double(), EPS)
    refuses("dtype must be float16, bfloat16 or float32, got torch.int32", ops.norm_stats, x.int(), EPS)
    refuses("weight is torch.float16, expected torch.float32 like", ops.layer_norm, x, w.half(), w, EPS)
    refuses(r"bias must have shape \(64,\), got \(63,\)", ops.layer_norm, x, w, w[1:], EPS)
    refuses(r"y must have shape \(2, 64\), got \(1, 64\)", ops.add_norm_stats, x, x[:1], None, EPS)
    refuses(r"layer_scale must have shape \(64,\), got \(2, 64\)", ops.add_layer_norm, x, x, x, w, w, EPS)
    refuses("y is on meta, expected", ops.add_norm_stats, x, x.to("meta"), None, EPS)
    refuses(r"1…16384 entries, got shape \(1, 16385\)", ops.norm_stats, torch.zeros(1, 16385, device=device), EPS)
    refuses("1…16384 entries", ops.norm_stats, torch.zeros(4, 0, device=device), EPS)
    refuses("no backward", ops.layer_norm, x.clone().requires_grad_(), w, w, EPS)
