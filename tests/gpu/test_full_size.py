"""The released architectures at full size on a GPU, random weights with outlier channels, against float32."""

from __future__ import annotations

import copy

import pytest
import torch

import radio_fast
from tests.numerics import assert_relative, assert_tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU's kernels at full size; this machine has none"),
]
VERSIONS = [
    "radio_v2.5-b",
    "radio_v2.5-l",
    "radio_v2.5-h",
    "c-radio_v4-so400m",
    "c-radio_v2-g",
    "radio_v2.5-g",
    "e-radio_v2",
]
SIZES = {14: [(224, 224), (112, 238)], 16: [(224, 224), (208, 336)]}


def with_outliers(model: radio_fast.RADIOModel) -> radio_fast.RADIOModel:
    """What trained models have: norms away from one, and channels of the residual stream far above the others."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if name.endswith(("norm1.weight", "norm2.weight", "norm.weight")):
                parameter.add_((0.3 * torch.randn(parameter.shape, generator=generator)).to(parameter.device))
                parameter[::97] *= 4
            elif name.endswith(("proj.weight", "fc2.weight", "w3.weight")) and parameter.ndim == 2:
                if getattr(model.model.spec, "swiglu", False):  # the DINOv2 student's LayerScale
                    parameter *= 0.1
                parameter[::61] *= 8
            elif "pos_embed" in name or "token" in name:
                parameter[..., ::61] *= 30
    return model


@pytest.fixture(autouse=True)
def ieee(monkeypatch):
    """torch's convolutions take TF32 by default, which float32 truth must not have."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


# One worker of pytest-xdist makes each model.
@pytest.fixture(scope="module", params=[pytest.param(v, marks=pytest.mark.xdist_group(v)) for v in VERSIONS])
def model(request):
    """In float32, plain PyTorch."""
    options = {"window_size": "optimal"} if request.param == "e-radio_v2" else {}
    loaded = radio_fast.load(request.param, random_init=True, dtype="float32", device="cuda", **options)
    yield with_outliers(loaded)
    del loaded
    torch.cuda.empty_cache()


def images(model, number: int) -> torch.Tensor:
    step = model.min_resolution_step
    height, width = SIZES[14 if model.patch_size == 14 else 16][number]
    height, width = (-(-side // step) * step for side in (height, width))
    return torch.rand(3, 3, height, width, generator=torch.Generator().manual_seed(number)).cuda()


def outputs(model, x: torch.Tensor, backend: str):
    model.backend = backend
    with torch.inference_mode():
        return [model(x) for _ in range(3 if backend == "auto" else 1)][-1]  # the third call replays a graph


@pytest.mark.parametrize("number", range(2))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(model, dtype, number):
    x = images(model, number)
    truth = outputs(model, x, "reference")
    summary, features = outputs(copy.deepcopy(model).to(dtype), x, "auto")
    assert features.dtype == summary.dtype == dtype
    assert_tokens(features, truth.features)
    S = len(model.model.summary_tokens)
    assert_tokens(summary.unflatten(1, (S, -1)), truth.summary.unflatten(1, (S, -1)))


def test_float32(model):
    x = images(model, 0)
    truth = outputs(model, x, "reference")
    for ours, theirs in zip(outputs(model, x, "auto"), truth, strict=True):
        assert_relative(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(model, dtype):
    """float32 weights, autocast's dtype inside; the features come out as they would from PyTorch's own."""
    x = images(model, 0)
    truth = outputs(model, x, "reference")
    with torch.autocast("cuda", dtype):
        plain, ours = outputs(model, x, "reference"), outputs(model, x, "auto")
    assert_tokens(ours.features, truth.features)
    assert ours.features.dtype == plain.features.dtype and ours.summary.dtype == plain.summary.dtype
