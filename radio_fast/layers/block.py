from __future__ import annotations

from torch import Tensor, nn

from radio_fast import ops
from radio_fast.layers.attention import Attention
from radio_fast.layers.mlp import Mlp, SwiGLU
from radio_fast.layers.norm import DynamicTanh, LayerNorm, LayerScale


class Block(nn.Module):
    """x += ls1·attn(norm1 x); x += ls2·mlp(norm2 x), x of shape (B, N, D), or a map (B, H, W, D).

    Seven launches: norm, qkv, attention, proj, add + norm, expand + activation, contract + add. With `fuse_norm` the
    two norms move into the linear layers after them, and row statistics take their place.
    """

    fuse_norm = False

    def __init__(
        self,
        norm1: LayerNorm | DynamicTanh,
        attn: Attention,
        norm2: LayerNorm | DynamicTanh,
        mlp: Mlp | SwiGLU,
        layer_scale: bool,
    ):
        super().__init__()
        dim = attn.proj.out_features
        self.norm1 = norm1
        self.attn = attn
        self.ls1 = LayerScale(dim) if layer_scale else None
        self.norm2 = norm2
        self.mlp = mlp
        self.ls2 = LayerScale(dim) if layer_scale else None

    def forward(
        self, x: Tensor, window: tuple[int, int, int] | int | None = None, branch: Tensor | None = None
    ) -> Tensor:
        """`window`: what `attn.mix` takes. `branch`: added to x first, in the pass that normalises."""
        ls1, ls2 = (None, None) if self.ls1 is None else (self.ls1.gamma, self.ls2.gamma)
        if self.fuse_norm:
            return self._forward_fused(x, window, branch, ls1, ls2)
        if branch is None:
            y = self.norm1(x)
        else:
            x, y = self.norm1.after_add(x, branch, None)
        y = self.attn.mix(self.attn.qkv(y), window)
        x, y = self.norm2.after_add(x, y, ls1)
        return self.mlp.contract(self.mlp.expand(y), x, ls2)

    def _forward_fused(
        self, x: Tensor, window, branch: Tensor | None, ls1: Tensor | None, ls2: Tensor | None
    ) -> Tensor:
        backend = self.norm1.backend
        if branch is None:
            mean, rstd = ops.norm_stats(x, self.norm1.eps, backend=backend)
        else:
            x, mean, rstd = ops.add_norm_stats(x, branch, None, self.norm1.eps, backend=backend)
        y = self.attn.mix(self.attn.qkv.after_norm(x, mean, rstd, self.norm1), window)
        x, mean, rstd = ops.add_norm_stats(x, y, ls1, self.norm2.eps, backend=backend)
        return self.mlp.contract(self.mlp.expand.after_norm(x, mean, rstd, self.norm2), x, ls2)
