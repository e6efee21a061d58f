"""forward_intermediates beyond the golden cases: against the blocks run one by one."""

from __future__ import annotations

import pytest
import torch

import radio_fast
from radio_fast.models.intermediates import resolve_indices
from tests.conftest import golden_source
from tests.numerics import assert_relative


def tokens_after_each_block(model, x):
    tokens = model.model.patch_generator(x, model.input_conditioner)
    out = []
    for block in model.blocks:
        tokens = block(tokens)
        out.append(tokens)
    return out


@pytest.fixture(scope="module")
def model():
    return radio_fast.load(golden_source("vit_b16_vitdet"))  # 9 blocks


@pytest.fixture(scope="module")
def x():
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize(
    ("indices", "expected"),
    [(None, list(range(9))), (2, [7, 8]), (9, list(range(9))), ([0, -1], [0, 8]), ((5, 2, 5), [2, 5]), ([-9], [0])],
)
def test_indices(model, x, indices, expected):
    assert resolve_indices(indices, 9) == expected
    outputs = model.forward_intermediates(x, indices, intermediates_only=True, output_fmt="NLC")
    blocks = tokens_after_each_block(model, x)
    assert len(outputs) == len(expected)
    for output, i in zip(outputs, expected, strict=True):
        assert_relative(output, blocks[i][:, model.num_summary_tokens :])


def test_dense_is_the_mean_since_the_last_index(model, x):
    outputs = model.forward_intermediates(
        x, [1, 5, 8], aggregation="dense", return_prefix_tokens=True, intermediates_only=True, output_fmt="NLC"
    )
    blocks = tokens_after_each_block(model, x)
    for output, (first, last) in zip(outputs, [(0, 1), (2, 5), (6, 8)], strict=True):
        mean = torch.stack(blocks[first : last + 1]).mean(dim=0)
        assert_relative(output.features, mean[:, model.num_summary_tokens :])
        assert_relative(output.summary, mean[:, [0, 1, 2]].flatten(1))


def test_final_output_is_that_of_forward(model, x):
    final, _ = model.forward_intermediates(x, [3])
    expected = model(x, feature_fmt="NCHW")
    assert torch.equal(final.features, expected.features)
    assert torch.equal(final.summary, expected.summary)


def test_stop_early_runs_no_block_too_many(model, x):
    ran = []
    handles = [
        block.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(model.blocks)
    ]  # fmt: skip
    final, (third,) = model.forward_intermediates(x, [3], stop_early=True)
    for handle in handles:
        handle.remove()
    assert ran == [0, 1, 2, 3]
    assert torch.equal(final.features, third)


@pytest.mark.parametrize("norm", [False, True])
def test_final_norm_only_when_asked(norm, x):
    """For the DINOv2 student, whose forward always ends in its norm."""
    model = radio_fast.load(golden_source("dinov2_g14"))
    x = torch.rand(1, 3, 56, 70, generator=torch.Generator().manual_seed(9))
    last = tokens_after_each_block(model, x)[-1]
    final, (inner,) = model.forward_intermediates(x, 1, norm=norm, output_fmt="NLC")
    expected = (model.model.norm(last) if norm else last)[:, 5:]
    assert_relative(final.features, expected)
    assert_relative(inner, expected)
    assert torch.equal(final.features, model(x).features) is norm


def test_vitdet_intermediates_come_in_image_order(x):
    """With windows as large as the image the order of patches is the plain one, so outputs can be compared."""
    model = radio_fast.load(golden_source("vit_b16_vitdet"), vitdet_window_size=2)
    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(10))
    outputs = model.forward_intermediates(image, None, intermediates_only=True)
    final = model(image, feature_fmt="NCHW").features
    assert torch.equal(outputs[-1], final)
    # Block 0 is windowed: a change in the top-left window must stay in the top-left 2 × 2 patches.
    changed = image.clone()
    changed[:, :, :32, :32] = 0.5
    difference = (model.forward_intermediates(changed, [0], intermediates_only=True)[0] - outputs[0]).abs().amax(dim=1)
    inside = torch.zeros_like(difference, dtype=torch.bool)
    inside[:, :2, :2] = True
    assert (difference[inside] > 0).all()
    assert (difference[~inside] == 0).all()


def test_intermediate_normalizer_leaves_the_prefix_alone(x):
    model = radio_fast.load(golden_source("vit_h16_norm"))
    image = torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(11))
    plain = tokens_after_each_block(model, image)[1]
    normalizer = model.inter_feature_normalizer
    for scheme in ("none", "pre-alpha", "post-alpha"):
        (output,) = model.forward_intermediates(
            image, [1], return_prefix_tokens=True, intermediates_only=True, output_fmt="NLC", norm_alpha_scheme=scheme
        )
        assert_relative(output.summary, plain[:, [0, 1, 2]].flatten(1))
        patches = plain[:, 8:]
        if scheme != "none":
            patches = (patches - normalizer.means[1]) @ normalizer.rotation[1].T * normalizer.alphas[1]
        assert_relative(output.features, patches)


def test_with_adaptors_the_final_output_is_a_dict(x):
    model = radio_fast.load(golden_source("vit_h16"), adaptor_names=["sam"])
    image = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(12))
    final, intermediates = model.forward_intermediates(image, [0])
    expected = model(image, feature_fmt="NCHW")
    assert list(final) == ["backbone", "sam"]
    assert torch.equal(final["sam"].features, expected["sam"].features)
    assert intermediates[0].shape == (1, 160, 2, 3)
