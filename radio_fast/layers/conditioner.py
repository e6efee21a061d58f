from __future__ import annotations

import torch
from torch import Tensor, nn

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class InputConditioner(nn.Module):
    """(x − norm_mean) / norm_std in float32.

    x is (..., 3, H, W) in [0, 1]. `.half()` and `.to(dtype)` leave the two buffers in float32: rounded, they would
    shift every pixel by up to 2⁻¹² of its value before the model has begun.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("norm_mean", torch.tensor(CLIP_MEAN).view(3, 1, 1))
        self.register_buffer("norm_std", torch.tensor(CLIP_STD).view(3, 1, 1))

    def _apply(self, fn, recurse=True):
        mean, std = self.norm_mean, self.norm_std
        super()._apply(fn, recurse)
        if self.norm_mean.dtype != torch.float32:
            self.norm_mean, self.norm_std = (t.to(self.norm_mean.device, torch.float32) for t in (mean, std))
        return self

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() - self.norm_mean) / self.norm_std
