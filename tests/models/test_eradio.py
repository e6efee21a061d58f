"""E-RADIO: structure from tensors, folding, windows, against the same network written with plain modules."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import radio_fast
from bench.eradio_state import SMALL, Config, random_state, write_checkpoint
from radio_fast.api import make_backbone
from radio_fast.layers.mlp import Linear
from radio_fast.models.eradio_spec import eradio_spec, released_spec
from radio_fast.models.eradio_weights import BN_EPS, canonical_eradio
from tests.conftest import golden_source, outlier_input
from tests.models.eradio import QUIET, golden, image, pair
from tests.numerics import assert_relative, assert_tokens, assert_within

VARIANTS = {
    "released layout": {},
    "pooling": {"conv_base": False},
    "pairs of convolutions": {"c2f": False, "depths": (2, 1, 1, 1)},
    "no pre_conv": {"pre_conv": False},
    "grouped pre_conv": {"pre_conv_groups": 4},
    "stem of 2 × 2 pixels": {"shuffle": 2},
    "stem of 4 × 4 pixels": {"shuffle": 4},
    "shuffled downsampling": {"shuffle_down": True},
    "SwiGLU": {"swiglu": True},
    "LayerScale": {"gamma": True},
    "biases": {"biases": True},
    "neck from level 1": {"neck_start": 1},
    "neck from level 3": {"neck_start": 3},
    "window 12": {"window": 12},
    "deep": {"depths": (2, 3, 2, 2), "sr_ratios": ((), (), (1, 2), (2,))},
}


# -- against plain modules --------------------------------------------------------------------------------------------


@QUIET
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name, tmp_path):
    config = dataclasses.replace(SMALL, **VARIANTS[name])
    ours, plain = pair(tmp_path, config, seed=len(name))
    x = image(64, 96, batch=2)
    for window in (None, 2, 3):
        if window:
            ours.model.change_window_size(window)
            plain.change_window_size(window)
        summary, features = ours(x)
        expected_summary, expected = plain(ours.input_conditioner(x))
        assert_relative(features, expected)
        assert_relative(summary, expected_summary)
        with torch.autocast("cpu", torch.bfloat16):
            assert_tokens(ours(x).features, expected)
    side = 4 << config.neck_start
    assert ours.patch_size == side
    assert ours(x, feature_fmt="NCHW").features.shape == (2, 64, 64 // side, 96 // side)


@QUIET
def test_random_sizes(tmp_path):
    """Non-square images from 32 to 640 pixels, every window, batches of 1 to 3."""
    ours, plain = pair(tmp_path, seed=5)
    draw = random.Random(8)
    for window in range(1, 17):
        H, W = (32 * round(20 ** draw.random()) for _ in range(2))
        H, W = (H, W) if window > 2 else (640, 32 * window)
        x = image(H, W, batch=draw.randint(1, 3), seed=window)
        ours.model.change_window_size(window)
        plain.change_window_size(window)
        with torch.no_grad():
            assert_relative(ours(x).features, plain(ours.input_conditioner(x))[1])


@QUIET
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [4, 16])
def test_half_precision(dtype, window, tmp_path):
    """At most twice the error of the plain modules in the same dtype, and every token points where it should."""
    ours, plain = pair(tmp_path, seed=2, dtype=dtype, window_size=window)
    plain.change_window_size(window)
    x = outlier_input(2, 3, 128, 256, dtype=torch.float32, seed=3).clamp(-3, 3)
    x = ours.input_conditioner(x)
    truth_summary, truth = plain(x)
    same_summary, same = plain.to(dtype)(x.to(dtype))
    ours.make_preprocessor_external()
    summary, features = ours(x)
    assert_within(features, truth, same)
    assert_within(summary, truth_summary, same_summary)
    assert_tokens(features, truth)
    assert_tokens(summary, truth_summary)


def test_released_structure_is_what_its_tensors_show():
    """The table for random weights against the structure read off tensors of the released shapes."""
    state = {name: torch.empty(shape, device="meta") for name, shape in released_shapes().items()}
    spec = eradio_spec("eradio_large_fullres_ws16", canonical_eradio(state), (0,))
    assert spec == released_spec("eradio_large_fullres_ws16")
    model = make_backbone(spec)
    assert 385e6 < sum(p.numel() for p in model.parameters()) < 395e6
    assert {block.spec.dim // block.spec.num_heads for block in model.modules() if hasattr(block, "attn")} == {96}


def released_shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of the released tensors: those of a model a 96th as wide, widths multiplied."""
    narrow = Config(dim=2, in_dim=1, num_heads=(1, 1, 1, 1), features=16, window=16)
    wide = {}
    for name, tensor in random_state(narrow).items():
        shape = list(tensor.shape)
        if "cpb_mlp.2" in name:
            shape[0] = 8 if "levels.2" in name else 16
        elif "pos_emb_funct" not in name and "num_batches" not in name:
            stem = "conv_down.0" in name or (name == "patch_embed.conv_down.2.conv.weight")
            for axis, size in enumerate(shape[:2]):
                fixed = (stem and size in (1, 3)) or ("neck" in name and name.endswith("conv1.weight") and axis == 1)
                shape[axis] = size if fixed else 96 * size
            if stem:  # 1 channel stands for 64
                shape = [64 if size == 1 else size for size in shape[:2]] + shape[2:]
        wide[name] = tuple(shape)
    return wide


