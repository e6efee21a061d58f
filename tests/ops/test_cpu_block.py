"""A block in one call: the values of its parts, and when the parts are called."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import radio_fast
from radio_fast import native_cpu, ops
from radio_fast.layers import cpu_block
from radio_fast.layers.attention import Attention
from radio_fast.layers.block import Block
from radio_fast.layers.mlp import Mlp, SwiGLU
from radio_fast.layers.norm import DynamicTanh, LayerNorm
from radio_fast.layers.packing import Segments
from radio_fast.native_cpu import BlockParameters, Layer, Norm
from tests.conftest import golden_source
from tests.numerics import assert_tokens

REASON = native_cpu.why_not_native_cpu()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

BF16 = torch.bfloat16
D = 96


def make(dtype: torch.dtype = BF16, mlp: nn.Module | None = None, qkv_bias: bool = True) -> tuple[Block, LayerNorm]:
    torch.manual_seed(0)
    block = Block(LayerNorm(D, scale=0.5), Attention(D, 3, qkv_bias), LayerNorm(D, 1e-3), mlp or Mlp(D, 160))
    after = LayerNorm(D, 1e-5, 0.25)
    for parameter in (*block.parameters(), *after.parameters()):
        parameter.data += torch.randn_like(parameter) / 4
    return block.to(dtype).requires_grad_(False), after.to(dtype).requires_grad_(False)


def by_parts(block, x, normed, after, window, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(cpu_block, "run", lambda *args: None)
        return block.step(x, normed, after, window)


@pytest.mark.parametrize("x_dtype, dtype", [(BF16, BF16), (BF16, torch.float32), (torch.float32,) * 2], ids=str)
@pytest.mark.parametrize("known, wanted", [(False, True), (True, False), (True, True), (False, False)])
@pytest.mark.parametrize("B, window", [(1, None), (3, None), (2, (4, 6, 2)), (1, "packed")])
@pytest.mark.parametrize("mlp", ("gelu", "swiglu", "odd"))
def test_the_values_of_its_parts(x_dtype, dtype, known, wanted, B, window, mlp, calls, monkeypatch):
    """Also with float32 weights, which the kernel rounds, and with x and what is known of it strided."""
    block, after = make(dtype, SwiGLU(D, 80) if mlp == "swiglu" else Mlp(D, 160 if mlp == "gelu" else 77), B == 1)
    if window == "packed":
        window = Segments(torch.tensor([0, 7, 20, 25], dtype=torch.int32), (7, 13, 5))
    x = torch.randn(B, 25, D).to(x_dtype)[:, : 24 if type(window) is tuple else 25]
    normed = torch.randn(B, 50, D).to(x_dtype)[:, : 2 * x.shape[1] : 2] if known else None
    expected = by_parts(block, x, normed, after if wanted else None, window, monkeypatch)
    calls.clear()
    out, out_normed = block.step(x, normed, after if wanted else None, window)
    assert calls == ["rf_cpu_blocks"]
    assert torch.equal(out, expected[0]) and (out_normed is None) == (not wanted)
    assert not wanted or torch.equal(out_normed, expected[1])


@pytest.mark.parametrize("kind", ("bfloat16", "float32", "int8"))
@pytest.mark.parametrize("N", (25, 401))
def test_buffers_that_serve_twice(kind, N):
    """Sums of more columns than float32's kernel takes at once; and of rows that are many for those of 16 bits."""
    dtype, hidden = torch.float32 if kind == "float32" else BF16, 1601
    shapes = {"qkv": (3 * D, D), "proj": (D, D), "fc1": (hidden, D), "fc2": (D, hidden)}
    torch.manual_seed(0)

    def layer(rows: int, columns: int) -> Layer:
        weight, bias = torch.randn(rows, columns) / columns**0.5, torch.randn(rows)
        if kind != "int8":
            return Layer(weight.to(dtype), bias)
        quantised, scale = ops.quantise(weight)
        return Layer(ops.pack_int8(quantised), bias, scale[:, 0].contiguous())

    def linear(x, layer, activation, residual):
        if layer.scale is not None:
            return native_cpu.linear_int8(x, layer.weight, layer.scale, layer.bias, activation, residual)
        return native_cpu.linear(x, layer.weight, layer.bias, activation, residual)

    layers = {name: layer(*shape) for name, shape in shapes.items()}
    norm = Norm(torch.randn(D).to(dtype), torch.randn(D).to(dtype), 1e-6, 0.5)
    block = BlockParameters(norm, norm, *layers.values(), 3, hidden, "gelu")
    x = expected = torch.randn(1, N, D).to(dtype)
    given = x.clone()
    for _ in range(3):
        y = linear(native_cpu.layer_norm(expected, None, *norm)[1], layers["qkv"], None, None)
        s = linear(native_cpu.attention(y, 3), layers["proj"], None, expected)
        y = linear(native_cpu.layer_norm(s, None, *norm)[1], layers["fc1"], "gelu", None)
        expected = linear(y, layers["fc2"], None, s)
    for calls in ((), (2, 1)):
        out, normed = native_cpu.blocks(x, None, [block] * 3, norm, calls=calls)
        assert torch.equal(out, expected) and torch.equal(x, given)
        assert torch.equal(normed, native_cpu.layer_norm(expected, None, *norm)[1])


