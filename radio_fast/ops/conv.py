"""A convolution of a map and its activation; on a CPU by oneDNN, on a weight laid out for it once.

From a plain weight oneDNN makes its own layout in every call: in E-RADIO's widest layers six times the convolution's
own time.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from radio_fast.ops._dispatch import cpu_limit
from radio_fast.ops._state import cacheable, overrides

ACTIVATIONS = {None: lambda y: y, "relu": F.relu, "silu": F.silu, "gelu": F.gelu}
DTYPES = (torch.bfloat16, torch.float32)
MAX_SHAPES = 4096
_ATTRIBUTES = {None: ("none", ""), "relu": ("relu", ""), "silu": ("swish", ""), "gelu": ("gelu", "none")}
_TRIAL = (2, 7, 9, 16)  # a map's shape
_layouts: dict[tuple, bytes] = {}
_TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


def conv_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, groups: int, activation: str | None
) -> Tensor:
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride, weight.shape[-1] // 2, groups=groups)
    return ACTIVATIONS[activation](y).permute(0, 2, 3, 1)


def packed_conv(
    x: Tensor, packed: Tensor, bias: Tensor | None, kernel: int, stride: int, groups: int, activation: str | None
) -> Tensor:
    """act(conv(x) + bias) of a map (B, H, W, C) in one, padded by half of the kernel.

    Args:
        packed: of `pack`, in x's dtype. bias: (channels) in it too, or None.

    Returns:
        (B, H', W', channels), contiguous, in x's dtype; sums, bias and activation are float32.
    """
    attribute, algorithm = _ATTRIBUTES[activation]
    padding, strides = 2 * [kernel // 2], 2 * [stride]
    y = torch.ops.mkldnn._convolution_pointwise(
        x.permute(0, 3, 1, 2), packed, bias, padding, strides, [1, 1], groups, attribute, [], algorithm
    )
    return y.permute(0, 2, 3, 1)


def shape_key(x: Tensor, weight: Tensor, stride: int, groups: int) -> tuple:
    """What the layout depends on."""
    return x.dtype, x.shape, weight.shape, stride, groups


def layout_of(key: tuple) -> bytes | None:
    """The layout for a `shape_key`, if one was packed for it before: most shapes share one, but a convolution on
    another's would take a hundred times as long.
    """
    return _layouts.get(key)


def pack(weight: Tensor, key: tuple) -> tuple[Tensor, bytes]:
    """A weight (channels, C / groups, k, k) in the layout that oneDNN wants for a `shape_key`, and that layout's name.

    No view: a copy.
    """
    dtype, (B, H, W, C), _, stride, groups = key
    padding = 2 * [weight.shape[-1] // 2]
    size = [B, C, H, W]
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight.to(dtype), padding, 2 * [stride], [1, 1], groups, size)
    layout = bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(packed).tolist())
    if len(_layouts) >= MAX_SHAPES:
        _layouts.clear()
    _layouts[key] = layout
    return packed, layout


def packs(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> bool:
    """Whether `packed_conv` may take the place of the plain form in this call, its weight be kept for later ones."""
    if backend == "auto":
        backend = overrides().get("RADIO_FAST_BACKEND", "auto")
    parameters = (weight,) if bias is None else (weight, bias)
    return (
        backend != "reference"
        and x.is_cpu
        and weight.is_cpu
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and cacheable(*parameters)
        and cpu_limit(DTYPES, x, *parameters) is None
        and not (torch.is_grad_enabled() and x.requires_grad)
        and x.numel() > 0
        and trusted(x.dtype)
    )


@functools.cache
def trusted(dtype: torch.dtype) -> bool:
    """Whether torch has these private operators, and they do here what this file takes them for: they are tried once.

    In another torch they may be gone or changed; oneDNN may lack the instructions for a dtype.
    """
    with torch.inference_mode(False), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        x, weight, bias = (torch.randn(*s, generator=generator) for s in (_TRIAL, (24, _TRIAL[3], 3, 3), (24,)))
        try:
            if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
                return False
            for activation in ACTIVATIONS:
                narrow = x.to(dtype)
                packed, _ = pack(weight, shape_key(narrow, weight, 2, 1))
                actual = packed_conv(narrow, packed, bias.to(dtype), 3, 2, 1, activation)
                truth = conv_ref(x, weight, bias, 2, 1, activation)
                error = (actual.float() - truth).abs().max() / truth.abs().max()
                if actual.dtype != dtype or not error <= _TOLERANCE[dtype]:
                    return False
        except (AttributeError, RuntimeError, TypeError, ValueError):
            return False
    return True
