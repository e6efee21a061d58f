"""What a caller or a file can get wrong with an E-RADIO."""

from __future__ import annotations

import dataclasses
import fnmatch
import time
import warnings

import pytest
import torch

import radio_fast
from bench.eradio_state import SMALL, random_state, write_checkpoint
from radio_fast import CheckpointError
from radio_fast.models.eradio_spec import eradio_spec
from radio_fast.models.eradio_weights import canonical_eradio
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


@pytest.mark.parametrize(
    ("size", "text"),
    [
        ((0, 0), "image sides must be 32 pixels or more, got 0 × 0"),
        ((-32, 32), "image sides must be 32 pixels or more"),
        ((16, 512), "image sides must be 32 pixels or more"),
        ((224.0, 224), r"image_dim must be \(height, width\) in pixels, got \(224.0, 224\)"),
        (("224", 224), r"image_dim must be \(height, width\) in pixels"),
        (224, r"image_dim must be \(height, width\) in pixels, got 224"),
        (None, r"image_dim must be \(height, width\) in pixels, got None"),
        ((224,), r"image_dim must be \(height, width\) in pixels"),
    ],
)
def test_set_optimal_window_size(size, text):
    with pytest.raises(ValueError, match=text):
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
    "levels.2.blocks.0.attention_blocks.0.downsample_op.weight",
    "levels.2.blocks.0.attention_blocks.1.pre_conv.bn.*",
    "high_res_neck.neck_features_proj.0.conv1.bias",
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


# Deleted from one of several alike: the others show that it was there.
SIBLINGS = {
    "levels.2.blocks.1.attention_blocks.1.pre_conv.*": {},
    "levels.2.blocks.1.attention_blocks.0.downsample_op.*": {},
    "levels.2.blocks.0.attention_blocks.0.gamma1": {"gamma": True},
    "levels.3.blocks.0.attention_blocks.0.gamma?": {"gamma": True},
    "levels.3.blocks.0.attention_blocks.0.attn.qkv.bias": {"biases": True},
    "levels.3.blocks.0.attention_blocks.0.attn.proj.bias": {"biases": True},
    "levels.2.blocks.1.attention_blocks.0.mlp.fc1.bias": {"biases": True},
    "levels.2.blocks.0.attention_blocks.1.mlp.fc2.bias": {"biases": True},
    "levels.0.blocks.0.conv2.bias": {"c2f": False},
    "levels.1.blocks.1.norm2.*": {"c2f": False, "depths": (1, 2, 2, 1)},
    "levels.2.blocks.0.attention_blocks.0.downsample_mixer.*": {"conv_base": False},
}


@pytest.mark.parametrize("name", SIBLINGS)
def test_missing_beside_its_like(name, tmp_path):
    config = dataclasses.replace(SMALL, **{"depths": (1, 1, 2, 1)} | SIBLINGS[name])
    state = random_state(config)
    kept = {key: tensor for key, tensor in state.items() if not fnmatch.fnmatchcase(key, name)}
    assert len(kept) < len(state)
    write_checkpoint(tmp_path / "eradio.pth.tar", kept)
    with pytest.raises(CheckpointError, match=r"lacks the backbone tensor '.*': it would run on random numbers"):
        radio_fast.load(tmp_path / "eradio.pth.tar")


def test_thousands_of_blocks_take_no_thousand_times_as_long():
    """Keys are read once: 40 000 of them in seconds, where a look through all of them for each block took minutes."""
    small = dataclasses.replace(SMALL, dim=2, in_dim=2, depths=(1, 1, 1, 2000), features=4, window=2)
    shapes = {name: torch.empty(tensor.shape, device="meta") for name, tensor in random_state(small).items()}
    assert len(shapes) > 30_000
    began = time.process_time()
    spec = eradio_spec("eradio", canonical_eradio(shapes), (0,))
    assert len(spec.levels[3].chains) == 2000
    assert time.process_time() - began < 30


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
    "narrow pre_conv": (f"{BLOCK}.pre_conv.*", (1,)),
    "narrow bottleneck": ("levels.0.blocks.m.0.cv2.*", (1,)),
    "flat upsample": ("levels.2.blocks.0.attention_blocks.0.upsample_op.weight", (96,)),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_shapes(name, tmp_path):
    key, shape = ODD[name]
    state = random_state(SMALL)
    if key.endswith(".*"):  # a convolution and its BatchNorm, cut to so many channels
        for found in fnmatch.filter(state, key):
            state[found] = state[found][: shape[0]] if state[found].ndim else state[found]
    else:
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


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("key", [f"{BLOCK}.attn.proj.weight", "levels.0.blocks.cv1.conv.weight"])
def test_odd_dtypes(key, dtype, tmp_path):
    state = random_state(SMALL)
    state[key] = state[key].to(dtype)
    write_checkpoint(tmp_path / "eradio.pth.tar", state)
    with pytest.raises(CheckpointError, match=f"stored as {dtype}; weights must be float16, bfloat16 or float32"):
        radio_fast.load(tmp_path / "eradio.pth.tar")


@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_odd_variance(value, tmp_path):
    state = random_state(SMALL)
    state["levels.0.blocks.cv1.bn.running_var"][3] = value
    write_checkpoint(tmp_path / "eradio.pth.tar", state)
    with pytest.raises(
        CheckpointError, match=r"cv1\.weight: its BatchNorm's running_var must be finite and not negative"
    ):
        radio_fast.load(tmp_path / "eradio.pth.tar")


def test_expanded_tensor(tmp_path):
    """A small file must not become terabytes of memory."""
    state = random_state(SMALL) | {f"{BLOCK}.mlp.fc1.weight": torch.zeros(1, 1).expand(1 << 40, 192)}
    state[f"{BLOCK}.mlp.fc2.weight"] = torch.zeros(1, 1).expand(192, 1 << 40)
    write_checkpoint(tmp_path / "eradio.pth.tar", state)
    with pytest.raises(CheckpointError, match=r"mlp\.fc1\.weight claims 211106232532992 values, the file has fewer"):
        radio_fast.load(tmp_path / "eradio.pth.tar")


@QUIET
@pytest.mark.parametrize("arch", ["", "e-radio_v2", "ERADIO"])
def test_recognised_without_a_telling_name(arch, tmp_path):
    state = random_state(SMALL)
    for name in ("eradio", arch):
        write_checkpoint(tmp_path / f"{name or 'none'}.pth.tar", state, arch=name)
    models = [radio_fast.load(tmp_path / f"{name or 'none'}.pth.tar") for name in ("eradio", arch)]
    assert torch.equal(*(model(image(64, 64)).features for model in models))


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
