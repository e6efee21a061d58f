"""The blend kernel against float64, within twice plain torch's error."""

from __future__ import annotations

import math
import random
import re

import pytest
import torch
from torch import Tensor

from radio_fast import ops
from radio_fast.kernels import blend as kernels
from radio_fast.ops.blend import blend_ref
from tests.conftest import outlier_input
from tests.numerics import assert_relative, assert_within

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def blend_truth(x: Tensor, skip: Tensor) -> Tensor:
    """float64; a shuffled x is written out position by position."""
    C = skip.shape[-1]
    if x.shape != skip.shape:
        spread = skip.new_full(skip.shape, math.nan, dtype=torch.float64)
        for row in range(2):
            for column in range(2):
                first = (2 * row + column) * C
                spread[:, row::2, column::2] = x[..., first : first + C].double()
        x = spread
    return (x.double() + skip.double()) / 2


def check(x: Tensor, skip: Tensor) -> None:
    truth = blend_truth(x, skip)
    # Were the plain form wrong, its error would excuse the kernel's.
    assert_relative(ops.blend(x.double(), skip.double(), backend="reference"), truth, 1e-15)
    actual = ops.blend(x, skip, backend="triton")
    assert actual.is_contiguous()
    assert_within(actual, truth, ops.blend(x, skip, backend="reference"))


def inputs(B: int, H: int, W: int, C: int, shuffled: bool, dtype: torch.dtype, device: str, seed: int = 0):
    shape = (B, H // 2, W // 2, 4 * C) if shuffled else (B, H, W, C)
    x = outlier_input(*shape, dtype=dtype, seed=seed, device=device)
    return x, outlier_input(B, H, W, C, dtype=dtype, seed=seed + 1, device=device)


FORMS = pytest.mark.parametrize("shuffled", (False, True), ids=("alike", "shuffled"))


@pytest.mark.parametrize("dtype", DTYPES)
@FORMS
@pytest.mark.parametrize("C", (1, 7, 16, 113, 192, 257, 384, 768))
def test_widths(C, shuffled, dtype, device, guarded):
    check(*inputs(2, 4, 6, C, shuffled, dtype, device, seed=C))


@FORMS
@pytest.mark.parametrize("shape", ((1, 2, 2), (3, 2, 14), (2, 14, 2), (1, 34, 6), (5, 10, 22)), ids=str)
def test_maps(shape, shuffled, device, guarded):
    """Tiles that end inside a row, inside an image, and that hold several images."""
    check(*inputs(*shape, 20, shuffled, torch.float16, device))


@pytest.mark.parametrize("shape", ((1, 1, 1), (3, 5, 7), (2, 1, 13), (113, 1, 1)), ids=str)
def test_odd_maps(shape, device, guarded):
    check(*inputs(*shape, 24, False, torch.float16, device))


def strided(x: Tensor, how: str) -> Tensor:
    """The same values in another layout, NaN between them."""
    B, H, W, C = x.shape
    if how == "contiguous":
        return x
    if how == "channels first":
        return x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    if how == "columns first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "wider":
        view = x.new_full((B + 1, H + 5, W + 3, C + 9), math.nan)[1:, 2 : H + 2, 1 : W + 1, 4 : C + 4]
    else:
        assert how == "every other"
        view = x.new_full((2 * B, 3 * H, 2 * W, 2 * C), math.nan)[1::2, ::3, 1::2, ::2]
    return view.copy_(x)


LAYOUTS = ("channels first", "columns first", "wider", "every other")


@FORMS
@pytest.mark.parametrize("skip_how", ("contiguous", *LAYOUTS))
@pytest.mark.parametrize("x_how", ("contiguous", *LAYOUTS))
def test_strides(x_how, skip_how, shuffled, device, guarded):
    x, skip = inputs(2, 6, 10, 35, shuffled, torch.float16, device)
    check(strided(x, x_how), strided(skip, skip_how))


@FORMS
def test_expanded(shuffled, device, guarded):
    x, skip = inputs(1, 4, 6, 20, shuffled, torch.float16, device)
    check(x.expand(3, -1, -1, -1), strided(skip.expand(3, -1, -1, -1), "wider"))
    check(strided(x.expand(3, -1, -1, -1), "wider"), skip.expand(3, -1, -1, -1))


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32))
def test_neither_sum_nor_difference_overflows(dtype, device, guarded):
    largest = torch.full((1, 2, 2, 16), torch.finfo(dtype).max, dtype=dtype, device=device)
    assert torch.equal(ops.blend(largest, largest, backend="triton"), largest)
    assert not ops.blend(largest, -largest, backend="triton").any()


