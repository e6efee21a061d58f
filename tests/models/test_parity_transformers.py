"""Against Transformers' RadioModel, an independent implementation of the plain ViT versions."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import radio_fast
from radio_fast.folder import native_backbone
from radio_fast.models.weights import canonical_backbone
from tests.numerics import assert_relative

transformers = pytest.importorskip("transformers", minversion="5.17", reason="pip install radio_fast[parity]")

SIZES = [(224, 224), (160, 336), (48, 64)]
CONFIGS = {
    "swiglu-layerscale": {
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "use_swiglu_ffn": True,
        "layerscale_value": 0.7,
    },
    "vit-b": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "vit-h-4": {"hidden_size": 1280, "num_hidden_layers": 4, "num_attention_heads": 16},
}

# What Transformers can do and the released models don't have: written under its own names.
NO_REMOTE_CODE_NAME = {
    ".mlp.w12.": ".mlp.weights_in.",
    ".mlp.w3.": ".mlp.weights_out.",
    ".ls1.gamma": ".layer_scale1.lambda1",
    ".ls2.gamma": ".layer_scale2.lambda1",
}


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights at the scale of trained ones, norms and biases away from neutral, a few outlier channels."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "layer_scale" in name:
            continue
        value = torch.empty_like(parameter).normal_(std=0.03, generator=generator)
        if "norm" in name and name.endswith("weight"):
            value += 1
            value[::97] *= 8
        parameter.data.copy_(value)


@pytest.fixture(scope="module", params=CONFIGS, ids=str)
def pair(request, tmp_path_factory):
    """(theirs, a folder that they saved): random weights, at full width."""
    config = transformers.RadioConfig(max_img_size=512, **CONFIGS[request.param])
    theirs = transformers.RadioModel(config).eval()
    randomize(theirs, seed=3)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, folder


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_from_saved_folder(pair, size):
    theirs, folder = pair
    ours = radio_fast.load(folder)
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = theirs(x)
    summary, features = ours(x)
    assert_relative(features, expected.features)
    assert_relative(summary, expected.summary)


def test_from_names_in_memory(pair, tmp_path):
    """The names that Transformers' modules have, which differ from those it writes to disk."""
    theirs, folder = pair
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file({name: t.contiguous() for name, t in theirs.state_dict().items()}, tmp_path / "model.safetensors")
    x = torch.rand(1, 3, 96, 64, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        expected = theirs(x)
    assert_relative(radio_fast.load(tmp_path)(x).features, expected.features)


def test_from_our_names_into_theirs(pair, tmp_path):
    """The other way: our tensors, written in the remote-code names, loaded by Transformers."""
    theirs, folder = pair
    ours = radio_fast.load(folder)
    with torch.no_grad():
        for parameter in ours.model.parameters():
            parameter.mul_(1.01)
    tensors = {f"radio_model.model.{name}": t.contiguous() for name, t in ours.model.state_dict().items()}
    for i, block in enumerate(theirs.encoder.layer):  # ours has its LayerScale in the weights
        if hasattr(block.layer_scale1, "lambda1"):
            one = torch.ones_like(block.layer_scale1.lambda1)
            tensors |= {f"radio_model.model.blocks.{i}.ls{n}.gamma": one.clone() for n in (1, 2)}
    for old, new in NO_REMOTE_CODE_NAME.items():
        tensors = {name.replace(old, new): t for name, t in tensors.items()}
    tensors |= {f"radio_model.input_conditioner.{n}": t for n, t in ours.input_conditioner.state_dict().items()}
    tensors["radio_model.summary_idxs"] = ours.summary_idxs
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    loaded = transformers.RadioModel.from_pretrained(tmp_path).eval()
    x = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected = loaded(x)
    assert_relative(expected.features, ours(x).features)
    # And it was our copy that was loaded, not the folder's weights.
    with torch.no_grad():
        assert not torch.allclose(theirs(x).features, expected.features, rtol=1e-3)


@pytest.mark.parametrize("separate", ["q_proj k_proj v_proj", "query key value"])
def test_separate_qkv_names(separate, rng):
    """Both spellings of separate q, k, v end up as one matrix, in this order."""
    parts = torch.randn(3, 8, 8, generator=rng)
    inner = "attention." if "query" in separate else ""
    tensors = {
        f"encoder.layer.0.attention.{inner}{name}.weight": part
        for name, part in zip(separate.split(), parts, strict=True)
    }
    shuffled = dict(reversed(tensors.items()))
    (key, fused), *rest = canonical_backbone(native_backbone(shuffled), "radio")[0].items()
    assert not rest
    assert key == "blocks.0.attn.qkv.weight"
    assert torch.equal(fused(), parts.flatten(0, 1))
