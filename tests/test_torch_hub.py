"""torch.hub's way in, as a user has it: another working directory, and radio_fast not installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import radio_fast
from tests.conftest import golden_source

ROOT = Path(__file__).resolve().parents[1]
H16 = golden_source("vit_h16")


def run(tmp_path: Path, code: str, root: Path = ROOT) -> subprocess.CompletedProcess:
    """`code` in a new interpreter that knows of radio_fast only what torch.hub tells it; `hub(**kwargs)` loads."""
    (tmp_path / "script.py").write_text(
        f"""
import importlib.util, json, sys, torch
sys.path[:] = [p for p in sys.path if p != {str(ROOT)!r}]
assert importlib.util.find_spec("radio_fast") is None, "installed: this would test nothing"
def hub(**kwargs):
    return torch.hub.load({str(root)!r}, "radio_model", source="local", skip_validation=True, **kwargs)
{code}
for kernels in (importlib.util.find_spec("kernels"), getattr(sys.modules.get("kernels"), "__spec__", None)):
    assert kernels is None or {str(root)!r} not in str(kernels), "Transformers would take ours for another's"
"""
    )
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TRITON_INTERPRET")}
    # An editable install would be found through its .pth file, which -S leaves out; what is needed is named instead.
    packages = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    command = [sys.executable, "-S", "-c", f"import sys; sys.path += {packages}; exec(open('script.py').read())"]
    return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)


def test_every_official_argument(tmp_path):
    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    torch.save(image, tmp_path / "image.pt")
    done = run(
        tmp_path,
        f"""
version = {str(H16)!r}
model, checkpoint = hub(version=version, adaptor_names=["clip", "sam"], return_checkpoint=True, progress=False)
out = model(torch.load("image.pt"))
torch.save({{k: tuple(v) for k, v in out.items()}}, "out.pt")
windowed = hub(version={str(golden_source("vit_b16_vitdet"))!r}, vitdet_window_size=2, neck_name=None, num_tokens=None)
half = hub(version=version, dtype="bfloat16", backend="reference")
weight = half.model.blocks[0].mlp.fc1.weight
print(json.dumps([sorted(out), sorted(checkpoint), windowed.window_size, str(weight.dtype)]))
""",
    )
    assert done.returncode == 0, done.stderr
    names, entries, window, dtype = json.loads(done.stdout)
    assert names == ["backbone", "clip", "sam"] and window == 2 and dtype == "torch.bfloat16"
    assert {"args", "state_dict"} <= set(entries)
    ours = radio_fast.load(H16, adaptor_names=["clip", "sam"])(image)
    theirs = torch.load(tmp_path / "out.pt")
    for name, (summary, features) in ours.items():
        assert torch.equal(summary, theirs[name][0]) and torch.equal(features, theirs[name][1])


REFUSED = {
    "neck_name": ({"neck_name": "pixel"}, "neck_name='pixel' is not supported (RADIO1D has no released weights)"),
    "num_tokens": ({"num_tokens": 64}, "num_tokens=64 is not supported (RADIO1D has no released weights)"),
    "unknown": ({"attention": "fast"}, "radio_model has no argument attention; it takes version, checkpoint, device,"),
    "version": ({"version": "radio_v9"}, "unknown version 'radio_v9': did you mean"),
    "adaptor": ({"version": str(H16), "adaptor_names": "dino_v3"}, "this checkpoint has 'clip', 'siglip'"),
}


def test_what_it_refuses(tmp_path):
    done = run(
        tmp_path,
        f"""
said = {{}}
for name, (kwargs, _) in {REFUSED!r}.items():
    try:
        hub(**kwargs)
    except ValueError as error:
        said[name] = str(error)
print(json.dumps(said))
""",
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said.keys() == REFUSED.keys()
    for name, (_, text) in REFUSED.items():
        assert text in said[name]


@pytest.fixture
def unpacked(tmp_path):
    """The repository as torch.hub unpacks GitHub's archive of it: symbolic links are text files."""
    folder = tmp_path / "NVlabs_RADIO_main"
    shutil.copytree(ROOT / "radio_fast", folder / "radio_fast", symlinks=True, ignore=shutil.ignore_patterns("*.so"))
    shutil.copytree(ROOT / "kernels", folder / "kernels")
    shutil.copy(ROOT / "hubconf.py", folder)
    link = folder / "radio_fast" / "kernels"
    target = os.readlink(link)
    link.unlink()
    link.write_text(target)
    return folder


def test_kernels_are_found_in_an_archive(unpacked, tmp_path):
    pytest.importorskip("triton")
    done = run(
        tmp_path,
        f"""
model = hub(version={str(H16)!r})
from radio_fast.kernels import configs
print(configs.__name__, configs.__file__)
""",
        root=unpacked,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["radio_fast.kernels.configs", str(unpacked / "kernels" / "configs.py")]
