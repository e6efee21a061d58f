"""A ViT whose blocks' linear layers are int8, and what keeps outlier channels from spoiling them.

An int8 row has one scale, so a channel that is 20 times larger than the others takes 20 times as much of it. Channels
are brought nearer to each other before weights are made int8, by factors that the weight after them undoes
(SmoothQuant; Xiao et al., 2023): in the norms before qkv and fc1, and in v before proj. How large channels are is told
from the weights alone. Factors are powers of two: what they touch in bfloat16 stays what it was.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from radio_fast.layers.block import Block
from radio_fast.layers.linear_int8 import LinearInt8
from radio_fast.layers.mlp import SwiGLU
from radio_fast.models.vit import VisionTransformer
from radio_fast.models.weights import State, fill

# A typical channel's largest normalised value; mean squares of pixels, of what attention gives, of hidden values.
LARGEST, PATCH, ATTENDED, HIDDEN = 3.0, 0.3, 0.3, 0.1


def check_int8(device: torch.device, is_vit: bool) -> None:
    """Refuse what has no int8 form.

    Raises:
        ValueError: a GPU, or an E-RADIO.
    """
    if device.type != "cpu":
        raise ValueError(f"dtype='int8' is for CPUs, got device '{device}': take dtype='bfloat16' there")
    if not is_vit:
        raise ValueError("dtype='int8' is for ViTs, this is an E-RADIO: take dtype='bfloat16'")


def fill_int8(vit: VisionTransformer, state: State, release: Callable[[Tensor], None] = lambda tensor: None) -> None:
    """`fill` on the CPU in bfloat16, the blocks' linear layers in int8. One block at a time is there in float32.

    Raises:
        CheckpointError: as `fill`. ValueError: a weight with NaN or infinity.
    """
    blocks, vit.blocks = vit.blocks, nn.ModuleList()
    parts = [{} for _ in blocks]
    for name in [name for name in state if name.startswith("blocks.")]:
        number, _, leaf = name.removeprefix("blocks.").partition(".")
        if number.isdecimal() and int(number) < len(parts):
            parts[int(number)][leaf] = state.pop(name)
    cpu = torch.device("cpu")
    fill(vit, state, "", cpu, torch.bfloat16, release)
    squares = mean_squares(vit)
    for i, (block, part) in enumerate(zip(blocks, parts, strict=True)):
        fill(block, part, f"blocks.{i}.", cpu, torch.float32, release)
        squares = even_out(block, squares)
        _replace(block)
        block.to(torch.bfloat16)
    vit.blocks = blocks
    _give_back()


def _give_back() -> None:
    """What was float32 for a while, to the system: glibc keeps freed pieces of up to 32 MiB, more than the model."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _replace(block: Block) -> None:
    for part in (block.attn, block.mlp):
        for name, layer in list(part.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(part, name, LinearInt8(layer))


def mean_squares(vit: VisionTransformer) -> Tensor:
    """(D): about how large the tokens' channels are before the first block, from the weights alone."""
    embedder = vit.patch_generator
    return (
        embedder.pos_embed.float().square().mean((0, 1)) + embedder.embedder.weight.float().square().sum(1) * ATTENDED
    )


def even_out(block: Block, squares: Tensor) -> Tensor:
    """Rescale a float32 block's channels, so that its function stays what it was, before its weights are made int8.

    `squares`: of the tokens that come in; those of what goes out are returned.
    """
    D, mlp = squares.shape[0], block.mlp
    contract = mlp.w3 if isinstance(mlp, SwiGLU) else mlp.fc2
    for norm, layer, last, hidden in (
        (block.norm1, block.attn.qkv, block.attn.proj, ATTENDED),
        (block.norm2, mlp.expand, contract, HIDDEN),
    ):
        size = (squares / squares.mean()).sqrt()
        factor = _factors(norm.weight.abs() * size * LARGEST + norm.bias.abs(), layer.weight)
        norm.weight /= factor
        norm.bias /= factor
        layer.weight *= factor
        if last is block.attn.proj:
            value, shift = layer.weight[2 * D :], None if layer.bias is None else layer.bias[2 * D :]
            largest = (value * (norm.weight * size)).square().sum(1).sqrt()
            factor = _factors(largest if shift is None else largest + shift.abs(), last.weight)
            value /= factor.unsqueeze(1)
            if shift is not None:
                shift /= factor
            last.weight *= factor
        squares = squares + last.weight.square().sum(1) * hidden
        if last.bias is not None:
            squares = squares + last.bias.square()
    return squares


def _factors(largest: Tensor, weight: Tensor) -> Tensor:
    """Powers of two, near √(a channel's largest value / its column's largest weight), their geometric mean about 1."""
    ratio = (largest.log2() - weight.abs().amax(0).log2()) / 2
    known = ratio.isfinite()  # neither a channel nor a column of zeros
    ratio = torch.where(known, ratio - ratio[known].mean(), 0.0).round().clamp(-12, 12)
    return torch.exp2(ratio)
