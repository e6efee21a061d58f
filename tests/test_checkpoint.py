"""Reading files that may be hostile, damaged or of an older make; and that the tensors come out as they were meant."""

import argparse
import codecs
import collections
import copy
import datetime
import functools
import json
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import types
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import radio_fast
from radio_fast import CheckpointError, checkpoint
from radio_fast.checkpoint import Inert, MappedRange, read_checkpoint, state_of_checkpoint
from radio_fast.models.weights import fold_spectral

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).resolve().parent / "golden"
H16 = GOLDEN / "vit_h16" / "checkpoint.pth.tar"
IMAGE = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@functools.cache
def _read_golden(case):
    return torch.load(GOLDEN / case / "checkpoint.pth.tar", weights_only=False)


def golden(case="vit_h16", **args):
    """A golden checkpoint's dict to be changed at will (but for the tensors, which are shared)."""
    content = dict(_read_golden(case))
    content["args"] = argparse.Namespace(**copy.deepcopy(vars(content["args"])) | args)
    content["state_dict"] = dict(content["state_dict"])
    return content


def save(content, folder):
    torch.save(content, folder / "model.pth.tar")
    return folder / "model.pth.tar"


def rewrite(path, change=lambda name, data: data, compression=zipfile.ZIP_STORED, repeat=0):
    """Write H16's records to `path`, their bytes passed through `change`; the largest is listed `repeat` times more."""
    with zipfile.ZipFile(path if path.exists() else H16) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, change(name, data))
        archive.filelist += [max(archive.filelist, key=lambda record: record.file_size)] * repeat


def rename_global(path, old, new):
    """Have the pickle call a class or function by another name, as another version of its library does."""
    old, new = ("c{}\n{}\n".format(*name.rsplit(".", 1)).encode() for name in (old, new))
    assert old in path.read_bytes()
    rewrite(path, lambda name, data: data.replace(old, new) if name.endswith("/data.pkl") else data)
    return path


def same_output(path, other=H16):
    """Both give the same features, bit for bit."""
    return all(map(torch.equal, radio_fast.load(path)(IMAGE), radio_fast.load(other)(IMAGE)))


# -- hostile files ----------------------------------------------------------------------------------------------------


class Call:
    """Unpickled carelessly, it calls `function(*args)`."""

    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


PAYLOADS = {
    "eval": Call(eval, "open('mark', 'w')"),
    "exec": Call(exec, "open('mark', 'w')"),
    "open": Call(open, "mark", "w"),
    "codecs": Call(codecs.open, "mark", "w"),
    "os.system": Call(os.system, "touch mark"),
    "Popen": Call(subprocess.Popen.wait, Call(subprocess.Popen, ["touch", "mark"])),
    "Path.touch": Call(pathlib.Path.touch, Path("mark")),
    "shutil": Call(shutil.copy, str(H16), "mark"),
    "torch.hub": Call(torch.hub.download_url_to_file, H16.as_uri(), "mark", None, False),
    "torch.save": Call(torch.save, 0, "mark"),
    "numpy": Call(np.save, "mark", 0),
    "rebuild": Call(torch._tensor._rebuild_from_type_v2, os.mkdir, type(None), ("mark",), {}),
}
PLACES = {
    "args": lambda content, bomb: setattr(content["args"], "note", argparse.Namespace(deep=[{"note": bomb}])),
    "used arg": lambda content, bomb: setattr(content["args"], "register_multiple", bomb),
    "top level": lambda content, bomb: content.update(note=bomb),
    "state_dict": lambda content, bomb: content["state_dict"].update({"base_model.note": bomb}),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("payload", PAYLOADS)
def test_malicious_pickle_runs_nothing(payload, place, tmp_path, monkeypatch):
    """The control first: read carelessly, the same file does leave its mark in the working folder."""
    content = golden("vit_b16_spectral")
    PLACES[place](content, PAYLOADS[payload])
    path = save(content, tmp_path)
    (tmp_path / "control").mkdir()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "control")
    torch.load(path, weights_only=False)
    assert os.listdir() != []

    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    allowed = set(torch.serialization.get_safe_globals())
    for read in (read_checkpoint, radio_fast.load):
        try:
            read(path)
        except CheckpointError as error:
            assert "weights_only" not in str(error), "the message must not advise to read the file unsafely"
    assert os.listdir() == []
    assert set(torch.serialization.get_safe_globals()) == allowed


def test_tensors_outside_the_file_leave_memory_alone(tmp_path):
    """A pickle can make tensors on the heap too: giving back all pages from there to the file's kills the process."""
    content = golden("vit_b16_spectral")
    content["state_dict"]["note"] = Call(torch.Tensor, 10)
    code = "import radio_fast, sys, torch; print(*radio_fast.load(sys.argv[1])(torch.rand(1, 3, 32, 32))[0].shape)"
    command = [sys.executable, "-c", code, str(save(content, tmp_path))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "1 192\n"), done.stderr


