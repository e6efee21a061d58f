from __future__ import annotations

import torch
from torch import Tensor, nn

from radio_fast import ops
from radio_fast.layers.cache import TensorCache
from radio_fast.layers.conditioner import InputConditioner
from radio_fast.ops._state import cacheable


class PrefixTokens(nn.Module):
    """cls tokens and registers, (P, D)."""

    def __init__(self, num_tokens: int, dim: int):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(num_tokens, dim))


class PatchGenerator(nn.Module):
    """Image → (B, P + T, D): patch projection, position by the CPE rule, prefix tokens in front.

    `resize_square=False` and `fixed_size=True` are the two exceptions to the CPE rule: a table already at the
    architecture's own image size, and a plain ViT whose image size can't change.
    """

    backend = "auto"

    def __init__(
        self,
        embed_dim: int,
        patch_size: int,
        num_positions: int,
        num_prefix: int,
        bias: bool = False,
        resize_square: bool = True,
        fixed_size: bool = False,
    ):
        super().__init__()
        self.patch_size = patch_size
        self.resize_square = resize_square
        self.fixed_size = fixed_size
        self.embedder = nn.Linear(3 * patch_size**2, embed_dim, bias=bias)
        self.pos_embed = nn.Parameter(torch.zeros(1, num_positions, embed_dim))
        self.cls_token = PrefixTokens(num_prefix, embed_dim)
        self._pos_cache = TensorCache(128 << 20)

    @property
    def num_prefix(self) -> int:
        return self.cls_token.token.shape[0]

    @property
    def grid_side(self) -> int:
        """R: the position table has R × R entries."""
        return round(self.pos_embed.shape[1] ** 0.5)

    def _apply(self, fn, recurse=True):
        self._pos_cache.clear()
        return super()._apply(fn, recurse)

    def positions(self, h: int, w: int, dtype: torch.dtype | None = None) -> Tensor:
        """(h·w, D) in `dtype` (the table's if None), computed once per size while the table stays as it is."""
        table = self.pos_embed
        dtype = dtype or table.dtype
        if not cacheable(table):
            return ops.pos_embed(table[0], h, w, self.resize_square, backend=self.backend).to(dtype)
        key, stamp = (h, w, dtype, table.device), (table.data_ptr(), table._version)
        pos = self._pos_cache.get(key, stamp)
        if pos is None:
            with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not be used under autograd
                pos = ops.pos_embed(table[0], h, w, self.resize_square, backend=self.backend).to(dtype)
            self._pos_cache.put(key, stamp, pos)
        return pos

    def forward(self, image: Tensor, conditioner: nn.Module | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """`dtype`: of the result, and what is computed in; the weights' own if None."""
        mean = std = None
        if isinstance(conditioner, InputConditioner):
            mean, std = conditioner.norm_mean, conditioner.norm_std
        elif conditioner is not None:
            image = conditioner(image)
        h, w = (side // self.patch_size for side in image.shape[2:])
        weight, bias, prefix = self.embedder.weight, self.embedder.bias, self.cls_token.token
        pos = self.positions(h, w, dtype)
        if dtype is not None and dtype != weight.dtype:
            weight, bias, prefix = (None if t is None else t.to(dtype) for t in (weight, bias, prefix))
        return ops.patch_embed(image, weight, bias, pos, prefix, self.patch_size, mean, std, backend=self.backend)
