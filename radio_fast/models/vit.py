"""The whole ViT forward of RADIO, plain and in ViTDet mode."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, cat, nn
from torch.nn.modules.module import _has_any_global_hook

from radio_fast.layers import cpu_block
from radio_fast.layers.attention import Attention
from radio_fast.layers.block import Block, call, call_rowwise
from radio_fast.layers.mlp import Mlp, SwiGLU, untouched
from radio_fast.layers.norm import DynamicTanh, LayerNorm
from radio_fast.layers.packing import Packing, Segments
from radio_fast.layers.patch_embed import PatchGenerator
from radio_fast.models.backbone import Backbone
from radio_fast.models.registry import ViTDet
from radio_fast.models.spec import ViTSpec
from radio_fast.ops._dispatch import CPU_DTYPES


def make_norm(spec: ViTSpec, block: int | None = None) -> nn.Module:
    """A norm of this model; `block` (from 0) sets the 1/√i of `scaled_ln`, where i counts from 1."""
    scale = (block + 1) ** -0.5 if spec.scaled_ln and block is not None else 1.0
    return DynamicTanh(spec.embed_dim, scale) if spec.dynamic_tanh else LayerNorm(spec.embed_dim, 1e-6, scale)


def make_block(spec: ViTSpec, index: int) -> Block:
    D = spec.embed_dim
    mlp = SwiGLU(D, spec.mlp_hidden) if spec.swiglu else Mlp(D, spec.mlp_hidden, spec.mlp_norm)
    attn = Attention(D, spec.num_heads, spec.qkv_bias)
    return Block(make_norm(spec, index), attn, make_norm(spec, index), mlp)


def windowed_blocks(depth: int, rule: ViTDet) -> frozenset[int]:
    """The blocks (from 0) that attend inside windows in ViTDet mode.

    With period q, block i switches to windows where i mod q = 0 and to global attention where i mod q = q − 1; the last
    block is always global (Li et al., 2022).

    Raises:
        ValueError: the period would be 1, where every block would switch both ways.
    """
    period = rule.num_windowed + 1 if rule.num_windowed is not None else max(depth // (rule.num_global or 4), 1)
    if period < 2:
        raise ValueError(
            f"ViTDet mode needs at least one windowed block before each global one: {depth} blocks with {rule} leave "
            f"none; use a smaller num_global or num_windowed ≥ 1"
        )
    return frozenset(i for i in range(depth - 1) if i % period != period - 1)


def _put_back(prefix: Tensor, patches: Tensor) -> Tensor:
    return cat([prefix, patches], dim=1)


class VisionTransformer(Backbone):
    """Image (B, 3, H, W) → tokens (B, P + T, D): P prefix tokens, then T = H/p · W/p patches row by row."""

    def __init__(self, spec: ViTSpec):
        super().__init__()
        self.spec = spec
        self.embed_dim = spec.embed_dim
        self.num_prefix = spec.num_prefix
        self.summary_tokens = spec.summary_idxs
        self.only_size = spec.grid_side * spec.patch_size if spec.fixed_size else None
        self.windowed: frozenset[int] = frozenset()
        self.patch_generator = PatchGenerator(
            spec.embed_dim,
            spec.patch_size,
            spec.num_positions,
            spec.num_prefix,
            bias=spec.patch_bias,
            resize_square=spec.resize_square,
            fixed_size=spec.fixed_size,
        )
        self.blocks = nn.ModuleList(make_block(spec, i) for i in range(spec.depth))
        self.norm = make_norm(spec) if spec.final_norm else nn.Identity()

    def set_vitdet(self, window_size: int, rule: ViTDet) -> None:
        """Attend inside `window_size` × `window_size` patches in all blocks but the global ones of `rule`."""
        if isinstance(window_size, bool) or not isinstance(window_size, int) or window_size < 1:
            raise ValueError(f"vitdet_window_size must be a positive number of patches, got {window_size!r}")
        self.windowed = windowed_blocks(len(self.blocks), rule)
        self.window_size = window_size

    @property
    def min_resolution_step(self) -> int:
        return self.spec.patch_size * (self.window_size or 1)

    @property
    def step_reason(self) -> str:
        why = f"patch size {self.spec.patch_size}"
        return f"{why} × ViTDet window {self.window_size}" if self.window_size else why

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return tokens[:, : self.num_prefix], tokens[:, self.num_prefix :]

    def run_blocks(
        self, x: Tensor, h: int, w: int, last: int | None = None, visit: Callable[[int, Tensor], None] | None = None
    ) -> Tensor:
        """Blocks 0…last on x (B, P + T, D); `visit(i, tokens)` sees the tokens after each block.

        While blocks attend inside windows, the prefix tokens are set aside and pass unchanged.
        """
        return self._run(x, None, (h, w, self.window_size), self.split, _put_back, last, visit)

    def run_packed(self, x: Tensor, packing: Packing) -> Tensor:
        """All blocks on x (1, Σ(P + T), D), the tokens of images of several sizes.

        While blocks attend inside windows, they get a batch of these, and the tokens in one row are set aside.
        """
        return self._run(x, packing.tokens, None, lambda x: (x, packing.windows(x)), packing.put_back)

    def _alike(self, first: int, last: int) -> list[Block]:
        """The blocks from `first` on, at most to `last`, that take the same tokens, all of them as they were made."""
        alike = []
        for i in range(first, last + 1):
            block = self.blocks[i]
            if (i in self.windowed) != (first in self.windowed) or not untouched(block, Block) or block.fuse_norm:
                break
            alike.append(block)
        return alike

    def _run(
        self,
        x: Tensor,
        everywhere: Segments | None,
        inside: tuple[int, int, int] | None,
        part: Callable[[Tensor], tuple[Tensor, Tensor]],
        put_back: Callable[[Tensor, Tensor], Tensor],
        last: int | None = None,
        visit: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """The blocks with `window` = everywhere, or inside on the second part of x if they are windowed."""
        last = len(self.blocks) - 1 if last is None else last
        called = not torch.compiler.is_compiling() and _has_any_global_hook()  # whoever hooks all modules sees blocks
        in_one_call = visit is None and x.is_cpu and x.dtype in CPU_DTYPES and not torch.compiler.is_compiling()
        aside = normed = None
        i = 0
        while i <= last:
            block, windowed = self.blocks[i], i in self.windowed
            if windowed and aside is None:
                aside, x = part(x)
            elif aside is not None and not windowed:
                aside, x = None, put_back(aside, x)
            window = inside if windowed else everywhere
            alike = [] if called else self._alike(i, last if in_one_call else min(i + 1, last))
            whole = cpu_block.run(alike, x, normed, None, window) if in_one_call and alike else None
            if whole is not None:
                x, normed, count = whole
            elif alike:
                after = alike[1].norm1 if len(alike) > 1 else None
                (x, normed), count = block.step(x, normed, after, window), 1
            else:
                x, normed, count = call(block, x, window), None, 1
            if visit is not None:
                visit(i, x if aside is None else put_back(aside, x))
            i += count
        return x if aside is None else put_back(aside, x)

    def forward(
        self,
        image: Tensor,
        conditioner: nn.Module | None = None,
        dtype: torch.dtype | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """`packing`: of `image`, the patches (ΣT, 3, p, p) of several images, → (1, Σ(P + T), D)."""
        if packing is not None:
            x = self.run_packed(self.patch_generator(image, conditioner, dtype, packing), packing)
            return call_rowwise(self.norm, x, packing.tokens, LayerNorm, DynamicTanh, nn.Identity)
        x = self.patch_generator(image, conditioner, dtype)
        return self.norm(self.run_blocks(x, *self.grid(image)))