# -- folding ----------------------------------------------------------------------------------------------------------


def test_folding_is_exact_to_the_last_bit_of_float32():
    """Folded weights are the float64 fold, rounded once, though weight and statistics are stored in float16."""
    state = {name: tensor.half() for name, tensor in random_state(SMALL, 3).items() if tensor.is_floating_point()}
    folded = canonical_eradio(state)
    checked = 0
    for name in [name.removesuffix(".running_var") for name in state if name.endswith(".running_var")]:
        scale, shift, mean, var = (
            state[f"{name}.{leaf}"].double() for leaf in ("weight", "bias", "running_mean", "running_var")
        )
        conv, target = name.removesuffix(".bn") + ".conv", name.removesuffix(".bn")
        if name.endswith(".norm"):
            conv = target = name.removesuffix(".norm") + ".conv1"
        factor = scale / (var + BN_EPS).sqrt()
        weight = state[f"{conv}.weight"].double() * factor[:, None, None, None]
        bias = state[f"{conv}.bias"].double() if f"{conv}.bias" in state else 0
        made = folded[f"{target}.weight"]()
        assert made.dtype == torch.float32
        assert torch.equal(made, weight.float().view(made.shape))
        assert_relative(folded[f"{target}.bias"](), shift + (bias - mean) * factor, 1e-7)
        checked += 1
    assert checked == 17
    assert not any("running" in name or ".bn." in name for name in folded)


def test_small_variance_needs_the_epsilon():
    """Variances near BatchNorm's ε, and means far from zero: the fold against torch's BatchNorm in float64."""
    generator = torch.Generator().manual_seed(1)
    weight, bn = torch.randn(8, 4, 3, 3, generator=generator), torch.nn.BatchNorm2d(8).eval().double()
    bn.running_var = torch.logspace(-7, 1, 8).double()
    bn.running_mean = 100 * torch.randn(8, generator=generator).double()
    state = {"x.conv.weight": weight} | {f"x.bn.{name}": tensor for name, tensor in bn.state_dict().items()}
    state["x.bn.bias"] = torch.randn(8, generator=generator)
    bn.bias.data.copy_(state["x.bn.bias"])
    folded = canonical_eradio(state)
    x = torch.randn(1, 4, 9, 9, generator=generator)
    expected = bn(F.conv2d(x.double(), weight.double(), padding=1))
    actual = F.conv2d(x.double(), folded["x.weight"]().double(), folded["x.bias"]().double(), padding=1)
    assert_relative(actual, expected.detach(), 1e-6)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
def test_dtype_after_loading(stored, dtype, tmp_path):
    """Whatever the file stores, the model is what was asked for, float32 without asking."""
    state = {n: t.to(stored) if t.is_floating_point() else t for n, t in random_state(SMALL).items()}
    write_checkpoint(tmp_path / "eradio.pth.tar", state)
    model = radio_fast.load(tmp_path / "eradio.pth.tar", dtype=dtype)
    expected = getattr(torch, dtype or "float32")
    biases = {id(m.bias) for m in model.model.modules() if isinstance(m, Linear)}  # always float32
    assert {p.dtype for p in model.model.parameters() if id(p) not in biases} == {expected}
    assert model(image(512, 512)).features.dtype == expected