def test_nothing_is_written_outside(monkeypatch):
    made = []

    def new_empty(self, shape):
        size = torch.Size(shape if isinstance(shape, tuple) else (shape,)).numel()
        whole = torch.full((size + 256,), float("nan"), dtype=self.dtype)
        made.append((whole, size))
        return whole[128 : 128 + size].view(shape)

    block, after = make()
    x = torch.randn(2, 33, D).to(BF16)
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    *results, count = cpu_block.run((block, block), x, None, after, None)
    assert len(made) == 3 and count == 2 and not any(t.isnan().any() for t in results)
    for whole, size in made:
        assert whole[:128].isnan().all() and whole[128 + size :].isnan().all()


def test_an_empty_batch(calls):
    block, after = make()
    out, normed = block.step(torch.empty(0, 5, D, dtype=BF16), None, after)
    assert out.shape == normed.shape == (0, 5, D) and not calls


class OtherMlp(SwiGLU):
    pass


CHANGES = {
    "a hook": lambda block, after: block.mlp.fc2.register_forward_hook(lambda *args: None),
    "a hook on the norm": lambda block, after: block.norm2.register_forward_pre_hook(lambda *args: None),
    "a patched layer": lambda block, after: setattr(block.attn.qkv, "forward", block.attn.qkv.forward),
    "a wrapped layer": lambda block, after: setattr(block.attn, "proj", nn.Sequential(block.attn.proj)),
    "another backend": lambda block, after: setattr(block.attn, "backend", "reference"),
    "another backend of a layer": lambda block, after: setattr(block.mlp.fc2, "backend", "reference"),
    "an activation after qkv": lambda block, after: setattr(block.attn.qkv, "activation", "gelu"),
    "an activation after the MLP": lambda block, after: setattr(block.mlp.fc2, "activation", "gelu"),
    "another activation": lambda block, after: setattr(block.mlp.fc1, "activation", "silu"),
    "another norm": lambda block, after: setattr(block, "norm1", DynamicTanh(D)),
    "a norm inside": lambda block, after: setattr(block.mlp, "norm", LayerNorm(160).to(BF16)),
    "another mlp": lambda block, after: setattr(block, "mlp", OtherMlp(D, 64).to(BF16)),
    "mixed weights": lambda block, after: block.mlp.fc1.float(),
    "a bias of another dtype": lambda block, after: setattr(
        block.attn.proj, "bias", nn.Parameter(block.attn.proj.bias.to(BF16), False)
    ),
    "strided weights": lambda block, after: setattr(
        block.mlp.fc1, "weight", nn.Parameter(block.mlp.fc1.weight.T.contiguous().T, False)
    ),
    "heads too small": lambda block, after: setattr(block.attn, "num_heads", 12),
    "gradients": lambda block, after: block.attn.proj.weight.requires_grad_(),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_otherwise_its_parts_are_called(change, calls, monkeypatch):
    block, after = make()
    CHANGES[change](block, after)
    x = torch.randn(1, 20, D).to(BF16)
    expected = by_parts(block, x, None, after, None, monkeypatch)
    calls.clear()
    out, _ = block.step(x, None, after)
    assert "rf_cpu_blocks" not in calls and torch.equal(out, expected[0])


@pytest.mark.parametrize("name", ("attn.qkv", "mlp.fc2", "norm2"))
def test_a_bias_that_is_no_parameter(name, calls, monkeypatch):
    """A plain tensor in its place, as functional code leaves it."""
    block, after = make()
    layer = block.get_submodule(name)
    bias = layer.bias.detach() + 1
    del layer.bias
    layer.bias = bias
    x = torch.randn(1, 20, D).to(BF16)
    expected = by_parts(block, x, None, after, None, monkeypatch)
    assert torch.equal(block.step(x, None, after)[0], expected[0])


def test_layers_that_do_not_fit_together(calls):
    block, after = make()
    block.mlp.fc1 = type(block.mlp.fc1)(D, 152, activation="gelu").to(BF16).requires_grad_(False)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        block.step(torch.randn(1, 20, D).to(BF16), None, after)
    assert "rf_cpu_blocks" not in calls


@pytest.mark.parametrize("name", ("BACKEND", "LINEAR", "LINEAR_ADD_NORM", "LAYER_NORM", "ADD_LAYER_NORM", "ATTENTION"))
def test_the_environment_names_its_parts(name, calls, monkeypatch):
    block, after = make()
    monkeypatch.setenv(f"RADIO_FAST_{name}", "reference")
    block.step(torch.randn(1, 20, D).to(BF16), None, after)
    assert "rf_cpu_blocks" not in calls


def test_whoever_hooks_all_modules_sees_them(calls):
    block, after = make()
    seen = []
    with torch.no_grad():
        handle = nn.modules.module.register_module_forward_hook(lambda module, *args: seen.append(module))
        block.step(torch.randn(1, 20, D).to(BF16), None, after)
        handle.remove()
    assert block.attn.qkv in seen and "rf_cpu_blocks" not in calls


def test_what_traces_sees_plain_torch(calls):
    block, _ = make()
    x = torch.randn(1, 20, D).to(BF16)
    exported = torch.export.export(block, (x,))
    torch.vmap(block, in_dims=0)(x.unsqueeze(0))
    with torch.autocast("cpu", BF16):
        block(x)
    assert not [node for node in exported.graph.nodes if "radio_fast" in str(node.target)] and not calls


def test_a_tensor_of_another_kind(calls):
    class Wrapped(torch.Tensor):
        pass

    block, _ = make()
    block(torch.randn(1, 20, D).to(BF16).as_subclass(Wrapped))
    block.mlp.fc2.weight = nn.Parameter(block.mlp.fc2.weight.as_subclass(Wrapped), False)
    block(torch.randn(1, 20, D).to(BF16))
    assert "rf_cpu_blocks" not in calls
    for window in ((4, 5, 3), (3, 5, 1), 7):
        with pytest.raises((ValueError, RuntimeError, TypeError)):
            make()[0].step(torch.randn(1, 20, D).to(BF16), None, None, window)


def test_starts_that_do_not_cover_the_tokens():
    block, after = make()
    x = torch.randn(1, 25, D).to(BF16)
    for starts in ([0, 7, 24], [1, 7, 25], [0, 26, 25], [0, -1, 25]):
        with pytest.raises(ValueError, match="cu_seqlens must ascend from 0 to 25"):
            block.step(x, None, after, Segments(torch.tensor(starts, dtype=torch.int32), (7, 18)))


@pytest.mark.parametrize("starts, lengths", [([0, 7, 25], (7, 18)), ([0, 7, 25], (7, 17))])
def test_packing_that_is_not_for_the_kernel(starts, lengths, calls):
    """Of another integer, or of other lengths than x: the parts say what they make of it."""
    block, after = make()
    x = torch.randn(1, 25, D).to(BF16)
    segments = Segments(torch.tensor(starts, dtype=torch.int64 if sum(lengths) == 25 else torch.int32), lengths)
    if sum(lengths) == 25:
        block.step(x, None, after, segments)
    else:
        with pytest.raises(ValueError, match="seqlens must have the 2 packed images' tokens"):
            block.step(x, None, after, segments)
    assert "rf_cpu_blocks" not in calls


# -- whole models -----------------------------------------------------------------------------------------------


def test_blocks_in_one_call(calls, monkeypatch):
    """Those of a model, up to one that is not as it was made, or to what one call may take."""
    torch.manual_seed(0)
    model = radio_fast.load("c-radio_v3-b", random_init=True, dtype="bfloat16")
    blocks = model.model.blocks = model.model.blocks[:5]
    x = torch.rand(2, 3, 32, 48)
    with monkeypatch.context() as patch:
        patch.setattr(cpu_block, "run", lambda *args: None)
        expected = model(x)
    calls.clear()

    def runs(wanted: int) -> None:
        out = model(x)
        assert torch.equal(out.features, expected.features) and torch.equal(out.summary, expected.summary)
        assert [entry for entry in calls if entry == "rf_cpu_blocks"] == wanted * ["rf_cpu_blocks"]
        calls.clear()

    runs(1)
    seen = []
    handle = blocks[2].register_forward_hook(lambda *args: seen.append(2))
    runs(3)  # its forward makes one of its own
    handle.remove()
    handle = blocks[3].mlp.fc1.register_forward_hook(lambda *args: seen.append(3))
    runs(2)
    handle.remove()
    handle = blocks[1].norm1.register_forward_hook(lambda *args: seen.append(1))
    runs(2)
    handle.remove()
    assert seen == [2, 3, 1]
    monkeypatch.setattr(cpu_block, "LONGEST", dict.fromkeys(cpu_block.LONGEST, 1))
    runs(5)
    monkeypatch.undo()
    blocks[3].float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_block, "run", lambda *args: None)
        expected = model(x)
    assert torch.equal(model(x).features, expected.features)


