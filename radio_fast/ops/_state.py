"""What torch and the environment are doing around a call."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

_environment = getattr(os.environ, "_data", os.environ)  # the dictionary inside is compared in 0.3 µs
_overrides: tuple[dict, dict[str, str]] = ({}, {})


def overrides() -> dict[str, str]:
    """The RADIO_FAST_* variables that are set to something; the same object as long as nothing changes."""
    global _overrides
    seen, found = _overrides
    if seen != _environment:
        seen = dict(_environment)
        found = {name: value for name, value in os.environ.items() if name.startswith("RADIO_FAST_") and value}
        _overrides = seen, found
    return found


def torch_is_plain() -> bool:
    """Whether torch's functions do what they say: no tracer, transform or mode is at work, but for a default device.

    A dispatch mode that only looks on, as that of our own graphs, says so by an attribute `transparent`.
    """
    modes = map(torch._C._get_function_stack_at, range(torch._C._len_torch_function_stack()))
    watchers = map(torch._C._get_dispatch_stack_at, range(torch._C._len_torch_dispatch_stack()))
    return (
        all(getattr(mode, "transparent", False) for mode in watchers)
        and all(type(mode) is DeviceContext for mode in modes)
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not torch.jit.is_tracing()
    )


def capturing(device: torch.device) -> bool:
    """Whether the current stream is being captured: what is computed now exists once the graph is replayed."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def cacheable(*sources: Tensor) -> bool:
    """Whether what is computed from these may be looked up, or kept for later calls.

    Not while it is differentiated, traced or transformed; inference tensors do not count their changes.
    """
    if torch.compiler.is_compiling() or not torch_is_plain():
        return False
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in sources)
    return not differentiable and not any(t.is_inference() for t in sources)


def settle(tensor: Tensor) -> None:
    """Wait until a tensor that other streams may be handed is there. Once for each that is kept."""
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()
