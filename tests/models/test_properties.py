"""The model object's properties and load's options that change them."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch

import radio_fast
from radio_fast.models.registry import ARCHS, VERSIONS, ViTDet, find_version
from radio_fast.models.spec import prefix_layout, spec_of_version
from radio_fast.models.vit import windowed_blocks
from radio_fast.ops.attention import from_windows, to_windows
from tests.conftest import golden_source

VITS = [name for name, row in VERSIONS.items() if not row.is_eradio]


def test_properties_of_a_bare_file():
    model = radio_fast.load(golden_source("vit_h16"))
    assert (model.patch_size, model.window_size, model.min_resolution_step) == (16, None, 16)
    assert (model.max_resolution, model.preferred_resolution) == (None, None)
    assert (model.num_summary_tokens, model.num_cls_tokens) == (8, 4)
    assert (model.embed_dim, model.summary_dim, len(model.blocks)) == (160, 480, 3)
    assert set(model.adaptors) == set()
    assert model.backend == "auto"
    assert model.model.blocks is model.blocks
    assert isinstance(model.input_conditioner, torch.nn.Module)


def test_properties_of_a_version():
    model = radio_fast.load("radio_v2.5-h", checkpoint=golden_source("vit_h16"))
    assert model.max_resolution == 2048
    assert model.preferred_resolution == (768, 768)
    assert (model.preferred_resolution.height, model.preferred_resolution.width) == (768, 768)
    assert model.version.license == "NSCL (non-commercial)"


@pytest.mark.parametrize(
    ("size", "expected"), [((1, 1), (16, 16)), ((224, 230), (224, 224)), ((333, 500), (336, 496)), ((24, 40), (32, 32))]
)
def test_nearest_resolution(size, expected):
    near = radio_fast.load(golden_source("vit_h16")).get_nearest_supported_resolution(*size)
    assert (near.height, near.width) == expected


def test_vitdet_from_the_version_table():
    model = radio_fast.load("radio_v2.5-b", checkpoint=golden_source("vit_b16_vitdet"), vitdet_window_size=2)
    assert (model.window_size, model.min_resolution_step) == (2, 32)
    assert model.get_nearest_supported_resolution(40, 100) == (32, 96)
    assert model.model.windowed == windowed_blocks(9, ViTDet(4))
    model = radio_fast.load("radio_v2.1", checkpoint=golden_source("vit_b16_vitdet"), vitdet_window_size=2)
    assert model.model.windowed == {0, 1, 2, 3, 4, 6, 7}, "five windowed blocks, one global, the last global"


@pytest.mark.parametrize(
    ("depth", "rule", "global_blocks"),
    [
        (12, ViTDet(4), {2, 5, 8, 11}),
        (24, ViTDet(4), {5, 11, 17, 23}),
        (32, ViTDet(None, 5), {5, 11, 17, 23, 29, 31}),
        (40, ViTDet(8), set(range(4, 40, 5))),
        (9, ViTDet(4), {1, 3, 5, 7, 8}),
        (27, ViTDet(4), {5, 11, 17, 23, 26}),
    ],
)
def test_vitdet_schedule(depth, rule, global_blocks):
    assert set(range(depth)) - windowed_blocks(depth, rule) == global_blocks


@pytest.mark.parametrize(("h", "w", "k"), [(2, 2, 1), (4, 6, 2), (6, 3, 3), (8, 4, 4)])
def test_window_order(h, w, k):
    """Window by window, each row by row, counted out by hand."""
    x = torch.arange(h * w).view(1, -1, 1)
    expected = [
        (wy * k + y) * w + wx * k + x_
        for wy in range(h // k) for wx in range(w // k) for y in range(k) for x_ in range(k)
    ]  # fmt: skip
    ordered = to_windows(x, h, w, k)
    assert ordered.shape == (h * w // k**2, k * k, 1)
    assert ordered.flatten().tolist() == expected
    assert torch.equal(from_windows(ordered, h, w, k), x)


def test_vitdet_window_of_the_whole_image_is_global_but_for_the_prefix():
    """Windowed blocks leave the prefix alone: after block 0 it is still what the checkpoint holds."""
    model = radio_fast.load(golden_source("vit_b16_vitdet"), vitdet_window_size=4)
    x = torch.rand(1, 3, 64, 128, generator=torch.Generator().manual_seed(0))
    (first,) = model.forward_intermediates(x, [0], return_prefix_tokens=True, intermediates_only=True)
    token = model.model.patch_generator.cls_token.token
    assert torch.equal(first.summary, token[list(model.model.spec.summary_idxs)].flatten().unsqueeze(0))


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({}, (1, 0, (0,))),
        ({"register_multiple": 8}, (1, 7, (0,))),
        ({"cls_token_per_teacher": True, "teachers": [{"name": n} for n in "abcd"]}, (4, 0, (0, 1, 2, 3))),
        (
            {"cls_token_per_teacher": True, "teachers": [{"name": n} for n in "abcdefgh"], "register_multiple": 8},
            (8, 8, tuple(range(8))),
        ),
        (
            {
                "cls_token_per_teacher": True,
                "teachers": [{"name": "a"}, {"name": "b", "use_summary": False}, {"name": "a"}, {"name": "c"}],
                "register_multiple": 8,
            },
            (3, 5, (0, 3)),
        ),
        ({"cpe_num_registers": 4, "register_multiple": 8}, (1, 4, (0,))),
        ({"teachers": [{"name": "a"}, {"name": "b"}], "register_multiple": 8}, (1, 7, (0,))),
    ],
)
def test_prefix_layout(args, expected):
    assert prefix_layout(args) == expected


@pytest.mark.parametrize("name", VITS)
def test_every_version_has_a_full_size_structure(name):
    spec = spec_of_version(VERSIONS[name])
    assert spec.embed_dim == ARCHS[spec.arch].embed_dim
    assert spec.grid_side * spec.patch_size == VERSIONS[name].max_resolution
    assert find_version(name) is VERSIONS[name]


def test_versions_and_default():
    assert len(radio_fast.versions()) == 17
    assert find_version("") is find_version(None) is VERSIONS["c-radio_v4-h"]
    assert find_version("eradio_v1") is VERSIONS["e-radio_v2"]
    assert find_version("nothing") is None


def test_random_init_is_seeded_and_full_size():
    a, b, c = (radio_fast.load("radio_v2.5-b", random_init=True, seed=s) for s in (0, 0, 1))
    x = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    assert torch.equal(a(x).features, b(x).features)
    assert not torch.equal(a(x).features, c(x).features)
    assert a(x).summary.shape == (1, 2304)
    assert sum(p.numel() for p in a.model.blocks.parameters()) == 12 * 7_087_872


def test_return_checkpoint():
    model, checkpoint = radio_fast.load(golden_source("vit_h16"), return_checkpoint=True)
    stored = checkpoint["state_dict"]["base_model.blocks.1.attn.qkv.weight"]
    assert torch.equal(model.blocks[1].attn.qkv.weight, stored.float())
    assert checkpoint["args"].model == "vit_huge_patch16_224"


@pytest.mark.parametrize("names", ["clip", ["clip"], ("sam", "clip", "sam"), []])
def test_adaptor_names(names):
    model = radio_fast.load(golden_source("vit_h16"), adaptor_names=names)
    output = model(torch.zeros(1, 3, 32, 32))
    if not names:
        assert isinstance(output, radio_fast.RadioOutput)
    else:
        expected = ["clip"] if isinstance(names, str) else list(dict.fromkeys(names))
        assert list(output) == ["backbone", *expected]
        assert all(out.summary.dtype == out.features.dtype == torch.float32 for out in output.values())


def test_adaptors_are_float32_in_a_half_precision_model():
    for model in (
        radio_fast.load(golden_source("vit_h16"), adaptor_names="sam", dtype="bfloat16"),
        radio_fast.load(golden_source("vit_h16"), adaptor_names="sam").half(),
    ):
        output = model(torch.zeros(1, 3, 32, 32), feature_fmt="NCHW")
        assert output["backbone"].features.dtype != torch.float32
        assert output["sam"].features.dtype == output["sam"].summary.dtype == torch.float32
        assert output["sam"].features.shape == (1, 56, 4, 4)


def test_dtype_follows_the_file_and_the_argument():
    assert radio_fast.load(golden_source("vit_h16_bf16")).blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    loaded = radio_fast.load(golden_source("vit_h16_bf16"), dtype="float32")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_hugging_face_config_beside_the_weights(tmp_path):
    """Resolutions, ViTDet window and version of a folder's config apply; arguments go before them."""
    shutil.copytree(golden_source("hf_vit_l16"), tmp_path, dirs_exist_ok=True)
    model = radio_fast.load(tmp_path)
    assert (model.max_resolution, model.preferred_resolution) == (2048, (768, 768))
    assert model.version.name == "radio_v2.5-h"
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"max_resolution": 1024, "preferred_resolution": [512, 256], "adaptor_names": []}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = radio_fast.load(tmp_path)
    assert (model.max_resolution, model.preferred_resolution) == (1024, (512, 256))
    assert model.window_size is None
    (tmp_path / "config.json").write_text(json.dumps(config | {"vitdet_window_size": 2}))
    with pytest.raises(ValueError, match="ViTDet mode needs at least one windowed block"):
        radio_fast.load(tmp_path)  # two blocks are too few for it
    (tmp_path / "config.json").write_text(json.dumps(config | {"preferred_resolution": "large"}))
    with pytest.raises(
        radio_fast.CheckpointError, match=r"preferred_resolution must be \[height, width\], got 'large'"
    ):
        radio_fast.load(tmp_path)


def test_hash_of_a_local_file():
    path = golden_source("vit_h16")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    radio_fast.load(path, sha256=digest.upper())
    with pytest.raises(radio_fast.DownloadError, match=f"has sha256 {digest}, expected {'0' * 64}"):
        radio_fast.load(path, sha256="0" * 64)
