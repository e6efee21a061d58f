from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu}


class Conv(nn.Conv2d):
    """act(conv(x) + bias), x a map (B, H, W, C), padded to the same size (divided by `stride`).

    (B, H, W, C) is torch's channels-last format seen from its own side: the views cost nothing, and the linear layers
    and norms between convolutions read the same memory. The weight has that format too: else torch would bring it into
    it in every call.
    """

    weight_format = torch.channels_last

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        bias: bool = True,
        activation: str | None = None,
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        y = self._conv_forward(x.permute(0, 3, 1, 2), weight, bias)
        if self.activation is not None:
            y = ACTIVATIONS[self.activation](y)
        return y.permute(0, 2, 3, 1)
