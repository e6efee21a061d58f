"""The position kernel against F.interpolate in float64, within twice plain torch's error."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from radio_fast import ops
from radio_fast.ops.pos_embed import pos_embed_ref
from tests.conftest import outlier_input
from tests.numerics import assert_within

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
RULES = pytest.mark.parametrize("resize_square", [True, False], ids=["square", "native"])


def truth(table: Tensor, h: int, w: int, resize_square: bool) -> Tensor:
    """(h·w, D) in float64."""
    R = math.isqrt(table.shape[0])
    grid = table.double().reshape(R, R, -1).permute(2, 0, 1)[None]
    if resize_square:
        m = max(h, w)
        grid = F.interpolate(grid, size=(m, m), mode="bilinear", align_corners=False)[:, :, :h, :w]
    else:
        grid = F.interpolate(grid[:, :, :h, :w], size=(h, w), mode="bilinear", align_corners=False)
    return grid[0].permute(1, 2, 0).reshape(h * w, -1)


def check(table: Tensor, sizes: list[tuple[int, int]], resize_square: bool) -> None:
    actual = ops.pos_embed_varlen(table, sizes, resize_square, backend="triton")
    reference = ops.pos_embed_varlen(table, sizes, resize_square, backend="reference")
    assert torch.equal(reference, torch.cat([pos_embed_ref(table, h, w, resize_square) for h, w in sizes]))
    assert actual.is_contiguous() and actual.dtype == table.dtype
    assert_within(actual, torch.cat([truth(table, h, w, resize_square) for h, w in sizes]), reference)


SIZES = [
    (4, 4),  # smaller than the table of 5 × 5
    (5, 5),  # the table
    (5, 3),
    (2, 5),
    (11, 3),  # a longer and a shorter side
    (3, 13),
    (1, 1),
    (1, 7),
    (9, 8),
]


@RULES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [31, 1])
def test_sizes(D, dtype, resize_square, device, guarded):
    check(outlier_input(5 * 5, D, dtype=dtype, seed=D, device=device), SIZES, resize_square)


@RULES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("h", "w"), [(9, 13), (3, 5), (20, 6), (2, 113)], ids=str)
def test_one_size(h, w, dtype, resize_square, device, guarded):
    table = outlier_input(7 * 7, 16, dtype=dtype, seed=h, device=device)
    check(table, [(h, w)], resize_square)
    one = ops.pos_embed(table, h, w, resize_square, backend="triton")
    several = ops.pos_embed_varlen(table, [(2, 3), (h, w), (h, w)], resize_square, backend="triton")
    assert torch.equal(one, several[6 : 6 + h * w]) and torch.equal(one, several[6 + h * w :])


@pytest.mark.parametrize("D", [768, 1280])
def test_model_widths(D, device, guarded):
    check(outlier_input(3 * 3, D, dtype=torch.float16, seed=D, device=device), [(2, 4), (3, 1)], True)


@RULES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("R", [1, 7, 16, 37])
def test_own_size_is_the_table(R, dtype, resize_square, device, guarded):
    table = outlier_input(R * R, 16, dtype=dtype, seed=R, device=device)
    table[0, 0] = -0.0
    out = ops.pos_embed(table, R, R, resize_square, backend="triton")
    assert torch.equal(out.view(torch.uint8), table.view(torch.uint8))  # torch.equal takes -0.0 for 0.0
    assert out.data_ptr() != table.data_ptr()
    assert ops.pos_embed(table, R, R, resize_square, backend="reference") is table


def test_native_corner_is_the_table(device, guarded):
    table = outlier_input(16 * 16, 32, dtype=torch.float16, seed=9, device=device)
    out = ops.pos_embed(table, 11, 7, False, backend="triton")
    assert torch.equal(out, table.view(16, 16, 32)[:11, :7].reshape(77, 32))


def test_first_corner_is_clamped(device, guarded):
    """Before the first cell's centre there is nothing to mix it with."""
    table = outlier_input(3 * 3, 32, dtype=torch.float32, seed=12, device=device)
    out = ops.pos_embed(table, 8, 8, backend="triton")
    assert torch.equal(out.view(8, 8, 32)[0, 0], table[0])


def test_table_with_strides(device, guarded):
    wide = torch.full((8 * 8, 70), float("nan"), dtype=torch.float16, device=device)
    wide[:, 2:66] = table = outlier_input(8 * 8, 64, dtype=torch.float16, seed=10, device=device)
    expected = ops.pos_embed(table, 5, 9, backend="triton")
    for same in (wide[:, 2:66], table.t().contiguous().t()):
        assert torch.equal(ops.pos_embed(same, 5, 9, backend="triton"), expected)


def test_operator(device):
    table = outlier_input(4 * 4, 32, dtype=torch.float16, seed=11, device=device)
    for args in ((table, [5, 2], [3, 4], True), (table[:, ::2], [4], [4], False)):
        torch.library.opcheck(torch.ops.radio_fast.pos_embed.default, args)


def test_limits(device):
    table = torch.randn(16, 32, device=device)

    def refuses(text: str, table: Tensor, sizes: list[tuple[int, int]]) -> None:
        with pytest.raises(ValueError, match=text):
            ops.pos_embed_varlen(table, sizes, backend="triton")

    refuses("dtype must be float16, bfloat16 or float32, got torch.float64", table.double(), [(2, 2)])
    refuses(r"table must have shape \(R·R, D\), got \(15, 32\)", table[1:], [(2, 2)])
    refuses(r"table must have shape \(R·R, D\), got \(1, 16, 32\)", table[None], [(2, 2)])
    refuses("sizes must be one or more .* of at least one patch", table, [])
    refuses("sizes must be one or more .* of at least one patch", table, [(2, 2), (0, 3)])
    refuses("no backward", table.clone().requires_grad_(), [(2, 2)])
    with pytest.raises(ValueError, match="backend of pos_embed must be one of"):
        ops.pos_embed(table, 2, 2, backend="cutlass")
