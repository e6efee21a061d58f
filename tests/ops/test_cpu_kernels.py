"""The CPU kernels on AMX, in bfloat16 and in float32: values, odd sizes, strides, memory around them, threads."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
import torch.nn.functional as F

from radio_fast import native_cpu, ops
from tests.numerics import assert_within
from tests.ops.truth import attention_truth

REASON = native_cpu.why_not_native_cpu()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

BF16 = torch.bfloat16
ROWS = (1, 15, 16, 17, 31, 33, 64, 206)
FEW = 383  # rows of bfloat16, up to which they meet the weight panel after panel; more of them meet blocks of it
OUTLIER = 200.0
DTYPE = BF16


@pytest.fixture(params=(BF16, torch.float32), ids=("bfloat16", "float32"), autouse=True)
def dtype(request, monkeypatch) -> torch.dtype:
    """What `random` gives."""
    monkeypatch.setattr(sys.modules[__name__], "DTYPE", request.param)
    return request.param


def random(*shape: int, seed: int = 0, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype or DTYPE)


def guarded(monkeypatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Every result is made inside a larger poisoned block; (block, result) of each."""
    made = []

    def new_empty(self, shape, **options):
        size = torch.Size(shape).numel()
        block = torch.full((size + 256,), float("nan"), dtype=options.get("dtype", self.dtype))
        result = block[128 : 128 + size].view(shape)
        made.append((block, result))
        return result

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    return made


