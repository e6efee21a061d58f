"""radio_fast.accelerate: one line after a model that other code has built."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import radio_fast
from radio_fast import adopt
from radio_fast.checkpoint import read_checkpoint
from radio_fast.layers.window_attention import coords_table
from radio_fast.models.registry import ViTDet
from tests.conftest import GOLDEN, golden_calls, golden_source
from tests.models.official import Official, RemoteCode
from tests.models.test_golden import flatten
from tests.numerics import GOLDEN_RTOL, assert_relative

pytestmark = pytest.mark.filterwarnings("ignore:attention windows")
IMAGE = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def official(case: str, **load) -> nn.Module:
    return RemoteCode(case, **load) if case.startswith("hf_") else Official(case, **load)


def not_shared(ours: radio_fast.RADIOModel, theirs: nn.Module) -> set[str]:
    """The tensors of ours that have memory of their own."""
    taken = {t.untyped_storage().data_ptr() for t in theirs.state_dict().values()}
    found = {name for name, t in ours.state_dict().items() if t.untyped_storage().data_ptr() not in taken}
    return found - {"summary_idxs"}


# -- right ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "number", "call"), golden_calls())
def test_official_outputs(case, number, call):
    """The official outputs, from models with the official names."""
    model = radio_fast.accelerate(official(case, **call.get("load", {})))
    stored = load_file(GOLDEN / case / "io.safetensors")
    if "summary_idxs" in call:
        assert model.num_summary_tokens == call["num_summary_tokens"]
        assert model.summary_idxs.tolist() == call["summary_idxs"]
    x = stored[f"{number}.image"].float() / 255
    if call.get("window") == "optimal":
        model.model.set_optimal_window_size(x.shape[2:])
    outputs = dict(flatten(getattr(model, call.get("method", "forward"))(x, **call.get("kwargs", {}))))
    expected = {key.removeprefix(f"{number}."): t for key, t in stored.items() if key.startswith(f"{number}.out")}
    assert set(outputs) == set(expected)
    rtol = GOLDEN_RTOL[torch.bfloat16 if case.endswith("bf16") else torch.float32]
    for name, truth in expected.items():
        assert_relative(outputs[name], truth, rtol)


@pytest.mark.parametrize(
    "config",
    [{}, {"use_swiglu_ffn": True, "layerscale_value": 0.7}, {"qkv_bias": False}],
    ids=["plain", "swiglu", "no-qkv-bias"],
)
def test_transformers(config):
    transformers = pytest.importorskip("transformers", minversion="5.17", reason="pip install radio_fast[parity]")
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "max_img_size": 256}
    torch.manual_seed(3)
    theirs = transformers.RadioModel(transformers.RadioConfig(**sizes, **config)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "layer_scale" not in name:
                parameter.normal_(1.0 if "norm" in name and "weight" in name else 0.0, 0.1)
        expected = theirs(IMAGE)
    ours = radio_fast.accelerate(theirs)
    assert_relative(ours(IMAGE).features, expected.features)
    assert_relative(ours(IMAGE).summary, expected.summary)
    scaled = "layerscale_value" in config
    made = {"attn.qkv.weight"} | ({"attn.qkv.bias"} if config.get("qkv_bias", True) else set())
    made |= {f"{layer}.{leaf}" for layer in ("attn.proj", "mlp.w3") for leaf in ("weight", "bias")} if scaled else set()
    assert not_shared(ours, theirs) == {f"model.blocks.{i}.{name}" for i in range(3) for name in made}
    theirs.make_preprocessor_external()
    conditioned = ours.input_conditioner(IMAGE)
    assert torch.equal(radio_fast.accelerate(theirs)(conditioned).features, ours(IMAGE).features)


NOTHING = r"^$"


# -- without a copy ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "adaptors", "own"),
    [
        ("vit_h16", ["clip", "sam"], NOTHING),
        ("hf_vit_h16_adaptors", None, NOTHING),
        ("vit_h16_norm", None, NOTHING),
        ("dinov2_g14", None, r"^model\.blocks\.\d\.(attn\.proj|mlp\.w3)\.(weight|bias)$"),
        ("vit_b16_spectral", ["clip"], r"\.(qkv|proj|fc1|fc2|[02])\.weight$"),
        ("vit_b16_attn_head", ["dino_v2"], r"^adaptors\.dino_v2\.feat_mlp\.blocks\.\d\.(attn\.proj|mlp\.fc2)\."),
    ],
)
def test_memory_is_shared(case, adaptors, own):
    theirs = official(case, adaptor_names=adaptors)
    ours = radio_fast.accelerate(theirs)
    made = not_shared(ours, theirs)
    assert not sorted(name for name in made if not re.search(own, name))
    assert bool(made) == (own != NOTHING)


def test_half_precision_stays_and_shares_all_but_biases():
    theirs = official("vit_h16", adaptor_names="clip")
    theirs.model.half()
    theirs.adaptors.half()
    ours = radio_fast.accelerate(theirs)
    assert ours(IMAGE)["backbone"].features.dtype == torch.float16
    assert {p.dtype for name, p in ours.adaptors.named_parameters()} == {torch.float16}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert not_shared(ours, theirs) == {f"model.blocks.{i}.{layer}.bias" for i in range(3) for layer in layers}
    truth = radio_fast.load(golden_source("vit_h16"), dtype="float16")(IMAGE)
    assert torch.equal(ours(IMAGE)["backbone"].features, truth.features)


@pytest.mark.parametrize("case", ["vit_h16", "vit_b16_spectral", "dinov2_g14", "eradio_small"])
def test_the_given_model_is_left_alone(case):
    theirs = official(case)
    before = {name: (t, t._version, t.requires_grad) for name, t in theirs.state_dict(keep_vars=True).items()}
    values = copy.deepcopy(theirs.state_dict())
    ours = radio_fast.accelerate(theirs)
    ours(IMAGE[:, :, :56, :84] if case == "dinov2_g14" else IMAGE)
    after = theirs.state_dict(keep_vars=True)
    assert list(after) == list(before)
    for name, (tensor, version, requires_grad) in before.items():
        assert after[name] is tensor
        assert (tensor._version, tensor.requires_grad) == (version, requires_grad)
        assert torch.equal(tensor, values[name])
    assert not any(p.requires_grad for p in ours.parameters())
    ours.float().half()
    assert all(torch.equal(t, values[name]) and t.dtype == values[name].dtype for name, t in after.items())


# -- its settings -----------------------------------------------------------------------------------------------------


def test_external_preprocessor_is_kept():
    theirs = official("vit_h16")
    expected = radio_fast.accelerate(theirs)(IMAGE)
    conditioner = radio_fast.load(golden_source("vit_h16")).input_conditioner
    theirs.make_preprocessor_external()
    ours = radio_fast.accelerate(theirs)
    assert isinstance(ours.input_conditioner, nn.Identity)
    assert torch.equal(ours(conditioner(IMAGE)).features, expected.features)


def test_conditioner_s_own_values_are_kept():
    theirs = official("vit_h16")
    theirs.input_conditioner.norm_mean.add_(0.1)
    assert torch.equal(radio_fast.accelerate(theirs).input_conditioner.norm_mean, theirs.input_conditioner.norm_mean)


def test_resolutions_are_kept():
    ours = radio_fast.accelerate(official("vit_h16"))
    assert ours.max_resolution == 1024
    assert (ours.preferred_resolution.height, ours.preferred_resolution.width) == (768, 512)


def test_vitdet_window_is_kept():
    theirs = official("vit_b16_vitdet", vitdet_window_size=2)
    ours = radio_fast.accelerate(theirs)
    truth = radio_fast.load(golden_source("vit_b16_vitdet"), vitdet_window_size=2)
    assert ours.window_size == 2
    assert torch.equal(ours(IMAGE).features, truth(IMAGE).features)
    assert radio_fast.accelerate(theirs, version="radio_v2").model.windowed == {0, 1, 2, 3, 4, 6, 7}  # 5 windowed


def test_vitdet_rule_that_depends_on_the_version(monkeypatch):
    """ViT-H for 768 pixels: 4 global blocks in radio_v2.5-h, 8 in c-radio_v2-vlm-h, and no tensor tells them apart."""
    monkeypatch.setattr(adopt, "_looks_like", lambda ours, row: row.name in ("radio_v2.5-h", "c-radio_v2-vlm-h"))
    theirs = official("vit_b16_vitdet", vitdet_window_size=2)
    with pytest.raises(ValueError, match=r"pass version='radio_v2\.5-h' or 'c-radio_v2-vlm-h'"):
        radio_fast.accelerate(theirs)
    assert radio_fast.accelerate(theirs, version="radio_v2.5-h").model.windowed == {0, 2, 4, 6}
    with pytest.raises(ValueError, match="c-radio_v3-b has no ViTDet mode"):
        radio_fast.accelerate(theirs, version="c-radio_v3-b")


def test_same_looks():
    ours = radio_fast.load("radio_v2.5-b", random_init=True)
    rows = [row for row in radio_fast.models.registry.VERSIONS.values() if adopt._looks_like(ours, row)]
    assert [row.name for row in rows] == ["radio_v2.5-b"]
    assert adopt._vitdet_rule(ours, None) == ViTDet(4)


@pytest.mark.parametrize("window", [4, 5])
def test_window_of_an_eradio_is_kept(window):
    """Its tables are then for that window, in units of the one it was built with."""
    theirs = official("eradio_small")
    for name, module in theirs.named_modules():
        if name.endswith("pos_emb_funct"):
            module.relative_coords_table = coords_table(window, 16)
    ours = radio_fast.accelerate(theirs)
    assert ours.model.attention_window == window
    truth = radio_fast.load(golden_source("eradio_small"), window_size=window)
    assert_relative(ours(IMAGE).features, truth(IMAGE).features)
    tables = [[t for n, t in model.named_buffers() if n.endswith("coords_table")] for model in (ours, truth)]
    for table, stored in zip(*tables, strict=True):
        assert_relative(table, stored, 1e-3)  # the file has it in float16
    for again, rtol in ((3, 1e-5), (16, 1e-3)):
        for model in (ours, truth):
            model.model.change_window_size(again)
        assert_relative(ours(IMAGE).features, truth(IMAGE).features, rtol)


def test_arguments_in_place_of_what_a_model_does_not_show():
    theirs = official("vit_h16", adaptor_names=["sam"])
    expected = radio_fast.accelerate(theirs)(IMAGE)["sam"]
    args = read_checkpoint(golden_source("vit_h16"))["args"]
    del theirs.adaptors["sam"].feat_mlp.upsample_factor
    with pytest.raises(ValueError, match=r"adaptor 'sam' has no upsample_factor.*args=checkpoint\['args'\]"):
        radio_fast.accelerate(theirs)
    del theirs.adaptors["sam"].head_idx
    assert torch.equal(radio_fast.accelerate(theirs, args=args)(IMAGE)["sam"].features, expected.features)
    assert torch.equal(radio_fast.accelerate(theirs, args=vars(args))(IMAGE)["sam"].summary, expected.summary)


def test_options():
    theirs = official("vit_h16")
    assert radio_fast.accelerate(theirs, backend="reference", cuda_graphs=False).graphs is None
    assert radio_fast.accelerate(theirs, backend="reference").backend == "reference"
    assert radio_fast.accelerate(theirs, cuda_graphs=True).graphs is not None
    for option, message in (
        ({"backend": "fast"}, "backend must be one of 'auto', 'reference', 'triton', 'cpu', got 'fast'"),
        ({"cuda_graphs": 1}, "cuda_graphs must be True, False or None"),
        ({"version": "radio_v2.5"}, "unknown version 'radio_v2.5': did you mean"),
    ):
        with pytest.raises(ValueError, match=message):
            radio_fast.accelerate(theirs, **option)


def test_wrappers_are_looked_through():
    theirs = official("hf_vit_l16")
    expected = radio_fast.accelerate(theirs)(IMAGE).features
    assert torch.equal(radio_fast.accelerate(torch.compile(theirs, backend="eager"))(IMAGE).features, expected)
    assert torch.equal(radio_fast.accelerate(nn.DataParallel(theirs).eval())(IMAGE).features, expected)


def test_structure_that_only_names_show():
    """A final norm where there is one; DINOv2's table is resized whatever its size; the version that a config names."""
    theirs = official("vit_h16")
    assert radio_fast.accelerate(theirs).model.spec.final_norm is False
    theirs.model.norm = nn.LayerNorm(160, eps=1e-6).eval()
    assert radio_fast.accelerate(theirs).model.spec.final_norm is True
    theirs = official("dinov2_g14")
    theirs.model.inner.patch_generator.pos_embed = nn.Parameter(torch.zeros(1, 16 * 16, 128))
    assert radio_fast.accelerate(theirs).model.spec.resize_square is True
    theirs = official("vit_h14_v1")
    theirs.model.patch_generator.pos_embed = nn.Parameter(torch.zeros(1, 16 * 16, 80))
    assert radio_fast.accelerate(theirs).model.spec.resize_square is False
    assert radio_fast.accelerate(official("hf_vit_l16")).version.name == "radio_v2.5-h"


