"""What a caller or a file can get wrong: each is refused, with a text that says what would be right."""

import copy
import functools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import radio_fast
from radio_fast import CheckpointError
from radio_fast.checkpoint import read_checkpoint

GOLDEN = Path(__file__).resolve().parent / "golden"
H16 = GOLDEN / "vit_h16" / "checkpoint.pth.tar"
ERADIO = GOLDEN / "eradio_small" / "checkpoint.pth.tar"
FOLDER = GOLDEN / "hf_vit_h16_adaptors"


@functools.cache
def model(**kwargs):
    return radio_fast.load(GOLDEN / "vit_b16_vitdet" / "checkpoint.pth.tar", **kwargs)


def saved(folder, change, case="vit_h16"):
    """A golden checkpoint's file after `change(content, args, state_dict)`."""
    content = torch.load(GOLDEN / case / "checkpoint.pth.tar", weights_only=False)
    content["args"] = copy.deepcopy(content["args"])
    change(content, vars(content["args"]), content["state_dict"])
    torch.save(content, folder / "changed.pth.tar")
    return folder / "changed.pth.tar"


# -- images and options of a forward ----------------------------------------------------------------------------------

STEP = r"height and width must be multiples of"
IMAGES = {
    "height": ((1, 3, 65, 64), rf"{STEP} 16 pixels \(patch size 16\), got 65 × 64; the nearest .* is 64 × 64"),
    "width": ((1, 3, 64, 90), rf"{STEP} 16 .*got 64 × 90; the nearest supported size is 64 × 96"),
    "zero height": ((1, 3, 0, 64), rf"{STEP} 16 .*got 0 × 64; the nearest supported size is 16 × 64"),
    "zero width": ((1, 3, 64, 0), rf"{STEP} 16 .*got 64 × 0; the nearest supported size is 64 × 16"),
    "gray": ((1, 1, 64, 64), r"3 channels \(RGB\) in dimension 1, got shape \(1, 1, 64, 64\)"),
    "channels last": ((1, 64, 64, 3), r"3 channels \(RGB\) in dimension 1, got shape \(1, 64, 64, 3\)"),
    "no batch": ((3, 64, 64), r"4 dimensions, \(B, 3, H, W\), got shape \(3, 64, 64\)"),
    "video": ((1, 2, 3, 64, 64), r"4 dimensions, \(B, 3, H, W\), got shape \(1, 2, 3, 64, 64\)"),
}
METHODS = ("forward", "forward_intermediates")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", IMAGES)
def test_image_shape(name, method):
    shape, text = IMAGES[name]
    with pytest.raises(ValueError, match=text):
        getattr(model(), method)(torch.rand(shape))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [(80, 64), (16, 16), (0, 32)])
def test_image_size_with_vitdet(size, method):
    """A legal size for the patches alone does not do: the step is patch × window."""
    near = tuple(max(round(side / 32), 1) * 32 for side in size)
    text = rf"{STEP} 32 pixels \(patch size 16 × ViTDet window 2\), got {size[0]} × {size[1]}; .* {near[0]} × {near[1]}"
    with pytest.raises(ValueError, match=text):
        getattr(model(vitdet_window_size=2), method)(torch.rand(1, 3, *size))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("image", "text"),
    [
        (
            torch.zeros(1, 3, 64, 64, dtype=torch.uint8),
            r"float tensor in \[0, 1\], got torch\.uint8: .*x\.float\(\) / 255",
        ),
        (torch.zeros(1, 3, 64, 64, dtype=torch.bool), r"float tensor in \[0, 1\], got torch\.bool"),
        (torch.zeros(1, 3, 64, 64).numpy(), r"must be a tensor of shape \(B, 3, H, W\), got ndarray"),
        ([[0.0]], r"must be a tensor of shape \(B, 3, H, W\), got list"),
        (None, r"must be a tensor of shape \(B, 3, H, W\), got NoneType"),
        (torch.empty(1, 3, 64, 64, device="meta"), r"x is on meta and the model on cpu: move one"),
    ],
)
def test_image_kind(image, text, method):
    with pytest.raises(ValueError, match=text):
        getattr(model(), method)(image)


@pytest.mark.parametrize("value", ["nchw", "BCHW", "", None, 5, ["NCHW"]])
def test_feature_fmt(value):
    with pytest.raises(ValueError, match="feature_fmt must be one of 'NLC', 'NCHW', got "):
        model()(torch.rand(1, 3, 64, 64), feature_fmt=value)