def assert_guarded(made: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    assert made
    for block, result in made:
        assert block[:128].isnan().all() and block[-128:].isnan().all(), "something outside the result was written"
        assert not result.isnan().any(), "part of the result was not written"


def linear_truth(x, weight, bias, activation=None, residual=None):
    y = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    y = F.gelu(y) if activation == "gelu" else y
    if activation == "swiglu":
        a, b = y.chunk(2, -1)
        y = F.silu(a) * b
    return y if residual is None else y + residual.double()


def check_linear(x, weight, bias, activation=None, residual=None):
    """Of a few rows also eight times as many, in as many calls: of few numbers torch's error may be next to none."""
    xs = [x, *(x.roll(i, -1) for i in range(1, 8 if x[..., 0].numel() < 16 else 1))]
    actual = torch.stack([native_cpu.linear(x, weight, bias, activation, residual) for x in xs])
    # Of odd strides torch's own product reads beyond a row.
    plain = [
        ops.linear(x.contiguous(), weight.contiguous(), bias, activation, residual, backend="reference") for x in xs
    ]
    truth = [linear_truth(x, weight, bias, activation, residual) for x in xs]
    assert_within(actual, torch.stack(truth), torch.stack(plain))


@pytest.mark.parametrize("M", ROWS)
@pytest.mark.parametrize("N, K", [(1, 32), (31, 64), (33, 96), (64, 1), (33, 50), (96, 800), (160, 1007)])
def test_linear_of_every_size(M, N, K, monkeypatch):
    made = guarded(monkeypatch)
    x, weight, bias = random(M, K), random(N, K, seed=1) / K**0.5, random(N, seed=2, dtype=torch.float32)
    check_linear(x, weight, bias, "gelu", random(M, N, seed=3))
    assert_guarded(made)


@pytest.mark.parametrize("M", ROWS)
@pytest.mark.parametrize("N, K", [(2, 32), (62, 50), (66, 96), (130, 800)])
def test_swiglu_of_every_size(M, N, K, monkeypatch):
    made = guarded(monkeypatch)
    weight = random(N, K, seed=1) / K**0.5
    check_linear(random(M, K), weight, random(N, seed=2, dtype=torch.float32), "swiglu")
    check_linear(random(M, K), weight, None, "swiglu")
    assert_guarded(made)


def test_silu_far_out(dtype):
    """x · σ(x) to the ends, and what is not finite."""
    x = torch.linspace(-200, 200, 64 * 32).view(64, 32).to(dtype)
    weight = torch.cat([torch.eye(32), torch.zeros(32, 32)]).to(dtype)
    ones = torch.cat([torch.zeros(32), torch.ones(32)])
    actual = native_cpu.linear(x, weight, ones, "swiglu", None)
    assert_within(actual, F.silu(x.double()), F.silu(x))
    for value in (float("nan"), float("inf"), float("-inf")):
        ones[:32] = value
        plain = ops.linear(x, weight, ones, "swiglu", backend="reference")
        actual = native_cpu.linear(x, weight, ones, "swiglu", None)
        assert torch.equal(actual.isnan(), plain.isnan()) and torch.equal(actual.isinf(), plain.isinf())


@pytest.mark.parametrize("activation", (None, "gelu"))
@pytest.mark.parametrize("residual", (False, True))
@pytest.mark.parametrize("bias", (None, torch.float32, BF16))
def test_linear_and_what_follows_it(activation, residual, bias, threads):
    x, weight = random(2, 103, 768), random(200, 768, seed=1) / 28
    shift = None if bias is None else random(200, seed=2, dtype=bias)
    check_linear(x, weight, shift, activation, random(2, 103, 200, seed=3) if residual else None)


def test_linear_of_rows_in_blocks_of_them(threads):
    """More of x than half of L2: each thread rearranges its own part."""
    check_linear(random(350, 4096), random(64, 4096, seed=1) / 64, None)


@pytest.mark.parametrize("dtype", (BF16,), indirect=True)
@pytest.mark.parametrize("M", (384, 385, 401, 431, 897))
@pytest.mark.parametrize("N, K", [(2, 32), (32, 1), (34, 50), (66, 800), (62, 1050), (130, 2031)])
def test_linear_of_many_rows(M, N, K, monkeypatch, threads):
    """To the bit what few of them give: the same products are added up in the same order."""
    made = guarded(monkeypatch)
    x, residual, bias = random(M, K), random(M, N, seed=3), random(N, seed=2, dtype=torch.float32)
    weight = random(N, K, seed=1) / K**0.5
    check_linear(x, weight, bias, "gelu", residual)
    for activation, shift, others in (
        *((None, None, None), (None, bias, residual), ("gelu", bias, None), ("gelu", None, None)),
        *(("swiglu", bias, None), ("swiglu", None, None)),
    ):
        together = native_cpu.linear(x, weight, shift, activation, others)
        parts = [
            native_cpu.linear(rows, weight, shift, activation, None if others is None else others[m : m + FEW])
            for m, rows in zip(range(0, M, FEW), x.split(FEW), strict=True)
        ]
        assert torch.equal(together, torch.cat(parts))
    assert_guarded(made)


@pytest.mark.parametrize("dtype", (BF16,), indirect=True)
def test_linear_of_many_rows_in_several_blocks_of_the_weight(threads):
    """More of it than half of L2, and more panels than a block has; threads that have none take part in the others'."""
    check_linear(random(400, 3000), random(300, 3000, seed=1) / 55, None, None, random(400, 300, seed=2))
    check_linear(random(900, 40), random(1800, 40, seed=1) / 6, random(1800, seed=3, dtype=torch.float32), "gelu")


@pytest.mark.parametrize("dtype", (BF16,), indirect=True)
@pytest.mark.parametrize("N, K", [(1, 32), (33, 96), (32, 50), (96, 800), (70, 2031)])
@pytest.mark.parametrize("M", (206, FEW + 18))
def test_linear_rounds_a_float32_weight_as_it_reads(M, N, K, monkeypatch, threads):
    made = guarded(monkeypatch)
    x, residual = random(M, K), random(M, N, seed=3)
    block = torch.full((N + 2, K + 64), float("nan"))
    block[1:-1, 32:-32] = random(N, K, seed=1, dtype=torch.float32) / K**0.5
    weight = block[1:-1, 32:-32]
    weight[0, :4] = torch.tensor([1.00390625, 1.01171875, -3.4e38, 1e-42])  # ties to even, to infinity, a denormal
    x[:, 2] = torch.where(x[:, 2] == 0, 1, x[:, 2])
    actual = native_cpu.linear(x, weight, None, "gelu", residual)
    assert torch.equal(actual[:, 1:], native_cpu.linear(x, weight.to(BF16), None, "gelu", residual)[:, 1:])
    plain, rounded = (native_cpu.linear(x, w, None, None, None) for w in (weight, weight.to(BF16)))
    assert torch.equal(plain, rounded) and plain[:, 0].isinf().all()
    assert_guarded(made[1:])


def test_linear_with_an_outlier_channel():
    x = random(50, 256)
    x[:, 7] *= OUTLIER
    check_linear(x, random(96, 256, seed=1) / 16, random(96, seed=2, dtype=torch.float32))


def test_gelu_far_out(dtype):
    """x · Φ(x) to the ends of what a layer gives: a diagonal weight leads values through unchanged."""
    x = torch.linspace(-40, 40, 64 * 32).view(64, 32).to(dtype)
    actual = native_cpu.linear(x, torch.eye(32, dtype=dtype), None, "gelu", None)
    assert_within(actual, F.gelu(x.double()), F.gelu(x))
    assert (actual[x < -6].abs() < 1e-4).all()


def test_linear_of_strided_arguments():
    x, weight = random(40, 3, 128)[:, 1], random(70, 256, seed=1)[:, ::2] / 11
    check_linear(x, weight, random(70, 2, seed=2, dtype=torch.float32)[:, 0])
    wide, residual = random(70, 320, seed=1)[:, 32:160] / 11, random(40, 140, seed=3)[:, :70]
    check_linear(x, wide, None, None, residual)
    check_linear(x.T.contiguous().T, wide, None)
    check_linear(random(1, 128).expand(5, 128), wide, None)


def test_linear_reads_nothing_beyond_its_arguments(dtype):
    """NaNs around x, weight, bias and residual would show in the sums."""

    def inside(*shape, seed):
        block = torch.full((shape[0] + 2, shape[1] + 64), float("nan"), dtype=dtype)
        block[1:-1, 32:-32] = random(*shape, seed=seed)
        return block[1:-1, 32:-32]

    bias = torch.full((39,), float("nan"))
    bias[2:-2] = 1
    for K in (96, 79):
        weight = inside(35, K, seed=1)
        weight /= 9
        for M in (17, FEW + 16):
            check_linear(inside(M, K, seed=0), weight, bias[2:-2], "gelu", inside(M, 35, seed=2))
            check_linear(inside(M, K, seed=0), weight[1:], bias[2:-3], "swiglu")


def test_gelu_of_what_vanishes(dtype):
    """Far below zero the result is next to zero, however far, not a millionth of x."""
    x = torch.tensor([-1e3, -1e30, -3e38]).view(3, 1).to(dtype)
    actual = native_cpu.linear(x, torch.ones(1, 1, dtype=dtype), None, "gelu", None)
    assert (actual.abs() < 1e-5).all()
    assert native_cpu.linear(x * torch.nan, torch.ones(1, 1, dtype=dtype), None, "gelu", None).isnan().all()


@pytest.mark.parametrize("M", (40, FEW + 1))
def test_a_nan_stays_in_its_row(M):
    x = random(M, 64)
    x[3, 5] = float("nan")
    out = native_cpu.linear(x, random(48, 64, seed=1), None, None, None)
    assert out[3].isnan().all() and not out[:3].isnan().any() and not out[4:].isnan().any()


@pytest.mark.parametrize("dtype", (torch.float32,), indirect=True)
def test_all_of_float32_s_bits():
    """Values that bfloat16 would round, tiny and huge ones; a sum whose large products take each other away."""
    x = torch.tensor([[1 + 2**-23, 1 - 2**-24, -3.3e38, 1.7e-33, 16777215.0]])
    actual = native_cpu.linear(x, torch.eye(5), None, None, None)
    torch.testing.assert_close(actual, x, rtol=2**-24, atol=0)
    large = random(40, 64) * 1e4
    x, weight = torch.cat([large, -large, random(40, 32, seed=1)], 1), random(50, 64, seed=2)
    check_linear(x, torch.cat([weight, weight, random(50, 32, seed=3)], 1), None)


@pytest.mark.parametrize("bad", (float("inf"), float("-inf"), float("nan")))
def test_what_is_not_finite_stays_so(bad):
    x, weight = random(20, 70), random(40, 70, seed=1)
    x[3, 5] = bad
    out = native_cpu.linear(x, weight, None, "gelu", None)
    assert not out[3][weight[:, 5] * bad > 0].isfinite().any() and out[:3].isfinite().all() and out[4:].isfinite().all()


def test_nothing_in_nothing_out():
    assert native_cpu.linear(random(0, 64), random(8, 64), None, None, None).shape == (0, 8)
    assert native_cpu.linear(random(3, 64), random(0, 64), None, None, None).shape == (3, 0)
    assert native_cpu.attention(random(0, 5, 96), 2).shape == (0, 5, 32)
    assert native_cpu.attention(random(2, 0, 96), 2).shape == (2, 0, 32)
    assert native_cpu.layer_norm(random(0, 8), None, random(8), None, 1e-6, 1.0)[1].shape == (0, 8)


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("offset", (0, 8))
def test_memory_that_has_been_given_back(which, offset):
    """As by sharded training; a bias or residual would else count as none."""
    shapes = (4, 32), (8, 32), (8,), (4, 8)
    made = [random(offset + torch.Size(shape).numel())[offset:].view(shape) for shape in shapes]
    made[2] = torch.ones(offset + 8)[offset:]
    made[which].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="has been given back"):
        native_cpu.linear(made[0], made[1], made[2], None, made[3])


