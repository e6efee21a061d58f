from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from radio_fast import ops
from radio_fast.layers.cache import TensorCache, state_of
from radio_fast.layers.conditioner import InputConditioner
from radio_fast.layers.packing import Packing
from radio_fast.ops._state import cacheable


class PrefixTokens(nn.Module):
    """cls tokens and registers, (P, D)."""

    def __init__(self, num_tokens: int, dim: int):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(num_tokens, dim))


class PatchGenerator(nn.Module):
    """Image (or packed patches) → (B, P + T, D): patch projection, position by the CPE rule, prefix tokens in front.

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
        return self._positions([(h, w)], dtype)[0]

    def _positions(self, sizes: Sequence[tuple[int, int]], dtype: torch.dtype | None) -> list[Tensor]:
        """`positions` of each size; those that are not there yet by one launch."""
        table = self.pos_embed
        dtype = dtype or table.dtype
        if not cacheable(table):
            return self._resized(sizes, dtype)
        stamp = state_of(table)
        keys = [(h, w, dtype, table.device) for h, w in sizes]
        found = {key: self._pos_cache.get(key, stamp) for key in keys}
        missing = [key for key in keys if found[key] is None]
        if missing:
            with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not be used under autograd
                made = self._resized([key[:2] for key in missing], dtype)
                if len(made) > 1:  # each is kept, and freed, for itself
                    made = [pos.clone() for pos in made]
            for key, pos in zip(missing, made, strict=True):
                self._pos_cache.put(key, stamp, pos)
                found[key] = pos
        return [found[key] for key in keys]

    def _resized(self, sizes: Sequence[tuple[int, int]], dtype: torch.dtype) -> list[Tensor]:
        pos = ops.pos_embed_varlen(self.pos_embed[0], [*sizes], self.resize_square, backend=self.backend).to(dtype)
        return [pos] if len(sizes) == 1 else [*pos.split([h * w for h, w in sizes])]

    def forward(
        self,
        image: Tensor,
        conditioner: nn.Module | None = None,
        dtype: torch.dtype | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """`dtype`: of the result, and what is computed in; the weights' own if None.

        `packing`: of `image`, the patches (ΣT, 3, p, p) of several images, → (1, Σ(P + T), D).
        """
        mean = std = None
        if isinstance(conditioner, InputConditioner):
            mean, std = conditioner.norm_mean, conditioner.norm_std
        elif conditioner is not None:
            image = conditioner(image)
        weight, bias, prefix = self.embedder.weight, self.embedder.bias, self.cls_token.token
        if packing is None:
            h, w = (side // self.patch_size for side in image.shape[2:])
            pos = self.positions(h, w, dtype)
        else:
            parts = self._positions(packing.sizes, dtype)
            pos = parts[0] if len(parts) == 1 else torch.cat(parts)
        if dtype is not None and dtype != weight.dtype:
            weight, bias, prefix = (None if t is None else t.to(dtype) for t in (weight, bias, prefix))
        args = image, weight, bias, pos, prefix, self.patch_size, mean, std
        if packing is None:
            return ops.patch_embed(*args, backend=self.backend)
        return ops.patch_embed(*args, packing.rows, packing.tokens.cu_seqlens, backend=self.backend).unsqueeze(0)