def test_mapped_range_is_the_file():
    """All of the tensors' own mapping, nothing of the heap or of another mapping of the file, which may be changed."""
    tensors, others = (list(read_checkpoint(H16)["state_dict"].values()) for _ in range(2))
    heap, mapped = torch.ones(1 << 16), MappedRange(H16, [*tensors, torch.ones(1)])
    assert sys.platform != "linux" or all(any(a <= t.data_ptr() < b for a, b in mapped.ranges) for t in tensors)
    others[0].fill_(1)
    mapped.release_all()
    mapped.release(heap)
    assert all(map(torch.equal, tensors, golden()["state_dict"].values()))
    assert bool((heap == 1).all()) and bool((others[0] == 1).all())


def test_no_code_of_ours_reads_unsafely():
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    found = [ROOT / name for name in listed.stdout.splitlines()] or list(ROOT.rglob("*.py"))
    found = [path for path in found if path.is_file() and path.relative_to(ROOT).parts[0] != "tests"]
    assert len(found) >= 20
    unsafe = re.compile(r"""weights_only['"]?\s*[=:]\s*(False|0|None)""")
    assert [str(path) for path in found if unsafe.search(path.read_text(encoding="utf-8"))] == []


# -- harmless values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_numpy_scalars_of_numpy_1_and_2(module, tmp_path):
    """The bytes of an object scalar are a pickle of their own, which numpy would run."""
    scalar, mark = np.float64(0).__reduce__()[0], tmp_path / "mark"
    content = golden(i=np.int64(-3), f=np.float32(1.5), h=np.float16(2.5), b=np.bool_(True), c=np.complex64(1j))
    hidden = Call(scalar, np.dtype("O"), b"cbuiltins\nopen\n(V%s\nVw\ntR." % str(mark).encode())
    args = {"swapped": Call(scalar, np.dtype(">i4"), b"\0\0\0\7"), "text": np.str_("x"), "day": np.datetime64("2020")}
    vars(content["args"]).update(args, hidden=hidden, register_multiple=np.int64(8))
    path = rename_global(save(content, tmp_path), f"{scalar.__module__}.scalar", f"{module}.scalar")
    args = read_checkpoint(path)["args"]
    got = [args.i, args.f, args.h, args.b, args.c, args.swapped]
    assert got == [-3, 1.5, 2.5, True, 1j, 7] and [type(v) for v in got] == [int, float, float, bool, complex, int]
    assert all(isinstance(value, Inert) for value in (args.text, args.day, args.hidden)) and not mark.exists()
    assert same_output(path)


@pytest.mark.parametrize("name", ["PurePosixPath", "PosixPath", "PureWindowsPath", "WindowsPath"])
@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_paths_of_any_system_and_python(module, name, tmp_path):
    kind = pathlib.PureWindowsPath if "Windows" in name else pathlib.PurePosixPath
    path = save(golden(output=kind("C:/a") / "b"), tmp_path)
    rename_global(path, f"{kind.__module__}.{kind.__name__}", f"{module}.{name}")
    read = read_checkpoint(path)["args"].output
    assert read == kind("C:/a/b") and not isinstance(read, pathlib.Path)


def test_odd_values_in_args_are_kept_or_inert(tmp_path):
    plain = {"enable-cudnn-attention": True, "kind": torch.int64, "big": 2**70, "raw": b"\xff", "bag": {1, 2}}
    plain |= {"inner": argparse.Namespace(deep=argparse.Namespace(x=[1, 2])), "size": torch.Size([1, 2])}
    odd = [datetime.datetime(2024, 1, 1), functools.partial(print, 1), re.I, np.arange(3), range(3), frozenset({1})]
    odd += [types.SimpleNamespace(a=1), np.array([{}], dtype=object), int, print]
    counts = collections.defaultdict(list, {"a": [1]})
    path = save(golden(**plain, odd=odd, counts=counts), tmp_path)
    args = read_checkpoint(path)["args"]
    assert {name: getattr(args, name) for name in plain} == plain and args.counts == {"a": [1]}
    assert all(isinstance(value, Inert) or issubclass(value, Inert) for value in args.odd)
    assert same_output(path)


# -- damaged files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_truncated(seed, tmp_path):
    path, whole = tmp_path / "cut.pth.tar", H16.read_bytes()
    path.write_bytes(whole[: random.Random(seed).randrange(1, len(whole))])
    for read in (read_checkpoint, radio_fast.load):
        with pytest.raises(CheckpointError, match=r"cut\.pth\.tar"):
            read(path)


