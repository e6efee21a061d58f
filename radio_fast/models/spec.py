"""What a ViT checkpoint's tensors and arguments say about its structure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from radio_fast.models.registry import ARCHS, Arch, Version


@dataclass(frozen=True)
class ViTSpec:
    """Everything that shapes a RADIO ViT. Widths and depths are read from tensors, the rest from arguments."""

    arch: str
    embed_dim: int
    depth: int
    num_heads: int
    mlp_hidden: int
    patch_size: int
    num_positions: int
    num_cls_tokens: int = 1
    num_registers: int = 0
    summary_idxs: tuple[int, ...] = (0,)
    image_size: int | None = 224
    fixed_size: bool = False  # no CPE: one image size only
    swiglu: bool = False
    mlp_norm: bool = False
    dynamic_tanh: bool = False
    scaled_ln: bool = False
    final_norm: bool = False
    qkv_bias: bool = True
    patch_bias: bool = False

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads must divide the width {self.embed_dim} of {self.arch}, got {self.num_heads}")
        if self.grid_side**2 != self.num_positions:
            raise ValueError(f"the position table must be square, got {self.num_positions} entries")
        if not self.summary_idxs or not all(0 <= i < self.num_prefix for i in self.summary_idxs):
            raise ValueError(
                f"summary indices must be one or more prefix tokens, 0…{self.num_prefix - 1}, got {self.summary_idxs}"
            )

    @property
    def num_prefix(self) -> int:
        return self.num_cls_tokens + self.num_registers

    @property
    def grid_side(self) -> int:
        """R: the position table has R × R entries."""
        return math.isqrt(self.num_positions)

    @property
    def resize_square(self) -> bool:
        """Whether positions are resized to a square first: always, but for tables at the arch's own image size."""
        return self.image_size is None or self.grid_side * self.patch_size != self.image_size


def spec_of_version(version: Version) -> ViTSpec:
    """The full-size structure of a released version, for random weights."""
    arch = ARCHS[version.arch]
    num_cls, num_registers, summary_idxs = version.prefix
    return ViTSpec(
        arch=version.arch,
        embed_dim=arch.embed_dim,
        depth=arch.depth,
        num_heads=arch.num_heads,
        mlp_hidden=arch.mlp_hidden,
        patch_size=arch.patch_size,
        num_positions=(version.max_resolution // arch.patch_size) ** 2,
        num_cls_tokens=num_cls,
        num_registers=num_registers,
        summary_idxs=summary_idxs,
        image_size=arch.image_size,
        swiglu=arch.swiglu,
        mlp_norm=arch.mlp_norm,
        dynamic_tanh=arch.dynamic_tanh,
        final_norm=arch.dino_student,
        patch_bias=arch.dino_student,
    )


def prefix_layout(args: Mapping) -> tuple[int, int, tuple[int, ...]]:
    """(cls tokens, registers, summary indices) from a checkpoint's training arguments."""
    teachers = args.get("teachers") or []
    per_teacher = bool(args.get("cls_token_per_teacher"))
    names = [teacher["name"] for teacher in teachers]
    num_cls = len(set(names)) if per_teacher and names else 1
    num_registers = args.get("cpe_num_registers") or 0
    multiple = args.get("register_multiple")
    if not num_registers and multiple:
        num_registers = multiple - num_cls % multiple
    summary_idxs = (0,)
    if per_teacher and names:
        summary_idxs = tuple(sorted({names.index(t["name"]) for t in teachers if t.get("use_summary", True)}))
    return num_cls, num_registers, summary_idxs


def depth_of(state: Mapping[str, torch.Tensor]) -> int:
    blocks = [int(m[1]) for key in state if (m := re.match(r"blocks\.(\d+)\.", key))]
    return max(blocks, default=-1) + 1


def require(state: Mapping[str, torch.Tensor], key: str) -> torch.Tensor:
    if key not in state:
        raise KeyError(key)
    return state[key]


def spec_of_state(
    state: Mapping[str, torch.Tensor],
    arch_name: str,
    model_kwargs: Mapping,
    model_norm: bool,
    layout: tuple[int, int, tuple[int, ...]],
    fixed_size: bool = False,
) -> ViTSpec:
    """Read the structure off a backbone's tensors (in this package's names).

    Raises:
        KeyError: a tensor that every backbone has is missing; its name is the error's argument.
        ValueError: the tensors contradict each other or the arguments.
    """
    arch: Arch | None = ARCHS.get(arch_name)
    num_heads = model_kwargs.get("num_heads") or (arch.num_heads if arch else None)
    if num_heads is None:
        raise ValueError(
            f"unknown architecture {arch_name!r} without model_kwargs.num_heads (the head count is in no tensor's "
            f"shape). Known architectures: {', '.join(ARCHS)}"
        )
    embedder = require(state, "patch_generator.embedder.weight")
    patch_size = math.isqrt(embedder.shape[1] // 3)
    if 3 * patch_size**2 != embedder.shape[1]:
        raise ValueError(f"the patch projection must take 3·p·p features, got {embedder.shape[1]}")
    embed_dim = embedder.shape[0]

    depth = depth_of(state)
    expected = model_kwargs.get("depth") or (arch.depth if arch and embed_dim == arch.embed_dim else depth)
    if depth < expected or not depth:
        raise KeyError(f"blocks.{depth}.norm1.weight")

    swiglu = "blocks.0.mlp.w12.weight" in state
    hidden = require(state, "blocks.0.mlp.w3.weight" if swiglu else "blocks.0.mlp.fc2.weight").shape[1]
    num_cls, num_registers, summary_idxs = layout
    student = bool(arch and arch.dino_student)
    return ViTSpec(
        arch=arch_name,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        mlp_hidden=hidden,
        patch_size=patch_size,
        num_positions=require(state, "patch_generator.pos_embed").shape[1],
        num_cls_tokens=num_cls,
        num_registers=num_registers,
        summary_idxs=(0,) if student else summary_idxs,
        image_size=arch.image_size if arch else (224 if arch_name.endswith("_224") else None),
        fixed_size=fixed_size,
        swiglu=swiglu,
        mlp_norm="blocks.0.mlp.norm.weight" in state,
        dynamic_tanh="blocks.0.norm1.alpha" in state,
        scaled_ln=bool(model_kwargs.get("scaled_ln")),
        final_norm=student or bool(model_norm),
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        patch_bias="patch_generator.embedder.bias" in state,
    )
