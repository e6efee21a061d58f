from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Deferred:
    """A tensor of a known shape, made of stored ones when it is wanted: folded weights never exist all at once."""

    def __init__(self, shape: tuple[int, ...], make: Callable[..., Tensor], *sources: Tensor):
        self.shape = torch.Size(shape)
        self.make = make
        self.sources = sources

    @property
    def dtype(self) -> torch.dtype:
        """What the file stores it as."""
        return self.sources[0].dtype

    def numel(self) -> int:
        return self.shape.numel()

    @classmethod
    def then(
        cls, value: Tensor | Deferred, shape: tuple[int, ...], change: Callable[..., Tensor], *others: Tensor
    ) -> Deferred:
        """change(value, *others), once it is wanted."""
        if not isinstance(value, Deferred):
            return cls(shape, change, value, *others)
        count = len(value.sources)
        return cls(shape, lambda *s: change(value.make(*s[:count]), *s[count:]), *value.sources, *others)

    def __call__(self) -> Tensor:
        return self.make(*self.sources)
