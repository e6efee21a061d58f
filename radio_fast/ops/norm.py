"""Row-wise normalisations, alone or together with the residual add before them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from radio_fast import native_cpu
from radio_fast.ops._dispatch import (
    CPU_DTYPES,
    Op,
    bucket,
    cpu_limit,
    limit_of,
    register,
    register_cpu,
    sm_of,
    triton_runs,
    why_not_native_cpu,
)

MAX_WIDTH = 16384  # a row stays on chip


def layer_norm_ref(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, scale: float = 1.0) -> Tensor:
    y = F.layer_norm(x, weight.shape, weight, bias, eps)
    return y if scale == 1.0 else y * scale


def add_ref(x: Tensor, y: Tensor, layer_scale: Tensor | None) -> Tensor:
    return x + (y if layer_scale is None else y * layer_scale)


def add_layer_norm_ref(
    x: Tensor, y: Tensor, layer_scale: Tensor | None, weight: Tensor, bias: Tensor, eps: float, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    s = add_ref(x, y, layer_scale)
    return s, layer_norm_ref(s, weight, bias, eps, scale)


def norm_stats_ref(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x if x.dtype == torch.float64 else x.float(), dim=-1, correction=0)
    return mean, torch.rsqrt(var + eps)


def add_norm_stats_ref(x: Tensor, y: Tensor, layer_scale: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    s = add_ref(x, y, layer_scale)
    return s, *norm_stats_ref(s, eps)


def _limit(x: Tensor, **others: Tensor | None) -> str | None:
    if x.ndim < 1 or not 0 < x.shape[-1] <= MAX_WIDTH:
        return f"the last axis must have 1…{MAX_WIDTH} entries, got shape {tuple(x.shape)}"
    for name, tensor in others.items():
        wanted = x.shape if name == "y" else x.shape[-1:]
        if tensor is not None and tensor.shape != wanted:
            return f"{name} must have shape {tuple(wanted)}, got {tuple(tensor.shape)}"
    return limit_of(x, **others)


def _limits(limit: str | None, *tensors: Tensor | None) -> dict[str, str | None]:
    cpu = limit
    if limit is None and tensors[0].device.type == "cpu":
        cpu = cpu_limit(CPU_DTYPES, *tensors)
    return {"triton": limit, "cpu": cpu}


def _key(x: Tensor, *others) -> str:
    return f"d{x.shape[-1]} rows{bucket(x.shape[:-1].numel())}" if x.ndim else ""


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, scale: float = 1.0, *, backend: str = "auto"
) -> Tensor:
    """scale · ((x − mean) / √(var + eps) · weight + bias) over the last axis (Ba et al., 2016).

    Args:
        x: (..., D), any strides. weight, bias: (D).

    Returns:
        (..., D) in x's dtype; statistics and arithmetic are float32.
    """
    limit = _limit(x, weight=weight, bias=bias)
    return LAYER_NORM(backend, (x, weight, bias, eps, scale), _limits(limit, x, weight, bias))


def add_layer_norm(
    x: Tensor,
    y: Tensor,
    layer_scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: float = 1.0,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(s, layer_norm(s)) with s = x + y · layer_scale, in one pass over memory.

    Args:
        x, y: (..., D). layer_scale: (D) or None. weight, bias, eps, scale: as for `layer_norm`.

    Returns:
        Both (..., D) in x's dtype. The norm is taken of s as it is stored, rounded to that dtype.
    """
    limit = _limit(x, y=y, layer_scale=layer_scale, weight=weight, bias=bias)
    limits = _limits(limit, x, y, weight, bias)
    if layer_scale is not None:
        limits["cpu"] = limits["cpu"] or "LayerScale is not in it"
    return ADD_LAYER_NORM(backend, (x, y, layer_scale, weight, bias, eps, scale), limits)


