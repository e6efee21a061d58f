"""Blocks are used part by part; whoever hooks, wraps, patches or compiles one, or a layer of it, must not notice."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import radio_fast
from tests.conftest import golden_source
from tests.numerics import assert_relative

LAYERS = ["", "norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]


@pytest.fixture(scope="module")
def loaded() -> radio_fast.RADIOModel:
    return radio_fast.load(golden_source("vit_h16"), cuda_graphs=False)


@pytest.fixture
def model(loaded):
    return copy.deepcopy(loaded)


X = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(2))


def plain(model, layer: str) -> list[torch.Tensor]:
    """What each block's layer gives, from the definition: its own modules, called one after another."""
    seen = []
    x = model.model.patch_generator(X, model.input_conditioner)
    for block in model.blocks:
        normed = block.norm1(x)
        qkv = block.attn.qkv(normed)
        proj = block.attn.proj(block.attn.mix(qkv))
        x = x + proj
        normed2 = block.norm2(x)
        fc1 = block.mlp.fc1(normed2)
        fc2 = block.mlp.fc2(fc1)
        x = x + fc2
        found = {"": x, "norm1": normed, "norm2": normed2, "attn.qkv": qkv, "attn.proj": proj}
        seen.append((found | {"mlp.fc1": fc1, "mlp.fc2": fc2})[layer])
    return seen


@pytest.mark.parametrize("layer", LAYERS)
def test_forward_hooks_see_what_the_layer_gives(model, layer):
    expected, seen = plain(model, layer), []
    for block in model.blocks:
        block.get_submodule(layer).register_forward_hook(lambda module, args, out: seen.append(out))
    model(X)
    assert len(seen) == len(model.blocks)
    for ours, theirs in zip(seen, expected, strict=True):
        assert_relative(ours, theirs)


@pytest.mark.parametrize("layer", LAYERS)
def test_hooks_and_patches_change_the_output(model, layer):
    """What a hook, or a method in its place, returns is what goes on."""
    target = model.blocks[1].get_submodule(layer)
    handle = target.register_forward_hook(lambda module, args, out: 0.5 * out)
    hooked = model(X).features
    handle.remove()
    assert not torch.allclose(hooked, model(X).features, rtol=1e-3)
    forward = target.forward
    target.forward = lambda *args, **kwargs: 0.5 * forward(*args, **kwargs)
    assert_relative(model(X).features, hooked)


def test_global_hooks_see_blocks(model):
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        model(X)
    finally:
        handle.remove()
    assert all(block in seen for block in model.blocks)


def test_backward_hooks(model):
    seen = []
    model.blocks[0].register_full_backward_hook(lambda *args: seen.append("block"))
    model.blocks[1].attn.proj.register_full_backward_hook(lambda *args: seen.append("proj"))
    model(X.clone().requires_grad_()).features.sum().backward()
    assert sorted(seen) == ["block", "proj"]


class LowRank(nn.Module):
    """As adapters do it: another module around a layer."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


@pytest.mark.parametrize("name", ["attn.proj", "mlp.fc2", "attn.qkv"])
def test_wrapped_layers(model, name):
    layer = model.blocks[1].get_submodule(name)
    owner = model.blocks[1].get_submodule(name.rpartition(".")[0])
    wrapped = LowRank(layer)
    delta = (wrapped.up.weight @ wrapped.down.weight).detach()
    other = copy.deepcopy(model)
    setattr(owner, name.rpartition(".")[2], wrapped)
    with torch.no_grad():
        other.blocks[1].get_submodule(name).weight.add_(delta)
        assert_relative(model(X).features, other(X).features)


def test_wrapped_block(model):
    before = model(X).features

    class Wrapper(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block, self.calls = block, 0

        def forward(self, x):
            self.calls += 1
            return self.block(x)

    model.blocks[1] = Wrapper(model.blocks[1])
    assert_relative(model(X).features, before)
    assert model.blocks[1].calls == 1


def test_pruned_layer(model):
    """A parametrisation by a hook: later writes to weight_orig count."""
    layer = model.blocks[1].attn.proj
    prune.identity(layer, "weight")
    before = model(X).features
    with torch.no_grad():
        layer.weight_orig.mul_(0.5)
    assert not torch.allclose(model(X).features, before, rtol=1e-3)


def test_compiled_block(model):
    before, graphs = model(X).features, []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model.blocks[1].compile(backend=backend)
    with torch.no_grad():
        assert_relative(model(X).features, before)
    assert graphs
