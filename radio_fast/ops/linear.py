"""Linear layers with what comes before (LayerNorm) and after them (activation, LayerScale, residual)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from radio_fast import native_cpu
from radio_fast.ops import _dispatch
from radio_fast.ops._dispatch import (
    CPU_DTYPES,
    CPU_OR_REFERENCE,
    Op,
    backend_of_ops,
    bucket,
    cpu_limit,
    limit_of,
    register,
    register_cpu,
    sm_of,
    triton_runs,
    why_not_native_cpu,
)
from radio_fast.ops._state import cacheable, capturing, overrides, settle
from radio_fast.ops.norm import ADD_LAYER_NORM, LAYER_NORM, add_layer_norm, layer_norm, layer_norm_ref

ACTIVATIONS = (None, "gelu", "silu", "swiglu")


def _bias_as(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A float32 bias in the dtype that cuBLAS adds it in; on a GPU cast once, not by a launch in every call.

    The cast is kept with the bias. As everywhere, writes to `.data` are not seen: torch does not count them.
    """
    if bias is None or bias.dtype == dtype:
        return bias
    if not _dispatch.accelerated(bias.device) or not cacheable(bias):
        return bias.to(dtype)
    state = (bias.data_ptr(), bias._version, dtype)
    found = getattr(bias, "_radio_fast_cast", None)
    if found is None or found[0] != state:
        with torch.inference_mode(False), torch.no_grad():
            found = state, bias.to(dtype)
        if not capturing(bias.device):
            settle(found[1])
            bias._radio_fast_cast = found
    return found[1]


def linear_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None = None,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
) -> Tensor:
    y = F.linear(x, weight, _bias_as(bias, x.dtype))
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
    wide = x if x.dtype == torch.float64 else x.float()
    norm_weight, norm_bias = norm_weight.to(wide.dtype), norm_bias.to(wide.dtype)
    normalised = (wide - mean.unsqueeze(-1)) * rstd.unsqueeze(-1) * norm_weight + norm_bias
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
    if bias is not None and bias.dtype == torch.float32 and bias.device == x.device:
        bias = None  # of any dtype of x
    return limit_of(x, weight=None if rounds_weight(x, weight) else weight, bias=bias)


def rounds_weight(x: Tensor, weight: Tensor) -> bool:
    """Whether it is for the CPU kernel to round the weight, as it reads it."""
    if x.dtype != torch.bfloat16 or weight.dtype != torch.float32:
        return False
    return x.device.type == "cpu" == weight.device.type and not _dispatch.accelerated(x.device)


def _cpu_limit(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, *others: Tensor | None
) -> str | None:
    if activation not in native_cpu.ACTIVATIONS:
        return f"{activation} is not in it"
    if activation == "swiglu" and any(other is not None for other in others):
        return "a residual after swiglu is not in it"
    return cpu_limit(CPU_DTYPES, x, weight, bias, *others)


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
        x: (..., K), any strides. weight: (M, K), in x's dtype; beside bfloat16 on the CPU also float32, rounded.
        bias: (M), in x's dtype or float32, or None.
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
    args = (x, weight, bias, activation, residual, layer_scale)
    cpu = limit
    if limit is None and x.device.type == "cpu":
        cpu = (
            "LayerScale is not in it" if layer_scale is not None else _cpu_limit(x, weight, bias, activation, residual)
        )
    limits = {"triton": limit, "cpu": cpu}
    if rounds_weight(x, weight) and LINEAR.choose(backend, args, limits) != "cpu":
        return linear(x, weight.to(x.dtype), *args[2:], backend=backend)
    return LINEAR(backend, args, limits)


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
    args = (x, mean, rstd, norm_weight, norm_bias, norm_scale, weight, bias, activation)
    return LN_LINEAR(backend, args, {"triton": limit})