def test_what_is_changed_between_two_calls_is_seen(calls):
    """Nothing is kept: weights, whatever way they are swapped, and norms."""
    torch.manual_seed(0)
    model = radio_fast.load("c-radio_v3-b", random_init=True, dtype="bfloat16")
    blocks = model.model.blocks = model.model.blocks[:2]
    x, seen = torch.rand(1, 3, 32, 32), []
    seen.append(model(x).features)
    blocks[0].attn.proj.weight.data = blocks[0].attn.proj.weight.data * 2
    seen.append(model(x).features)
    blocks[1].mlp.fc2.bias.data.add_(1)
    seen.append(model(x).features)
    blocks[1].norm1.eps = 0.5
    seen.append(model(x).features)
    blocks[0].attn.num_heads = 24
    seen.append(model(x).features)
    blocks[0].mlp.fc1.activation = None
    seen.append(model(x).features)
    blocks[1].attn.qkv.weight.data = blocks[1].attn.qkv.weight.data.float()
    model(x)
    assert calls.count("rf_cpu_blocks") == 7
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_intermediates_keep_their_values(calls):
    model = radio_fast.load(golden_source("vit_h16"), dtype="bfloat16")
    x = torch.rand(2, 3, 64, 64)
    seen = model.forward_intermediates(x, return_prefix_tokens=True)[1]
    for i in range(len(seen)):
        alone = model.forward_intermediates(x, [i], stop_early=True, return_prefix_tokens=True)[1][0]
        assert torch.equal(alone.features, seen[i].features)
    assert calls


@pytest.mark.parametrize("case, window", [("dinov2_g14", None), ("vit_so400m16", None), ("vit_b16_vitdet", 2)])
def test_packed_images(case, window, calls):
    """In one call each, also in ViTDet mode; to the bit what each image gives alone."""
    model = radio_fast.load(golden_source(case), dtype="bfloat16", vitdet_window_size=window)
    step = model.min_resolution_step
    images = [torch.rand(3, h * step, w * step) for h, w in ((2, 3), (4, 1), (3, 3))]
    packed = model.forward_packed(images)
    assert "rf_cpu_blocks" in calls and "rf_cpu_attention" not in calls
    for i, image in enumerate(images):
        alone = model(image.unsqueeze(0))
        assert_tokens(packed.features[i], alone.features[0].float(), 0.999)
