"""E-RADIO checkpoints with random weights, in the released file's structure and names, of any size."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from radio_fast.layers.conditioner import InputConditioner


@dataclass(frozen=True)
class Config:
    """The released model's shape by default; the other fields are what E-RADIO's other variants differ in."""

    dim: int = 192
    in_dim: int = 64
    depths: tuple[int, ...] = (3, 3, 5, 5)
    num_heads: tuple[int, ...] = (2, 4, 8, 16)
    sr_ratios: tuple[tuple[int, ...], ...] = ((), (), (2, 1), (1,))  # empty: convolutions
    window: int = 16
    mlp_ratio: int = 4
    features: int = 1536
    neck_start: int = 2
    conv_base: bool = True  # False: pooling changes the resolution
    c2f: bool = True  # False: pairs of convolutions
    pre_conv: bool = True
    pre_conv_groups: int = 1
    shuffle: int = 1  # pixels a side that the stem moves to channels
    shuffle_down: bool = False
    swiglu: bool = False
    gamma: bool = False
    biases: bool = False


SMALL = Config(dim=24, in_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 2), features=64)


def random_state(config: Config, seed: int = 0) -> dict[str, Tensor]:
    """The backbone's tensors, float32: weights of standard deviation 1/√inputs, BatchNorm statistics off neutral."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def normal(*shape: int, std: float = 0.1, mean: float = 0.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * std + mean

    def weight(name: str, *shape: int, bias: int = 0) -> None:
        state[f"{name}.weight"] = normal(*shape, std=math.prod(shape[1:]) ** -0.5)
        if bias:
            state[f"{name}.bias"] = normal(bias)

    def norm(name: str, dim: int, batch: bool = True) -> None:
        state[f"{name}.weight"] = normal(dim, mean=1.0)
        state[f"{name}.bias"] = normal(dim)
        if batch:
            state[f"{name}.running_mean"] = normal(dim)
            state[f"{name}.running_var"] = torch.rand(dim, generator=generator) + 0.5
            state[f"{name}.num_batches_tracked"] = torch.tensor(1000)

    def conv(name: str, inputs: int, outputs: int, kernel: int = 3) -> None:
        weight(f"{name}.conv", outputs, inputs, kernel, kernel)
        norm(f"{name}.bn", outputs)

    def attention(name: str, dim: int, heads: int, ratio: int) -> None:
        hidden, side, biases = config.mlp_ratio * dim, 2 * config.window - 1, config.biases
        if ratio == 2 and config.conv_base:
            weight(f"{name}.downsample_op", dim, dim, 2, 2, bias=dim)
            weight(f"{name}.upsample_op", dim, dim, 2, 2, bias=dim)
        elif ratio == 2:
            conv(f"{name}.downsample_mixer", dim, dim, 1)
            conv(f"{name}.upsample_mixer", dim, dim, 1)
        elif config.pre_conv:
            conv(f"{name}.pre_conv", dim // config.pre_conv_groups, dim)
        for i in (1, 2):
            norm(f"{name}.norm{i}", dim, batch=False)
            if config.gamma:
                state[f"{name}.gamma{i}"] = normal(dim, mean=0.5)
        weight(f"{name}.attn.qkv", 3 * dim, dim, bias=3 * dim * biases)
        weight(f"{name}.attn.proj", dim, dim, bias=dim * biases)
        position = f"{name}.attn.pos_emb_funct"
        offsets = torch.arange(1 - config.window, config.window) / (config.window - 1) * 8
        offsets = offsets.sign() * (offsets.abs() + 1).log2() / 3
        table = torch.stack(torch.meshgrid(offsets, offsets, indexing="ij"), -1)
        state[f"{position}.relative_coords_table"] = table.view(1, side, side, 2)
        weight(f"{position}.cpb_mlp.0", 512, 2, bias=512)
        weight(f"{position}.cpb_mlp.2", heads, 512)
        width = 2 * hidden if config.swiglu else hidden
        weight(f"{name}.mlp.fc1", width, dim, bias=width * biases)
        weight(f"{name}.mlp.fc2", dim, hidden, bias=dim * biases)

    channels = 3 * config.shuffle**2
    for i, dim in enumerate((config.in_dim, config.dim)):
        conv(f"patch_embed.conv_down.{2 * i}", channels, dim)
        channels = dim
    for i, (depth, heads, ratios) in enumerate(zip(config.depths, config.num_heads, config.sr_ratios, strict=True)):
        dim, name = config.dim << i, f"levels.{i}"
        if ratios:
            for block in range(depth):
                for j, ratio in enumerate(ratios):
                    attention(f"{name}.blocks.{block}.attention_blocks.{j}", dim, heads, ratio)
        elif config.c2f:
            half = dim // 2
            conv(f"{name}.blocks.cv1", dim, 2 * half, 1)
            conv(f"{name}.blocks.cv2", (2 + depth) * half, dim, 1)
            for block in range(depth):
                for j in (1, 2):
                    conv(f"{name}.blocks.m.{block}.cv{j}", half, half)
        else:
            for block in range(depth):
                for j in (1, 2):
                    weight(f"{name}.blocks.{block}.conv{j}", dim, dim, 3, 3, bias=dim)
                    norm(f"{name}.blocks.{block}.norm{j}", dim)
        if i + 1 < len(config.depths):
            conv(f"{name}.downsample.reduction", 4 * dim if config.shuffle_down else dim, 2 * dim)
    for i, level in enumerate(range(config.neck_start, len(config.depths))):
        dim, name = config.dim << level, f"high_res_neck.neck_features_proj.{i}"
        weight(f"{name}.conv1", dim, 1, 3, 3, bias=dim)
        norm(f"{name}.norm", dim)
        weight(f"{name}.conv2", config.features, dim, 1, 1, bias=config.features)
    return state


def write_checkpoint(path: Path, state: dict[str, Tensor], arch: str = "eradio_random", **entries: Tensor) -> None:
    """A `*.pth.tar` file of a backbone; `entries`: more of its state_dict."""
    args = argparse.Namespace(model=arch, model_kwargs={"return_full_features": True})
    tensors = {f"base_model.{name}": tensor for name, tensor in state.items()} | entries
    tensors |= {f"input_conditioner.{name}": tensor for name, tensor in InputConditioner().state_dict().items()}
    torch.save({"arch": arch, "epoch": 0, "args": args, "state_dict": tensors}, path)
