"""The operations a RADIO model is made of, as functions of tensors.

Each takes `backend`: "reference" is plain PyTorch, the truth that every kernel is held against; "triton" the kernel;
"auto" chooses (`_dispatch.choose`).
"""

from radio_fast.ops.attention import attention
from radio_fast.ops.blend import blend
from radio_fast.ops.linear import linear, linear_add_norm, ln_linear
from radio_fast.ops.linear_int8 import linear_int8, pack_int8, quantise, unpack_int8
from radio_fast.ops.norm import add_layer_norm, add_norm_stats, dynamic_tanh, layer_norm, norm_stats
from radio_fast.ops.patch_embed import patch_embed
from radio_fast.ops.pos_embed import pos_embed, pos_embed_varlen
from radio_fast.ops.window_attention import padded_bias, window_attention

__all__ = [
    "add_layer_norm",
    "add_norm_stats",
    "attention",
    "blend",
    "dynamic_tanh",
    "layer_norm",
    "linear",
    "linear_add_norm",
    "linear_int8",
    "ln_linear",
    "norm_stats",
    "pack_int8",
    "padded_bias",
    "patch_embed",
    "pos_embed",
    "pos_embed_varlen",
    "quantise",
    "unpack_int8",
    "window_attention",
]
