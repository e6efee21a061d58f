"""The linear kernels against float64, within twice plain torch's error."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from radio_fast import ops
from radio_fast.ops.linear import linear_ref, ln_linear_ref
from tests.conftest import outlier_input
from tests.numerics import assert_within

pytest.importorskip("triton")

from radio_fast.kernels import configs
from radio_fast.kernels import linear as kernels

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ACTIVATIONS = (None, "gelu", "swiglu", "silu")


@pytest.fixture
def arch(monkeypatch, device):
    """Take the tiles of another architecture, where the kernel runs in the interpreter."""

    def take(sm: int) -> None:
        if device == "cuda":
            pytest.skip("on a GPU its own architecture's tiles run")
        monkeypatch.setenv("RADIO_FAST_ARCH", str(sm))

    return take


def normal(*shape: int, dtype: torch.dtype, seed: int, device: str, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(device, dtype)


def columns_of(activation: str | None, N: int) -> int:
    return 2 * N if activation == "swiglu" else N


def parameters(K: int, rows: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """A weight that keeps values near the input's size, and a bias."""
    weight = normal(rows, K, dtype=dtype, seed=1, device=device, scale=K**-0.5)
    return weight, normal(rows, dtype=dtype, seed=2, device=device)


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.float()
    return x.mean(-1), (x.var(-1, correction=0) + 1e-6).rsqrt()


def truth_of(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
) -> Tensor:
    y = torch.einsum("...k,nk->...n", x.double(), weight.double())
    if bias is not None:
        y = y + bias.double()
    if activation == "gelu":
        y = y * torch.special.ndtr(y)
    elif activation == "silu":
        y = y / (1 + torch.exp(-y))
    elif activation == "swiglu":
        N = y.shape[-1] // 2
        y = y[..., :N] * y[..., N:] / (1 + torch.exp(-y[..., :N]))
    if layer_scale is not None:
        y = y * layer_scale.double()
    return y if residual is None else y + residual.double()


def normalised(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, scale: float) -> Tensor:
    x = (x.double() - mean.double()[..., None]) * rstd.double()[..., None]
    return (x * weight.double() + bias.double()) * scale


def check(x, weight, bias, activation, residual=None, layer_scale=None) -> None:
    arguments = (x, weight, bias, activation, residual, layer_scale)
    actual = ops.linear(*arguments, backend="triton")
    assert actual.is_contiguous()
    assert_within(actual, truth_of(*arguments), ops.linear(*arguments, backend="reference"))


def check_norm(x, weight, bias, activation, norm_scale=1.0, statistics_of=statistics) -> None:
    mean, rstd = statistics_of(x)
    K = x.shape[-1]
    norm_weight = 1 + normal(K, dtype=x.dtype, seed=5, device=str(x.device), scale=0.3)
    norm_bias = normal(K, dtype=x.dtype, seed=6, device=str(x.device), scale=0.5)
    norm = (mean, rstd, norm_weight, norm_bias, norm_scale)
    actual = ops.ln_linear(x, *norm, weight, bias, activation, backend="triton")
    assert actual.is_contiguous()
    truth = truth_of(normalised(x, *norm), weight, bias, activation)
    assert_within(actual, truth, ops.ln_linear(x, *norm, weight, bias, activation, backend="reference"))


# (B, tokens, K, N): ViT-B, L, H and SO400M projections cut to few columns, DINOv2-g's patch features; odd lengths
SHAPES = (
    (1, 1, 768, 96),
    (1, 7, 1024, 64),
    (1, 113, 588, 80),
    (2, 101, 160, 136),
    (1, 203, 144, 72),
    (1, 257, 96, 40),
)


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_shapes(shape, dtype, sm, arch, device, guarded):
    arch(sm)
    B, tokens, K, N = shape
    activation = ACTIVATIONS[tokens % 4]
    x = outlier_input(B, tokens, K, dtype=dtype, seed=tokens, device=device)
    weight, bias = parameters(K, columns_of(activation, N), dtype, device)
    check(x, weight, bias, activation)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_float32_bias_is_not_rounded(dtype, device, guarded):
    """Added to the float32 sums: 1.001 − 1 is not what bfloat16 and float16 make of it."""
    x, weight = torch.zeros(3, 64, dtype=dtype, device=device), torch.zeros(40, 64, dtype=dtype, device=device)
    bias = torch.full((40,), 1.001, device=device)
    minus_one = torch.full((3, 40), -1.0, dtype=dtype, device=device)
    out = ops.linear(x, weight, bias, None, minus_one, backend="triton")
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), torch.full_like(out, 0.001).float(), rtol=2**-8, atol=0)
    x, (weight, _) = outlier_input(2, 7, 64, dtype=dtype, seed=1, device=device), parameters(64, 40, dtype, device)
    check(x, weight, normal(40, dtype=torch.float32, seed=9, device=device), "gelu")
    check_norm(x, weight, normal(40, dtype=torch.float32, seed=9, device=device), None)


