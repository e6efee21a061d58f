"""What `RADIOModel` asks of a network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from radio_fast.layers.block import Block
from radio_fast.layers.linear_int8 import LinearInt8
from radio_fast.layers.norm import LayerNorm
from radio_fast.ops._dispatch import backend_of_ops


class Backbone(nn.Module):
    """Image (B, 3, H, W) → tokens (B, N, D), which `split` parts into prefix tokens and features.

    Called with an image, the conditioner to apply to it (or None), and the dtype to compute in: the weights' own if
    None, else they are cast as they are used. `summary_tokens`: which of the prefix tokens make up the summary.
    """

    embed_dim: int
    summary_tokens: tuple[int, ...]
    window_size: int | None = None  # of ViTDet, in patches
    only_size: int | None = None  # a side in pixels, where images can have no other

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def min_resolution_step(self) -> int:
        """The pixels that an image's sides must be multiples of."""
        raise NotImplementedError

    @property
    def step_reason(self) -> str:
        """Why, for the error's text."""
        raise NotImplementedError

    def autocast_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What the tokens are in under PyTorch's autocast to `dtype`: a residual stream that begins with positions."""
        return torch.promote_types(next(self.parameters()).dtype, dtype)

    def check_move(self, fn) -> None:
        """Refuse an `_apply` that a part can't follow, before any other has."""
        for module in self.modules():
            if isinstance(module, LinearInt8):
                module.check_move(fn)

    def _apply(self, fn, recurse=True):
        self.check_move(fn)
        return super()._apply(fn, recurse)

    def grid(self, image: Tensor) -> tuple[int, int]:
        """(h, w): the rows and columns of features that an image has."""
        p = self.spec.patch_size
        return image.shape[2] // p, image.shape[3] // p

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(prefix tokens (B, P, D), features (B, h·w, D))."""
        raise NotImplementedError

    def set_backend(self, backend: str, fuse_norm: bool = False) -> None:
        """Which implementation of the ops the layers ask for; `fuse_norm`: LayerNorm inside the linears after it."""
        backend = backend_of_ops(backend)
        for module in self.modules():
            if hasattr(module, "backend"):
                module.backend = backend
            if isinstance(module, Block):
                module.fuse_norm = fuse_norm and isinstance(module.norm1, LayerNorm)
