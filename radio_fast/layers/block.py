from __future__ import annotations

from torch import Tensor, nn

from radio_fast import ops
from radio_fast.layers import cpu_block
from radio_fast.layers.attention import Attention
from radio_fast.layers.mlp import Mlp, SwiGLU, add_norm, untouched
from radio_fast.layers.norm import DynamicTanh, LayerNorm
from radio_fast.layers.packing import Segments


class Block(nn.Module):
    """x += attn(norm1 x); x += mlp(norm2 x), x of shape (B, N, D), or a map (B, H, W, D). LayerScale is in the weights.

    Blocks one after another, by `step`, take seven launches each: qkv, attention, proj and expand with its activation,
    contract, and the residual with the next norm in one pass, twice; or the residual in the product and the norm on its
    own (`ops.linear_add_norm`). On a CPU they are one call (`cpu_block`). With `fuse_norm` the two norms move into the
    linear layers after them, and row statistics take their place.
    """

    fuse_norm = False

    def __init__(
        self, norm1: LayerNorm | DynamicTanh, attn: Attention, norm2: LayerNorm | DynamicTanh, mlp: Mlp | SwiGLU
    ):
        super().__init__()
        self.norm1 = norm1
        self.attn = attn
        self.norm2 = norm2
        self.mlp = mlp

    def forward(
        self,
        x: Tensor,
        window: tuple[int, int, int] | Segments | int | None = None,
        branch: Tensor | None = None,
    ) -> Tensor:
        """`window`: what `attn.mix` takes. `branch`: added to x first, in the pass that normalises."""
        if self.fuse_norm:
            return self._forward_fused(x, window, branch)
        normed = None
        if branch is not None and untouched(self.norm1, LayerNorm):
            x, normed = self.norm1.after_add(x, branch)
        elif branch is not None:
            x = x + branch
        return self.step(x, normed, None, window)[0]

    def step(
        self,
        x: Tensor,
        normed: Tensor | None,
        after: LayerNorm | DynamicTanh | None,
        window: tuple[int, int, int] | Segments | int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(the block's output, `after` of it: the next block's norm1, or None).

        `normed`: norm1 of x, where the block before has made it.
        """
        whole = cpu_block.run((self,), x, normed, after, window)
        if whole is not None:
            x, normed, _ = whole
            return x, after(x) if normed is None and after is not None else normed
        y = self.norm1(x) if normed is None else normed
        y = self.attn.mix(self.attn.qkv(y), window)
        x, y = add_norm(self.attn.proj, y, x, self.norm2)
        return self.mlp.contract(self.mlp.expand(y), x, after)

    def _forward_fused(self, x: Tensor, window, branch: Tensor | None) -> Tensor:
        backend = self.norm1.backend
        if branch is None:
            mean, rstd = ops.norm_stats(x, self.norm1.eps, backend=backend)
        else:
            x, mean, rstd = ops.add_norm_stats(x, branch, None, self.norm1.eps, backend=backend)
        y = self.attn.proj(self.attn.mix(self.attn.qkv.after_norm(x, mean, rstd, self.norm1), window))
        x, mean, rstd = ops.add_norm_stats(x, y, None, self.norm2.eps, backend=backend)
        return self.mlp.contract(self.mlp.expand.after_norm(x, mean, rstd, self.norm2), x, None)[0]


def call(block: nn.Module, x: Tensor, window: tuple[int, int, int] | Segments | None) -> Tensor:
    """block(x, window), where what stands in the block's place, or around it, may know nothing of packed images."""
    if window is None:
        return block(x)
    if isinstance(window, Segments) and not untouched(block, Block):
        return window.apart(block, x)
    return block(x, window)


def call_rowwise(module: nn.Module, x: Tensor, segments: Segments, *kinds: type) -> Tensor:
    """module(x) for images one after another, which only those of `kinds`, as they were made, are sure not to mix."""
    return module(x) if untouched(module, *kinds) else segments.apart(module, x)
