"""The operations a RADIO model is made of, as functions of tensors.

The plain PyTorch forms here are the truth that every kernel is held against.
"""

from radio_fast.ops.attention import attention
from radio_fast.ops.linear import linear
from radio_fast.ops.norm import dynamic_tanh, layer_norm
from radio_fast.ops.patch_embed import patch_embed
from radio_fast.ops.pos_embed import pos_embed

__all__ = ["attention", "dynamic_tanh", "layer_norm", "linear", "patch_embed", "pos_embed"]
