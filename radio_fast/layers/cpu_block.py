"""Blocks in one call of the CPU kernels: at batch 1 seven calls' own work, for each of them, is a tenth of the time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from radio_fast import native_cpu
from radio_fast.layers.attention import Attention
from radio_fast.layers.linear_int8 import LinearInt8
from radio_fast.layers.mlp import Linear, Mlp, SwiGLU, untouched
from radio_fast.layers.norm import DynamicTanh, LayerNorm
from radio_fast.layers.packing import Segments
from radio_fast.native_cpu import BlockParameters, Layer, Norm
from radio_fast.ops import _dispatch
from radio_fast.ops.attention import ATTENTION, HEAD_DIMS
from radio_fast.ops.linear import LINEAR, LINEAR_ADD_NORM
from radio_fast.ops.linear_int8 import LINEAR_INT8, packed_shape
from radio_fast.ops.norm import ADD_LAYER_NORM, LAYER_NORM, MAX_WIDTH

if TYPE_CHECKING:
    from radio_fast.layers.block import Block

BACKENDS = ("auto", _dispatch.CPU_OR_REFERENCE)
OPS = (LINEAR, LINEAR_ADD_NORM, LAYER_NORM, ADD_LAYER_NORM, ATTENTION, LINEAR_INT8)
# Multiply-adds after which a call ends, about 50 ms: only between calls Ctrl-C is heard.
LONGEST = {torch.bfloat16: 1 << 36, torch.float32: 1 << 33}


def run(
    blocks: Sequence[Block],
    x: Tensor,
    normed: Tensor | None,
    after: LayerNorm | DynamicTanh | None,
    window: tuple[int, int, int] | Segments | int | None,
) -> tuple[Tensor, Tensor | None, int] | None:
    """`Block.step` of as many of `blocks` as the kernels take, to the bit: (x, the next one's norm1 of it, how many).

    `after`: the norm after all of them. None where the first one's parts are to be called: any of them is not as it
    was made, or another implementation runs it, or it is not for the kernel.
    """
    if torch.compiler.is_compiling() or x.dtype not in _dispatch.CPU_DTYPES or x.ndim != 3 or _has_any_global_hook():
        return None
    if native_cpu.why_not_native_cpu() is not None:  # before all blocks are looked at, by each of them
        return None
    starts = None
    if isinstance(window, Segments):
        starts, lengths = window
        if not _packs(starts, lengths, x):
            return None
        window = None
    elif window is not None and not (type(window) is tuple and _tiles(window, x)):
        return None
    chain, calls, work = [], [0], 0
    for block in blocks:
        parameters = _parameters(block, x.shape[2])
        if parameters is None or (chain and parameters.norm1.weight.dtype != chain[0].norm1.weight.dtype):
            break
        if x.dtype == torch.float32 and any(part.weight.dtype != x.dtype for part in parameters[:6]):
            break
        if work > LONGEST[x.dtype]:
            calls.append(0)
            work = 0
        chain.append(parameters)
        calls[-1] += 1
        work += x.shape[0] * x.shape[1] * sum(layer.weight.numel() for layer in parameters[2:6])
    if not chain:
        return None
    if len(chain) < len(blocks):
        after = blocks[len(chain)].norm1
    after = _norm(after, x.shape[2], chain[0].norm1.weight.dtype)
    tensors = [t for parameters in chain for t in _tensors(parameters)]
    others = [normed, starts, *(after or ())[:2]]
    if not _dispatch.kernels_run_all(OPS, (x, *(t for t in others if t is not None), *tensors)):
        return None
    return *native_cpu.blocks(x, normed, chain, after, window, starts, calls), len(chain)


def _packs(starts: Tensor, lengths: tuple[int, ...], x: Tensor) -> bool:
    """Whether these images make up x; the kernel looks at the values of `starts`."""
    shape = (1, sum(lengths)), (len(lengths) + 1,)
    return starts.dtype == torch.int32 and (x.shape[:2], starts.shape) == shape


def _tiles(window: tuple[int, int, int], x: Tensor) -> bool:
    h, w, k = window
    return h * w == x.shape[1] and not (h % k or w % k)


def _own(module: nn.Module, name: str) -> Tensor | None:
    """An attribute, from where a module keeps its parameters: else it takes ten times as long, and there are many."""
    found = module._parameters
    return found[name] if name in found else getattr(module, name, None)


def _norm(norm: LayerNorm | DynamicTanh | None, D: int, dtype: torch.dtype) -> Norm | None:
    if not untouched(norm, LayerNorm) or norm.backend not in BACKENDS:
        return None
    weight, bias = _own(norm, "weight"), _own(norm, "bias")
    if weight is None or weight.shape != (D,) or not _like(dtype, weight, bias):
        return None
    return Norm(weight, bias, norm.eps, norm.scale)


def _layer(
    linear: Linear | LinearInt8, shape: tuple[int, int], activation: str | None, dtype: torch.dtype
) -> Layer | None:
    if not untouched(linear, Linear, LinearInt8) or linear.backend not in BACKENDS or linear.activation != activation:
        return None
    bias, scale = _own(linear, "bias"), None
    if bias is not None and not (bias.shape == shape[:1] and _like(torch.float32, bias, None)):
        return None
    if type(linear) is LinearInt8:
        weight, scale, dtype = linear._buffers.get("weight"), linear._buffers.get("scale"), torch.int8
        if scale is None or scale.shape != shape[:1] or not _like(torch.float32, scale, None) or activation == "swiglu":
            return None
        shape = packed_shape(*shape)
    else:
        weight = _own(linear, "weight")
    if weight is None or weight.shape != shape or not _like(dtype, weight, None):
        return None
    return Layer(weight, bias, scale)


def _like(dtype: torch.dtype, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        weight.dtype == dtype
        and weight.is_contiguous()
        and (bias is None or (bias.dtype == dtype and bias.shape == weight.shape and bias.is_contiguous()))
    )


def _parameters(block: Block, D: int) -> BlockParameters | None:
    """What the kernel takes of a block of width D, if nothing in it is another than it was made to be."""
    attn, mlp = block.attn, block.mlp
    if not untouched(attn, Attention) or attn.backend not in BACKENDS or D > MAX_WIDTH:
        return None
    if untouched(mlp, Mlp) and mlp.norm is None:
        expand, contract = mlp.fc1, mlp.fc2
    elif untouched(mlp, SwiGLU):
        expand, contract = mlp.w12, mlp.w3
    else:
        return None
    if D % attn.num_heads or D // attn.num_heads not in HEAD_DIMS:
        return None
    first, activation = getattr(block.norm1, "weight", None), getattr(expand, "activation", None)
    if first is None or first.dtype not in native_cpu.DTYPES or activation not in native_cpu.ACTIVATIONS:
        return None
    hidden, dtype = getattr(contract, "in_features", 0), first.dtype
    wide = 2 * hidden if activation == "swiglu" else hidden
    parts = (
        _norm(block.norm1, D, dtype),
        _norm(block.norm2, D, dtype),
        _layer(attn.qkv, (3 * D, D), None, dtype),
        _layer(attn.proj, (D, D), None, dtype),
        _layer(expand, (wide, D), activation, dtype),
        _layer(contract, (D, hidden), None, dtype),
    )
    return (
        BlockParameters(*parts, attn.num_heads, hidden, activation) if all(part is not None for part in parts) else None
    )


def _tensors(parameters: BlockParameters) -> Iterator[Tensor]:
    for part in parameters[:6]:
        yield from (value for value in part if isinstance(value, Tensor))