DEPTH = 9  # vit_b16_vitdet's blocks
OUTSIDE = rf"one or more numbers in -{DEPTH}…{DEPTH - 1}, got "
COUNT = rf"a count must lie in 1…{DEPTH} \(the model's blocks\), got "
KIND = "must be an int, a list of ints or None, got "


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"indices": [DEPTH]}, OUTSIDE),
        ({"indices": [0, -DEPTH - 1]}, OUTSIDE),
        ({"indices": []}, OUTSIDE),
        ({"indices": ()}, OUTSIDE),
        ({"indices": 0}, COUNT),
        ({"indices": -1}, COUNT),
        ({"indices": DEPTH + 1}, COUNT),
        ({"indices": True}, KIND),
        ({"indices": [True, False]}, KIND),
        ({"indices": 1.0}, KIND),
        ({"indices": [0.0]}, KIND),
        ({"indices": "1"}, KIND),
        ({"indices": ["1"]}, KIND),
        ({"output_fmt": "nlc"}, "output_fmt must be one of 'NLC', 'NCHW', got 'nlc'"),
        ({"aggregation": "mean"}, "aggregation must be one of 'sparse', 'dense', got 'mean'"),
        ({"norm_alpha_scheme": None}, "norm_alpha_scheme must be one of 'none', 'pre-alpha', 'post-alpha', got None"),
    ],
)
def test_forward_intermediates_options(options, text):
    with pytest.raises(ValueError, match=text):
        model().forward_intermediates(torch.rand(1, 3, 64, 64), **options)


# -- arguments of load ------------------------------------------------------------------------------------------------

