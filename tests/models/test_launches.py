"""How many kernels a forward launches, and that nothing but kernels of the forward runs: no cast, no copy."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import radio_fast
from radio_fast.ops import _dispatch
from radio_fast.ops._dispatch import OPS
from tests.conftest import golden_source

pytest.importorskip("triton")

# What only makes another view of the same memory, or memory without a value.
NO_LAUNCH = {
    "alias", "as_strided", "chunk", "detach", "empty", "empty_like", "expand", "new_empty", "permute", "reshape",
    "_reshape_alias", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind",
    "unflatten", "unsqueeze", "_unsafe_view", "view", "flatten",
}  # fmt: skip
CASES = ["vit_h16", "vit_so400m16", "vit_l16_half", "dinov2_g14", "vit_g16_scaled_ln"]


class Launches(TorchDispatchMode):
    """The operators that are called, by name: each is one kernel, ours as PyTorch's, but for views."""

    transparent = True

    def __init__(self):
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in NO_LAUNCH:
            self.seen[name] += 1
        return func(*args, **kwargs or {})


@pytest.fixture
def shipped(monkeypatch):
    """The shipped choices of a GPU, on the CPU: cuBLAS where there is no epilogue, our kernels for the rest."""
    monkeypatch.setattr(_dispatch, "accelerated", lambda device: True)
    monkeypatch.setenv("RADIO_FAST_TUNE", "0")
    for op in OPS.values():
        monkeypatch.setattr(op, "_rankings", {})


def launches(model, x, **options) -> Counter[str]:
    with torch.inference_mode():
        model(x, **options)  # positions and casts are computed once
        with Launches() as mode:
            model(x, **options)
    return mode.seen


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_seven_a_block(case, dtype, shipped):
    """qkv, attention, proj, add + norm, expand + activation, contract, add + norm."""
    model = radio_fast.load(golden_source(case), dtype=dtype, cuda_graphs=False)
    p = model.patch_size
    seen = launches(model, torch.rand(1, 3, 2 * p, 3 * p))
    depth, final_norm = len(model.blocks), int(isinstance(model.model.norm, radio_fast.layers.norm.LayerNorm))
    assert seen == Counter(
        attention=depth,
        add_layer_norm=2 * depth - 1,
        linear=4 * depth,
        layer_norm=1 + final_norm,
        patch_embed=1,
        cat=1,  # the summary's tokens
    )


def test_windowed_blocks(shipped):
    """ViTDet: the prefix tokens are put aside and back where the windows change, not in every block."""
    model = radio_fast.load(golden_source("vit_b16_vitdet"), vitdet_window_size=2, dtype="float16", cuda_graphs=False)
    seen = launches(model, torch.rand(1, 3, 64, 64))
    depth, windowed = len(model.blocks), model.model.windowed
    changes = sum((i in windowed) != (i - 1 in windowed) for i in range(depth))
    back = sum(i not in windowed and i - 1 in windowed for i in range(depth))
    assert back and seen["cat"] == back + 1
    assert seen["attention"] == depth
    assert seen.total() <= 7 * depth + changes + back + 3