def test_convolutions_are_channels_last():
    """Else torch brings each weight into that format in every call."""
    convs = [module for module in golden().modules() if isinstance(module, torch.nn.Conv2d)]
    assert len(convs) > 8
    assert all(conv.weight.is_contiguous(memory_format=torch.channels_last) for conv in convs)


# -- properties and outputs -------------------------------------------------------------------------------------------


@QUIET
def test_properties(tmp_path):
    model = golden()
    assert (model.patch_size, model.min_resolution_step, model.window_size) == (16, 32, None)
    assert (model.num_summary_tokens, model.num_cls_tokens, model.blocks) == (None, None, None)
    assert (model.embed_dim, model.summary_dim) == (160, 160)
    assert (model.max_resolution, model.preferred_resolution) == (None, None)
    assert model.get_nearest_supported_resolution(230, 500) == (224, 512)
    assert model.get_nearest_supported_resolution(1, 47) == (32, 32)
    row = radio_fast.load("eradio_v1", checkpoint=golden_source("eradio_small"))
    assert (row.version.name, row.max_resolution, row.preferred_resolution) == ("e-radio_v2", 2048, (512, 512))
    summary, features = model(image(64, 96))
    assert_relative(summary, features.mean(1))
    nchw = model(image(64, 96), feature_fmt="NCHW").features
    assert torch.equal(nchw.flatten(2).transpose(1, 2), features)


def test_no_intermediates():
    with pytest.raises(NotImplementedError, match="E-RADIO has no forward_intermediates"):
        golden().forward_intermediates(image(64, 64))


@QUIET
def test_adaptors(tmp_path):
    """Both heads see the features: the summary head their mean, whatever slot the file names."""
    generator = torch.Generator().manual_seed(4)
    heads = {}
    for group, width in (("_heads", 24), ("_feature_projections", 4 * 12)):
        for name, shape in (("fc1", (32, 64)), ("final.2", (width, 32))):
            heads[f"{group}.clip.{name}.weight"] = torch.randn(shape, generator=generator) / 8
            heads[f"{group}.clip.{name}.bias"] = torch.randn(shape[0], generator=generator)
        heads |= {f"{group}.clip.final.0.weight": torch.ones(32), f"{group}.clip.final.0.bias": torch.zeros(32)}
    file = tmp_path / "eradio.pth.tar"
    write_checkpoint(file, random_state(SMALL), **heads)
    content = torch.load(file, weights_only=False)
    content["args"].teachers = [{"name": "clip", "type": "open_clip", "fd_upsample_factor": 2, "token_slot": 3}]
    torch.save(content, file)
    x = image(64, 96)
    backbone = radio_fast.load(file)(x)
    outputs = radio_fast.load(file, adaptor_names="clip")(x)

    def head(x: torch.Tensor, group: str) -> torch.Tensor:
        y = F.linear(x, heads[f"{group}.clip.fc1.weight"], heads[f"{group}.clip.fc1.bias"])
        y = F.gelu(F.layer_norm(y, (32,)))
        return F.linear(y, heads[f"{group}.clip.final.2.weight"], heads[f"{group}.clip.final.2.bias"])

    assert torch.equal(outputs["backbone"].features, backbone.features)
    assert_relative(outputs["clip"].summary, head(backbone.summary, "_heads"))
    fine = head(backbone.features, "_feature_projections").view(1, 4, 6, 2, 2, 12).transpose(2, 3).reshape(1, 96, 12)
    assert_relative(outputs["clip"].features, fine)
    assert radio_fast.load(file, adaptor_names="clip")(x, feature_fmt="NCHW")["clip"].features.shape == (1, 12, 8, 12)


@QUIET
def test_hugging_face_folder(tmp_path):
    """The remote-code layout, as for the ViTs."""
    state = random_state(SMALL)
    write_checkpoint(tmp_path / "eradio.pth.tar", state)
    file = radio_fast.load(tmp_path / "eradio.pth.tar")
    tensors = {f"radio_model.model.{name}": tensor for name, tensor in state.items()}
    tensors |= {f"radio_model.input_conditioner.{n}": t for n, t in file.input_conditioner.state_dict().items()}
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {"args": {"model": "eradio_large_fullres_ws16", "model_kwargs": {}}, "version": "e-radio_v2"}
    (folder / "config.json").write_text(json.dumps(config))
    model = radio_fast.load(folder)
    assert model.version.name == "e-radio_v2"
    assert torch.equal(model(image(64, 64)).features, file(image(64, 64)).features)