# -- refused ----------------------------------------------------------------------------------------------------------


class Subclass(torch.Tensor):
    pass


def replaced(name: str, change):
    """The model with one of its parameters changed."""

    def act(model):
        owner, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner)
        value = change(owner._parameters.pop(leaf))
        if value is not None:
            owner.register_parameter(leaf, nn.Parameter(value, requires_grad=False))

    return act


def scaled(factor: float):
    def act(model):
        model.model.blocks._modules["1"].norm2.scale = factor

    return act


def eps(model):
    model.model.blocks._modules["2"].norm1.eps = 1e-5


def tanh_gelu(model):
    model.model.blocks._modules["0"].mlp.act = nn.GELU("tanh").eval()


def weight_norm(model):
    model.model.blocks._modules["0"].attn.proj = nn.utils.parametrizations.weight_norm(nn.Linear(160, 160)).eval()


def lora(model):
    model.model.blocks._modules["0"].attn.qkv.lora_A = nn.Parameter(torch.zeros(4, 160))


def unequal_heads(model):
    model.model.blocks._modules["0"].attn.num_heads = 4


QKV, PROJ = "model.blocks.1.attn.qkv.weight", "model.blocks.1.attn.proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.train(), r"training mode: call its \.eval\(\) first"),
        (lambda m: m.model.blocks.train(), r"training mode: call its \.eval\(\) first"),
        (replaced(QKV, lambda t: t.to("meta")), f"{QKV} is on the meta device, without data"),
        (replaced(QKV, lambda t: t.to(torch.int8)), f"{QKV} is int8. accelerate takes plain float32"),
        (replaced(QKV, lambda t: t.double()), f"{QKV} is float64. accelerate takes plain float32"),
        (replaced(QKV, lambda t: t.detach().as_subclass(Subclass)), f"{QKV} is a Subclass: quantised, sharded"),
        (replaced(QKV, lambda t: t.detach().to_sparse()), f"{QKV} is sparse_coo"),
        (replaced(QKV, lambda t: t.half()), r"of several dtypes .*qkv\.weight float16.*\.to\(dtype\)"),
        (replaced(QKV, lambda t: None), r"lacks the backbone tensor 'blocks\.1\.attn\.qkv\.weight'.*The model is"),
        (replaced(PROJ, lambda t: t[:, :80]), r"blocks\.1\.attn\.proj\.weight has shape \(160, 80\) in the model"),
        (scaled(0.5), r"block 1: norm2 is neither a LayerNorm of ε 1e-6 nor that times 1/√2"),
        (scaled(2**-0.5), "some blocks multiply their norms by 1/√i and others don't"),
        (eps, r"block 2: norm1 is neither a LayerNorm of ε 1e-6"),
        (tanh_gelu, r"block 0: the MLP's activation must be the exact GELU, found GELU\(approximate='tanh'\)"),
        (weight_norm, r"blocks\.0\.attn\.proj: its weight parametrisation is not a spectral one"),
        (lora, r"it has tensors that this package knows no use of: blocks\.0\.attn\.qkv\.lora_A"),
        (unequal_heads, r"the same number of attention heads, found \[2, 4\]"),
    ],
)
def test_refused(change, message):
    theirs = official("vit_h16")
    change(theirs)
    with pytest.raises(ValueError, match=message):
        radio_fast.accelerate(theirs)


