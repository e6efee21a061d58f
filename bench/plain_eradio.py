"""E-RADIO written with plain modules: the rival of `bench_eradio.py`, and a second opinion for the tests.

Convolutions, BatchNorms and LayerNorms are separate modules in the checkpoint's own structure and names, tensors are
(B, C, H, W) in torch's default layout, windows are cut out and put back, and the position bias is computed in every
forward pass. Nothing is shared with radio_fast's implementation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def children(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered modules lie under `prefix`."""
    numbers = {int(m[1]) for key in state if (m := re.match(rf"{re.escape(prefix)}(\d+)\.", key))}
    return max(numbers, default=-1) + 1


class ConvBN(nn.Module):
    def __init__(self, weight: Tensor, stride: int = 1, activation: nn.Module | None = None, groups: int = 1):
        super().__init__()
        out, per_group, kernel, _ = weight.shape
        self.conv = nn.Conv2d(per_group * groups, out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out)
        self.activation = activation or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    def __init__(self, first: Tensor, second: Tensor):
        super().__init__()
        self.cv1, self.cv2 = ConvBN(first, 1, nn.SiLU()), ConvBN(second, 1, nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x))


class C2f(nn.Module):
    def __init__(self, state: Mapping[str, Tensor], prefix: str):
        super().__init__()
        self.cv1 = ConvBN(state[f"{prefix}cv1.conv.weight"], 1, nn.SiLU())
        self.cv2 = ConvBN(state[f"{prefix}cv2.conv.weight"], 1, nn.SiLU())
        self.m = nn.ModuleList(
            Bottleneck(state[f"{prefix}m.{i}.cv1.conv.weight"], state[f"{prefix}m.{i}.cv2.conv.weight"])
            for i in range(children(state, f"{prefix}m."))
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).chunk(2, 1))
        for bottleneck in self.m:
            parts.append(bottleneck(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


class PositionBias(nn.Module):
    def __init__(self, window: int, heads: int):
        super().__init__()
        self.window = self.built = window
        side = 2 * window - 1
        self.register_buffer("relative_coords_table", torch.zeros(1, side, side, 2))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, heads, bias=False))

    def forward(self) -> Tensor:
        k, table = self.window, self.relative_coords_table
        if k != self.built:
            offsets = torch.arange(1 - k, k, dtype=torch.float32, device=table.device) / (self.built - 1) * 8
            table = torch.stack(torch.meshgrid(offsets, offsets, indexing="ij"), -1)
            table = table.sign() * (table.abs() + 1).log2() / math.log2(8)
        scores = 16 * self.cpb_mlp(table.to(self.cpb_mlp[0].weight.dtype)).sigmoid()
        scores = scores.reshape((2 * k - 1) ** 2, -1)
        along = torch.arange(k, device=table.device)
        y, x = torch.meshgrid(along, along, indexing="ij")
        y, x = y.flatten(), x.flatten()
        index = (y[:, None] - y + k - 1) * (2 * k - 1) + x[:, None] - x + k - 1
        return scores[index].permute(2, 0, 1)


def linear(state: Mapping[str, Tensor], name: str) -> nn.Linear:
    out, inputs = state[f"{name}.weight"].shape
    return nn.Linear(inputs, out, bias=f"{name}.bias" in state)


