"""What a packed call does on the device: as many launches for many images as for two, and no wait."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import radio_fast
from tests.numerics import assert_tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="launches on a GPU; this machine has none"),
]
SIZES = [(224, 224), (160, 320), (16, 16), (432, 272), (224, 224), (48, 80)]


@pytest.fixture(scope="module")
def warm():
    """(a model, images whose sizes it has seen)."""
    model = radio_fast.load("radio_v2.5-b", random_init=True, dtype="bfloat16", device="cuda")
    images = [torch.rand(3, *size, device="cuda") for size in SIZES]
    with torch.inference_mode():
        for few in (images, images[:2], images):
            model.forward_packed(few)
    torch.cuda.synchronize()
    return model, images


def test_no_hidden_synchronisation(warm):
    model, images = warm
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            model.forward_packed(images)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def launches(model, images) -> int:
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as report:
        model.forward_packed(images)
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in report.events())


def test_launches_do_not_grow_with_images(warm):
    """But for each image's patches, one copy."""
    model, images = warm
    assert launches(model, images) - launches(model, images[:2]) <= len(images) - 2
    assert launches(model, images) <= 7 * len(model.blocks) + len(images) + 12


def test_each_image_as_alone(warm):
    model, images = warm
    truth = radio_fast.load("radio_v2.5-b", random_init=True, dtype="float32", device="cuda", backend="reference")
    with torch.inference_mode():
        summary, features = model.forward_packed(images)
        for i, image in enumerate(images):
            alone = truth(image.unsqueeze(0))
            assert_tokens(features[i], alone.features[0])
            assert_tokens(summary[i].view(-1, model.embed_dim), alone.summary[0].view(-1, model.embed_dim))