def test_what_the_library_refuses():
    with pytest.raises(ValueError, match="K must be at least 1, got 0"):
        native_cpu.linear(random(2, 0), random(8, 0), None, None, None)
    with pytest.raises(ValueError, match="SwiGLU takes no residual"):
        native_cpu.linear(random(2, 32), random(8, 32), None, "swiglu", random(2, 4))
    with pytest.raises(ValueError, match="head dim must be a multiple of 8 up to 256, got 4"):
        native_cpu.attention(random(1, 2, 12), 1)
    with pytest.raises(ValueError, match="windows of 3 do not tile"):
        native_cpu.attention(random(1, 16, 96), 2, None, (4, 4, 3))


# -- attention --------------------------------------------------------------------------------------------------


def check_attention(qkv, heads, lengths=None, window=None):
    starts = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0).int()
    actual = native_cpu.attention(qkv, heads, starts, window)
    plain = ops.attention(qkv, heads, starts, None, window, backend="reference")
    assert_within(actual, attention_truth(qkv, heads, lengths, window), plain)


@pytest.mark.parametrize("N", (1, 15, 16, 17, 31, 33, 206, 257, 300))
@pytest.mark.parametrize("d", (8, 16, 32, 64, 72, 80, 96, 128))
def test_attention_of_every_size(N, d, monkeypatch):
    made = guarded(monkeypatch)
    check_attention(random(2, N, 3 * 2 * d), 2)
    assert_guarded(made[:1])


