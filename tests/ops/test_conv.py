"""Convolutions on oneDNN's packed weights: values, when they are taken, and what is kept of a weight for how long."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from radio_fast.layers.conv import Conv
from radio_fast.ops import conv
from tests.numerics import assert_within

ROOT = Path(__file__).parents[2]
BF16 = torch.bfloat16
DTYPES = [
    torch.float32,
    pytest.param(BF16, marks=pytest.mark.skipif(not conv.trusted(BF16), reason="oneDNN has no bfloat16 here")),
]
ACTIVATIONS = (None, "relu", "silu", "gelu")
OUTLIER = 50.0


@pytest.fixture
def packs(monkeypatch) -> list[tuple]:
    """The shapes that weights are packed for."""
    conv.trusted(torch.float32), conv.trusted(BF16)  # what they try is not to be counted
    made, pack = [], conv.pack
    monkeypatch.setattr(conv, "pack", lambda weight, key: (made.append(key), pack(weight, key))[1])
    monkeypatch.setattr(conv, "_layouts", {})
    return made


def layer(*args, seed: int = 0, **options) -> Conv:
    torch.manual_seed(seed)
    one = Conv(*args, **options).requires_grad_(False)
    return one.to(memory_format=torch.channels_last)


def image(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x[..., 0] *= OUTLIER
    return x.to(dtype)


def truth_of(one: Conv, x: torch.Tensor) -> torch.Tensor:
    bias = None if one.bias is None else one.bias.double()
    return conv.conv_ref(x.double(), one.weight.double(), bias, one.stride[0], one.groups, one.activation)


def check(one: Conv, x: torch.Tensor) -> None:
    one.backend = "reference"
    plain = one(x)
    one.backend = "auto"
    actual = one(x)
    assert actual.is_contiguous() and actual.dtype == x.dtype
    assert_within(actual, truth_of(one, x), plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("stride, groups, bias", [(1, 1, True), (2, 1, False), (1, 32, True), (1, 4, True)])
def test_values(stride, groups, bias, activation, dtype, packs, poison):
    one = layer(32, 64 if groups < 32 else 32, 3, stride, groups, bias, activation=activation).to(dtype)
    for shape in ((1, 1, 1, 32), (2, 7, 5, 32), (1, 17, 16, 32)):
        check(one, image(*shape, dtype=dtype))
    assert len(packs) == 3


@pytest.mark.parametrize("channels, out, kernel", [(3, 8, 3), (1, 1, 3), (7, 5, 3), (96, 33, 1), (16, 16, 5)])
def test_odd_channels_and_kernels(channels, out, kernel, packs):
    check(layer(channels, out, kernel, 2), image(2, 9, 13, channels))
    assert packs


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_maps(dtype, packs):
    one, wide = layer(32, 16, 3, activation="silu").to(dtype), image(2, 9, 9, 80, dtype=dtype)
    for x in (
        wide[..., 32:64],
        wide[:, :7, 1:8, :32],
        wide.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)[..., :32],
    ):
        check(one, x)
    check(one, image(2, 9, 9, 32, dtype=dtype).transpose(1, 2))
    assert packs


def test_a_weight_is_packed_once_for_all_shapes_of_a_layout(packs):
    one = layer(32, 32, 3)
    for _ in range(3):
        one(image(1, 8, 8, 32))
    assert len(packs) == 1
    one(image(2, 12, 12, 32))
    known = len(packs)
    other = layer(32, 32, 3, seed=1)
    for shape in ((1, 8, 8, 32), (2, 12, 12, 32)):
        check(other, image(*shape))
    assert len(packs) <= known + len({conv.layout_of(key) for key in packs})
    assert one._cache.bytes <= 2 * one.weight.nbytes


def test_layouts_are_told_apart():
    """A convolution on another shape's layout is right, and takes a hundred times as long."""
    one = layer(32, 32, 3)
    one(image(1, 8, 8, 32))
    (first,) = one._cache.entries.values()
    key = conv.shape_key(image(2, 9, 9, 32), one.weight, 1, 1)
    conv._layouts[key] = b"another"
    assert one._packed(image(2, 9, 9, 32)) is not first[1]
    assert conv.layout_of(key) != b"another"


