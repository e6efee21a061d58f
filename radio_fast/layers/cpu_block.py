"""A block in one call of the CPU kernels: at batch 1 seven calls' own work is a tenth of the time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from radio_fast import native_cpu
from radio_fast.layers.attention import Attention
from radio_fast.layers.linear_int8 import LinearInt8
from radio_fast.layers.mlp import Linear, Mlp, untouched
from radio_fast.layers.norm import DynamicTanh, LayerNorm
from radio_fast.ops import _dispatch
from radio_fast.ops.attention import ATTENTION, HEAD_DIMS
from radio_fast.ops.linear import LINEAR, LINEAR_ADD_NORM
from radio_fast.ops.linear_int8 import LINEAR_INT8
from radio_fast.ops.norm import LAYER_NORM, MAX_WIDTH

if TYPE_CHECKING:
    from radio_fast.layers.block import Block

OPS = (LINEAR, LINEAR_ADD_NORM, LAYER_NORM, ATTENTION, LINEAR_INT8)


def step(
    block: Block,
    x: Tensor,
    normed: Tensor | None,
    after: LayerNorm | DynamicTanh | None,
    window: tuple[int, int, int] | int | None,
) -> tuple[Tensor, Tensor | None] | None:
    """`Block.step`, to the bit; None where its parts have to be called: any of them is not as it was made, or another
    implementation runs it, or it is not for the kernel.
    """
    if x.dtype != torch.bfloat16 or x.ndim != 3:
        return None
    if window is not None and type(window) is not tuple:  # packed images, or a map's windows
        return None
    attn, mlp = block.attn, block.mlp
    if not (untouched(attn, Attention) and untouched(mlp, Mlp)) or mlp.norm is not None or _has_any_global_hook():
        return None
    norms = (block.norm1, block.norm2) if after is None else (block.norm1, block.norm2, after)
    layers = (attn.qkv, attn.proj, mlp.fc1, mlp.fc2)
    kind = LinearInt8 if type(attn.qkv) is LinearInt8 else Linear
    if not (all(untouched(m, LayerNorm) for m in norms) and all(untouched(m, kind) for m in layers)):
        return None
    if any(m.backend != "auto" for m in (attn, *norms, *layers)):
        return None
    if [m.activation for m in layers] != [None, None, "gelu", None]:
        return None
    # Where a module keeps them: an attribute takes ten times as long, and there are many.
    weights = [m._parameters.get("weight") for m in (*norms, *layers)]
    biases = [m._parameters.get("bias") for m in (*norms, *layers)]
    int8_scales = []
    if kind is LinearInt8:
        weights[-4:] = [m._buffers.get("weight") for m in layers]
        int8_scales = [m._buffers.get("scale") for m in layers]
    if not _fits(x, normed, weights, biases, attn.num_heads, window, int8_scales):
        return None
    scales = [(m.eps, m.scale) for m in norms]
    return native_cpu.block(x, normed, weights, biases, scales, attn.num_heads, window, int8_scales)


def _fits(
    x: Tensor,
    normed: Tensor | None,
    weights: list[Tensor | None],
    biases: list[Tensor | None],
    heads: int,
    window: tuple[int, int, int] | None,
    int8_scales: list[Tensor | None],
) -> bool:
    """Whether the kernel takes such shapes and dtypes, and "auto" would run it."""
    if any(tensor is None for tensor in (*weights, *int8_scales)):
        return False
    D, hidden = x.shape[2], (int8_scales[2] if int8_scales else weights[-2]).shape[0]
    dtype, norms = weights[0].dtype, len(weights) - 4
    if D % 32 or hidden % 32 or D > MAX_WIDTH or D % heads or D // heads not in HEAD_DIMS:
        return False
    if window is not None:
        h, w, k = window
        if h * w != x.shape[1] or h % k or w % k:
            return False
    shapes = [*[(D,)] * norms, (3 * D, D), (D, D), (hidden, D), (D, hidden)]
    found = [weight.shape for weight in weights]
    if int8_scales:
        if any(w.dtype != torch.int8 for w in weights[norms:]) or any(s.dtype != torch.float32 for s in int8_scales):
            return False
        packed = [(N // 32, -(-K // 64), 2, 16, 64) for N, K in shapes[norms:]]
        if found[norms:] != packed or [s.shape for s in int8_scales] != [(N,) for N, _ in shapes[norms:]]:
            return False
        found[norms:] = shapes[norms:]
    if dtype not in native_cpu.DTYPES or found != shapes:
        return False
    for i, bias in enumerate(biases):
        wanted = dtype if i < norms else torch.float32
        if bias is not None and (bias.dtype != wanted or bias.shape != shapes[i][:1]):
            return False
    parameters = [*weights, *int8_scales, *(bias for bias in biases if bias is not None)]
    plain = weights[:norms] if int8_scales else weights
    if any(weight.dtype != dtype for weight in plain) or not all(t.is_contiguous() for t in parameters):
        return False
    return _dispatch.kernels_run_all(OPS, (x, *parameters) if normed is None else (x, normed, *parameters))
