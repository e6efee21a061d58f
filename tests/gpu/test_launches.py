"""What a forward does on the device: launches, synchronisation, allocation."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import radio_fast

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="launches on a GPU; this machine has none"),
]


@pytest.fixture(scope="module", params=["radio_v2.5-b", "c-radio_v4-so400m"])
def warm(request):
    """(a model without graphs, an image that it has seen)."""
    model = radio_fast.load(request.param, random_init=True, dtype="bfloat16", device="cuda", cuda_graphs=False)
    x = torch.rand(2, 3, 224, 224, device="cuda")
    with torch.inference_mode():
        for _ in range(3):
            model(x)
    torch.cuda.synchronize()
    return model, x


def profiled(model, x) -> list:
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as report:
        model(x)
        torch.cuda.synchronize()
    return list(report.events())


def on_device(events: list) -> list[str]:
    return [event.name for event in events if event.device_type == torch.autograd.DeviceType.CUDA]


def test_seven_launches_a_block(warm):
    model, x = warm
    names = on_device(profiled(model, x))
    assert 5 * len(model.blocks) < len(names) <= 7 * len(model.blocks) + 4, "\n".join(names)
    assert not [name for name in names if name.startswith(("Memcpy", "Memset"))], "\n".join(names)


def test_no_casts_and_no_copies(warm):
    model, x = warm
    copying = {"aten::copy_", "aten::_to_copy", "aten::contiguous", "aten::clone"}
    assert not copying & {event.name for event in profiled(model, x)}


def test_no_hidden_synchronisation(warm):
    model, x = warm
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            model(x)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_no_memory_is_asked_of_the_device(warm):
    """Activations come out of the allocator's cache, the same ones in every call."""
    model, x = warm
    before = torch.cuda.memory_stats()["num_device_alloc"]
    with torch.inference_mode():
        for _ in range(5):
            model(x)
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["num_device_alloc"] == before


def test_a_replay_is_one_launch(warm):
    """And the copies in and out."""
    x = warm[1]
    model = radio_fast.load("radio_v2.5-b", random_init=True, dtype="bfloat16", device="cuda", cuda_graphs=True)
    with torch.inference_mode():
        for _ in range(4):
            model(x)
    events = profiled(model, x)
    calls = [event.name for event in events if event.name.startswith("cuda")]
    assert calls.count("cudaGraphLaunch") == 1, calls
    assert sum(name.startswith(("cudaLaunchKernel", "cuLaunchKernel")) for name in calls) <= 4, calls
    assert not [name for name in calls if name.startswith(("cudaMalloc", "cudaFree"))]


def test_peak_memory_is_weights_and_activations(warm):
    """No second copy of the parameters, in any call."""
    model, x = warm
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.inference_mode():
        model(x)
    rows = x.shape[0] * (14 * 14 + model.num_summary_tokens)
    widest = max(model.model.spec.mlp_hidden, 3 * model.embed_dim)
    activations = 2 * rows * (2 * widest + 4 * model.embed_dim)
    assert torch.cuda.max_memory_allocated() - before <= 2 * activations + (4 << 20)
