"""Under autocast, kernels in its dtype: on the CPU, with the choices of a GPU."""

from __future__ import annotations

import pytest
import torch

import radio_fast
from radio_fast.ops import _dispatch
from radio_fast.ops._dispatch import OPS, Op
from tests.conftest import golden_source
from tests.numerics import assert_tokens

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("nearest_bfloat16")
CASES = {
    "vit_h16": {},
    "vit_h16 adaptors": {"adaptor_names": ["clip", "sam"]},
    "dinov2_g14": {},
    "vit_b16_vitdet": {"vitdet_window_size": 2},
    "eradio_small": {"window_size": 2},
}


@pytest.fixture
def on_a_gpu(monkeypatch):
    """The dtypes that each op ran in."""
    monkeypatch.setattr(_dispatch, "accelerated", lambda device: True)
    monkeypatch.setenv("RADIO_FAST_TUNE", "0")
    for op in OPS.values():
        monkeypatch.setattr(op, "_rankings", {})
    ran = {}
    choose = Op.choose

    def record(op, backend, args, limits):
        name = choose(op, backend, args, limits)
        ran.setdefault((op.name, name), set()).add(args[1 if op.name == "patch_embed" else 0].dtype)
        return name

    monkeypatch.setattr(Op, "choose", record)
    return ran


def load(case: str, **options) -> tuple[radio_fast.RADIOModel, torch.Tensor]:
    model = radio_fast.load(golden_source(case.split()[0]), **CASES[case], **options)
    step = model.min_resolution_step
    side = max(2 * step, 64 if "eradio" in case else 0)
    return model, torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(3))


def flat(outputs) -> list[torch.Tensor]:
    return [t for pair in (outputs.values() if isinstance(outputs, dict) else [outputs]) for t in pair]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_runs_kernels_in_its_dtype(case, dtype, on_a_gpu):
    model, x = load(case)
    with torch.no_grad():
        truth = model(x)
        model.backend = "reference"
        with torch.autocast("cpu", dtype):
            plain = model(x)
        model.backend = "auto"
        on_a_gpu.clear()
        with torch.autocast("cpu", dtype):
            ours = model(x)
            assert torch.is_autocast_enabled("cpu")
    kernels = {op: dtypes for (op, name), dtypes in on_a_gpu.items() if name == "triton"}
    expected = {"window_attention", "blend"} if "eradio" in case else {"attention", "patch_embed"}
    assert kernels.keys() >= expected | {"linear", "add_layer_norm", "layer_norm"}
    assert all(kernels[op] == {dtype} for op in kernels if op != "pos_embed")
    for a, b, t in zip(flat(ours), flat(plain), flat(truth), strict=True):
        assert a.dtype == b.dtype, "as PyTorch's autocast has it"
        if "adaptors" in case:
            a, b, t = (v.unflatten(-1, (-1, v.shape[-1])) for v in (a, b, t))
        assert_tokens(a, t)
    assert {p.dtype for p in model.parameters()} == {torch.float32}, "the weights are not changed"


def test_16_bit_weights(on_a_gpu):
    """Autocast's dtype wins over the weights'. (PyTorch's own, on the CPU, refuses to mix the two.)"""
    truth = load("vit_h16")[0]
    model, x = load("vit_h16", dtype="float16")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours = model(x)
    assert on_a_gpu["attention", "triton"] == {torch.bfloat16}
    truth.backend = "reference"
    assert_tokens(ours.features, truth(x).features)


def test_intermediates(on_a_gpu):
    model, x = load("vit_h16")
    options = {"indices": [0, 1], "return_prefix_tokens": True, "output_fmt": "NLC", "norm": True}
    with torch.no_grad():
        _, truth = model.forward_intermediates(x, **options)
        with torch.autocast("cpu", torch.bfloat16):
            final, ours = model.forward_intermediates(x, **options)
            model.backend = "reference"
            plain_final, plain = model.forward_intermediates(x, **options)
    for a, b, t in zip(ours, plain, truth, strict=True):
        assert_tokens(a.features, t.features)
        assert a.features.dtype == b.features.dtype
    assert final.features.dtype == plain_final.features.dtype


def test_gradients_are_left_to_torch(on_a_gpu):
    model, x = load("vit_h16")
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        model(x).features.sum().backward()
    assert x.grad.abs().sum() > 0
    model, x = load("vit_h16")
    model.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        model(x).features.sum().backward()
    assert all(p.grad is not None for p in model.blocks.parameters())


def test_on_a_cpu_without_amx_nothing_changes(without_amx):
    """There autocast stays PyTorch's."""
    model, x = load("vit_h16")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours = model(x)
        model.backend = "reference"
        assert torch.equal(ours.features, model(x).features)