@pytest.mark.parametrize("way", ["deferred", "epilogue", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[2:], ids=str)
def test_linear_add_norm(shape, dtype, way, device, monkeypatch, guarded):
    """Both ways of putting the kernels together; the norm is that of s as it is stored."""
    monkeypatch.setenv("RADIO_FAST_LINEAR_ADD_NORM", way)
    if way == "triton":
        monkeypatch.delenv("RADIO_FAST_LINEAR_ADD_NORM")
    monkeypatch.setenv("RADIO_FAST_BACKEND", "triton")
    B, tokens, K, N = shape
    x = outlier_input(B, tokens, K, dtype=dtype, seed=tokens, device=device)
    weight, _ = parameters(K, N, dtype, device)
    bias = normal(N, dtype=torch.float32, seed=3, device=device)
    residual = outlier_input(B, tokens, N, dtype=dtype, seed=4, device=device)
    norm_weight, norm_bias = (normal(N, dtype=dtype, seed=seed, device=device) for seed in (5, 6))
    arguments = (x, weight, bias, residual, norm_weight, norm_bias, 1e-6, 0.7)
    s, normed = ops.linear_add_norm(*arguments)
    plain_s, _ = ops.linear_add_norm(*arguments, backend="reference")
    assert_within(s, truth_of(x, weight, bias, None, residual), plain_s)
    wide = torch.nn.functional.layer_norm(s.double(), (N,), norm_weight.double(), norm_bias.double(), 1e-6) * 0.7
    same = torch.nn.functional.layer_norm(s, (N,), norm_weight, norm_bias, 1e-6) * 0.7
    assert_within(normed, wide, same)


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ln_linear_shapes(shape, dtype, sm, arch, device, guarded):
    arch(sm)
    B, tokens, K, N = shape
    activation = ACTIVATIONS[(tokens + 1) % 4]
    x = outlier_input(B, tokens, K, dtype=dtype, seed=tokens, device=device)
    weight, bias = parameters(K, columns_of(activation, N), dtype, device)
    check_norm(x, weight, bias, activation)


@pytest.mark.parametrize("sm,dtype", [(90, torch.float16), (90, torch.bfloat16), (80, torch.float32)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("given", ["", "bias", "residual", "layer_scale", "bias residual layer_scale"])
def test_epilogues(given, activation, sm, dtype, arch, device, guarded):
    arch(sm)
    M, K, N = 70, 64, 56
    x = outlier_input(M, K, dtype=dtype, seed=3, device=device)
    weight, bias = parameters(K, columns_of(activation, N), dtype, device)
    residual = outlier_input(M, N, dtype=dtype, seed=4, device=device) if "residual" in given else None
    layer_scale = normal(N, dtype=dtype, seed=5, device=device) if "layer_scale" in given else None
    check(x, weight, bias if "bias" in given else None, activation, residual, layer_scale)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm_scale", [1.0, 0.37])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ln_linear_scale_and_no_bias(dtype, norm_scale, activation, device, guarded):
    x = 5 + outlier_input(70, 72, dtype=dtype, seed=3, device=device)
    weight, bias = parameters(72, columns_of(activation, 56), dtype, device)
    check_norm(x, weight, bias if norm_scale == 1.0 else None, activation, norm_scale)


def rows_of(sm: int) -> list:
    kinds = [(size, tma) for size in (2, 4) for tma in ((True, False) if 90 <= sm < 120 else (False,))]
    return [(sm, size, tma, row) for size, tma in kinds for row in configs.linear_rows(sm, size, tma)]


@pytest.mark.parametrize("sm,size,tma,row", rows_of(80) + rows_of(90) + rows_of(100), ids=str)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_every_tile(sm, size, tma, row, activation, arch, device, monkeypatch, guarded):
    """Each row of the table on a shape with ragged tiles in M, N and K, more tiles than programs."""
    arch(sm)

    def config(*arguments):
        assert arguments[5] is True  # tma
        return row._asdict() | {"BLOCK_N": row.block_n(activation), "tma": tma}

    monkeypatch.setattr(kernels, "linear_config", config)
    dtype = torch.float16 if size == 2 else torch.float32
    M, K, N = row.BLOCK_M + 3, row.BLOCK_K + 24, row.block_n(activation) + 8
    M, N = (M + row.BLOCK_M, N + row.block_n(activation)) if M * N < 2000 else (M, N)
    x = outlier_input(M, K, dtype=dtype, seed=9, device=device)
    weight, bias = parameters(K, columns_of(activation, N), dtype, device)
    check_norm(x, weight, bias, activation)
    if activation == "gelu":
        residual = outlier_input(M, N, dtype=dtype, seed=10, device=device)
        check(x, weight, bias, None, residual, normal(N, dtype=dtype, seed=11, device=device))


def test_groups_of_tiles_cover_the_output(device, guarded, arch):
    """More row tiles than a group holds, the last group narrower, more than one column of tiles."""
    arch(80)
    x = outlier_input(9 * 128 + 5, 32, dtype=torch.float16, seed=1, device=device)
    weight, bias = parameters(32, 256, torch.float16, device)
    check(x, weight, bias, None)


LAYOUTS = {
    "slice of rows": lambda x: x[:, 2:-1],
    "slice of columns": lambda x: x[..., 16:80],
    "slice of columns, not aligned": lambda x: x[..., 3:68],
    "one row": lambda x: x[1, 4],
    "rows far apart": lambda x: x[:, :1, :64],
    "transposed": lambda x: x[0, :32].T,
    "expanded": lambda x: x[:1, :1, :64].expand(2, 35, 64),
    "four axes": lambda x: x[:, :36].unflatten(1, (4, 9)),
    "permuted": lambda x: x.transpose(0, 1),
    "one column": lambda x: x[..., :1],
}


@pytest.mark.parametrize("sm,dtype", [(80, torch.bfloat16), (90, torch.float16)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, sm, dtype, arch, device, guarded):
    arch(sm)
    take = LAYOUTS[layout]
    x = take(outlier_input(2, 37, 96, dtype=dtype, seed=5, device=device))
    K, N = x.shape[-1], 48
    weight, bias = parameters(K, N, dtype, device)
    wide = normal(*x.shape[:-1], 2 * N, dtype=dtype, seed=7, device=device)
    residual, layer_scale = wide[..., ::2], wide.flatten()[: 2 * N : 2]
    if K > 1:
        check_norm(x, weight, bias, None)
    check(x, weight, bias, None, residual, layer_scale)
    check(x, weight.T.contiguous().T, bias.repeat(2)[::2], "gelu", wide[..., N:])
    padded = torch.cat([weight, weight], 1)
    check(x, padded[:, K:], None, None, wide[..., 1 : N + 1])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", [False, True])
def test_one_rounding(norm, activation, device, guarded):
    """Everything after the product happens in float32: the result is the float16 nearest to the truth."""
    M, K, N = 40, 64, 48
    x = outlier_input(M, K, dtype=torch.float16, seed=3, device=device)
    weight, bias = parameters(K, columns_of(activation, N), torch.float16, device)
    if norm:
        columns = (*statistics(x), weight[0] + 1, weight[1], 0.5)
        actual = ops.ln_linear(x, *columns, weight, bias, activation, backend="triton")
        truth = truth_of(normalised(x, *columns).half(), weight, bias, activation)
    else:
        last = (outlier_input(M, N, dtype=torch.float16, seed=4, device=device), weight[1:2, :N].flatten())
        actual = ops.linear(x, weight, bias, activation, *last, backend="triton")
        truth = truth_of(x, weight, bias, activation, *last)
    half_ulp = 2 ** (truth.abs().clamp(min=2.0**-14).log2().floor() - 11)
    assert ((actual.double() - truth).abs() <= 1.001 * half_ulp + 2e-5).all()


def test_what_descriptors_read():
    """TMA takes starts and strides of whole 16 bytes, and rows that don't overlap."""
    x = torch.zeros(8, 96, dtype=torch.float16)
    reads = kernels._tma_reads
    assert reads(x) and reads(x[:, 8:]) and reads(x[::2, :5])
    assert not reads(x[:, 4:]) and not reads(x.flatten()[:84].view(7, 12)) and not reads(x.T)
    assert not reads(x[:1].expand(8, 96)) and reads(x.float()[:, 4:])


def test_strided_statistics(device, guarded):
    x = outlier_input(2, 19, 64, dtype=torch.float16, seed=5, device=device)
    weight, bias = parameters(64, 48, torch.float16, device)

    def strided(x):
        return tuple(torch.stack([s, s + 9], -1)[..., 0] for s in statistics(x))

    check_norm(x, weight, bias, "gelu", statistics_of=strided)


@pytest.mark.parametrize("shape", [(0, 5, 64), (3, 0, 64), (0, 64)], ids=str)
def test_no_rows(shape, device):
    x = torch.empty(shape, dtype=torch.float16, device=device)
    weight, bias = parameters(64, 32, torch.float16, device)
    assert ops.linear(x, weight, bias, backend="triton").shape == (*shape[:-1], 32)
    assert ops.linear(x, weight[:0], bias[:0], backend="triton").shape == (*shape[:-1], 0)


@pytest.mark.filterwarnings("ignore:overflow")
def test_gelu_is_the_exact_one(device):
    """float32's best over all magnitudes, where x·1 reaches the epilogue as it is: no tanh, no cut-off."""
    far = torch.tensor([-1e30, -1e4, -100.0, 0.0, 100.0, 1e4, 1e30])
    y = torch.cat([torch.linspace(-12, 12, 2001), torch.linspace(-0.01, 0.01, 101), far])
    actual = ops.linear(y[:, None].to(device), torch.ones(1, 1, device=device), None, "gelu", backend="triton")
    exact = y.double() * torch.special.ndtr(y.double())
    errors = (actual[:, 0].cpu().double() - exact).abs(), (torch.nn.functional.gelu(y).double() - exact).abs()
    for limit, tolerance in ((12, 3e-7), (1, 1.5e-7), (1e-2, 2e-9)):
        error, of_torch = (e[y.abs() <= limit].max() for e in errors)
        assert error <= tolerance, f"|y| ≤ {limit}: {error}, torch's {of_torch}"
    assert torch.equal(actual[-7:, 0].cpu(), far.clamp(min=0))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_backend_is_the_reference(dtype, activation, device, without_amx):
    x = outlier_input(2, 5, 32, dtype=dtype, seed=1, device=device)
    weight, bias = parameters(32, 24, dtype, device)
    norm = (*statistics(x), bias.new_ones(32), bias.new_zeros(32), 0.5)
    for backend in ("reference", "auto") if device == "cpu" else ("reference",):
        actual = ops.linear(x, weight, bias, activation, backend=backend)
        assert torch.equal(actual, linear_ref(x, weight, bias, activation))
        actual = ops.ln_linear(x, *norm, weight, bias, activation, backend=backend)
        assert torch.equal(actual, ln_linear_ref(x, *norm, weight, bias, activation))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_opcheck(activation, device):
    dtype = torch.float16
    wide = outlier_input(2, 9, 80, dtype=dtype, seed=1, device=device)
    x = wide[:, 1:, 16:]
    weight, bias = parameters(64, columns_of(activation, 24), dtype, device)
    residual, layer_scale = wide[:, :8, :24], normal(24, dtype=dtype, seed=2, device=device)
    torch.library.opcheck(torch.ops.radio_fast.linear.default, (x, weight, bias, activation, residual, layer_scale))
    torch.library.opcheck(torch.ops.radio_fast.linear.default, (x, weight, None, activation, None, None))
    norm = (*statistics(x), weight[0], weight[1], 0.5)
    torch.library.opcheck(torch.ops.radio_fast.ln_linear.default, (x, *norm, weight, bias, activation))


X, W, B, HALF = (torch.zeros(shape, dtype=torch.float16) for shape in ((3, 8), (6, 8), (6,), (3,)))
BAD = {
    "dtype must be float16, bfloat16 or float32, got torch.float64": (X.double(), W.double(), B.double()),
    "weight is torch.float32, expected torch.float16": (X, W.float(), B),
    "bias is torch.bfloat16, expected torch.float16": (X, W, B.bfloat16()),
    r"must agree in K, got \(3, 8\) and \(6, 7\)": (X, W[:, :7], B),
    r"must agree in K, got \(3, 8\) and \(8,\)": (X, W[0], None),
    "K must be at least 1, got 0": (X[:, :0], W[:, :0], B),
    r"bias must have shape \(6,\), got \(5,\)": (X, W, B[:5]),
    "even number of weight rows, got 5": (X, W[:5], B[:5], "swiglu"),
    r"residual must have shape \(3, 6\), got \(6,\)": (X, W, B, None, B),
    r"residual must have shape \(3, 3\), got \(3, 6\)": (X, W, B, "swiglu", X[:, :6]),
    "residual is torch.float32": (X, W, B, None, X[:, :6].float()),
    r"layer_scale must have shape \(6,\), got \(1,\)": (X, W, B, None, None, B[:1]),
    r"layer_scale must have shape \(3,\), got \(6,\)": (X, W, B, "swiglu", None, B),
    "layer_scale is torch.bfloat16": (X, W, B, None, None, B.bfloat16()),
    "bias is on meta, expected cpu": (X, W, B.to("meta")),
    "activation must be one of None, 'gelu', 'silu', 'swiglu', got 'relu'": (X, W, B, "relu"),
    "no backward": (X.float().requires_grad_(), W.float(), B.float()),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises(ValueError, match=message):
        ops.linear(*BAD[message], backend="triton")


S, C = torch.zeros(3), torch.zeros(8, dtype=torch.float16)
BAD_NORM = {
    r"mean and rstd must have shape \(3,\)": (X, S[:2], S, C, C, 1.0, W, B),
    r"mean and rstd must have shape": (X, S, S[:, None], C, C, 1.0, W, B),
    "mean and rstd must be float32, got torch.float16 and torch.float32": (X, S.half(), S, C, C, 1.0, W, B),
    r"norm_weight and norm_bias must have shape \(8,\)": (X, S, S, C[:7], C, 1.0, W, B),
    "norm_bias is torch.float32, expected torch.float16": (X, S, S, C, C.float(), 1.0, W, B),
    "must agree in K": (X, S, S, C, C, 1.0, W[:, :7], B),
}


@pytest.mark.parametrize("message", BAD_NORM)
def test_bad_norm_input(message):
    with pytest.raises(ValueError, match=message):
        ops.ln_linear(*BAD_NORM[message], backend="triton")


@pytest.mark.parametrize("sm", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("size", [2, 4])
def test_configurations_fit_the_shape(sm, size):
    def tile(M: int, N: int, activation: str | None = None) -> tuple[int, int]:
        config = configs.linear_config(sm, size, M, N, activation, True, norm=False)
        assert config["tma"] == (sm in (90, 100))
        return config["BLOCK_M"], config["BLOCK_N"]

    assert tile(1, 1280)[0] == tile(16, 1280)[0] == 16
    assert tile(17, 1280)[0] == tile(64, 1280)[0] == 64
    many = tile(64 * 206, 5120)
    assert math.prod(many) == max(row.BLOCK_M * row.BLOCK_N for row in configs.linear_rows(sm, size, True))
    assert math.prod(tile(206, 1280)) < math.prod(many), "one image must not leave most SMs idle"
    assert tile(64 * 206, 4096, "swiglu") == (many[0], many[1] // 2)


def test_compile_cases_name_every_parameter():
    for sm in (75, 80, 90, 120):
        cases = kernels.compile_cases(sm)
        assert bool(cases) == (sm >= 80)
        for case in cases:
            assert {*case.signature, *case.constexprs} == {*case.fn.arg_names}
        assert len({(case.op, case.label) for case in cases}) == len(cases)
