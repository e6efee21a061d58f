"""`radio_fast.load("ORGANISATION/NAME")` against a hub on 127.0.0.1, and the folders that repositories hold."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import radio_fast
from radio_fast import CheckpointError, DownloadError
from tests.conftest import GOLDEN
from tests.hub import serving

ROOT = Path(__file__).resolve().parents[1]
FOLDER = GOLDEN / "hf_vit_h16_adaptors"
REPO = "nvidia/C-RADIOv2-H"


def shards(folder: Path, count: int = 3, suffix: str = "safetensors") -> Path:
    """Split the folder's weights into `count` files with an index, named as Transformers names them."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    save = save_file if suffix == "safetensors" else torch.save
    weight_map = {}
    for n in range(count):
        name = f"{stem}-{n + 1:05}-of-{count:05}.{suffix}"
        part = {key: tensors[key] for key in sorted(tensors)[n::count]}
        save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


def as_bin(folder: Path) -> Path:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


FORMS = {
    "one safetensors": lambda folder: folder,
    "sharded safetensors": shards,
    "one bin": as_bin,
    "sharded bin": lambda folder: shards(folder, 2, "bin"),
}


@pytest.fixture
def folder(tmp_path):
    """A remote-code folder with two adaptors in its config, and what else such repositories hold."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(FOLDER / name, folder)
    for name in ("modeling_radio.py", "README.md", "tokenizer.json", "onnx/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("raise SystemExit('this must never run')")
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serving() as server:
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)
        huggingface_hub.close_session()
        yield server


@pytest.fixture(scope="module")
def image():
    return torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def expected(image):
    return radio_fast.load(FOLDER)(image)


def assert_same(outputs, expected):
    assert outputs.keys() == expected.keys() == {"backbone", "clip", "sam"}
    for name, output in outputs.items():
        assert all(map(torch.equal, output, expected[name]))


@pytest.mark.parametrize("form", FORMS)
def test_repository(form, hub, folder, image, expected):
    """Every form of the weights, adaptors from the config; no code and no other format is downloaded."""
    weights = FORMS[form](folder)
    hub.put(REPO, weights)
    model, config = radio_fast.load(REPO, progress=False, return_checkpoint=True)
    assert_same(model(image), expected)
    assert config == json.loads((FOLDER / "config.json").read_text())
    wanted = {
        p.name for p in folder.iterdir() if p.name == "config.json" or re.search(r"^(pytorch_)?model[-.]", p.name)
    }
    assert set(hub.fetched()) == wanted and len(wanted) >= 2
    assert_same(radio_fast.load(weights)(image), expected)


def test_safetensors_are_preferred_to_bin(hub, folder, image, expected):
    (folder / "pytorch_model.bin").write_bytes(b"not needed")
    hub.put(REPO, folder)
    assert_same(radio_fast.load(REPO, progress=False)(image), expected)
    assert hub.fetched() == ["config.json", "model.safetensors"]
    assert_same(radio_fast.load(folder)(image), expected)


def test_adaptors_can_be_chosen(hub, folder, image):
    hub.put(REPO, folder)
    assert set(radio_fast.load(REPO, adaptor_names="sam", progress=False)(image)) == {"backbone", "sam"}
    assert isinstance(radio_fast.load(REPO, adaptor_names=[], progress=False)(image), radio_fast.RadioOutput)


def test_revisions(hub, folder, tmp_path):
    first = hub.put(REPO, folder)
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"max_resolution": 1024}))
    hub.put(REPO, other)
    hub.put(REPO, folder, branch="v1.0")
    hub.repos[REPO]["an-older-one"] = first

    def of(revision):
        return radio_fast.load(REPO, revision=revision, progress=False).max_resolution

    assert (of(None), of("main"), of("v1.0"), of(first)) == (1024, 1024, 2048, 2048)
    assert sum(path.endswith("model.safetensors") for method, path, *_ in hub.log if method == "GET") == 1


def test_offline_takes_the_cache(hub, folder, image, expected, monkeypatch):
    commit = hub.put(REPO, folder)
    radio_fast.load(REPO, progress=False)
    asked = len(hub.log)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for kwargs in ({}, {"revision": commit}, {"local_files_only": True}):
        assert_same(radio_fast.load(REPO, **kwargs)(image), expected)
    assert len(hub.log) == asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    radio_fast.load(REPO, local_files_only=True)
    assert len(hub.log) == asked


def test_a_local_folder_of_that_name_comes_first(hub, folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / REPO)
    monkeypatch.chdir(tmp_path)
    radio_fast.load(REPO)
    assert hub.log == []


def test_cache_dir(hub, folder, tmp_path):
    hub.put(REPO, folder)
    radio_fast.load(REPO, cache_dir=tmp_path / "mine", progress=False)
    assert list((tmp_path / "mine").glob("models--*/snapshots/*/model.safetensors"))
    assert not (tmp_path / "hub").exists()


def test_token(hub, folder, monkeypatch):
    hub.put(REPO, folder)
    hub.gated[REPO] = "hf_right"
    with pytest.raises(DownloadError, match=rf"{REPO} is gated: accept its terms at .*`hf auth login` or give token="):
        radio_fast.load(REPO, token="hf_wrong", progress=False)
    radio_fast.load(REPO, token="hf_right", progress=False)
    assert ("HEAD", "Bearer hf_right") in {(method, token) for method, _, token, _ in hub.log}
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    radio_fast.load(REPO, cache_dir=Path(constants.HF_HUB_CACHE).parent / "anew", progress=False)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


TROUBLE = {
    "no repository": ({}, "has no repository nvidia/absent that you may see: check the name"),
    "no revision": ({"revision": "v9"}, "has no revision 'v9': give a branch, a tag or a commit listed at http"),
    "no commit": ({"revision": "0" * 40}, "has no revision '0000.*': give a branch"),
    "no network": (
        {},
        r"not, or not wholly, in the cache .* can't be reached \(.*refused\): call again when it can be",
    ),
    "offline": ({}, "in the cache .*, and HF_HUB_OFFLINE is set: unset it; or give the path of a folder"),
    "cache alone": ({"local_files_only": True}, "in the cache .*, and local_files_only is set: leave it out"),
}


@pytest.mark.parametrize("name", TROUBLE)
def test_trouble_is_one_line_that_says_what_to_do(name, hub, folder, monkeypatch):
    kwargs, text = TROUBLE[name]
    hub.put(REPO, folder)
    if name == "no network":
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    if name == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match=text) as caught:
        radio_fast.load("nvidia/absent" if name == "no repository" else REPO, **kwargs, progress=False)
    assert "\n" not in str(caught.value)


def test_broken_connection_is_taken_up_where_it_broke(hub, folder, image, expected):
    hub.put(REPO, folder)
    hub.hiccup["model.safetensors"] = 1_000_000
    assert_same(radio_fast.load(REPO, progress=False)(image), expected)
    ranges = [asked for method, path, _, asked in hub.log if method == "GET" and path.endswith("model.safetensors")]
    assert len(ranges) == 2 and 900_000 < int(ranges[1].removeprefix("bytes=").rstrip("-")) <= 1_000_000


def test_next_call_fetches_what_is_missing(hub, folder, image, expected, monkeypatch):
    hub.put(REPO, shards(folder))
    hub.cut["model-00002-of-00003.safetensors"] = 100_000
    with pytest.raises(
        DownloadError,
        match=rf"download of {REPO} from .* failed .*; whole files are kept, call again .*or give the path",
    ):
        radio_fast.load(REPO, progress=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="not wholly, in the cache"):
        radio_fast.load(REPO, progress=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.cut.clear()
    hub.log.clear()
    assert_same(radio_fast.load(REPO, progress=False)(image), expected)
    assert hub.fetched() == ["model-00002-of-00003.safetensors"]


def test_changed_bytes_are_refused(hub, folder):
    """A file that is not what its name in the server's store says, as after an error in a proxy or on the way."""
    hub.put(REPO, folder)
    hub.etags["model.safetensors"] = "1" * 64
    with pytest.raises(
        DownloadError, match=rf"a file of {REPO} has sha256 \w{{64}}, expected 1{{64}}: deleted; call again"
    ):
        radio_fast.load(REPO, progress=False)
    hub.etags.clear()
    radio_fast.load(REPO, progress=False)


