"""What a user of Transformers' AutoModel does, with RadioFastModel in its place."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import radio_fast
from tests.conftest import GOLDEN, golden_source
from tests.numerics import assert_relative

transformers = pytest.importorskip("transformers", minversion="5.17", reason="pip install radio_fast[hf]")

from radio_fast.hf import RadioFastConfig, RadioFastModel, RadioFastModelOutput, register  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
ADAPTORS = GOLDEN / "hf_vit_h16_adaptors"
PLAIN = GOLDEN / "hf_vit_l16"


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(4)
    config = transformers.RadioConfig(
        hidden_size=96, num_hidden_layers=3, num_attention_heads=4, max_img_size=128, num_cls_tokens=4,
        num_registers=3, summary_idxs=[0, 2], layerscale_value=0.7, initializer_range=0.2, norm_mean=[0.4, 0.5, 0.6],
    )  # fmt: skip
    return transformers.RadioModel(config).eval()


@pytest.fixture(scope="module")
def native(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("native")
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def x():
    return torch.rand(2, 3, 48, 80, generator=torch.Generator().manual_seed(2))


def assert_alike(ours, theirs):
    for name in ("summary", "features", "last_hidden_state"):
        assert_relative(ours[name], theirs[name])


# -- against Transformers' model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_size", ["5GB", "100KB"])
def test_save_pretrained(shard_size, theirs, x, tmp_path):
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) == 1 if shard_size == "5GB" else len(shards) > 3
    ours = RadioFastModel.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = theirs(pixel_values=x)
    assert_alike(ours(pixel_values=x), expected)
    assert_relative(ours(x).features, expected.features)


def test_saved_as_bin(theirs, native, x, tmp_path):
    shutil.copy(native / "config.json", tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    with torch.no_grad():
        assert_alike(RadioFastModel.from_pretrained(tmp_path)(x), theirs(x))


def test_round_trip_through_transformers(native, x, tmp_path):
    """Their folder → ours → a folder in remote-code names → theirs."""
    ours = RadioFastModel.from_pretrained(native)
    ones = {
        f"radio_model.model.blocks.{i}.layer_scale{n}.lambda1": torch.ones(96) for i in range(3) for n in (1, 2)
    }  # ours has its LayerScale in the weights
    save_file({k: v.contiguous() for k, v in ours.state_dict().items()} | ones, tmp_path / "model.safetensors")
    shutil.copy(native / "config.json", tmp_path)
    theirs = transformers.RadioModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert_alike(ours(x), theirs(x))


@pytest.mark.parametrize("return_dict", [None, True, False])
def test_return_dict(return_dict, theirs, native, x):
    ours, kwargs = RadioFastModel.from_pretrained(native), {} if return_dict is None else {"return_dict": return_dict}
    with torch.no_grad():
        expected = theirs(x, **kwargs)
    outputs = ours(x, **kwargs)
    assert isinstance(outputs, tuple) is (return_dict is False) is isinstance(expected, tuple)
    assert len(outputs) == len(expected) == 3
    for i in range(3):
        assert_relative(outputs[i], expected[i])


def test_config(theirs, native):
    """Every field of theirs, but where the classes and files differ."""
    ours = RadioFastModel.from_pretrained(native).config
    assert isinstance(ours, transformers.RadioConfig)
    own = {"_name_or_path", "architectures"}
    expected = {k: v for k, v in theirs.config.to_dict().items() if k not in own}
    assert {k: v for k, v in ours.to_dict().items() if k in expected} == expected


# -- AutoModel ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def registered():
    restore = register()
    yield restore
    restore()


@pytest.mark.parametrize("kwargs", [{}, {"dtype": torch.bfloat16}, {"torch_dtype": "auto"}, {"local_files_only": True}])
def test_auto_model(kwargs, registered, theirs, native, x):
    ours = transformers.AutoModel.from_pretrained(native, **kwargs)
    assert type(ours) is RadioFastModel and not ours.training
    assert ours.dtype == kwargs.get("dtype", torch.float32)
    with torch.no_grad():
        expected = theirs(x)
    if "dtype" not in kwargs:
        assert_alike(ours(x), expected)


def test_auto_model_gives_theirs_again(registered, native):
    again = register()
    again()
    assert type(transformers.AutoModel.from_pretrained(native)) is RadioFastModel, "registered twice, taken back once"
    registered()
    assert type(transformers.AutoModel.from_pretrained(native)) is transformers.RadioModel


def test_auto_model_never_runs_code(registered, native, tmp_path):
    folder = Path(shutil.copytree(native, tmp_path / "folder"))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_bomb.Bomb", "AutoConfig": "modeling_bomb.Bomb"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_bomb.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')")
    for trust in (False, True):
        model = RadioFastModel.from_pretrained(folder, trust_remote_code=trust)
        assert not hasattr(model.config, "auto_map")
    assert type(transformers.AutoModel.from_pretrained(folder, trust_remote_code=False)) is RadioFastModel
    assert not (tmp_path / "exploded").exists()


def test_auto_model_from_config(registered, theirs):
    with pytest.raises(ValueError, match=r"register\(\) is for from_pretrained; a model without weights is RadioModel"):
        transformers.AutoModel.from_config(RadioFastConfig())
    assert type(transformers.AutoModel.from_config(theirs.config)) is transformers.RadioModel


# -- the output --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_adaptors():
    return RadioFastModel.from_pretrained(ADAPTORS)


def test_output(x):
    model = RadioFastModel.from_pretrained(PLAIN)
    output = model(pixel_values=x)
    assert isinstance(output, transformers.utils.ModelOutput)
    summary, features = output
    assert summary is output.summary is output["summary"] is output[0]
    assert features is output.features is output["features"] is output[1]
    assert list(output.keys()) == ["summary", "features", "last_hidden_state"] and "features" in output
    assert torch.equal(output.last_hidden_state[:, model.num_summary_tokens :], features)
    assert list(dict(output)) == list(output.keys()) and len(output.to_tuple()) == len(output) == 3
    for other in (pickle.loads(pickle.dumps(output)), copy.deepcopy(output)):
        assert type(other) is RadioFastModelOutput and all(map(torch.equal, other.to_tuple(), output.to_tuple()))
    same = radio_fast.load(PLAIN)(x)
    assert torch.equal(same.summary, summary) and torch.equal(same.features, features)
    assert model(x, feature_fmt="NCHW").features.shape == (2, model.embed_dim, 3, 5)


def test_adaptors(with_adaptors, x):
    output = with_adaptors(x)
    expected = radio_fast.load(ADAPTORS)(x)
    assert set(output.adaptors) == {"clip", "sam"}
    for name in ("clip", "sam"):
        assert all(map(torch.equal, output.adaptors[name], expected[name]))
    assert torch.equal(output.features, expected["backbone"].features)
    assert set(RadioFastModel.from_pretrained(ADAPTORS, adaptor_names="sam")(x).adaptors) == {"sam"}
    assert RadioFastModel.from_pretrained(ADAPTORS, adaptor_names=[])(x).adaptors is None


def test_remote_code_folder(with_adaptors):
    """The layout whose model needs trust_remote_code otherwise: its fields, and RadioConfig's."""
    config = with_adaptors.config
    stored = json.loads((ADAPTORS / "config.json").read_text())
    for name in ("args", "version", "max_resolution", "preferred_resolution", "adaptor_names", "patch_size"):
        assert getattr(config, name) == stored[name]
    shown = [config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.max_img_size]
    assert shown == [160, 3, 2, 256]
    assert [config.num_cls_tokens, config.num_registers, config.summary_idxs] == [4, 4, [0, 1, 2]]
    assert config.mlp_ratio == with_adaptors.blocks[0].mlp.fc1.weight.shape[0] / 160 and config.image_size == 768


