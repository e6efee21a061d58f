"""Linear layers with what comes before (LayerNorm) and after them (activation, LayerScale, residual)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from radio_fast.ops._dispatch import choose, limit_of, register, sm_of

ACTIVATIONS = (None, "gelu", "silu", "swiglu")


def linear_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None = None,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
) -> Tensor:
    y = F.linear(x, weight, bias)
    if activation == "gelu":
        y = F.gelu(y)
    elif activation == "silu":
        y = F.silu(y)
    elif activation == "swiglu":
        a, b = y.chunk(2, dim=-1)
        y = F.silu(a) * b
    if layer_scale is not None:
        y = y * layer_scale
    return y if residual is None else residual + y


def ln_linear_ref(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    norm_scale: float,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None = None,
) -> Tensor:
    normalised = (x.float() - mean.unsqueeze(-1)) * rstd.unsqueeze(-1) * norm_weight.float() + norm_bias.float()
    return linear_ref((normalised * norm_scale).to(x.dtype), weight, bias, activation)


def _limit(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> str | None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
    if x.ndim < 1 or weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        return f"x (..., K) and weight (M, K) must agree in K, got {tuple(x.shape)} and {tuple(weight.shape)}"
    if not weight.shape[1]:
        return "K must be at least 1, got 0"
    if activation == "swiglu" and weight.shape[0] % 2:
        return f"swiglu needs an even number of weight rows, got {weight.shape[0]}"
    if bias is not None and bias.shape != weight.shape[:1]:
        return f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}"
    return limit_of(x, weight=weight, bias=bias)


def _out_features(weight: Tensor, activation: str | None) -> int:
    return weight.shape[0] // (2 if activation == "swiglu" else 1)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None = None,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """residual + layer_scale · act(x·weightᵀ + bias).

    Args:
        x: (..., K), any strides. weight: (M, K). bias: (M) or None.
        activation: None; "gelu", the exact one, y·Φ(y) with erf; "silu", y·σ(y); "swiglu", silu(a)·b of the halves
            (a, b) of y.
        residual: (..., M') or None, M' = M, or M/2 for "swiglu". layer_scale: (M') or None.

    Returns:
        (..., M') in x's dtype; the kernel accumulates in float32 and rounds once, at the end.
    """
    limit = _limit(x, weight, bias, activation)
    if limit is None:
        out = (*x.shape[:-1], _out_features(weight, activation))
        if residual is not None and residual.shape != out:
            limit = f"residual must have shape {out}, got {tuple(residual.shape)}"
        elif layer_scale is not None and layer_scale.shape != out[-1:]:
            limit = f"layer_scale must have shape {out[-1:]}, got {tuple(layer_scale.shape)}"
        else:
            limit = limit_of(x, residual=residual, layer_scale=layer_scale)
    tensors = (x, weight, bias, residual, layer_scale)
    if choose("linear", backend, *tensors, needs_dot=True, limit=limit) == "triton":
        return torch.ops.radio_fast.linear(x, weight, bias, activation, residual, layer_scale)
    return linear_ref(x, weight, bias, activation, residual, layer_scale)


def ln_linear(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    norm_scale: float,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """act(norm_scale·((x − mean)·rstd·norm_weight + norm_bias)·weightᵀ + bias): LayerNorm and linear in one.

    Args:
        x: (..., K). mean, rstd: (...), float32, from `norm_stats` or `add_norm_stats`. norm_weight, norm_bias: (K).
        weight, bias, activation: as for `linear`.

    Returns:
        As `linear`. Normalised rows are rounded to x's dtype before the product, as if they had been stored.
    """
    limit = _limit(x, weight, bias, activation)
    if limit is None:
        if mean.shape != x.shape[:-1] or rstd.shape != x.shape[:-1]:
            limit = f"mean and rstd must have shape {tuple(x.shape[:-1])}"
        elif mean.dtype != torch.float32 or rstd.dtype != torch.float32:
            limit = f"mean and rstd must be float32, got {mean.dtype} and {rstd.dtype}"
        elif norm_weight.shape != x.shape[-1:] or norm_bias.shape != x.shape[-1:]:
            limit = f"norm_weight and norm_bias must have shape {tuple(x.shape[-1:])}"
        else:
            limit = limit_of(x, norm_weight=norm_weight, norm_bias=norm_bias)
    tensors = (x, mean, rstd, norm_weight, norm_bias, weight, bias)
    if choose("ln_linear", backend, *tensors, needs_dot=True, limit=limit) == "triton":
        return torch.ops.radio_fast.ln_linear(
            x, mean, rstd, norm_weight, norm_bias, norm_scale, weight, bias, activation
        )
    return ln_linear_ref(x, mean, rstd, norm_weight, norm_bias, norm_scale, weight, bias, activation)


# -- operators -------------------------------------------------------------------------------------------------


def _kernels():
    from radio_fast.kernels import linear

    return linear


register(
    "linear",
    "(Tensor x, Tensor weight, Tensor? bias, str? activation, Tensor? residual, Tensor? layer_scale) -> Tensor",
    lambda x, weight, bias, activation, residual, layer_scale: x.new_empty(
        (*x.shape[:-1], _out_features(weight, activation))
    ),
    lambda x, weight, bias, activation, residual, layer_scale: _kernels().linear(
        x, weight, bias, activation, residual, layer_scale, sm_of(x.device)
    ),
)
register(
    "ln_linear",
    "(Tensor x, Tensor mean, Tensor rstd, Tensor norm_weight, Tensor norm_bias, float norm_scale, Tensor weight, "
    "Tensor? bias, str? activation) -> Tensor",
    lambda x, mean, rstd, norm_weight, norm_bias, norm_scale, weight, bias, activation: x.new_empty(
        (*x.shape[:-1], _out_features(weight, activation))
    ),
    lambda x, mean, rstd, norm_weight, norm_bias, norm_scale, weight, bias, activation: _kernels().ln_linear(
        x, mean, rstd, norm_weight, norm_bias, norm_scale, weight, bias, activation, sm_of(x.device)
    ),
)