LOADS = {
    "unknown version": (("radio_v2.5-x",), {}, r"unknown version 'radio_v2\.5-x': did you mean .*'radio_v2\.5-"),
    "wrong case": (("C-RADIO_v4-H",), {}, r"unknown version .*did you mean 'c-radio_v4-h'"),
    "no such thing": (("resnet50",), {}, r"unknown version 'resnet50': known versions: radio_v1, .*c-radio_v4-h"),
    "number": ((5,), {}, "version must be a name or a path, got int"),
    "list": ((["radio_v1"],), {}, "version must be a name or a path, got list"),
    "bytes": ((b"radio_v1",), {}, "version must be a name or a path, got bytes"),
    "revision of a version": (
        ("radio_v1",),
        {"revision": "main"},
        "are for a Hugging Face repository .*'radio_v1' is not",
    ),
    "token for a file": ((H16,), {"token": "hf_x"}, "token .* for a Hugging Face repository .* is not"),
    "cache alone for a version": (
        ("",),
        {"local_files_only": True},
        "for a Hugging Face repository .*, which '' is not",
    ),
    "no repository": (("nvidia/C--RADIO",), {}, "unknown version 'nvidia/C--RADIO': .*as ORGANISATION/NAME"),
    "revision kind": (("nvidia/RADIO",), {"revision": 5}, "revision must be the name of a branch, .*, got 5"),
    "no revision": (("nvidia/RADIO",), {"revision": ""}, "revision must be the name of a branch, .*, got ''"),
    "token kind": (("nvidia/RADIO",), {"token": 5}, "token must be a string, True, False or None, got int"),
    "sha256 of a repository": (("nvidia/RADIO",), {"sha256": "0" * 64}, "sha256 is a file's: .*revision=COMMIT"),
    "sha256 of a folder": ((FOLDER,), {"sha256": "0" * 64}, "sha256 is a file's: a folder has several"),
    "random repository": (("nvidia/RADIO",), {"random_init": True}, "random_init takes a version name"),
    "checkpoint for an unknown version": (("radio_v9",), {"checkpoint": H16}, "unknown version 'radio_v9'"),
    "checkpoint kind": (("radio_v1",), {"checkpoint": 5}, "checkpoint must be a path, got int"),
    "adaptor": ((H16,), {"adaptor_names": "dino_v3"}, "this checkpoint has 'clip', 'siglip', 'dino_v2', 'sam'$"),
    "second adaptor": ((H16,), {"adaptor_names": ["clip", "CLIP"]}, "unknown adaptor 'CLIP': this checkpoint has"),
    "adaptor backbone": ((H16,), {"adaptor_names": "backbone"}, "unknown adaptor 'backbone'"),
    "adaptor kind": ((H16,), {"adaptor_names": 5}, "adaptor_names must be a name or a list of names, got 5"),
    "adaptor list kind": ((H16,), {"adaptor_names": [["clip"]]}, "adaptor_names must be a name or a list of names"),
    "no ViTDet": (("c-radio_v3-h",), {"vitdet_window_size": 8}, "c-radio_v3-h has no ViTDet mode: load it without"),
    "few blocks": ((H16,), {"vitdet_window_size": 2}, "one windowed block .*: 3 blocks .*use a smaller num_global"),
    "backend": ((H16,), {"backend": "cuda"}, "backend must be one of 'auto', 'reference'.*, got 'cuda'"),
    "dtype": ((H16,), {"dtype": "fp8"}, "dtype must be float32, float16, bfloat16 or int8, got 'fp8'"),
    "integer dtype": (
        (H16,),
        {"dtype": torch.uint8},
        r"dtype must be float32, float16, bfloat16 or int8, got torch\.uint8",
    ),
    "double": ((H16,), {"dtype": torch.float64}, r"dtype must be .* bfloat16 or int8, got torch\.float64"),
    "device": ((H16,), {"device": "gpu"}, "device must be a torch device such as 'cpu', 'cuda' .*, got 'gpu'"),
    "device kind": ((H16,), {"device": [0]}, r"device must be a torch device such as 'cpu', .*, got \[0\]"),
    "random file": ((H16,), {"random_init": True}, "random_init takes a version name, not a checkpoint"),
    "random and file": (("radio_v1",), {"checkpoint": H16, "random_init": True}, "random_init takes a version name"),
    "random adaptor": (("radio_v1",), {"random_init": True, "adaptor_names": "clip"}, "alone: it has no adaptors"),
    "random checkpoint": (("radio_v1",), {"random_init": True, "return_checkpoint": True}, "the backbone alone: "),
    "E-RADIO's ViTDet": (("eradio_v1",), {"vitdet_window_size": 8}, "e-radio_v2 has no ViTDet mode: load it without"),
    "E-RADIO file's ViTDet": ((ERADIO,), {"vitdet_window_size": 8}, "E-RADIO has no ViTDet mode: load it without"),
    "a ViT's window": (("radio_v1",), {"window_size": 8}, "window_size is E-RADIO's; a ViT takes vitdet_window_size"),
    "a ViT file's window": ((H16,), {"window_size": "optimal"}, "window_size is E-RADIO's; a ViT takes"),
    "window 0": ((ERADIO,), {"window_size": 0}, "window_size must be 'optimal' or a number in 1…32, got 0"),
    "negative window": (("e-radio_v2",), {"window_size": -7}, "window_size must be 'optimal' or a number .*, got -7"),
    "huge window": ((ERADIO,), {"window_size": 33}, "window_size must be 'optimal' or a number in 1…32, got 33"),
    "window kind": ((ERADIO,), {"window_size": True}, "window_size must be 'optimal' or a number in 1…32, got True"),
    "window name": ((ERADIO,), {"window_size": "best"}, "window_size must be 'optimal' or a number .*, got 'best'"),
    "short sha256": (("radio_v1",), {"sha256": "abc"}, "sha256 must be 64 hexadecimal digits, got 'abc'"),
    "odd sha256": (("radio_v1",), {"sha256": "g" * 64}, "sha256 must be 64 hexadecimal digits, got 'ggg"),
    "sha256 kind": (("radio_v1",), {"sha256": 5}, "sha256 must be 64 hexadecimal digits, got 5"),
}


