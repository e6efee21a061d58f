"""int8 linear layers: quantisation to the bit, exact sums, every size, what is refused, the plain form."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F

from radio_fast import native_cpu, ops
from radio_fast.ops.linear_int8 import LINEAR_INT8, TINY, linear_int8_ref
from tests.numerics import assert_within

REASON = native_cpu.why_not_native_cpu()
needs_amx = pytest.mark.skipif(REASON is not None, reason=str(REASON))
BF16 = torch.bfloat16


def random(*shape: int, seed: int = 0, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights(N: int, K: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(plain, packed, scale)."""
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randint(-127, 128, (N, K), dtype=torch.int8, generator=generator)
    plain[0], plain[-1] = 127, -127
    return plain, ops.pack_int8(plain), (torch.rand(N, generator=generator) + 0.5) / (100 * K**0.5)


def rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula, value by value, in float32."""
    largest = x.float().abs().max(dim=-1, keepdim=True).values
    return (x.float() * torch.div(torch.full_like(largest, 127), largest)).round(), largest / 127


def truth(x, plain, scale, bias=None, activation=None, residual=None):
    q, row = rounded(x)
    y = (q.double() @ plain.double().T) * row.double() * scale.double()
    y = y if bias is None else y + bias.double()
    y = F.gelu(y) if activation == "gelu" else y
    return y if residual is None else y + residual.double()


def check(x, plain, packed, scale, bias=None, activation=None, residual=None):
    others = bias, activation, residual
    actual = native_cpu.linear_int8(x, packed, scale, *others)
    assert_within(actual, truth(x, plain, scale, *others), linear_int8_ref(x, packed, scale, *others))


def guard(monkeypatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    made = []

    def new_empty(self, shape, **options):
        size = torch.Size(shape).numel()
        block = torch.full((size + 256,), float("nan"), dtype=self.dtype)
        made.append((block, block[128 : 128 + size].view(shape)))
        return made[-1][1]

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    return made


@pytest.mark.parametrize("N, K", [(1, 1), (32, 64), (33, 65), (95, 700)])
def test_packing_keeps_the_weight(N, K):
    plain, packed, _ = weights(N, K)
    assert packed.shape == (-(-N // 32), -(-K // 64), 2, 16, 64) and packed.is_contiguous()
    assert torch.equal(ops.unpack_int8(packed, N, K), plain)
    assert packed.count_nonzero() == plain.count_nonzero()
    for n, k in ((0, 0), (N - 1, K - 1), (N // 2, K // 3)):
        assert packed[n // 32, k // 64, n // 16 % 2, k % 64 // 4, 4 * (n % 16) + k % 4] == plain[n, k]


def test_quantised_rows():
    x = torch.tensor(
        [[1.0, -2.0, 0.5, 2.0], [0, 0, 0, 0], [TINY / 2, 0, 0, 0], [1, torch.inf, 2, 3], [1, torch.nan, 2, 3]]
    )
    q, scale = ops.quantise(x)
    assert q.tolist() == [[64, -127, 32, 127], *[[0] * 4] * 4]
    assert scale[:3, 0].tolist() == [torch.tensor(2 / 127).item(), 0, 0] and scale[3:].isnan().all()
    x = random(50, 300) * torch.logspace(-25, 25, 50).unsqueeze(1)
    q, scale = ops.quantise(x.to(BF16))
    expected = rounded(x.to(BF16))
    assert torch.equal(q, expected[0]) and torch.equal(scale, expected[1]) and q.abs().amax(1).eq(127).all()


@needs_amx
def test_the_kernel_quantises_to_the_bit():
    """A weight of one 1 a row leads single values through; scales of rows without rounding: largest 127 · 2ⁿ."""
    x = random(64, 128) * 8
    x[:, 5] = 127 * 2.0 ** torch.arange(-32, 32)
    x = torch.where(x.abs() > x[:, 5:6], x[:, 5:6], x)
    packed = ops.pack_int8(torch.eye(128, dtype=torch.int8))
    q, scale = rounded(x)
    actual = native_cpu.linear_int8(x, packed, torch.ones(128), None, None, None)
    assert torch.equal(actual, (q * scale).to(BF16)) and q.unique().numel() > 150
    ties = torch.tensor([127, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 126.5]).to(BF16).repeat(3, 16)
    actual = native_cpu.linear_int8(ties, packed, torch.ones(128), None, None, None)
    assert actual[0, :8].tolist() == [127, 0, 2, 2, 0, -2, -126, 126]


@needs_amx
@pytest.mark.parametrize("M, N, K", [(17, 40, 64), (33, 96, 1600), (5, 32, 4304)])
def test_sums_are_exact(M, N, K):
    """Below 2⁸ bfloat16 has every whole number: sums are brought there by a last column that takes the rest away."""
    generator = torch.Generator().manual_seed(0)
    plain = torch.randint(-127, 128, (N, K), dtype=torch.int8, generator=generator)
    x = torch.randint(-127, 128, (M, K), generator=generator).to(BF16)
    x[:, 0] = 127
    sums = x.double() @ plain.double().T
    row = int(M // 2)
    bias = -(sums[row] - sums[row] % 128).float()  # exact in float32
    actual = native_cpu.linear_int8(x, ops.pack_int8(plain), torch.ones(N), bias, None, None)
    assert sums.abs().max() > 1 << 15
    assert torch.equal(actual[row].double(), sums[row] % 128)


@needs_amx
@pytest.mark.parametrize("M", (1, 15, 16, 17, 31, 33, 64, 206))
@pytest.mark.parametrize("N, K", [(1, 1), (31, 63), (33, 65), (96, 800), (160, 1600)])
def test_every_size(M, N, K, monkeypatch):
    made = guard(monkeypatch)
    check(random(M, K), *weights(N, K), random(N, seed=2, dtype=torch.float32), "gelu", random(M, N, seed=3))
    block, result = made[0]
    assert block[:128].isnan().all() and block[-128:].isnan().all() and not result.isnan().any()


@needs_amx
@pytest.mark.parametrize("activation", (None, "gelu"))
@pytest.mark.parametrize("residual", (False, True))
@pytest.mark.parametrize("bias", (None, torch.float32, BF16))
def test_what_follows_the_product(activation, residual, bias, threads):
    shift = None if bias is None else random(200, seed=2, dtype=bias)
    x = random(2, 103, 768)
    check(x, *weights(200, 768), shift, activation, random(2, 103, 200, seed=3) if residual else None)


@needs_amx
def test_many_rows_in_blocks_of_them(threads):
    """More of x than half of L2: each thread makes its own part int8, here of an odd number of tiles."""
    for M in (410, 850):
        check(random(M, 4096), *weights(320, 4096))


@needs_amx
def test_many_rows_in_groups_of_panels(threads):
    """Several groups in a block of x of an odd number of 32 tokens: what one leaves to be finished lies elsewhere."""
    bias = random(600, seed=2, dtype=torch.float32)
    for M in (900, 945):
        check(random(M, 1601), *weights(600, 1601), bias, "gelu", random(M, 600, seed=3))


@needs_amx
def test_outlier_channels():
    x = random(50, 256)
    x[:, 7] *= 200
    check(x, *weights(96, 256))


@needs_amx
@pytest.mark.parametrize("bad", (float("nan"), float("inf"), -float("inf")))
def test_what_is_no_number_stays_in_its_row(bad):
    _, packed, scale = weights(48, 200)
    x = random(40, 200)
    x[3, 195], x[7], x[9], x[11] = bad, 0, 2.0**-110, 3e30
    for run in (linear_int8_ref, native_cpu.linear_int8):
        out = run(x, packed, scale, torch.ones(48), "gelu", torch.ones(40, 48, dtype=BF16))
        assert out[3].isnan().all() and not out[:3].isnan().any() and not out[4:].isnan().any()
        assert out[7].unique().numel() == 1 and torch.equal(out[7], out[9]), "rows of zeros give act(bias) + residual"
        assert torch.equal(out[7, 0], (F.gelu(torch.ones(())) + 1).to(BF16))


@needs_amx
def test_strided_arguments_and_nothing_read_beyond_them():
    def inside(*shape, seed):
        block = torch.full((shape[0] + 2, shape[1] + 64), float("nan"), dtype=BF16)
        block[1:-1, 32:-32] = random(*shape, seed=seed)
        return block[1:-1, 32:-32]

    plain, packed, scale = weights(70, 100)
    bias = torch.full((74,), float("nan"))
    bias[2:-2] = 1
    wide = torch.full((140,), float("nan"))
    wide[::2] = scale
    check(inside(17, 100, seed=0), plain, packed, wide[::2], bias[2:-2], None, inside(17, 70, seed=2))
    check(random(40, 3, 100)[:, 1], plain, packed, scale)
    check(random(9, 200)[:, ::2], plain, packed, scale)
    check(random(1, 100).expand(5, 100), plain, packed, scale)


@needs_amx
def test_nothing_in_nothing_out():
    _, packed, scale = weights(8, 64)
    assert native_cpu.linear_int8(random(0, 64), packed, scale, None, None, None).shape == (0, 8)
    empty = ops.pack_int8(torch.empty(0, 64, dtype=torch.int8))
    assert ops.linear_int8(random(3, 64), empty, torch.empty(0), None).shape == (3, 0)


@needs_amx
def test_the_same_from_several_threads_and_with_any_number():
    _, packed, scale = weights(300, 256)
    x, before, results = random(206, 256), torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(native_cpu.linear_int8(x, packed, scale, None, "gelu", None))
    torch.set_num_threads(before)

    def worker():
        for _ in range(10):
            results.append(native_cpu.linear_int8(x, packed, scale, None, "gelu", None))

    workers = [threading.Thread(target=worker) for _ in range(3)]
    [one.start() for one in workers]
    [one.join() for one in workers]
    assert len(results) == 33 and all(torch.equal(result, results[0]) for result in results)


# -- the op -----------------------------------------------------------------------------------------------------


@needs_amx
def test_auto_takes_the_kernel_in_bfloat16_alone(calls):
    _, packed, scale = weights(40, 64)
    ops.linear_int8(random(3, 64), packed, scale, None)
    assert calls == ["rf_cpu_linear_int8"]
    ops.linear_int8(random(3, 64, dtype=torch.float32), packed, scale, None)
    ops.linear_int8(random(3, 64), packed, scale, None, backend="reference")
    torch.vmap(lambda x: ops.linear_int8(x, packed, scale, None))(random(3, 2, 64))
    assert len(calls) == 1
    with pytest.raises(ValueError, match=r"dtype must be torch\.bfloat16, got torch\.float32"):
        ops.linear_int8(random(3, 64, dtype=torch.float32), packed, scale, None, backend="cpu")


def test_without_amx_the_plain_form_runs(calls, without_amx):
    plain, packed, scale = weights(40, 64)
    x = random(30, 64)
    out = ops.linear_int8(x, packed, scale, None)
    assert_within(out, truth(x, plain, scale), out.double().to(BF16))
    assert not calls
    with pytest.raises(ValueError, match="takes AMX away"):
        ops.linear_int8(x, packed, scale, None, backend="cpu")


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, BF16))
def test_the_plain_form(dtype):
    plain, packed, scale = weights(40, 300)
    x, residual = random(2, 9, 300, dtype=dtype), random(2, 9, 40, seed=3, dtype=dtype)
    bias = random(40, seed=2, dtype=torch.float32)
    expected = truth(x, plain, scale, bias, "gelu", residual)
    out = linear_int8_ref(x, packed, scale, bias, "gelu", residual)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected.to(dtype), rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)
    with torch.autocast("cpu", BF16):
        assert torch.equal(linear_int8_ref(x, packed, scale, bias, "gelu", residual), out)


@needs_amx
def test_the_operator_is_what_torch_expects():
    _, packed, scale = weights(40, 64)
    arguments = (random(3, 64), packed, scale, random(40, dtype=torch.float32), "gelu", random(3, 40))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.radio_fast.linear_int8_cpu, arguments, test_utils=tests)
    assert LINEAR_INT8.usable(torch.device("cpu"), BF16) == {"cpu": None, "reference": None}


def test_what_is_refused():
    _, packed, scale = weights(40, 64)
    x = random(3, 64)
    for arguments, reason in (
        ((x, packed, scale, None, "silu"), "activation must be None or 'gelu', got 'silu'"),
        ((x, packed, scale, None, "swiglu"), "activation must be None or 'gelu', got 'swiglu'"),
        ((x.double(), packed, scale, None), "x must be bfloat16, float16 or float32, got torch.float64"),
        ((x, packed.short(), scale, None), "weight must be int8 and scale float32, got torch.int16"),
        ((x, packed, scale.double(), None), "weight must be int8 and scale float32"),
        ((x[:, :0], packed, scale, None), r"K in 1…131072, got \(3, 0\)"),
        ((x[0, 0], packed, scale, None), r"got \(\)"),
        ((random(1, 131073), packed, scale, None), r"K in 1…131072, got \(1, 131073\)"),
        ((x, packed, scale[None], None), r"scale must be \(N\), got \(1, 40\)"),
        ((x, packed[0], scale, None), r"weight must be pack_int8 of \(40, 64\), of shape \(2, 1, 2, 16, 64\)"),
        ((random(3, 65), packed, scale, None), r"weight must be pack_int8 of \(40, 65\)"),
        ((x, packed, scale, scale[:3]), r"bias must be \(40\)"),
        ((x, packed, scale, scale.half()), r"bias must be \(40\), float32 or torch.bfloat16"),
        ((x, packed, scale, None, None, x), r"residual must be \(3, 40\)"),
        ((x.requires_grad_(), packed, scale, None), "linear_int8 has no gradient"),
    ):
        with pytest.raises(ValueError, match=reason):
            ops.linear_int8(*arguments)
    if REASON is None:
        with pytest.raises(ValueError, match=r"K must lie in 1\.\.\.131072"):
            native_cpu.linear_int8(x[:, :0].detach(), packed, scale, None, None, None)
