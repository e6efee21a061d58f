"""E-RADIO's windows: which one runs, when it changes, and the position bias that depends on it."""

from __future__ import annotations

import dataclasses
import math
import warnings

import pytest
import torch

import radio_fast
from bench.eradio_state import SMALL
from radio_fast.layers.window_attention import PositionBias, coords_table
from radio_fast.models.eradio import optimal_window
from tests.conftest import golden_source
from tests.models.eradio import QUIET, golden, image, pair
from tests.numerics import assert_relative

# -- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "window"),
    [((224, 224), 7), ((512, 512), 16), ((1024, 2048), 16), ((256, 512), 8), ((544, 544), 1), ((640, 96), 3),
     ((32, 64), 1), ((672, 672), 7), ((416, 2048), 13), ((250, 300), 7)],
)  # fmt: skip
def test_optimal_window(size, window):
    """The largest divisor, up to 16, of min(H, W) / 32."""
    n = min(size) // 32
    assert optimal_window(*size) == window == max(k for k in range(1, 17) if n % k == 0)
    model = golden()
    model.model.set_optimal_window_size(torch.zeros(1, 3, *size, device="meta").shape[2:])
    assert model.model.attention_window == window


@QUIET
def test_windows_change_only_when_asked():
    model, x = golden(), image(128, 128)
    built = model(x).features
    model(image(96, 64))
    assert model.model.attention_window is None
    assert torch.equal(model(x).features, built)

    model.model.set_optimal_window_size((128, 128))
    four = model(x).features
    assert not torch.allclose(four, built, rtol=1e-3)
    model(image(96, 64))
    assert torch.equal(model(x).features, four)

    assert torch.equal(golden(window_size=4)(x).features, four)
    follows = golden(window_size="optimal")
    assert torch.equal(follows(x).features, four)
    small = image(96, 64)
    assert torch.equal(follows(small).features, golden(window_size=2)(small).features)
    assert torch.equal(follows(x).features, four)
    assert follows.model.attention_window == "optimal"
    model.model.change_window_size(16)
    assert_relative(model(x).features, built, 1e-3)  # the table anew, not as the file rounded it
    assert (
        radio_fast.load("e-radio_v2", checkpoint=golden_source("eradio_small"), window_size=4).model.attention_window
        == 4
    )


def test_resizing_is_told_once_with_sizes_that_fit():
    model = golden()
    with pytest.warns(
        UserWarning, match="attention windows of 16 × 16 don't fit the maps of a 192 × 128 image"
    ) as told:
        model(image(192, 128))
    text = str(told[0].message)
    assert len(told) == 1
    assert "a window of 2 (model.model.change_window_size) would fit this one" in text
    assert "images of 512 × 512 would need no resizing" in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(image(192, 128))
        model(image(96, 64))
        model(image(512, 512))
        other = golden()
        other(image(512, 512))  # what the warning names
        other.model.change_window_size(2)
        other(image(192, 128))
        other.model.set_optimal_window_size((192, 192))
        other(image(192, 192))
    with pytest.warns(UserWarning, match="attention windows of 6 × 6 don't fit .* images of 192 × 192 would"):
        other(image(160, 224))


def test_without_attention_no_size_is_resized(tmp_path):
    config = dataclasses.replace(SMALL, sr_ratios=((), (), (), ()))
    ours, plain = pair(tmp_path, config)
    x = image(96, 160)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_relative(ours(x).features, plain(ours.input_conditioner(x))[1])


# -- the position bias ------------------------------------------------------------------------------------------------


def random_bias(built: int = 4, heads: int = 3) -> PositionBias:
    bias = PositionBias(built, heads).requires_grad_(False)
    bias.relative_coords_table.copy_(coords_table(built, built))
    generator = torch.Generator().manual_seed(7)
    for parameter in bias.parameters():
        parameter.normal_(std=0.3, generator=generator)
    return bias


@pytest.mark.parametrize("window", [1, 2, 4, 5])
def test_bias_entry_by_entry(window):
    """Each entry from its offset, in float64, with scalar arithmetic."""
    module = random_bias()
    first, last = module.cpb_mlp[0], module.cpb_mlp[2]

    def value(dy: int, dx: int) -> torch.Tensor:
        t = [offset / (4 - 1) * 8 for offset in (dy, dx)]
        t = torch.tensor([math.copysign(math.log2(abs(v) + 1) / math.log2(8), v) for v in t], dtype=torch.float64)
        hidden = (first.weight.double() @ t + first.bias.double()).clamp(min=0)
        return 16 / (1 + torch.exp(-(last.weight.double() @ hidden)))

    bias = module(window, torch.float32)
    expected = torch.empty(3, window**2, window**2, dtype=torch.float64)
    for q in range(window**2):
        for k in range(window**2):
            expected[:, q, k] = value(q // window - k // window, q % window - k % window)
    expected -= expected.amax((1, 2), keepdim=True)
    if window > 1:
        assert_relative(bias - bias.amax((1, 2), keepdim=True), expected)
    assert bias.max() <= 0


def test_bias_uses_the_stored_table_for_the_built_window_alone():
    module = random_bias()
    exact = {window: module(window, torch.float32).clone() for window in (3, 4)}
    module.relative_coords_table.mul_(1.01)
    assert torch.equal(module(3, torch.float32), exact[3])
    assert not torch.allclose(module(4, torch.float32), exact[4])


def test_bias_is_computed_once_per_window(monkeypatch):
    model = golden()
    calls = []
    compute = PositionBias._compute
    monkeypatch.setattr(PositionBias, "_compute", lambda *args: calls.append(args[1:]) or compute(*args))
    blocks = sum(isinstance(module, PositionBias) for module in model.modules())
    for window in (4, 2, 4, 2, 4):
        model.model.change_window_size(window)
        model(image(128, 128))
    assert len(calls) == 2 * blocks
    with torch.autocast("cpu", torch.bfloat16):
        model(image(128, 128))
    assert len(calls) == 3 * blocks
    model.half()
    model(image(128, 128))
    assert len(calls) == 4 * blocks


def test_bias_follows_its_weights():
    module = random_bias()
    before = module(3, torch.float32).clone()
    with torch.no_grad():
        module.cpb_mlp[2].weight.mul_(2)
    assert not torch.allclose(module(3, torch.float32), before)
    module.requires_grad_()
    module(3, torch.float32).square().sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_rounded_bias_is_exact_where_it_weighs_most():
    """In bfloat16 entries near 16 would be off by 0.03; less the largest, those that weigh most are hardly off."""
    module = random_bias(heads=1)
    module.cpb_mlp[2].weight.abs_()  # all values between 8 and 16
    truth, rounded = module(4, torch.float32), module(4, torch.bfloat16).float()
    near = truth > -1
    assert near.any()
    assert ((rounded - truth)[near].abs() <= 2**-9).all()