def test_refused_on_several_devices():
    tensors = {"model.a": torch.zeros(1), "model.b": torch.zeros(1, device="meta")}
    with pytest.raises(ValueError, match=r"several devices \(model\.a on cpu, model\.b on meta\): move it to one"):
        adopt._place(tensors)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            nn.Linear(2, 2),
            r"Linear is no RADIO model \(its parameters: weight, bias, …\).*torch\.hub\.load.*RadioModel",
        ),
        (nn.ReLU(), r"ReLU is no RADIO model \(its parameters: none\)"),
        ("radio_v2.5-h", "takes a RADIO model, an nn.Module, got str"),
    ],
)
def test_refused_what_is_no_radio_model(model, message):
    with pytest.raises(ValueError, match=message):
        radio_fast.accelerate(model)


def test_refused_its_own():
    with pytest.raises(ValueError, match="radio_fast's model already"):
        radio_fast.accelerate(radio_fast.load(golden_source("vit_h16")))


def test_refused_eradio_of_several_windows_or_another_epsilon():
    theirs = official("eradio_small")
    table = next(m for n, m in theirs.named_modules() if n.endswith("pos_emb_funct"))
    table.relative_coords_table = coords_table(4, 16)
    with pytest.raises(
        ValueError, match=r"must be the same in all levels, found \(now, as built\): \[\(4, 16\), \(16,"
    ):
        radio_fast.accelerate(theirs)
    theirs = official("eradio_small")
    theirs.model.levels._modules["2"].blocks._modules["0"].attention_blocks._modules["0"].norm1.eps = 1e-6
    with pytest.raises(ValueError, match=r"norm1 must have ε 1e-05, found 1e-06"):
        radio_fast.accelerate(theirs)


def test_position_table_that_needs_the_architecture():
    theirs = official("vit_so400m16")
    D = theirs.model.patch_generator.pos_embed.shape[2]
    theirs.model.patch_generator.pos_embed = nn.Parameter(torch.zeros(1, 37 * 37, D))
    with pytest.raises(ValueError, match="does not show its architecture, which a position table for 592 pixels needs"):
        radio_fast.accelerate(theirs)
    args = read_checkpoint(golden_source("vit_so400m16"))["args"]
    assert radio_fast.accelerate(theirs, args=args).model.spec.resize_square is False
    args = json.loads(json.dumps({"model": "vit_so400m_patch16_224", "model_kwargs": args.model_kwargs}))
    assert radio_fast.accelerate(theirs, args=args).model.spec.resize_square is True
