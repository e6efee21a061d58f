"""load(dtype="int8"): accuracy, what stays what it is, saving, and what is refused."""

from __future__ import annotations

import copy
import io
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import radio_fast
from radio_fast import native_cpu, ops
from radio_fast.layers.linear_int8 import LinearInt8
from radio_fast.layers.mlp import Linear
from radio_fast.models import int8
from radio_fast.models.int8 import even_out, fill_int8, mean_squares
from tests.conftest import golden_source
from tests.numerics import assert_tokens

REASON = native_cpu.why_not_native_cpu()
needs_amx = pytest.mark.skipif(REASON is not None, reason=str(REASON))
BF16 = torch.bfloat16
COSINE = 0.995
VITS = ("vit_h16", "vit_so400m16", "vit_g16_scaled_ln", "dinov2_g14", "vit_b16_vitdet", "hf_vit_h16_adaptors")


@pytest.fixture(scope="module")
def model():
    return radio_fast.load(golden_source("vit_h16"), dtype="int8")


def image(model, B: int = 2) -> torch.Tensor:
    side = model.model.only_size or 2 * model.min_resolution_step
    return torch.rand(B, 3, side, side, generator=torch.Generator().manual_seed(3)).to(BF16)


def outputs(found) -> list[torch.Tensor]:
    return [t for out in found.values() for t in out] if isinstance(found, dict) else list(found)


@torch.no_grad()
@pytest.mark.parametrize("backend", ("auto", "reference"))
@pytest.mark.parametrize("case", VITS)
def test_every_token_points_where_float32_s_does(case, backend):
    model, truth = (radio_fast.load(golden_source(case), dtype=dtype) for dtype in ("int8", "float32"))
    model.backend = backend
    x = image(model)
    for actual, expected in zip(outputs(model(x)), outputs(truth(x.float())), strict=True):
        assert_tokens(actual.flatten(0, -2).float(), expected.flatten(0, -2), COSINE)


