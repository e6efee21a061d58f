"""The CPE rule against F.interpolate, written down a second time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from radio_fast.layers.cache import TensorCache
from radio_fast.layers.patch_embed import PatchGenerator
from radio_fast.ops import pos_embed

R, D = 16, 5


def interpolate(grid: torch.Tensor, h: int, w: int) -> torch.Tensor:
    return F.interpolate(grid.unsqueeze(0), size=(h, w), mode="bilinear", align_corners=False).squeeze(0)


@pytest.mark.parametrize(
    ("h", "w"),
    [(1, 1), (1, 16), (16, 16), (4, 4), (4, 9), (9, 4), (15, 16), (17, 3), (3, 40), (40, 40), (33, 57), (100, 1)],
)
@pytest.mark.parametrize("resize_square", [True, False], ids=["cpe", "native"])
def test_against_interpolate(h, w, resize_square, rng):
    table = torch.randn(R * R, D, generator=rng)
    grid = table.view(R, R, D).permute(2, 0, 1)
    if (h, w) == (R, R):
        expected = grid
    elif resize_square:
        m = max(h, w)
        expected = interpolate(grid, m, m)[:, :h, :w]
    else:
        expected = grid[:, :h, :w]
        if h > R or w > R:
            expected = interpolate(expected, h, w)
    actual = pos_embed(table, h, w, resize_square)
    torch.testing.assert_close(actual, expected.permute(1, 2, 0).reshape(h * w, D), rtol=1e-6, atol=1e-6)


def test_half_table_is_resized_in_float32(rng):
    table = torch.randn(R * R, D, generator=rng).half()
    expected = pos_embed(table.float(), 7, 30).half()
    assert torch.equal(pos_embed(table, 7, 30), expected)


def generator_with(table: torch.Tensor) -> PatchGenerator:
    generator = PatchGenerator(D, 2, R * R, 1).requires_grad_(False)
    generator.pos_embed.copy_(table)
    return generator


def test_cache_follows_the_table(rng):
    """Changed in place, cast or loaded anew, the table's old positions must not be used again."""
    generator = generator_with(torch.randn(1, R * R, D, generator=rng))
    first = generator.positions(5, 9)
    assert generator.positions(5, 9) is first, "a size seen before is computed again"
    generator.pos_embed.mul_(2)
    assert torch.equal(generator.positions(5, 9), 2 * first)
    generator.load_state_dict(generator.state_dict() | {"pos_embed": torch.ones(1, R * R, D)})
    torch.testing.assert_close(generator.positions(5, 9), torch.ones(45, D))
    generator.half()
    assert generator.positions(5, 9).dtype == torch.float16


def test_cache_under_autocast_keeps_full_precision(rng):
    generator = generator_with(torch.randn(1, R * R, D, generator=rng))
    with torch.autocast("cpu", torch.bfloat16):
        inside = generator.positions(6, 6)
    assert torch.equal(inside, pos_embed(generator.pos_embed[0], 6, 6))


def test_cache_is_bounded():
    cache = TensorCache(max_bytes=1000)
    for i in range(20):
        cache.put((i,), (), torch.zeros(100))  # 400 bytes
        assert cache.bytes <= 1000
    assert len(cache.entries) == 2
    assert cache.get((19,), ()) is not None
    cache.put(("large",), (), torch.zeros(300))
    assert cache.get(("large",), ()) is None
    assert cache.get((19,), ()) is not None, "an entry too large to keep must not push others out"
    cache.put((19,), ("changed",), torch.ones(100))
    assert cache.get((19,), ()) is None and cache.get((19,), ("changed",)) is not None
    assert len(cache.entries) == 2, "what belongs to weights that are no more must go"
