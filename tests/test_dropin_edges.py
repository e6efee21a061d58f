"""What a user of the loaders, accelerate() and AutoModel's interface may come with, and must not be silently wrong."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import radio_fast

transformers = pytest.importorskip("transformers", minversion="5.17", reason="pip install radio_fast[hf]")
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_img_size": 64}


def saved(folder, **config):
    theirs = transformers.RadioModel(transformers.RadioConfig(**SMALL, **config)).eval()
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act must be 'gelu', got 'relu'"),
        ({"layer_norm_eps": 1e-2}, "layer_norm_eps must be 1e-6, got 0.01"),
    ],
)
def test_what_no_tensor_shows_is_not_ignored(tmp_path, config, message):
    saved(tmp_path, **config)
    with pytest.raises(radio_fast.CheckpointError, match=message):
        radio_fast.load(tmp_path)


class Classifier(nn.Module):
    def __init__(self, radio):
        super().__init__()
        self.radio_model = radio
        self.head = nn.Linear(2, 2)


def test_a_model_around_the_model_is_not_dropped(tmp_path):
    theirs = saved(tmp_path)
    with pytest.raises(ValueError, match=r"weights of its own .*head.weight.* accelerate its .radio_model"):
        radio_fast.accelerate(Classifier(theirs).eval())
    with pytest.raises(ValueError, match="version must be a version's name or None, got 5"):
        radio_fast.accelerate(theirs, version=5)


def test_what_is_set_on_the_outer_model_counts(tmp_path):
    saved(tmp_path)
    model = radio_fast.hf.RadioFastModel.from_pretrained(tmp_path)
    model.backend, model.graphs = "reference", None
    assert model.radio_model.backend == "reference" and model.radio_model.graphs is None
    assert model.blocks[0].attn.backend == "reference"


@pytest.mark.parametrize("field", [{"num_labels": "abc"}, {"use_return_dict": 3}])
def test_strange_configs_are_one_clear_error(tmp_path, field):
    saved(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | field))
    with pytest.raises(radio_fast.CheckpointError, match=r"config\.json"):
        radio_fast.hf.RadioFastModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("field", [{"to_dict": 5}, {"mlp_ratio": 4}])
def test_harmless_configs_load(tmp_path, field):
    saved(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | field))
    model = radio_fast.hf.RadioFastModel.from_pretrained(tmp_path)
    assert model.config.to_dict()["mlp_ratio"] == 4.0


def test_auto_model_after_register(tmp_path):
    """AutoModel's config has RadioConfig's defaults where the file says nothing: no contradiction."""
    theirs = saved(tmp_path)
    restore = radio_fast.hf.register()
    try:
        ours = transformers.AutoModel.from_pretrained(tmp_path)
    finally:
        restore()
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x).features, theirs(x).features, rtol=1e-5, atol=1e-5)
