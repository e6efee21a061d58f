"""Whole tiny models with every op forced to its Triton kernel: the golden outputs."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import radio_fast
from tests.conftest import GOLDEN, golden_source
from tests.numerics import GOLDEN_RTOL, assert_relative, assert_tokens

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("nearest_bfloat16")

# Sizes cut to what the interpreter does in seconds: the first call of each case.
CASES = ["vit_h16", "vit_so400m16", "vit_l16_half", "dinov2_g14", "vit_g16_scaled_ln", "vit_b16_vitdet", "eradio_small"]


@pytest.fixture
def launched(monkeypatch):
    """The names of the operators that ran."""
    from radio_fast.ops._dispatch import Op

    seen = set()
    choose = Op.choose

    def record(op, *args):
        backend = choose(op, *args)
        if backend == "triton":
            seen.add(op.name)
        return backend

    monkeypatch.setattr(Op, "choose", record)
    return seen


def load(case: str, device: str, fuse_norm: bool, **options) -> radio_fast.RADIOModel:
    model = radio_fast.load(golden_source(case), backend="triton", device=device, **options)
    model.model.set_backend("triton", fuse_norm=fuse_norm)
    return model


@pytest.mark.parametrize("fuse_norm", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("case", CASES)
def test_golden(case, fuse_norm, device, poison, launched):
    stored = load_file(GOLDEN / case / "io.safetensors")
    model = load(case, device, fuse_norm, vitdet_window_size=2 if case == "vit_b16_vitdet" else None)
    x = (stored["0.image"].float() / 255).to(device)
    if case == "eradio_small":
        model.model.set_optimal_window_size(x.shape[2:])
    summary, features = model(x)
    assert_relative(features.cpu(), stored["0.out.features"], GOLDEN_RTOL[torch.float32])
    assert_relative(summary.cpu(), stored["0.out.summary"], GOLDEN_RTOL[torch.float32])
    norms = {"norm_stats", "add_norm_stats", "ln_linear"} if fuse_norm else {"layer_norm", "add_layer_norm"}
    if case == "dinov2_g14":
        norms |= {"layer_norm"}  # its final norm stands alone
    eradio = {"window_attention", "blend"}
    vit = {"patch_embed", "pos_embed", "attention"}
    assert launched == norms | {"linear"} | (eradio if case == "eradio_small" else vit)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fuse_norm", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("case", ["vit_h16", "eradio_small"])
def test_half_precision(case, dtype, fuse_norm, device, poison):
    options = {"window_size": "optimal"} if case == "eradio_small" else {}
    truth_model = radio_fast.load(golden_source(case), backend="reference", **options)
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    truth = truth_model(x)
    summary, features = load(case, device, fuse_norm, dtype=dtype, **options)(x.to(device))
    assert features.dtype == dtype
    assert_tokens(features.cpu(), truth.features)
    S = len(truth_model.model.summary_tokens)
    assert_tokens(summary.cpu().view(1, S, -1), truth.summary.view(1, S, -1))