def test_rest_of_the_interface(with_adaptors, x):
    model = with_adaptors
    assert model.patch_size == 16 and model.max_resolution == 2048 and model.device == torch.device("cpu")
    assert model.get_nearest_supported_resolution(50, 70) == (48, 64)
    assert len(model.forward_intermediates(x, [0, 2], intermediates_only=True)) == 2
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        model.nothing  # noqa: B018
    tensors, stored = model.state_dict(), load_file(ADAPTORS / "model.safetensors")
    assert {k for k in tensors if "adaptors" not in k} <= set(stored), "the names of the remote-code layout"
    external = copy.deepcopy(model)
    conditioner = external.make_preprocessor_external()
    assert_relative(external(conditioner(x)).features, model(x).features)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half(x).features.dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:attention windows")
def test_other_sources(x):
    """Checkpoint files and E-RADIO have no Hugging Face config; what there is to say is read off the model."""
    file = RadioFastModel.from_pretrained(golden_source("vit_h16"))
    assert file.config.hidden_size == 160 and file.config.num_attention_heads == 2 and file(x).summary.shape[0] == 2
    x = torch.rand(1, 3, 64, 64)
    eradio = RadioFastModel.from_pretrained(golden_source("eradio_small"))
    output = eradio(x)
    assert eradio.config.hidden_size == eradio.embed_dim and torch.equal(output.last_hidden_state, output.features)


REFUSED = {
    "unknown": (
        {"attn_implementation": "sdpa"},
        "no argument attn_implementation; .* it takes checkpoint, device, dtype",
    ),
    "several": ({"subfolder": "x", "proxies": {}}, "has no argument proxies, subfolder; "),
    "two dtypes": ({"dtype": "float16", "torch_dtype": "bfloat16"}, "give one of them"),
    "two devices": ({"device": "cpu", "device_map": "cpu"}, "device and device_map mean the same here"),
    "spread": ({"device_map": {"a": 0, "b": 1}}, "device_map must be one device for the whole model"),
    "dtype": ({"dtype": "fp8"}, "dtype must be float32, float16, bfloat16 or int8, got 'fp8'"),
    "config": ({"config": transformers.RadioConfig()}, "config.hidden_size is 1280, the weights have 128: leave"),
    "revision of a folder": ({"revision": "main"}, "revision, .* are for a Hugging Face repository"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    kwargs, text = REFUSED[name]
    with pytest.raises(ValueError, match=text):
        RadioFastModel.from_pretrained(PLAIN, **kwargs)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_dtype(name):
    assert RadioFastModel.from_pretrained(PLAIN, **{name: "bfloat16"}).dtype == torch.bfloat16


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, torch.device("cpu")])
def test_device_map(device_map):
    assert RadioFastModel.from_pretrained(PLAIN, device_map=device_map).device == torch.device("cpu")


@pytest.mark.parametrize("kwargs", [{"output_hidden_states": True}, {"output_attentions": True}])
def test_what_is_not_kept(kwargs, with_adaptors, x):
    with pytest.raises(ValueError, match=r"keeps no hidden states .*forward_intermediates"):
        with_adaptors(x, **kwargs)
    assert with_adaptors(x, **dict.fromkeys(kwargs, False)).features is not None


def test_without_transformers():
    """radio_fast and its processor go without; the model's error names the extra."""
    code = """
import sys
sys.modules["transformers"] = None
import radio_fast
assert radio_fast.hf.ImageProcessor().step == 16
for name in ("RadioFastModel", "register"):
    try:
        getattr(radio_fast.hf, name)
    except ImportError as error:
        assert f"radio_fast.hf.{name} needs Transformers 5.17 or newer: pip install radio_fast[hf]" in str(error)
    else:
        raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)