def test_as_many_shapes_as_there_are(packs, monkeypatch):
    monkeypatch.setattr(conv, "MAX_SHAPES", 3)
    one = layer(8, 8, 3)
    for side in range(1, 9):
        check(one, image(1, side, side, 8))
        assert len(conv._layouts) <= 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_changed_weight_is_packed_anew(dtype, packs):
    one, x = layer(16, 16, 3).to(dtype), image(1, 6, 6, 16, dtype=dtype)
    check(one, x)
    one.weight.mul_(-2)
    check(one, x)
    one.load_state_dict(layer(16, 16, 3, seed=5).state_dict())
    check(one, x)
    one.weight = nn.Parameter(layer(16, 16, 3, seed=6).weight.to(dtype), requires_grad=False)
    check(one, x)
    one.bias.add_(3)
    check(one, x)
    assert len(packs) == 4
    one.weight = nn.Parameter(layer(16, 16, 3, seed=7).weight.to(dtype), requires_grad=False)
    check(one, x)
    other = nn.Parameter(layer(16, 16, 3, seed=8).weight.to(dtype), requires_grad=False)
    assert other._version == one.weight._version
    one.weight = other
    check(one, x)
    one.to(torch.float64).to(dtype)
    assert not one._cache.entries
    check(one, x)


@pytest.mark.parametrize("swap", ("parameter", "data"))
def test_a_weight_replaced_twice_between_two_calls(swap, packs):
    """The second one may lie where the first was."""
    one, x = layer(16, 16, 3), image(1, 6, 6, 16)
    check(one, x)
    before = one.weight.data_ptr(), one.weight._version
    for _ in range(20):
        for _ in range(2):
            changed = one.weight.detach() + 0.1
            if swap == "data":
                one.weight.data = changed
            else:
                one.weight = nn.Parameter(changed, requires_grad=False)
            del changed
        again = before == (one.weight.data_ptr(), one.weight._version)
        check(one, x)
        if again:
            return
        before = one.weight.data_ptr(), one.weight._version


def test_both_dtypes_of_autocast(packs):
    """bfloat16 maps meet float32 weights: rounded once, kept beside the float32 ones."""
    one = layer(16, 24, 3, activation="gelu")
    for _ in range(2):
        for dtype in (torch.float32, BF16) if conv.trusted(BF16) else (torch.float32,):
            x = image(2, 6, 6, 16, dtype=dtype)
            with torch.no_grad():
                rounded = copy.deepcopy(one).to(dtype)
                assert torch.equal(one(x), rounded(x))
    assert {(packed.dtype, *key[:1]) for key, (_, packed) in one._cache.entries.items()} == {
        (dtype, dtype) for dtype in (torch.float32, BF16) if conv.trusted(dtype)
    }


def test_copies_keep_nothing(packs):
    one, x = layer(16, 16, 3), image(1, 6, 6, 16)
    expected, twin = one(x), copy.deepcopy(one)
    assert one._cache.entries and not twin._cache.entries
    assert torch.equal(twin(x), expected)


