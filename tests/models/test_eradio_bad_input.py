"""What a caller or a file can get wrong with an E-RADIO."""

from __future__ import annotations

import fnmatch
import warnings

import pytest
import torch

import radio_fast
from bench.eradio_state import SMALL, random_state, write_checkpoint
from radio_fast import CheckpointError
from tests.models.eradio import QUIET, golden, image


@pytest.mark.parametrize(("size", "near"), [((224, 240), "224 × 256"), ((48, 64), "64 × 64"), ((0, 32), "32 × 32")])
def test_image_size(size, near):
    text = rf"multiples of 32 pixels \(E-RADIO's last level\), got {size[0]} × {size[1]}; the nearest .* is {near}"
    with pytest.raises(ValueError, match=text):
        golden()(torch.zeros(1, 3, *size))


@pytest.mark.parametrize("window", [0, -1, 33, 10**9, True, 2.0, "4", None, "optimal"])
def test_change_window_size(window):
    model = golden()
    with pytest.raises(ValueError, match="window_size must be a number of positions in 1…32, got "):
        model.model.change_window_size(window)
    assert model.model.attention_window is None


@pytest.mark.parametrize("size", [(0, 0), (-32, 32), (16, 512), (100, 512), (224.0, 224), ("224", 224)])
def test_set_optimal_window_size(size):
    with pytest.raises(ValueError, match="image sizes must be multiples of 32 pixels, "):
        golden().model.set_optimal_window_size(size)


LACKING = [
    "patch_embed.conv_down.0.conv.weight",
    "patch_embed.conv_down.2.conv.weight",
    "patch_embed.conv_down.2.bn.running_mean",
    "levels.0.blocks.cv1.conv.weight",
    "levels.0.blocks.cv2.conv.weight",
    "levels.1.blocks.m.0.cv2.bn.weight",
    "levels.1.downsample.reduction.conv.weight",
    "levels.2.blocks.0.attention_blocks.0.upsample_op.weight",
    "levels.2.blocks.0.attention_blocks.0.upsample_op.bias",
    "levels.2.blocks.0.attention_blocks.1.attn.pos_emb_funct.relative_coords_table",
    "levels.2.blocks.0.attention_blocks.1.attn.pos_emb_funct.cpb_mlp.2.weight",
    "levels.3.blocks.0.attention_blocks.0.mlp.fc1.weight",
    "levels.3.blocks.0.attention_blocks.0.attn.qkv.weight",
    "levels.3.blocks.0.attention_blocks.0.norm2.bias",
    "high_res_neck.neck_features_proj.0.conv1.weight",
    "high_res_neck.neck_features_proj.1.norm.running_var",
    "high_res_neck.neck_features_proj.1.norm.*",
    "high_res_neck.neck_features_proj.1.conv2.bias",
]


@pytest.mark.parametrize("name", LACKING)
def test_missing_tensor(name, tmp_path):
    state = {key: tensor for key, tensor in random_state(SMALL).items() if not fnmatch.fnmatchcase(key, name)}
    assert len(state) < len(random_state(SMALL))
    write_checkpoint(tmp_path / "eradio.pth.tar", state)
    with pytest.raises(CheckpointError, match=r"lacks the backbone tensor '.*': it would run on random numbers"):
        radio_fast.load(tmp_path / "eradio.pth.tar")


BLOCK = "levels.3.blocks.0.attention_blocks.0"
ODD = {
    "scalar": ("levels.0.blocks.cv1.conv.weight", ()),
    "flat weight": ("patch_embed.conv_down.0.conv.weight", (27,)),
    "gray stem": ("patch_embed.conv_down.0.conv.weight", (16, 1, 3, 3)),
    "even kernel": ("patch_embed.conv_down.2.conv.weight", (24, 16, 2, 2)),
    "empty": ("levels.0.downsample.reduction.conv.weight", (48, 0, 3, 3)),
    "short BatchNorm": ("levels.0.downsample.reduction.bn.running_var", (1,)),
    "window of 33": (f"{BLOCK}.attn.pos_emb_funct.relative_coords_table", (1, 65, 65, 2)),
    "heads": (f"{BLOCK}.attn.pos_emb_funct.cpb_mlp.2.weight", (7, 512)),
    "qkv": (f"{BLOCK}.attn.qkv.weight", (10, 192)),
    "wide MLP": (f"{BLOCK}.mlp.fc1.weight", (3 * 768, 192)),
    "neck": ("high_res_neck.neck_features_proj.1.conv1.weight", (192, 2, 3, 3)),
    "flat upsample": ("levels.2.blocks.0.attention_blocks.0.upsample_op.weight", (96,)),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_shapes(name, tmp_path):
    key, shape = ODD[name]
    state = random_state(SMALL)
    state[key] = torch.zeros(shape)
    write_checkpoint(tmp_path / "eradio.pth.tar", state)
    with pytest.raises(CheckpointError, match=r"shape|must|divide|fit"):
        radio_fast.load(tmp_path / "eradio.pth.tar")


@pytest.mark.parametrize(
    "key", ["levels.400000000.blocks.0.x", "levels.7.blocks.cv1.conv.weight", "levels.2.blocks.5.attention_blocks.0.y"]
)
def test_numbers_out_of_order(key, tmp_path):
    """A far number names no million of levels between."""
    state = random_state(SMALL) | {key: torch.zeros(1)}
    write_checkpoint(tmp_path / "eradio.pth.tar", state)
    with pytest.raises(CheckpointError, match="lacks the backbone tensor"):
        radio_fast.load(tmp_path / "eradio.pth.tar")


@QUIET
def test_derived_tensors_are_ignored_and_others_told(tmp_path):
    state = random_state(SMALL)
    extra = {f"{BLOCK}.attn.pos_emb_funct.relative_bias": torch.ones(2, 256, 256), "norm.weight": torch.ones(192)}
    extra |= {
        f"{BLOCK}.attn.pos_emb_funct.relative_position_index": torch.zeros(256, 256),
        "head.weight": torch.ones(1),
    }
    write_checkpoint(tmp_path / "a.pth.tar", state)
    write_checkpoint(tmp_path / "b.pth.tar", state | extra)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models = [radio_fast.load(tmp_path / f"{name}.pth.tar") for name in "ab"]
    assert torch.equal(*(model(image(64, 64)).features for model in models))
    write_checkpoint(tmp_path / "c.pth.tar", state | {f"{BLOCK}.surprise": torch.ones(1)})
    with pytest.warns(UserWarning, match=r"does not use: levels\.3\.blocks\.0\.attention_blocks\.0\.surprise"):
        radio_fast.load(tmp_path / "c.pth.tar")