@pytest.mark.parametrize("seed", range(10))
def test_any_map(seed, device, guarded):
    draw = random.Random(seed)
    B, H, W = draw.randint(1, 3), 2 * draw.randint(1, 12), 2 * draw.randint(1, 12)
    x, skip = inputs(B, H, W, draw.randint(1, 100), draw.random() < 0.7, draw.choice(DTYPES), device, seed)
    check(strided(x, draw.choice(LAYOUTS)), strided(skip, draw.choice(("contiguous", *LAYOUTS))))


@pytest.mark.parametrize("sm", (70, 75, 80, 89, 90, 100, 120))
def test_configurations(sm, device, guarded, monkeypatch):
    monkeypatch.setenv("RADIO_FAST_ARCH", str(sm))
    check(*inputs(1, 6, 8, 96, True, torch.float16, device))


@pytest.mark.parametrize("shape", ((0, 4, 4, 8), (2, 0, 4, 8), (2, 4, 0, 8), (2, 4, 4, 0)), ids=str)
@FORMS
def test_nothing_to_do(shape, shuffled, device):
    B, H, W, C = shape
    x, skip = inputs(B, H, W, C, shuffled, torch.float16, device)
    assert ops.blend(x, skip, backend="triton").shape == shape


@FORMS
@pytest.mark.parametrize("how", ("contiguous", "wider"))
def test_operator(how, shuffled, device):
    x, skip = inputs(2, 4, 6, 20, shuffled, torch.float16, device)
    torch.library.opcheck(torch.ops.radio_fast.blend.default, (strided(x, how), strided(skip, how)))


@FORMS
def test_reference_backend(shuffled, device):
    x, skip = inputs(2, 4, 6, 20, shuffled, torch.float32, device)
    assert torch.equal(ops.blend(x, skip, backend="reference"), blend_ref(x, skip))


SKIP = torch.zeros(2, 4, 6, 8)
BAD = {  # (x, skip, what the message says)
    "rank": (SKIP[0], SKIP[0, 0], "x and skip must have shapes (B, H, W, C) both"),
    "size": (SKIP[:, :3], SKIP, "got (2, 3, 6, 8) and (2, 4, 6, 8)"),
    "batch": (torch.zeros(1, 2, 3, 32), SKIP, "got (1, 2, 3, 32) and (2, 4, 6, 8)"),
    "channels": (torch.zeros(2, 2, 3, 16), SKIP, "got (2, 2, 3, 16) and (2, 4, 6, 8)"),
    "odd": (torch.zeros(2, 2, 3, 32), torch.zeros(2, 5, 6, 8), "got (2, 2, 3, 32) and (2, 5, 6, 8)"),
    "dtype": (SKIP, SKIP.half(), "skip is torch.float16, expected torch.float32 like the input"),
    "float64": (SKIP.double(), SKIP.double(), "dtype must be float16, bfloat16 or float32, got torch.float64"),
    "device": (SKIP, SKIP.to("meta"), "skip is on meta, expected cpu"),
}


@pytest.mark.parametrize("change", BAD)
def test_refuses(change):
    x, skip, message = BAD[change]
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.blend(x, skip, backend="triton")


def test_compile_cases():
    for sm in (70, 75, 80, 86, 89, 90, 100, 120):
        cases = kernels.compile_cases(sm)
        assert any(case.signature["x_ptr"] == "*bf16" for case in cases) == (sm >= 80)
        for case in cases:
            assert sorted([*case.signature, *case.constexprs]) == sorted(case.fn.arg_names)
            assert case.dot_macs == 0