def norm_stats(x: Tensor, eps: float, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """(mean, 1/√(var + eps)) of each row, what `ln_linear` needs.

    Args:
        x: (..., D), any strides.

    Returns:
        Both (...), float32.
    """
    return NORM_STATS(backend, (x, eps), {"triton": _limit(x)})


def add_norm_stats(
    x: Tensor, y: Tensor, layer_scale: Tensor | None, eps: float, *, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """(s, mean, 1/√(var + eps)) with s = x + y · layer_scale: `add_layer_norm` that leaves the norm to `ln_linear`."""
    limit = _limit(x, y=y, layer_scale=layer_scale)
    return ADD_NORM_STATS(backend, (x, y, layer_scale, eps), {"triton": limit})


def dynamic_tanh(x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor, scale: float = 1.0) -> Tensor:
    """scale · (weight · tanh(alpha·x) + bias), a norm without statistics (Zhu et al., 2025)."""
    y = torch.tanh(alpha * x) * weight + bias
    return y if scale == 1.0 else y * scale


# -- operators -------------------------------------------------------------------------------------------------


def _kernels():
    from radio_fast.kernels import layer_norm

    return layer_norm


def _stats_like(x: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))


register(
    "layer_norm",
    "(Tensor x, Tensor weight, Tensor bias, float eps, float scale) -> Tensor",
    lambda x, weight, bias, eps, scale: x.new_empty(x.shape),
    lambda x, weight, bias, eps, scale: _kernels().layer_norm(x, weight, bias, eps, scale, sm_of(x.device)),
)
register(
    "add_layer_norm",
    "(Tensor x, Tensor y, Tensor? layer_scale, Tensor weight, Tensor bias, float eps, float scale) -> (Tensor, Tensor)",
    lambda x, y, layer_scale, weight, bias, eps, scale: (x.new_empty(x.shape), x.new_empty(x.shape)),
    lambda x, y, layer_scale, weight, bias, eps, scale: _kernels().add_layer_norm(
        x, y, layer_scale, weight, bias, eps, scale, sm_of(x.device)
    ),
)
register(
    "norm_stats",
    "(Tensor x, float eps) -> (Tensor, Tensor)",
    lambda x, eps: _stats_like(x),
    lambda x, eps: _kernels().norm_stats(x, eps, sm_of(x.device)),
)
register(
    "add_norm_stats",
    "(Tensor x, Tensor y, Tensor? layer_scale, float eps) -> (Tensor, Tensor, Tensor)",
    lambda x, y, layer_scale, eps: (x.new_empty(x.shape), *_stats_like(x)),
    lambda x, y, layer_scale, eps: _kernels().add_norm_stats(x, y, layer_scale, eps, sm_of(x.device)),
)

_layer_norm_cpu = register_cpu(
    "layer_norm_cpu",
    "(Tensor x, Tensor weight, Tensor? bias, float eps, float scale) -> Tensor",
    lambda x, weight, bias, eps, scale: x.new_empty(x.shape),
    lambda x, weight, bias, eps, scale: native_cpu.layer_norm(x, None, weight, bias, eps, scale)[1],
)
_add_layer_norm_cpu = register_cpu(
    "add_layer_norm_cpu",
    "(Tensor x, Tensor y, Tensor weight, Tensor? bias, float eps, float scale) -> (Tensor, Tensor)",
    lambda x, y, weight, bias, eps, scale: (x.new_empty(x.shape), x.new_empty(x.shape)),
    native_cpu.layer_norm,
)


def _cpu_add_layer_norm(x, y, layer_scale, weight, bias, eps, scale) -> tuple[Tensor, Tensor]:
    return _add_layer_norm_cpu(x, y, weight, bias, eps, scale)


LAYER_NORM = Op("layer_norm", layer_norm_ref, _key)
ADD_LAYER_NORM = Op("add_layer_norm", add_layer_norm_ref, _key, batched=(0, 1))
NORM_STATS = Op("norm_stats", norm_stats_ref, _key)
ADD_NORM_STATS = Op("add_norm_stats", add_norm_stats_ref, _key, batched=(0, 1))
for _op in (LAYER_NORM, ADD_LAYER_NORM, NORM_STATS, ADD_NORM_STATS):
    _op.add("triton", getattr(torch.ops.radio_fast, _op.name), triton_runs(needs_dot=False))
LAYER_NORM.add("cpu", _layer_norm_cpu, why_not_native_cpu, shipped=CPU_DTYPES)
ADD_LAYER_NORM.add("cpu", _cpu_add_layer_norm, why_not_native_cpu, shipped=CPU_DTYPES)
