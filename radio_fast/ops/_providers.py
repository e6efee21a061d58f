"""Attention as others do it: torch's SDPA backends by name, flash-attn 2, 3 and 4, xFormers.

"auto" takes one only where `_tuning` measured it to be the fastest; by its name (`backend=`, RADIO_FAST_ATTENTION) it
runs, or is an error. Each takes packed q, k, v without copying them; none takes packed images or windows here.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from radio_fast.arch import arch_of
from radio_fast.ops._dispatch import HALF, Op

# What F.scaled_dot_product_attention calls. `sdpa_kernel`, which chooses among them, does so for all threads at once.
SDPA = {
    "sdpa-cudnn": ("_scaled_dot_product_cudnn_attention", (None, False)),  # no bias, no log-sum-exp
    "sdpa-flash": ("_scaled_dot_product_flash_attention", ()),
    "sdpa-efficient": ("_scaled_dot_product_efficient_attention", (None, False)),
}
# name: the module, its function on q, k, v of (B, N, H, d), the sms that it is made for
PACKAGES = {
    "flash-attn": ("flash_attn", "flash_attn_func", range(80, 130)),
    "flash-attn-3": ("flash_attn_interface", "flash_attn_func", range(90, 100)),
    "flash-attn-4": ("flash_attn.cute", "flash_attn_func", range(90, 120)),
    "xformers": ("xformers.ops", "memory_efficient_attention", range(75, 130)),
}


def _heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of shape (B, N, H, d): views."""
    return qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)


def _sdpa(name: str, qkv: Tensor, num_heads: int, *packed_or_window: None) -> Tensor:
    operator, arguments = SDPA[name]
    q, k, v = (t.transpose(1, 2) for t in _heads(qkv, num_heads))
    return getattr(torch.ops.aten, operator)(q, k, v, *arguments)[0].transpose(1, 2).flatten(2)


def _package(name: str, qkv: Tensor, num_heads: int, *packed_or_window: None) -> Tensor:
    out = _function(name)(*_heads(qkv, num_heads))
    return (out[0] if isinstance(out, tuple) else out).flatten(2)  # some return the log-sum-exp too


@cache
def _function(name: str) -> Callable[..., Tensor]:
    module, function, _ = PACKAGES[name]
    return getattr(importlib.import_module(module), function)


@cache
def why_not_import(name: str) -> str | None:
    """None where the package of this name can be imported, else the reason in one line."""
    module = PACKAGES[name][0]
    try:
        if importlib.util.find_spec(module) is None:
            return "not installed"
        _function(name)
    except Exception as error:  # a broken build can raise anything
        if isinstance(error, ModuleNotFoundError) and error.name and module.startswith(error.name):
            return "not installed"
        return f"does not import: {' '.join(f'{type(error).__name__}: {error}'.split())[:200]}"
    return None


def _why_not_gpu(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda" or torch.version.cuda is None:
        return f"it is for NVIDIA GPUs, not for {device.type}"
    return None


def _why_not_sdpa(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    reason = _why_not_gpu(device, dtype)
    if reason is None and name != "sdpa-efficient" and dtype not in HALF:
        return f"{dtype} is not for it"
    return reason


def _why_not_package(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    reason = _why_not_gpu(device, dtype)
    if reason is not None:
        return reason
    if dtype not in HALF:
        return f"{dtype} is not for it"
    try:
        sm = arch_of(*torch.cuda.get_device_capability(device)).sm
    except ValueError as error:
        return str(error)
    if sm not in PACKAGES[name][2]:
        return f"sm_{sm} is not for it"
    return why_not_import(name)


def add_attention_providers(op: Op) -> None:
    for name in SDPA:
        op.add(name, partial(_sdpa, name), partial(_why_not_sdpa, name), shipped=())
    for name in PACKAGES:
        op.add(name, partial(_package, name), partial(_why_not_package, name), shipped=())
