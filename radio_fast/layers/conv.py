from __future__ import annotations

import torch
from torch import Tensor, nn

from radio_fast.layers.cache import TensorCache, state_of
from radio_fast.ops import conv


class Conv(nn.Conv2d):
    """act(conv(x) + bias), x a map (B, H, W, C), padded to the same size (divided by `stride`).

    (B, H, W, C) is torch's channels-last format seen from its own side: the views cost nothing, and the linear layers
    and norms between convolutions read the same memory. The weight has that format too: else torch would bring it into
    it in every call. On a CPU a copy of the weight in oneDNN's own layout is kept, as long as the weight stays what it
    is.
    """

    backend = "auto"
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
        self._cache = TensorCache(2 * self.weight.nbytes)  # small images have layouts of their own

    def _apply(self, fn, recurse=True):
        self._cache.clear()
        return super()._apply(fn, recurse)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if conv.packs(x, weight, bias, self.backend):
            bias = None if bias is None else bias.to(x.dtype)
            (stride, _), (kernel, _) = self.stride, self.kernel_size
            return conv.packed_conv(x, self._packed(x), bias, kernel, stride, self.groups, self.activation)
        if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        y = self._conv_forward(x.permute(0, 3, 1, 2), weight, bias)
        return conv.ACTIVATIONS[self.activation](y).permute(0, 2, 3, 1)

    def _packed(self, x: Tensor) -> Tensor:
        weight = self.weight
        stamp = state_of(weight)
        key = conv.shape_key(x, weight, self.stride[0], self.groups)
        layout = conv.layout_of(key)
        packed = None if layout is None else self._cache.get((x.dtype, layout), stamp)
        if packed is None:
            packed, layout = conv.pack(weight, key)
            self._cache.put((x.dtype, layout), stamp, packed)
        return packed