def test_which_layers_are_int8(model):
    kinds = {name: type(module) for name, module in model.named_modules() if hasattr(module, "out_features")}
    inside = {name for name, kind in kinds.items() if kind is LinearInt8}
    assert inside == {
        f"model.blocks.{i}.{layer}"
        for i in range(len(model.blocks))
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    others = {p.dtype for n, p in model.model.named_parameters() if not n.endswith("bias")}
    assert others == {BF16} and not any(p.requires_grad for p in model.parameters())
    layer = model.blocks[0].mlp.fc1
    assert layer.weight.dtype == torch.int8 and layer.scale.dtype == layer.bias.dtype == torch.float32
    bfloat16 = radio_fast.load(golden_source("vit_h16"), dtype="bfloat16").blocks[0]
    size = layer.dequantised().abs().amax(1) / bfloat16.mlp.fc1.weight.float().abs().amax(1)
    assert layer.dequantised().shape == bfloat16.mlp.fc1.weight.shape and size.min() > 1 / 4 and size.max() < 4


@torch.no_grad()
def test_channels_are_evened_out_and_the_function_stays():
    model = radio_fast.load(golden_source("vit_h16"), dtype="float32")
    generator = torch.Generator().manual_seed(0)
    for block in model.blocks:
        for norm in (block.norm1, block.norm2):
            norm.weight[torch.randperm(len(norm.weight), generator=generator)[:3]] *= 30
    x = image(model).float()
    before, plain = model(x), copy.deepcopy(model)
    squares = mean_squares(model.model)
    for block in model.blocks:
        squares = even_out(block, squares)
    for actual, expected in zip(model(x), before, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())

    def spread(model):
        return max(n.weight.abs().max() / n.weight.abs().median() for b in model.blocks for n in (b.norm1, b.norm2))

    assert spread(model) < spread(plain) / 2
    ratio = model.blocks[0].norm1.weight / plain.blocks[0].norm1.weight
    assert torch.equal(ratio.log2().round(), ratio.log2()) and ratio.unique().numel() > 2


def test_layers_of_zeros_have_an_int8_form():
    model = radio_fast.load(golden_source("vit_h16"), dtype="float32")
    block = model.blocks[0]
    for parameter in (block.attn.qkv.weight, block.norm2.weight, block.norm2.bias, block.mlp.fc2.weight):
        parameter.data.zero_()
    with torch.no_grad():
        even_out(block, torch.ones(block.norm1.weight.shape[0]))
    assert all(p.isfinite().all() for p in block.parameters())
    assert not LinearInt8(block.mlp.fc2).dequantised().any()
    block.mlp.fc1.weight.data[3, 5] = torch.nan
    with pytest.raises(ValueError, match="a weight with NaN or infinity has no int8 form"):
        LinearInt8(block.mlp.fc1)


@torch.no_grad()
@pytest.mark.parametrize("name", ["blocks.", "blocks.1", "blocks.0x.attn.qkv.weight", "blocks.².attn.qkv.weight"])
def test_names_that_are_no_block_s_are_passed_over(name, model):
    """As `load` does in other dtypes."""
    made, source = (radio_fast.load(golden_source("vit_h16"), dtype=dtype).model for dtype in ("bfloat16", "float32"))
    fill_int8(made, source.state_dict() | {name: torch.zeros(3)})
    assert torch.equal(made.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)


@needs_amx
@torch.no_grad()
@pytest.mark.parametrize("bfloat16", ["", "qkv", "fc2"])
def test_a_block_is_one_call_and_gives_what_its_parts_give(bfloat16, model, calls, monkeypatch):
    """Also where one of its layers is not int8."""
    block, after = copy.deepcopy(model.blocks[0]), model.blocks[1].norm1
    if bfloat16:
        owner = block.attn if bfloat16 == "qkv" else block.mlp
        setattr(owner, bfloat16, like(getattr(owner, bfloat16)))
    x = torch.randn(2, 21, model.embed_dim, generator=torch.Generator().manual_seed(0)).to(BF16)
    out, normed = block.step(x, None, after)
    assert calls == ["rf_cpu_blocks"]
    calls.clear()
    monkeypatch.setattr("radio_fast.layers.cpu_block.run", lambda *args: None)
    expected = block.step(x, None, after)
    assert calls.count("rf_cpu_linear_int8") == (3 if bfloat16 else 4)
    assert torch.equal(out, expected[0]) and torch.equal(normed, expected[1])


def like(layer: LinearInt8) -> Linear:
    return Linear(layer.in_features, layer.out_features, activation=layer.activation).to(BF16)


CHANGES = {
    "one layer in float32": lambda b: setattr(b.mlp, "fc1", like(b.mlp.fc1).float()),
    "a hook": lambda b: b.mlp.fc2.register_forward_hook(lambda *args: None),
    "another scale": lambda b: setattr(b.mlp.fc2, "scale", b.mlp.fc2.scale.double()),
    "another weight": lambda b: setattr(b.mlp.fc2, "weight", b.mlp.fc2.weight[:1]),
    "a strided scale": lambda b: setattr(b.mlp.fc2, "scale", b.mlp.fc2.scale.repeat(2, 1).T.contiguous()[:, 0]),
    "another backend": lambda b: setattr(b.attn.qkv, "backend", "reference"),
}


@needs_amx
@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_otherwise_its_parts_are_called(change, model, calls):
    block = copy.deepcopy(model.blocks[0])
    CHANGES[change](block)
    x = torch.randn(1, 20, model.embed_dim).to(BF16)
    if change in ("another scale", "another weight"):
        with pytest.raises(ValueError, match="must be"):
            block.step(x, None, None)
    else:
        block.step(x, None, None)
    assert "rf_cpu_blocks" not in calls


@torch.no_grad()
def test_without_amx_plain_torch_runs(model, calls, without_amx):
    x = image(model)
    out = model(x)
    assert not calls
    assert_tokens(out.features, radio_fast.load(golden_source("vit_h16"), dtype="float32")(x.float()).features, COSINE)


@torch.no_grad()
def test_saved_copied_and_pickled(model):
    x = image(model)
    expected = model(x)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    fresh = radio_fast.load(golden_source("vit_h16"), dtype="int8")
    for module in fresh.modules():
        if isinstance(module, LinearInt8):
            module.weight.zero_()
    fresh.load_state_dict(torch.load(buffer))
    for other in (fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to("cpu").bfloat16()):
        assert all(map(torch.equal, other(x), expected))


def test_float_weights_are_refused(model):
    other = radio_fast.load(golden_source("vit_h16"), dtype="bfloat16")
    before = model.blocks[0].mlp.fc1.weight.clone()
    with pytest.raises(RuntimeError, match=r"blocks.0.attn.qkv.weight is torch.bfloat16: an int8 model takes int8"):
        model.load_state_dict(other.state_dict(), strict=False)
    assert torch.equal(model.blocks[0].mlp.fc1.weight, before)
    with pytest.raises(RuntimeError, match="scale"):
        other.load_state_dict(model.state_dict())


@pytest.mark.parametrize("move", ("float", "half", "double"))
def test_another_dtype_is_refused_before_anything_changes(model, move):
    state = {name: (tensor.dtype, tensor.data_ptr()) for name, tensor in model.state_dict().items()}
    for module in (model, model.model, model.blocks[0].attn.qkv):
        with pytest.raises(ValueError, match="an int8 model computes in bfloat16, got"):
            getattr(module, move)()
    assert state == {name: (tensor.dtype, tensor.data_ptr()) for name, tensor in model.state_dict().items()}


def test_what_has_no_int8_form(monkeypatch):
    with pytest.raises(ValueError, match="dtype='int8' is for ViTs, this is an E-RADIO"):
        radio_fast.load("e-radio_v2", dtype="int8", random_init=True)
    with pytest.raises(ValueError, match="dtype='int8' is for ViTs, this is an E-RADIO"):
        radio_fast.load(golden_source("eradio_small"), dtype="int8")
    monkeypatch.setattr("radio_fast.api.resolve_device", lambda device: torch.device("cuda"))
    with pytest.raises(ValueError, match="dtype='int8' is for CPUs, got device 'cuda': take dtype='bfloat16'"):
        radio_fast.load(golden_source("vit_h16"), dtype="int8", device="cuda")


def test_training_is_refused(model):
    twin = copy.deepcopy(model).requires_grad_(True)
    with pytest.raises(ValueError, match="linear_int8 has no gradient"):
        twin(image(model))


@torch.no_grad()
def test_all_else_works_as_with_other_dtypes(model):
    x = image(model)
    expected = model(x)
    alone = model.forward_packed(list(x))
    assert_tokens(torch.stack(alone.features), expected.features.float(), 0.9999)
    _, [middle] = model.forward_intermediates(x, indices=1, output_fmt="NLC", norm=True)
    assert torch.equal(middle, expected.features)
    with torch.autocast("cpu", BF16):
        assert_tokens(model(x).features, expected.features.float(), 0.9999)
    with torch.inference_mode():
        assert torch.equal(model(x).features, expected.features)
    exported = torch.export.export(model, (x,)).module()
    assert_tokens(exported(x).features, expected.features.float(), 0.999)


def test_onnx_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="int8"):
        radio_fast.export_onnx(model, tmp_path / "model.onnx", check=False)


def test_random_weights_of_a_version():
    model = radio_fast.load("c-radio_v3-b", random_init=True, dtype=torch.int8)
    layers = [module for module in model.modules() if isinstance(module, LinearInt8)]
    assert len(layers) == 48 and not any(isinstance(module, nn.Linear) for module in model.blocks.modules())
    assert ops.unpack_int8(layers[0].weight, 2304, 768).abs().amax() == 127


def test_loading_gives_memory_back(monkeypatch):
    """Once, when all blocks are there; and nothing where the C library has no such call."""
    calls = []
    library = SimpleNamespace(malloc_trim=calls.append)
    monkeypatch.setattr(int8, "ctypes", SimpleNamespace(CDLL=lambda name: library))
    monkeypatch.setattr(int8, "sys", SimpleNamespace(platform="linux"))
    radio_fast.load(golden_source("vit_h16"), dtype="int8")
    assert calls == [0]
    del library.malloc_trim
    int8._give_back()