def test_attention_of_a_long_image(threads):
    """Five blocks of keys, in which the largest score moves on, and queries split among the threads."""
    qkv = random(1, 1034, 3 * 64)
    qkv[:, :, 64:128] *= torch.linspace(0.2, 4, 1034).view(1, -1, 1)
    check_attention(qkv, 1)


def test_attention_of_large_scores():
    """The softmax is nearly one token's weight, and a shift of all scores changes nothing."""
    qkv = random(1, 70, 3 * 64)
    qkv[..., 0] = 30
    qkv[..., 64] = OUTLIER
    check_attention(qkv, 1)
    check_attention(random(1, 300, 3 * 32) * 8, 1)


@pytest.mark.parametrize("bad", (float("nan"), float("inf"), -float("inf")))
def test_what_is_no_number_in_attention_is_seen(bad):
    """In a query it is in that one's result alone, a NaN in a key in all of its head's; also beyond 256 keys."""
    for N in (20, 300):
        qkv = random(1, N, 3 * 2 * 32).abs()
        qkv[0, N - 1, 0] = bad
        out = native_cpu.attention(qkv, 2)
        assert out[0, N - 1, :32].isnan().all() and out.isnan().sum() == 32
        qkv = random(1, N, 3 * 2 * 32).abs()
        qkv[0, N - 1, 64] = float("nan")
        assert torch.equal(native_cpu.attention(qkv, 2).isnan().any(1), torch.arange(64)[None] < 32)


@pytest.mark.parametrize("lengths", ([5, 1, 40], [300, 17], [0, 3, 0, 20], [33]))
def test_attention_of_packed_images(lengths, threads):
    check_attention(random(sum(lengths), 3 * 2 * 64), 2, lengths=lengths)


def test_wrong_starts_of_packed_images_touch_no_other_memory(monkeypatch):
    made = guarded(monkeypatch)
    for starts in ([0, 1000], [-7, 20], [20, 3], [5, 9]):
        native_cpu.attention(random(20, 96), 2, torch.tensor(starts, dtype=torch.int32))
    monkeypatch.undo()
    for block, _ in made:
        assert block[:128].isnan().all() and block[-128:].isnan().all()


