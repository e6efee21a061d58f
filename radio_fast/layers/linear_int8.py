from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from radio_fast import ops

FLOAT_GIVEN = "an int8 model takes int8 weights and their scales: radio_fast.load(…, dtype='int8') makes them of others"


class LinearInt8(nn.Module):
    """residual + act(x·weightᵀ + bias) in int8 (`ops.linear_int8`), for inference on a CPU.

    Buffers `weight`, int8, in the kernel's order (`ops.pack_int8`), and `scale`, (N) float32, of each row: the float
    weight was about unpack_int8(weight, N, K) · scale[:, None]. Both, and the bias, stay what they are under
    `.to(bfloat16)`, the one dtype of such a model.
    """

    backend = "auto"

    def __init__(self, linear: nn.Linear):
        """Of a `Linear`, whose weight it lets go of."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.activation = linear.activation
        weight, scale = ops.quantise(linear.weight.detach())
        if not scale.isfinite().all():
            raise ValueError("a weight with NaN or infinity has no int8 form")
        self.register_buffer("weight", ops.pack_int8(weight.to(torch.int8)))
        self.register_buffer("scale", scale.squeeze(1))
        self.bias = linear.bias
        linear.weight = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.activation != "swiglu":
            return ops.linear_int8(
                x, self.weight, self.scale, self.bias, self.activation, residual, backend=self.backend
            )  # fmt: skip
        a, b = ops.linear_int8(x, self.weight, self.scale, self.bias, backend=self.backend).chunk(2, dim=-1)
        y = F.silu(a) * b
        return y if residual is None else residual + y

    def dequantised(self) -> Tensor:
        """The weight that it computes with, (N, K), float32."""
        return ops.unpack_int8(self.weight, self.out_features, self.in_features) * self.scale.unsqueeze(1)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn, recurse=True):
        self.check_move(fn)
        before = self.scale, None if self.bias is None else self.bias.detach()
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:
            self.scale = before[0].to(self.scale.device)
        if self.bias is not None and self.bias.dtype != torch.float32:
            self.bias.data = before[1].to(self.bias.device)
        return self

    def check_move(self, fn) -> None:
        """Refuse what `.to` would do to it: its dtype is bfloat16, its device a CPU.

        Raises:
            ValueError: `fn` takes it elsewhere.
        """
        probe = fn(torch.empty(0, dtype=torch.bfloat16, device=self.scale.device))
        if probe.dtype != torch.bfloat16:
            raise ValueError(f"an int8 model computes in bfloat16, got {probe.dtype}: load it anew with that dtype")
        if probe.device.type not in ("cpu", "meta"):
            raise ValueError(f"an int8 model is for CPUs, got {probe.device}: load it anew with dtype='bfloat16'")

    def _load_from_state_dict(self, state_dict, prefix, *args):
        given = state_dict.get(f"{prefix}weight")
        if isinstance(given, Tensor) and given.dtype != torch.int8:
            args[-1].append(f"{prefix}weight is {given.dtype}: {FLOAT_GIVEN}")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