def linear_add_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    norm_scale: float = 1.0,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(s, layer_norm(s)) with s = residual + x·weightᵀ + bias, in two launches, of which there are two ways.

    "epilogue": the product adds the residual as it stores, the norm follows: s is written and read once. "deferred": a
    plain product, which cuBLAS does best, then add and norm in one pass: M values a row more to write and read.

    Args:
        x: (..., K). weight, bias: (M, K) and (M), as for `linear`. residual: (..., M). norm_weight, norm_bias: (M), and
            eps, norm_scale: as for `layer_norm`.
        backend: of the two parts; "auto" takes the faster way, RADIO_FAST_LINEAR_ADD_NORM names it.

    Returns:
        Both (..., M) in x's dtype. The norm is taken of s as it is stored.
    """
    args = (x, weight, bias, residual, norm_weight, norm_bias, eps, norm_scale)
    if backend == "auto" and LINEAR_ADD_NORM.variable not in overrides():
        backend = backend_of_ops(overrides().get("RADIO_FAST_BACKEND", "auto"))  # of the two parts
        if any(part.variable in overrides() for part in (LINEAR, LAYER_NORM, ADD_LAYER_NORM)):
            return _deferred(*args)  # each as it was named
    if backend == CPU_OR_REFERENCE:
        return _epilogue(*args, backend=backend)
    if backend not in ("auto", "reference"):
        return _deferred(*args, backend=backend)
    limits = {"cpu": None if x.dtype in CPU_DTYPES else f"{x.dtype} is not in it"}
    if rounds_weight(x, weight) and LINEAR_ADD_NORM.choose(backend, args, limits) != "cpu":
        args = (x, weight.to(x.dtype), *args[2:])
    return LINEAR_ADD_NORM(backend, args, limits)


def linear_add_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    norm_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    s = linear_ref(x, weight, bias, None, residual)
    return s, layer_norm_ref(s, norm_weight, norm_bias, eps, norm_scale)


def _epilogue(x, weight, bias, residual, norm_weight, norm_bias, eps, norm_scale, backend="auto"):
    s = linear(x, weight, bias, None, residual, backend=backend)
    return s, layer_norm(s, norm_weight, norm_bias, eps, norm_scale, backend=backend)


def _deferred(x, weight, bias, residual, norm_weight, norm_bias, eps, norm_scale, backend="auto"):
    y = linear(x, weight, bias, backend=backend)
    return add_layer_norm(residual, y, None, norm_weight, norm_bias, eps, norm_scale, backend=backend)


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


_linear_cpu = register_cpu(
    "linear_cpu",
    "(Tensor x, Tensor weight, Tensor? bias, str? activation, Tensor? residual) -> Tensor",
    lambda x, weight, bias, activation, residual: x.new_empty((*x.shape[:-1], _out_features(weight, activation))),
    native_cpu.linear,
)


# -- implementations -------------------------------------------------------------------------------------------


def _cpu(x, weight, bias, activation, residual, layer_scale) -> Tensor:
    return _linear_cpu(x, weight, bias, activation, residual)


def _shape(x: Tensor, weight: Tensor) -> str:
    """float32 products are several times faster where the user has allowed TF32: that is another measurement."""
    precision = f" {torch.backends.cuda.matmul.fp32_precision}" if x.dtype == torch.float32 else ""
    return f"m{bucket(x.shape[:-1].numel())} n{weight.shape[0]} k{weight.shape[-1]}{precision}"


def _linear_key(x, weight, bias, activation, residual, layer_scale) -> str:
    extras = (activation, residual is not None and "residual", layer_scale is not None and "scale")
    return " ".join((_shape(x, weight), *filter(None, extras)))


def _linear_first(x, weight, bias, activation, residual, layer_scale) -> str:
    """Without an epilogue there is nothing to gain on cuBLAS."""
    return "reference" if activation is residual is layer_scale is None else ""


def _ln_linear_key(x, mean, rstd, norm_weight, norm_bias, norm_scale, weight, bias, activation) -> str:
    return f"{_shape(x, weight)} {activation or ''}".rstrip()


LINEAR = Op("linear", linear_ref, _linear_key, batched=(0, 4), first=_linear_first)
LINEAR.add("triton", torch.ops.radio_fast.linear, triton_runs(needs_dot=True))
LINEAR.add("cpu", _cpu, why_not_native_cpu, shipped=CPU_DTYPES)
LN_LINEAR = Op("ln_linear", ln_linear_ref, _ln_linear_key, batched=(0, 1, 2))
LN_LINEAR.add("triton", torch.ops.radio_fast.ln_linear, triton_runs(needs_dot=True))
LINEAR_ADD_NORM = Op(
    "linear_add_norm", linear_add_norm_ref, lambda x, weight, *others: _shape(x, weight), batched=(0, 3)
)
LINEAR_ADD_NORM.add("deferred", _deferred, triton_runs(needs_dot=False))
LINEAR_ADD_NORM.add("epilogue", _epilogue, triton_runs(needs_dot=True))
# The residual in the product: s is rounded once, and the product itself is never written.
LINEAR_ADD_NORM.add("cpu", _epilogue, why_not_native_cpu, shipped=CPU_DTYPES)