@pytest.mark.parametrize("window", ((4, 6, 2), (8, 8, 8), (6, 3, 3), (5, 4, 1), (14, 14, 7)))
def test_attention_inside_windows(window):
    check_attention(random(2, window[0] * window[1], 3 * 2 * 32), 2, window=window)


def test_attention_of_strided_qkv():
    wide = random(4, 20, 200)
    check_attention(wide[::2, 1::2, 8:104], 2)
    check_attention(random(96, 20, 1).permute(2, 1, 0), 2)


def test_attention_reads_nothing_beyond_its_arguments(dtype):
    block = torch.full((1, 35, 96 + 64), float("nan"), dtype=dtype)
    block[:, 1:34, 32:-32] = random(1, 33, 96)
    check_attention(block[:, 1:34, 32:-32], 2)


# -- norms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, D", [(1, 1), (3, 15), (17, 16), (5, 33), (206, 768), (2, 5000)])
@pytest.mark.parametrize("add", (False, True))
def test_layer_norm(rows, D, add, monkeypatch, threads):
    made = guarded(monkeypatch)
    x, y = random(rows, D) + 3, random(rows, D, seed=1) if add else None
    x[:, D // 2] *= OUTLIER
    weight, bias = random(D, seed=2), random(D, seed=3)
    s, out = native_cpu.layer_norm(x, y, weight, bias, 1e-6, 0.5)
    plain = x if y is None else x + y
    assert torch.equal(s, plain)
    truth = F.layer_norm(plain.double(), (D,), weight.double(), bias.double(), 1e-6) * 0.5
    assert_within(out, truth, F.layer_norm(plain, (D,), weight, bias, 1e-6) * 0.5)
    assert_guarded(made)


def test_layer_norm_of_strided_rows():
    x, weight = random(4, 9, 64)[:, ::2, ::2], random(32, 2, seed=1)[:, 0]
    _, out = native_cpu.layer_norm(x, x, weight, None, 1e-5, 1.0)
    truth = F.layer_norm((x + x).double(), (32,), weight.double(), None, 1e-5)
    assert_within(out, truth, F.layer_norm(x + x, (32,), weight, None, 1e-5))


# -- threads ----------------------------------------------------------------------------------------------------


def test_several_threads_at_once():
    """Each has its own tiles and memory; results are those of a call alone."""
    x, weight, qkv = random(70, 256), random(96, 256, seed=1), random(2, 50, 3 * 64)
    rows = random(FEW + 40, 256, seed=2)

    def run():
        linear = torch.cat([native_cpu.linear(x, weight, None, "gelu", None) for x in (x, rows)])
        return linear, native_cpu.attention(qkv, 1), native_cpu.layer_norm(x, x, x[0], None, 1e-6, 1.0)[1]

    alone, failures = run(), []

    def worker():
        for _ in range(20):
            if not all(map(torch.equal, alone, run())):
                failures.append("a result differs")

    workers = [threading.Thread(target=worker) for _ in range(4)]
    for one in workers:
        one.start()
    for one in workers:
        one.join()
    assert not failures


def test_nobody_reads_what_another_thread_has_yet_to_rearrange():
    """More threads than cores: some are kept from it in the midst. What lies there is the last call's, of another x."""
    xs, weight = [random(250, 768, seed=i) for i in (0, 1)], random(64, 768, seed=2)
    before = torch.get_num_threads()
    alone = [native_cpu.linear(x, weight, None, None, None) for x in xs]
    torch.set_num_threads(7)
    found = [native_cpu.linear(xs[i % 2], weight, None, None, None) for i in range(1000)]
    torch.set_num_threads(before)
    assert all(torch.equal(out, alone[i % 2]) for i, out in enumerate(found))


def test_the_same_result_whatever_the_threads():
    x, weight, qkv = random(1700, 256), random(300, 256, seed=1), random(1, 206, 3 * 64)
    results, before = [], torch.get_num_threads()
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        few, many = (native_cpu.linear(rows, weight, None, None, None) for rows in (x[:206], x))
        results.append((few, many, native_cpu.attention(qkv, 1)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
