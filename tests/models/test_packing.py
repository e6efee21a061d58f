"""What loading makes of the weights: one copy, LayerScale folded, biases in float32."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode

import radio_fast
from radio_fast.layers.mlp import Linear
from radio_fast.models.deferred import Deferred
from radio_fast.models.weights import fold_layer_scale
from radio_fast.ops import _dispatch
from tests.conftest import golden_source, outlier_input
from tests.numerics import assert_within

linear_op = importlib.import_module("radio_fast.ops.linear")  # the package has a function of this name
HALF = [torch.float16, torch.bfloat16]
CAST = {
    "half": lambda m: m.half(),
    "to": lambda m: m.to(torch.bfloat16),
    "bfloat16 and back": lambda m: m.bfloat16().float(),
    "twice": lambda m: m.half().to(torch.bfloat16),
    "type": lambda m: m.type(torch.float16),
}


@pytest.mark.parametrize("cast", CAST)
def test_biases_stay_float32(cast):
    layer = Linear(8, 6)
    bias = layer.bias.detach().clone()
    parameter = layer.bias
    CAST[cast](layer)
    assert layer.bias.dtype == torch.float32 and torch.equal(layer.bias, bias)
    assert layer.bias is parameter, "optimizers and hooks hold on to it"
    assert layer.weight.dtype == (torch.float32 if "back" in cast else layer.weight.dtype)
    assert layer.double().bias.dtype == torch.float64
    assert Linear(8, 6, bias=False).half().bias is None


def test_biases_on_the_meta_device():
    with torch.device("meta"):
        layer = Linear(8, 6)
    assert layer.half().bias.dtype == torch.float32
    assert layer.to_empty(device="cpu").bias.dtype == torch.float32


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("how", ["load", "to"])
def test_biases_of_a_model(dtype, how):
    """Not rounded on the way: vit_h16's file is in float32."""
    source = golden_source("vit_h16")
    truth = radio_fast.load(source)
    model = radio_fast.load(source, dtype=dtype) if how == "load" else radio_fast.load(source).to(dtype)
    names = [name for name, module in model.named_modules() if isinstance(module, Linear)]
    assert len(names) == 4 * len(model.blocks)
    for name in names:
        assert torch.equal(model.get_submodule(name).bias, truth.get_submodule(name).bias)
        assert model.get_submodule(name).weight.dtype == dtype


def test_state_dict_round_trip():
    model = radio_fast.load(golden_source("vit_h16"), dtype="bfloat16")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(model.state_dict())
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(other(x).features, model(x).features)


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(_dispatch, "accelerated", lambda device: True)


def test_cublas_gets_its_bias_cast_once(on_a_gpu):
    bias = nn.Parameter(torch.randn(6), requires_grad=False)
    first = linear_op._bias_as(bias, torch.float16)
    assert torch.equal(first, bias.half())
    assert linear_op._bias_as(bias, torch.float16) is first, "a launch in every call"
    assert linear_op._bias_as(bias, torch.float32) is bias
    bias.add_(1)
    assert torch.equal(linear_op._bias_as(bias, torch.float16), bias.half()), "stale"
    assert linear_op._bias_as(bias, torch.bfloat16).dtype == torch.bfloat16
    bias.data = torch.randn(6)
    assert torch.equal(linear_op._bias_as(bias, torch.bfloat16), bias.bfloat16()), "stale"
    with torch.inference_mode():
        inside = linear_op._bias_as(bias, torch.float16)
    assert not inside.is_inference()
    module = nn.Linear(2, 6)
    module.bias = bias
    copied = copy.deepcopy(module)
    assert not hasattr(copied.bias, "_radio_fast_cast")
    torch.utils.swap_tensors(bias, nn.Parameter(torch.randn(6), requires_grad=False))  # nothing holds a weak reference
    assert torch.equal(linear_op._bias_as(bias, torch.float16), bias.half())
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(linear_op._bias_as(bias, torch.bfloat16), FakeTensor)
    assert torch.equal(linear_op._bias_as(bias, torch.bfloat16), bias.bfloat16()), "the fake one was kept"