class Attention(nn.Module):
    def __init__(self, state: Mapping[str, Tensor], prefix: str):
        super().__init__()
        side = state[f"{prefix}pos_emb_funct.relative_coords_table"].shape[1]
        self.heads = state[f"{prefix}pos_emb_funct.cpb_mlp.2.weight"].shape[0]
        self.qkv, self.proj = linear(state, f"{prefix}qkv"), linear(state, f"{prefix}proj")
        self.pos_emb_funct = PositionBias((side + 1) // 2, self.heads)

    def forward(self, x: Tensor) -> Tensor:
        N, S, C = x.shape
        q, k, v = self.qkv(x).view(N, S, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.pos_emb_funct().to(q.dtype))
        return self.proj(y.transpose(1, 2).reshape(N, S, C))


class Mlp(nn.Module):
    def __init__(self, state: Mapping[str, Tensor], prefix: str):
        super().__init__()
        self.fc1, self.fc2 = linear(state, f"{prefix}fc1"), linear(state, f"{prefix}fc2")
        self.swiglu = self.fc1.out_features == 2 * self.fc2.in_features

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.swiglu:
            a, b = x.chunk(2, -1)
            return self.fc2(F.silu(a) * b)
        return self.fc2(F.gelu(x))


class AttentionBlock(nn.Module):
    """One resolution of a block: convolution or down-sampling, windows, back to the map, the mean with the input."""

    def __init__(self, state: Mapping[str, Tensor], prefix: str):
        super().__init__()
        dim = state[f"{prefix}norm1.weight"].shape[0]
        self.sr_ratio = 1
        if f"{prefix}downsample_op.weight" in state:
            self.sr_ratio = 2
            self.downsample_op = nn.Conv2d(dim, dim, 2, 2)
            self.upsample_op = nn.ConvTranspose2d(dim, dim, 2, 2)
        elif f"{prefix}downsample_mixer.conv.weight" in state:
            self.sr_ratio = 2
            self.downsample_mixer = ConvBN(state[f"{prefix}downsample_mixer.conv.weight"])
            self.upsample_mixer = ConvBN(state[f"{prefix}upsample_mixer.conv.weight"])
        elif f"{prefix}pre_conv.conv.weight" in state:
            weight = state[f"{prefix}pre_conv.conv.weight"]
            self.pre_conv = ConvBN(weight, groups=dim // weight.shape[1])
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(state, f"{prefix}attn.")
        self.mlp = Mlp(state, f"{prefix}mlp.")
        self.gamma1 = self.gamma2 = 1.0
        if f"{prefix}gamma1" in state:
            self.gamma1, self.gamma2 = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        block_input = x
        if hasattr(self, "downsample_op"):
            x = self.downsample_op(x)
        elif hasattr(self, "downsample_mixer"):
            x = self.downsample_mixer(F.avg_pool2d(x, 2))
        elif hasattr(self, "pre_conv"):
            x = self.pre_conv(x) + x
        B, C, H, W = x.shape
        k = self.attn.pos_emb_funct.window
        x = F.pad(x, (0, -W % k, 0, -H % k), mode="reflect") if H % k or W % k else x
        rows, columns = x.shape[2] // k, x.shape[3] // k
        y = x.view(B, C, rows, k, columns, k).permute(0, 2, 4, 3, 5, 1).reshape(-1, k * k, C)
        y = y + self.gamma1 * self.attn(self.norm1(y))
        y = y + self.gamma2 * self.mlp(self.norm2(y))
        x = y.view(B, rows, columns, k, k, C).permute(0, 5, 1, 3, 2, 4).reshape(B, C, rows * k, columns * k)
        x = x[:, :, :H, :W]
        if hasattr(self, "upsample_op"):
            x = self.upsample_op(x)
        elif hasattr(self, "upsample_mixer"):
            x = self.upsample_mixer(F.interpolate(x, scale_factor=2, mode="nearest"))
        return 0.5 * x + 0.5 * block_input


class Block(nn.Module):
    def __init__(self, state: Mapping[str, Tensor], prefix: str):
        super().__init__()
        count = children(state, f"{prefix}attention_blocks.")
        self.attention_blocks = nn.ModuleList(
            AttentionBlock(state, f"{prefix}attention_blocks.{i}.") for i in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.attention_blocks:
            x = block(x)
        return x


class ConvBlock(nn.Module):
    def __init__(self, state: Mapping[str, Tensor], prefix: str):
        super().__init__()
        out, inputs, kernel, _ = state[f"{prefix}conv1.weight"].shape
        self.conv1 = nn.Conv2d(inputs, out, kernel, padding=kernel // 2)
        self.conv2 = nn.Conv2d(out, inputs, kernel, padding=kernel // 2)
        self.norm1, self.norm2 = nn.BatchNorm2d(out), nn.BatchNorm2d(inputs)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm2(self.conv2(F.gelu(self.norm1(self.conv1(x)))))


class Downsample(nn.Module):
    def __init__(self, weight: Tensor, dim: int):
        super().__init__()
        self.shuffle = weight.shape[1] != dim
        self.reduction = ConvBN(weight, 1 if self.shuffle else 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(F.pixel_unshuffle(x, 2) if self.shuffle else x)


class Level(nn.Module):
    def __init__(self, state: Mapping[str, Tensor], prefix: str, dim: int):
        super().__init__()
        if f"{prefix}blocks.cv1.conv.weight" in state:
            self.blocks = C2f(state, f"{prefix}blocks.")
        elif f"{prefix}blocks.0.conv1.weight" in state:
            count = children(state, f"{prefix}blocks.")
            self.blocks = nn.Sequential(*(ConvBlock(state, f"{prefix}blocks.{i}.") for i in range(count)))
        else:
            self.blocks = nn.ModuleList(
                Block(state, f"{prefix}blocks.{i}.") for i in range(children(state, f"{prefix}blocks."))
            )
        reduction = state.get(f"{prefix}downsample.reduction.conv.weight")
        self.downsample = None if reduction is None else Downsample(reduction, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(what the next level takes, what the neck takes)."""
        if not isinstance(self.blocks, nn.ModuleList):
            x = self.blocks(x)
        else:
            H, W = x.shape[2:]
            windows = [b for b in self.modules() if isinstance(b, AttentionBlock)]
            step = max(b.attn.pos_emb_funct.window for b in windows) * max(b.sr_ratio for b in windows)
            if H % step or W % step:
                x = F.interpolate(x, size=(H + -H % step, W + -W % step), mode="nearest")
            for block in self.blocks:
                x = block(x)
            if x.shape[2:] != (H, W):
                x = F.interpolate(x, size=(H, W), mode="nearest")
        return (x if self.downsample is None else self.downsample(x)), x


class NeckProjection(nn.Module):
    def __init__(self, dim: int, width: int, ratio: int):
        super().__init__()
        self.ratio = ratio
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.ratio > 1:
            x = F.interpolate(x, scale_factor=self.ratio, mode="nearest")
        return self.conv2(self.norm(self.conv1(x)))


class Neck(nn.Module):
    def __init__(self, state: Mapping[str, Tensor], prefix: str):
        super().__init__()
        projections = f"{prefix}neck_features_proj."
        self.neck_features_proj = nn.ModuleList(
            NeckProjection(
                state[f"{projections}{i}.conv1.weight"].shape[0], state[f"{projections}{i}.conv2.weight"].shape[0], 2**i
            )
            for i in range(children(state, projections))
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        used = maps[-len(self.neck_features_proj) :]
        return sum(project(x) for project, x in zip(self.neck_features_proj, used, strict=True))


class PlainERADIO(nn.Module):
    """Image (B, 3, H, W), normalised → (summary (B, F), features (B, H/16·W/16, F)).

    `state`: the checkpoint's `base_model.` tensors (shapes are enough), whose structure is taken.
    """

    def __init__(self, state: Mapping[str, Tensor]):
        super().__init__()
        self.patch_embed = nn.Module()
        weights = [state[f"patch_embed.conv_down.{i}.conv.weight"] for i in (0, 2)]
        self.shuffle = math.isqrt(weights[0].shape[1] // 3)
        strides = {1: (2, 2), 2: (2, 1), 4: (1, 1)}[self.shuffle]
        stem = [ConvBN(weight, stride, nn.ReLU()) for weight, stride in zip(weights, strides, strict=True)]
        self.patch_embed.conv_down = nn.Sequential(stem[0], nn.Identity(), stem[1])
        dim = len(weights[1])
        self.levels = nn.ModuleList(Level(state, f"levels.{i}.", dim << i) for i in range(children(state, "levels.")))
        self.high_res_neck = Neck(state, "high_res_neck.")

    def change_window_size(self, window: int) -> None:
        for module in self.modules():
            if isinstance(module, PositionBias):
                module.window = window

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = self.patch_embed.conv_down(F.pixel_unshuffle(image, self.shuffle))
        maps = []
        for level in self.levels:
            x, kept = level(x)
            maps.append(kept)
        features = self.high_res_neck(maps).flatten(2).transpose(1, 2)
        return features.mean(1), features
