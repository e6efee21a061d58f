"""The snippets of docs/ run as they stand: names that they load are tiny ones here."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import GOLDEN
from tests.hub import serving

ROOT = Path(__file__).resolve().parents[1]
SNIPPET = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CHECKPOINT = GOLDEN / "vit_b16_vitdet" / "checkpoint.pth.tar"


def test_every_snippet_of_loading(tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.17", reason="pip install radio_fast[hf]")
    text = (ROOT / "docs" / "loading.md").read_text(encoding="utf-8")
    snippets = SNIPPET.findall(text)
    assert len(snippets) == text.count("```python") == 7
    # What the snippets name, in their working directory.
    there = tmp_path / "path" / "to"
    there.mkdir(parents=True)
    (there / "radio_fast").symlink_to(ROOT)
    shutil.copy(CHECKPOINT, there / "checkpoint.pth.tar")
    shutil.copytree(GOLDEN / "hf_vit_h16_adaptors", there / "folder")
    config = transformers.RadioConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, max_img_size=64)
    transformers.RadioModel(config).save_pretrained(there / "transformers-folder")
    shutil.copy(ROOT / "examples" / "images" / "coffee.jpg", tmp_path / "photo.jpg")
    # Each has its own names; one process, as importing takes longer than running.
    code = ["import torch", "torch.set_num_threads(1)"]
    for number, snippet in enumerate(snippets):
        code.append(f"exec(compile({snippet!r}, 'snippet {number}', 'exec'), {{}})\nprint('done', {number})")
    (tmp_path / "run.py").write_text("\n".join(code))
    with serving() as hub:
        files = {name: (GOLDEN / "hf_vit_l16" / name).read_bytes() for name in ("config.json", "model.safetensors")}
        config = json.loads(files["config.json"]) | {"preferred_resolution": [96, 96]}  # 768 takes its time
        hub.put("nvidia/C-RADIOv2-L", files | {"config.json": json.dumps(config).encode()})
        hub.put("nvidia/RADIO", {"radio-v2.5-b_half.pth.tar": CHECKPOINT.read_bytes()})
        env = os.environ | {
            "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1", "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1",
            "RADIO_FAST_CACHE": str(tmp_path / "cache"),
        }  # fmt: skip
        env.pop("HF_HUB_CACHE", None)
        done = subprocess.run(
            [sys.executable, "run.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
        )
    assert done.returncode == 0, done.stderr
    assert re.findall(r"done (\d)", done.stdout) == [str(n) for n in range(7)]