def test_cast_inside_a_captured_graph_is_not_kept(on_a_gpu, monkeypatch):
    """It would be memory of the graph, which no replay may have filled yet."""
    bias = nn.Parameter(torch.randn(6), requires_grad=False)
    monkeypatch.setattr(linear_op, "capturing", lambda device: True)
    first = linear_op._bias_as(bias, torch.float16)
    assert linear_op._bias_as(bias, torch.float16) is not first
    bias.requires_grad_()
    assert linear_op._bias_as(bias, torch.float16).requires_grad


# -- LayerScale --------------------------------------------------------------------------------------------------------


def test_layer_scale_is_in_the_weights():
    model = radio_fast.load(golden_source("dinov2_g14"))
    assert not any("ls1" in name or "gamma" in name for name in model.state_dict())


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_fold(deferred, bias, rng):
    weight, gamma, b = torch.randn(6, 4, generator=rng), torch.randn(6, generator=rng), torch.randn(6, generator=rng)
    stored = Deferred((6, 4), lambda w: 2 * w, weight) if deferred else weight
    state = {"a.attn.proj.weight": stored, "a.mlp.w3.weight": weight, "a.ls1.gamma": gamma, "a.ls2.gamma": 2 * gamma}
    if bias:
        state["a.attn.proj.bias"] = b
    before = dict(state)
    out = fold_layer_scale(state)
    assert state == before, "the input is not changed"
    assert set(out) == {key for key in state if not key.endswith("gamma")}
    assert torch.equal(out["a.attn.proj.weight"](), weight * (1 + deferred) * gamma[:, None])
    assert torch.equal(out["a.mlp.w3.weight"](), weight * 2 * gamma[:, None])
    if bias:
        assert torch.equal(out["a.attn.proj.bias"](), b * gamma)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"b.ls1.gamma": None}, KeyError, "b.ls1.gamma"),
        ({"b.ls2.gamma": None}, KeyError, "b.ls2.gamma"),
        ({"b.attn.proj.weight": None}, KeyError, "b.attn.proj.weight"),
        ({"b.mlp.fc2.weight": None}, KeyError, "b.mlp.fc2.weight"),
        ({"b.ls1.gamma": torch.ones(5)}, ValueError, "b.ls1.gamma must be 6 floating-point factors"),
        ({"b.ls1.gamma": torch.ones(6, 1)}, ValueError, "b.ls1.gamma must be 6 floating-point factors"),
        ({"b.ls2.gamma": torch.ones(6, dtype=torch.int64)}, ValueError, "got torch.int64"),
    ],
)
def test_fold_refuses(change, error, said):
    one = torch.ones(6)
    state = {
        "b.ls1.gamma": one,
        "b.ls2.gamma": one,
        "b.attn.proj.weight": one[:, None],
        "b.mlp.fc2.weight": one[:, None],
    }
    state = {key: value for key, value in (state | change).items() if value is not None}
    with pytest.raises(error, match=said):
        fold_layer_scale(state)


@pytest.mark.parametrize("gamma", [1.0, 1e-2, 1e-5, 1e-7])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_folding_is_exact_enough(dtype, gamma, rng):
    """Even where float16 cuts γ·W off: by the one rule, of the residual stream that it is added to."""
    K, D = 256, 96
    x = outlier_input(4, 7, D, dtype=dtype, seed=1)
    y = outlier_input(4, 7, K, dtype=dtype, seed=2)
    weight, bias = torch.randn(D, K, generator=rng) * K**-0.5, torch.randn(D, generator=rng)
    scale = gamma * (1 + torch.rand(D, generator=rng))
    truth = x.double() + (y.double() @ weight.double().T + bias.double()) * scale.double()
    plain = x + (y @ weight.to(dtype).T + bias.to(dtype)) * scale.to(dtype)
    state = {"attn.proj.weight": weight, "attn.proj.bias": bias, "ls1.gamma": scale, "ls2.gamma": scale}
    folded = fold_layer_scale(state | {"mlp.fc2.weight": weight})
    layer = Linear(K, D)
    layer.weight.data, layer.bias.data = folded["attn.proj.weight"]().to(dtype), folded["attn.proj.bias"]()
    with torch.no_grad():
        assert_within(layer(y, x), truth, plain)