def _record(ending, data):
    return lambda path: rewrite(path, lambda name, old: data if name.endswith(ending) else old)


BROKEN = {
    "empty": (lambda p: p.write_bytes(b""), r"is empty \(0 bytes\)"),
    "text": (lambda p: p.write_bytes(b"version https://git-lfs"), "not a torch checkpoint: it starts with b'vers'"),
    "zip of text": (lambda p: zipfile.ZipFile(p, "w").writestr("hello.txt", "hello"), r"no data\.pkl"),
    "compressed": (lambda p: rewrite(p, compression=zipfile.ZIP_DEFLATED), "is compressed"),
    "overlapping": (lambda p: rewrite(p, repeat=99), "records claim"),
    "byte order": (_record("/byteorder", b"middle"), "endian"),
    "TorchScript": (lambda p: torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), p), "TorchScript"),
    "no pickle": (_record("/data.pkl", b"hello"), "can't be read as a torch checkpoint"),
    "legacy": (lambda p: torch.save(1, p, _use_new_zipfile_serialization=False), r"before torch 1\.6.*torch\.save\("),
    "list": (lambda p: torch.save([1, 2], p), "holds a list, not the dict"),
    "code": (lambda p: torch.save(Call(print), p), "holds a print, not the dict"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_named_with_the_reason(name, tmp_path):
    path, (make, reason) = tmp_path / "broken.pth.tar", BROKEN[name]
    make(path)
    for read in (read_checkpoint, radio_fast.load):
        with pytest.raises(CheckpointError, match=rf"(?s)broken\.pth\.tar.*{reason}"):
            read(path)


def test_oversized_pickle(monkeypatch):
    monkeypatch.setattr(checkpoint, "MAX_PICKLE_BYTES", 1000)
    with pytest.raises(CheckpointError, match=r"data\.pkl has \d+ bytes, more than 1000"):
        read_checkpoint(H16)


def test_bit_flips_never_get_past_the_checks(tmp_path):
    """Whatever a flipped bit in the pickle says: the file is refused, or loads and runs."""
    path = Path(shutil.copy(GOLDEN / "vit_l16_mixed_heads" / "checkpoint.pth.tar", tmp_path))
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        pickled = next(archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl"))
    start, rng, refused = whole.index(pickled), random.Random(0), 0
    for _ in range(50):
        flipped = bytearray(whole)
        flipped[start + rng.randrange(len(pickled))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                radio_fast.load(path, adaptor_names="dino_v2")(IMAGE[..., :32, :32])
        except CheckpointError:
            refused += 1
        except ValueError as error:
            assert "unknown adaptor 'dino_v2'" in str(error)
    assert 10 < refused < 50


# -- from file to model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module."])
def test_ema_weights_are_preferred_and_end_spectral_args(prefix, tmp_path):
    content = golden(spectral_reparam={"eps": 0.5})
    content["state_dict_ema"] = {prefix + key: value for key, value in content["state_dict"].items()}
    content["state_dict"] = {key: torch.zeros_like(value) for key, value in content["state_dict"].items()}
    assert same_output(save(content, tmp_path))


@pytest.mark.parametrize("kind", ["checkpoint", "folder"])
@pytest.mark.parametrize("harm", ["overwrite", "truncate"])
def test_model_does_not_depend_on_the_file_any_more(kind, harm, tmp_path):
    """The weights are copies: touched pages of a truncated mapping would kill the process."""
    source, name = (H16.parent, H16.name) if kind == "checkpoint" else (GOLDEN / "hf_vit_l16", "model.safetensors")
    folder = Path(shutil.copytree(source, tmp_path / "copy"))
    path = folder / name
    model = radio_fast.load(path if kind == "checkpoint" else folder, adaptor_names=[])
    before = model(IMAGE)
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size) if harm == "overwrite" else file.truncate(0)
    assert all(map(torch.equal, before, model(IMAGE)))


def _spectral64(matrix, v, scale, version, eps):
    """radio.md §8 word for word, in float64."""
    matrix, v, scale = matrix.double(), v.double(), scale.double()
    u = matrix @ v
    u /= u.norm().clamp(min=eps)
    v = matrix.T @ u
    v /= v.norm().clamp(min=eps)
    s = (1 + scale.exp()).log() + 0.05 if version == 2 else scale
    return matrix * s / (u @ matrix @ v + eps)


@pytest.mark.parametrize("eps", [1e-12, 0.25])
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("version", [None, 1, 2])
def test_fold_spectral(version, parts, eps):
    generator = torch.Generator().manual_seed(parts)
    matrix, expected = torch.randn(parts * 5, 7, generator=generator), []
    state = {"x.bias": torch.ones(1), "x.parametrizations.weight.original": matrix}
    for n, chunk in enumerate(matrix.split(5)):
        u, v, scale = (torch.randn(*shape, generator=generator) for shape in ((5,), (7,), (1, 1)))
        prefix = "x.parametrizations.weight.0." + (f"parts.{n}." if parts > 1 else "")
        state |= {f"{prefix}_u": u, f"{prefix}_v": v, f"{prefix}scale": scale}
        state |= {} if version is None else {f"{prefix}_sn_version": torch.tensor(version)}
        expected.append(_spectral64(chunk, v, scale, version, eps))
    folded = fold_spectral(state, eps)
    assert set(folded) == {"x.bias", "x.weight"}
    torch.testing.assert_close(folded["x.weight"]().double(), torch.cat(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("setting", "eps"), [(True, 1e-6), ({"n_power_iterations": 1}, 1e-12), ({"eps": 1e-4}, 1e-4)])
def test_spectral_eps(setting, eps):
    """Weights as small as the eps show which one was taken: the arguments' for the backbone, 1e-6 for heads."""
    content, end = golden("vit_b16_spectral", spectral_reparam=setting), ".parametrizations.weight."
    tensors = content["state_dict"]
    tensors |= {key: value * 1e-6 for key, value in tensors.items() if key.endswith(".original")}
    state = state_of_checkpoint(content)
    for key, got, used in (
        ("base_model.blocks.1.attn.proj", state.backbone["blocks.1.attn.proj.weight"], eps),
        ("_heads.clip.fc1", state.heads["clip"][0]["fc1.weight"], 1e-6),
    ):
        original, v, scale = (tensors[key + end + name] for name in ("original", "0._v", "0.scale"))
        version = tensors[f"{key}{end}0._sn_version"].item()
        torch.testing.assert_close(got().double(), _spectral64(original, v, scale, version, used), rtol=1e-4, atol=0)


def _plain_forward(state, x, heads, p=16):
    """timm's ViT, from the tensors under their names in the file."""
    w = {key.removeprefix("base_model."): value.float() for key, value in state.items()}
    x = (x - w["input_conditioner.norm_mean"]) / w["input_conditioner.norm_std"]
    x = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=p).flatten(2).transpose(1, 2)
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], dim=1) + w["pos_embed"]
    B, N, D = x.shape
    for i in range(2):
        names = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        norm1, qkv, proj, norm2, fc1, fc2 = ((w[f"blocks.{i}.{n}.weight"], w[f"blocks.{i}.{n}.bias"]) for n in names)
        y = F.linear(F.layer_norm(x, (D,), *norm1, 1e-6), *qkv)
        q, k, v = y.view(B, N, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
        y = ((q @ k.transpose(2, 3)) * (D // heads) ** -0.5).softmax(-1) @ v
        x = x + F.linear(y.transpose(1, 2).reshape(B, N, D), *proj)
        x = x + F.linear(F.gelu(F.linear(F.layer_norm(x, (D,), *norm2, 1e-6), *fc1)), *fc2)
    return x[:, 0], x[:, 1:]


def test_plain_timm_vit(tmp_path):
    """Without CPE: a convolution for the patches, a position for the cls token too, and one image size only."""
    content = golden("vit_l16_half", cpe_max_size=None, cls_token_per_teacher=False, register_multiple=None)
    state, generator = content["state_dict"], torch.Generator().manual_seed(1)
    old = ("embedder.weight", "cls_token.token", "pos_embed")
    weight, token, positions = (state.pop(f"base_model.patch_generator.{name}").float() for name in old)
    D = weight.shape[0]
    state["base_model.patch_embed.proj.weight"] = weight.view(D, 3, 16, 16)
    state["base_model.patch_embed.proj.bias"] = torch.randn(D, generator=generator)
    state["base_model.cls_token"] = token[None, :1]
    state["base_model.pos_embed"] = torch.cat([torch.randn(1, 1, D, generator=generator), positions], dim=1)
    model = radio_fast.load(save(content, tmp_path))
    x = torch.rand(2, 3, 256, 256, generator=generator)
    heads = content["args"].model_kwargs["num_heads"]
    for got, expected in zip(model(x), _plain_forward(state, x, heads), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    with pytest.raises(ValueError, match="only 256 × 256 images, got 64 × 96"):
        model(IMAGE)


def test_sharded_folder_equals_single_file(tmp_path):
    source = GOLDEN / "hf_vit_l16"
    shutil.copy(source / "config.json", tmp_path)
    tensors = sorted(load_file(source / "model.safetensors").items())
    names = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, (key, _) in enumerate(tensors)}
    for shard in set(names.values()):
        save_file({key: value for key, value in tensors if names[key] == shard}, tmp_path / shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert same_output(tmp_path, source)