@pytest.mark.parametrize("name", LOADS)
def test_load_arguments(name, monkeypatch, tmp_path):
    args, kwargs, text = LOADS[name]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing here may get as far as a download
    with pytest.raises(ValueError, match=text):
        radio_fast.load(*args, **kwargs, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("window", [0, -1, True, 2.5, "2", [2]])
def test_vitdet_window(window):
    with pytest.raises(ValueError, match="vitdet_window_size must be a positive number of patches, got "):
        model.__wrapped__(vitdet_window_size=window)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda")])
def test_cuda_without_gpu(device):
    with pytest.raises(ValueError, match=r"asked for, but torch .* finds no usable CUDA GPU"):
        radio_fast.load(H16, device=device)


@pytest.mark.parametrize("name", ["absent.pth.tar", "absent/model.pth", "absent.pt"])
@pytest.mark.parametrize("how", ["version", "version as Path", "checkpoint"])
def test_missing_path(how, name, tmp_path):
    path = tmp_path / name
    args, kwargs = {"version": ((str(path),), {}), "version as Path": ((path,), {})}.get(
        how, ((), {"checkpoint": path})
    )
    with pytest.raises(FileNotFoundError, match=rf"no checkpoint at .*{name}"):
        radio_fast.load(*args, **kwargs)


def test_folder_is_no_checkpoint_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no checkpoint file at {tmp_path}"):
        read_checkpoint(tmp_path)


# -- what a checkpoint may say ----------------------------------------------------------------------------------------


def put(**args):
    return lambda content, old, state: old.update(args)


def drop(*keys):
    return lambda content, args, state: [state.pop(key) for key in keys]


def block(n):
    return lambda content, args, state: [state.pop(key) for key in list(state) if f"base_model.blocks.{n}." in key]


def shape(key, *sizes):
    return lambda content, args, state: state.update({key: torch.zeros(sizes)})


def teacher(**entry):
    return lambda content, args, state: args["teachers"][0].update(entry)


LACKS = r"lacks the backbone tensor '{}': it would run on random numbers"
CONTENTS = {
    "no state_dict": (lambda c, a, s: c.pop("state_dict"), "has no state_dict; its entries are: 'arch', 'epoch'"),
    "empty state_dict": (lambda c, a, s: s.clear(), "has no state_dict"),
    "list state_dict": (lambda c, a, s: c.update(state_dict=[1]), "has no state_dict"),
    "no args": (lambda c, a, s: c.pop("args"), "args must be a Namespace or a dict, got NoneType"),
    "list args": (lambda c, a, s: c.update(args=[1]), "args must be a Namespace or a dict, got list"),
    "teachers": (put(teachers="clip"), r"args\.teachers must be of type list or tuple, got str"),
    "teacher": (put(teachers=["clip"]), r"each of the checkpoint's args\.teachers must be a dict with a name"),
    "nameless teacher": (teacher(name=5), r"each of the checkpoint's args\.teachers must be a dict with a name"),
    "register_multiple": (put(register_multiple="8"), r"args\.register_multiple must be of type int, got str"),
    "negative registers": (put(cpe_num_registers=-1), r"args\.cpe_num_registers must lie in 0…4096, got -1"),
    "many registers": (put(register_multiple=10**9), r"args\.register_multiple must lie in 0…4096, got 1000000000"),
    "dtype": (put(dtype=torch.int64), r"args\.dtype must be float32, float16 or bfloat16, got torch\.int64"),
    "dtype name": (put(dtype="load"), r"args\.dtype must be float32, float16 or bfloat16"),
    "dtype kind": (put(dtype=32), r"args\.dtype must be of type dtype or str, got int"),
    "model": (put(model=["vit"]), r"args\.model must be of type str, got list"),
    "unknown model": (put(model="vit_x", model_kwargs={}), r"unknown architecture 'vit_x' without model_kwargs\.num"),
    "model_kwargs": (put(model_kwargs=[1]), r"args\.model_kwargs must be of type Mapping, got list"),
    "num_heads": (put(model_kwargs={"num_heads": 0}), r"model_kwargs\.num_heads must be a positive integer, got 0"),
    "num_heads fit": (put(model_kwargs={"num_heads": 7}), "num_heads must divide the width 160 .*, got 7"),
    "depth": (put(model_kwargs={"depth": "3"}), r"model_kwargs\.depth must be a positive integer, got '3'"),
    "per teacher": (put(cls_token_per_teacher=1), r"args\.cls_token_per_teacher must be of type bool, got int"),
    "model_norm": (put(model_norm="yes"), r"args\.model_norm must be of type bool, got str"),
    "spectral_reparam": (put(spectral_reparam=1), r"args\.spectral_reparam must be of type bool or Mapping, got int"),
    "token_slot": (teacher(token_slot=8), "'clip': token_slot must be one of the 8 prefix tokens, got 8"),
    "upsample": (teacher(fd_upsample_factor=1.5), "'clip': fd_upsample_factor must lie in 1…16, got 1.5"),
    "upsample fit": (teacher(fd_upsample_factor=5), "'clip': 32 features are no multiple of .*fd_upsample_factor, 5"),
    "adaptor name": (lambda c, a, s: rename_adaptor(a, s, "training"), "'training', which can't be used as a name"),
    "block tensor": (drop("base_model.blocks.1.attn.qkv.weight"), LACKS.format(r"blocks\.1\.attn\.qkv\.weight")),
    "first block's bias": (drop("base_model.blocks.0.attn.qkv.bias"), LACKS.format(r"blocks\.0\.attn\.qkv\.bias")),
    "norm": (drop("base_model.blocks.2.norm2.bias"), LACKS.format(r"blocks\.2\.norm2\.bias")),
    "last block": (block(2), LACKS.format(r"blocks\.2\.norm1\.weight")),
    "middle block": (block(1), LACKS.format(r"blocks\.1\.\S+")),
    "patches": (drop("base_model.patch_generator.embedder.weight"), LACKS.format(r"patch_generator\.embedder\.weight")),
    "positions": (drop("base_model.patch_generator.pos_embed"), LACKS.format(r"patch_generator\.pos_embed")),
    "prefix": (drop("base_model.patch_generator.cls_token.token"), LACKS.format(r"patch_generator\.cls_token\.token")),
    "conditioner": (drop("input_conditioner.norm_mean"), r"input_conditioner\.norm_mean is missing"),
    "head tensor": (drop("_heads.clip.fc1.bias"), r"adaptors\.clip\.head_mlp\.fc1\.bias is missing"),
    "shape": (
        shape("base_model.blocks.1.mlp.fc1.weight", 640, 161),
        r"blocks\.1\.mlp\.fc1\.weight has shape \(640, 161\) in the checkpoint, expected \(640, 160\)",
    ),
    "positions' shape": (shape("base_model.patch_generator.pos_embed", 1, 255, 160), "table must be square, got 255"),
    "few prefix tokens": (shape("base_model.patch_generator.cls_token.token", 3, 160), r"at least the 4 .*\(3, 160\)"),
    "plain ViT": (shape("base_model.patch_embed.proj.weight", 160, 3, 16, 16), LACKS.format("cls_token")),
    "sparse": (lambda c, a, s: s.update(x=torch.eye(3).to_sparse()), "x must be a plain dense tensor"),
    "no data": (lambda c, a, s: s.update(x=torch.empty(3, device="meta")), "x must be a plain dense tensor"),
    "no tensor": (lambda c, a, s: s.update(x=[1.0]), "x must be a tensor, got list"),
}


def rename_adaptor(args, state, name):
    """Call the first teacher `name`; its heads then lie under its index."""
    args["teachers"][0]["name"] = name
    for key in [key for key in state if ".clip." in key]:
        state[key.replace(".clip.", ".0.")] = state.pop(key)


@pytest.mark.parametrize("name", CONTENTS)
def test_checkpoint_content(name, tmp_path):
    change, text = CONTENTS[name]
    path = saved(tmp_path, change)
    with pytest.raises(CheckpointError, match=text):
        radio_fast.load(path, adaptor_names="training" if name == "adaptor name" else "clip")


@pytest.mark.parametrize(
    ("cls_token", "positions"), [((1, 1, 159), (1, 257, 160)), ((160,), (1, 257, 160)), ((1, 1, 160), (257, 160))]
)
def test_plain_vit_shapes(cls_token, positions, tmp_path):
    def change(content, args, state):
        shapes = {"patch_embed.proj.weight": (160, 3, 16, 16), "cls_token": cls_token, "pos_embed": positions}
        state.update({f"base_model.{key}": torch.zeros(size) for key, size in shapes.items()})

    with pytest.raises(CheckpointError, match=r"cls_token and pos_embed must be of shape .*, got \(160, 3, 16, 16\), "):
        radio_fast.load(saved(tmp_path, change))


@pytest.mark.parametrize("gone", ["0._v", "0.scale", "original"])
def test_incomplete_spectral_weights(gone, tmp_path):
    key = f"base_model.blocks.0.attn.proj.parametrizations.weight.{gone}"
    with pytest.raises(
        CheckpointError, match=r"blocks\.0\.attn\.proj: its weight parametrisation is not a spectral one"
    ):
        radio_fast.load(saved(tmp_path, drop(key), "vit_b16_spectral"))


def test_unexpected_tensor_is_warned_of_by_name(tmp_path):
    path = saved(tmp_path, shape("base_model.blocks.0.surprise", 1))
    with pytest.warns(UserWarning, match=r"tensors this model does not use: blocks\.0\.surprise$"):
        changed = radio_fast.load(path)
    image = torch.rand(1, 3, 64, 64)
    assert all(map(torch.equal, changed(image), radio_fast.load(H16)(image)))


# -- Hugging Face folders ---------------------------------------------------------------------------------------------


def config(**entries):
    def change(folder):
        content = json.loads((folder / "config.json").read_text()) | entries
        (folder / "config.json").write_text(json.dumps(content))

    return change


def native(**entries):
    """A config in Transformers' own style, the only place that the summary indices and the normalisation are in."""
    fields = {"hidden_size": 160, "num_hidden_layers": 3, "num_attention_heads": 2, "num_cls_tokens": 4}

    def change(folder):
        config(args=0, model_type="radio", **fields | entries)(folder)
        tensors = load_file(folder / "model.safetensors")
        kept = {key: value for key, value in tensors.items() if "summary_idxs" not in key and "conditioner" not in key}
        save_file(kept, folder / "model.safetensors")

    return change


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def index(name):
    def change(folder):
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        text = json.dumps(name if isinstance(name, dict) else {"weight_map": {"x": name}})
        (folder / "model.safetensors.index.json").write_text(text)

    return change


BARE = {"model": "vit_huge_patch16_224", "model_kwargs": {"num_heads": 2, "depth": 3}}
FOLDERS = {
    "no config": (lambda f: (f / "config.json").unlink(), r"is no Hugging Face model folder: it has no config\.json"),
    "config is no JSON": (write("config.json", b"{'args'"), r"config\.json is not valid JSON"),
    "config is no text": (write("config.json", b"\xff\xfe\x00"), r"config\.json is not valid JSON"),
    "deep config": (write("config.json", b"[" * 100_000), r"config\.json is not valid JSON"),
    "config is a list": (write("config.json", b"[1]"), r"config\.json must hold a JSON object, got list"),
    "other model": (config(args=0, model_type="vit"), "is of model_type 'vit'; this needs a RADIO folder"),
    "no model_type": (config(args=0), "is of model_type None; this needs a RADIO folder"),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        r"has no model\.safetensors and no pytorch_model\.bin: copy the whole folder",
    ),
    "damaged": (write("model.safetensors", b"\x00" * 100), r"model\.safetensors is not a readable safetensors file"),
    "truncated": (
        lambda f: os.truncate(f / "model.safetensors", 100_000),
        r"model\.safetensors is not a readable safetensors file",
    ),
    "shard outside": (index("../model-1.safetensors"), r"names a shard outside its folder: '\.\./model-1"),
    "absolute shard": (index(str(FOLDER / "model.safetensors")), "names a shard outside its folder: '/"),
    "shard of another kind": (index("config.json"), "names a shard that is no .safetensors file: 'config.json'"),
    "tensor missing": (index({"weight_map": {"x": "model-1.safetensors"}}), "tensors that its shards don't have: x$"),
    "shard missing": (index("model-2.safetensors"), r"has no model-2\.safetensors: copy the whole folder"),
    "no weight_map": (index({"metadata": {}}), r"index\.json has no weight_map"),
    "adaptor_names": (config(adaptor_names=5), r"config\.json: adaptor_names must be a list of names, got 5"),
    "stray adaptor": (config(args=BARE), "adaptor 'clip' is none of the teachers"),
    "hidden_size": (native(hidden_size=128), r"config\.json: hidden_size is 128, the tensors have 160"),
    "hidden_size kind": (native(hidden_size="160"), r"config\.json: hidden_size must be of type int, got '160'"),
    "summary_idxs": (native(summary_idxs=["a"]), r"config\.json: summary_idxs must be a list of integers, got \['a'\]"),
    "summary range": (native(summary_idxs=[8]), r"summary indices must be one or more prefix tokens, 0…7, got \(8,\)"),
    "norm_mean": (native(norm_mean=[0.5]), r"config\.json: norm_mean must be a list of 3 numbers, got \[0\.5\]"),
    "no norm_mean": (native(), r"input_conditioner\.norm_mean is missing"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_hugging_face_folder(name, tmp_path):
    change, text = FOLDERS[name]
    folder = Path(shutil.copytree(FOLDER, tmp_path / "folder"))
    change(folder)
    with pytest.raises(CheckpointError, match=text):
        radio_fast.load(folder)