def test_when_plain_torch_does_it(packs, monkeypatch):
    x = image(1, 6, 6, 16)
    one = layer(16, 16, 3, activation="relu")
    expected = one(x)
    packs.clear()
    one._cache.clear()
    monkeypatch.setattr(conv, "_layouts", {})

    def plain(y):
        assert not packs
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)

    one.backend = "reference"
    plain(one(x))
    one.backend = "auto"
    with monkeypatch.context() as context:
        context.setenv("RADIO_FAST_BACKEND", "reference")
        plain(one(x))
    with torch.backends.mkldnn.flags(enabled=False):
        plain(one(x))
    with torch.no_grad():  # its grad_fn is none, and its changes are not counted
        plain(torch.vmap(one)(x.unsqueeze(0))[0])
    y = one(x.clone().requires_grad_())
    y.sum().backward()
    plain(y.detach())
    one.requires_grad_(True)
    one(x).sum().backward()
    assert one.weight.grad is not None and not packs
    one.requires_grad_(False)
    with torch.inference_mode():
        made_there = copy.deepcopy(one)
        plain(made_there(x))
        assert made_there.weight.is_inference() and one(x) is not None and packs
    packs.clear()
    with torch.autocast("cpu", BF16):
        assert one(x).dtype == BF16 and not packs
    assert one(image(0, 6, 6, 16)).shape == (0, 6, 6, 16) and not packs
    assert one(x.double().float()).shape == (1, 6, 6, 16)


def test_tensors_that_are_not_plain(packs):
    class Wrapped(torch.Tensor):
        pass

    one, x = layer(16, 16, 3), image(1, 6, 6, 16)
    assert type(one(x.as_subclass(Wrapped))) is Wrapped
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert one(mode.from_tensor(x)).shape == x.shape
    assert one.to("meta")(x.to("meta")).is_meta and not packs


def test_float64_and_float16_are_plain(packs):
    for dtype in (torch.float64, torch.float16):
        assert layer(16, 16, 3).to(dtype)(image(1, 6, 6, 16, dtype=dtype)).dtype == dtype
    assert not packs


def test_compile_and_export_see_plain_convolutions(packs):
    one, x = layer(16, 16, 3, activation="silu").eval(), image(1, 6, 6, 16)
    exported = torch.export.export(one, (x,))
    assert not [node.target for node in exported.graph.nodes if "mkldnn" in str(node.target)]
    traced = torch.jit.trace(one, (x,), check_trace=False)
    assert "mkldnn" not in str(traced.graph) and not packs
    compiled = torch.compile(one, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), one(x), rtol=1e-4, atol=1e-4)
    assert len(packs) == 1


@pytest.fixture
def untried():
    conv.trusted.cache_clear()
    yield
    conv.trusted.cache_clear()


def gone(*args):
    raise AttributeError("no such operator")


@pytest.mark.parametrize(
    "name, stand_in",
    [
        ("pack", gone),
        ("packed_conv", gone),
        ("packed_conv", lambda x, *args: conv.conv_ref(x, torch.zeros(24, 16, 3, 3), None, 2, 1, None)),
        ("packed_conv", lambda x, *args: torch.full((2, 4, 5, 24), float("nan"))),
        ("packed_conv", lambda x, *args: x),
    ],
)
def test_operators_that_are_gone_or_changed_are_not_used(name, stand_in, monkeypatch, untried):
    one, x = layer(16, 16, 3, activation="silu"), image(1, 6, 6, 16)
    monkeypatch.setattr(conv, name, stand_in)
    assert not conv.trusted(torch.float32)
    assert torch.equal(one(x), conv.conv_ref(x, one.weight, one.bias, 1, 1, "silu"))


def test_several_threads(packs):
    one = layer(32, 32, 3, activation="gelu")
    maps = [image(1, side, side, 32) for side in (3, 8, 9)]
    expected, failures = [one(x) for x in maps], []
    one._cache.clear()

    def run():
        for _ in range(5):
            for x, y in zip(maps, expected, strict=True):
                if not torch.equal(one(x), y):
                    failures.append(x.shape)

    workers = [threading.Thread(target=run) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


MASKED = """
import torch
from tests.ops.test_conv import check, image, layer
for dtype in (torch.float32, torch.bfloat16):
    for activation in (None, "silu", "gelu"):
        check(layer(32, 32, 3, activation=activation).to(dtype), image(2, 9, 8, 32, dtype=dtype))
"""


@pytest.mark.parametrize("isa", ("AVX512_CORE", "AVX2"))
def test_with_fewer_instructions(isa):
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", MASKED], check=True, env=environment, cwd=ROOT, timeout=120)