@pytest.mark.parametrize("progress", [True, False])
def test_progress(progress, hub, folder, capfd):
    hub.put(REPO, folder)
    radio_fast.load(REPO, progress=progress)
    assert ("Fetching" in capfd.readouterr().err) is progress


def test_environment(hub, folder, tmp_path):
    """HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE, which huggingface_hub reads when it is imported."""
    hub.put(REPO, folder)
    hub.gated[REPO] = "hf_env"
    code = f"import radio_fast; print(radio_fast.load({REPO!r}, progress=False).embed_dim)"
    env = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_env",
                        "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}  # fmt: skip
    env.pop("HF_HUB_CACHE", None)
    for offline in ("0", "1"):
        asked = len(hub.log)
        done = subprocess.run(
            [sys.executable, "-c", code], env=env | {"HF_HUB_OFFLINE": offline}, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (0, "160\n"), done.stderr
    assert len(hub.log) == asked > 0
    assert list((tmp_path / "home" / "hub").glob("models--*/snapshots/*/config.json"))


# -- hostile folders ---------------------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def bin_of(content):
    return lambda folder: torch.save(content, folder / "pytorch_model.bin")


def bin_index(name):
    def change(folder):
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"x": name}}))

    return change


HOSTILE = {
    "code in a bin": (bin_of({"x": Bomb()}), r"can't be read as a torch checkpoint: .*system"),
    "bin of a model": (bin_of(torch.nn.Linear(2, 2)), "holds a Linear, not the dict"),
    "bin of numbers": (bin_of({"x": 5}), "the checkpoint's x must be a tensor, got int"),
    "sparse bin": (bin_of({"x": torch.eye(3).to_sparse()}), "the checkpoint's x must be a plain dense tensor"),
    "old pickle": (
        lambda f: (f / "pytorch_model.bin").write_bytes(pickle.dumps({}, 2)),
        "pickle from before torch 1.6",
    ),
    "shard above": (bin_index("../pytorch_model.bin"), r"names a shard outside its folder: '\.\./pytorch_model.bin'"),
    "shard elsewhere": (bin_index("/etc/passwd.bin"), "names a shard outside its folder: '/etc/passwd.bin'"),
    "shard missing": (bin_index("pytorch_model-2.bin"), r"has no pytorch_model-2\.bin: copy the whole folder"),
    "shard is a script": (bin_index("modeling_radio.py"), r"names a shard that is no \.bin file: 'modeling_radio\.py'"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bin(name, folder, tmp_path, monkeypatch):
    change, text = HOSTILE[name]
    (folder / "model.safetensors").unlink()
    change(folder)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=text):
        radio_fast.load(folder)
    assert not (tmp_path / "exploded").exists()


def test_hostile_repository_stays_in_the_cache(hub, folder, tmp_path):
    """File names that lead out of the cache are not followed, an index that does is refused."""
    files = {
        "config.json": (folder / "config.json").read_bytes(),
        "../../outside.safetensors": b"x",
        "/etc/x.bin": b"x",
    }
    files["model.safetensors.index.json"] = json.dumps({"weight_map": {"x": "../../../secret.safetensors"}}).encode()
    hub.put(REPO, files)
    with pytest.raises(CheckpointError, match=r"names a shard outside its folder: '\.\./\.\./\.\./secret"):
        radio_fast.load(REPO, progress=False)
    assert not list(tmp_path.rglob("outside.safetensors"))
    assert hub.fetched() == ["config.json", "model.safetensors.index.json"]
